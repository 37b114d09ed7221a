"""Choose the activation dtype of each Hop (its wire) where the operator leaves it open ("auto").

bf16, unless the measured link makes i8 worth its cost: a little compute at both ends, and some quality, which a check
at start-up bounds (runtime/rehearsal.py). A row of d elements takes 2 d bytes in bf16 and d + 4 in i8. i8 is worth it
on a Hop where one of these holds:

    latency      for one Sequence alone it saves WORTH of the Lap, sum_i t_i(1) + sum_h (delay_h + bytes / rate_h)
    throughput   the Hop carries a full MicroBatch, or a chunk of a prompt, in bf16 more slowly than the slowest Stage
                 computes it: the link holds up the Ring

and it saves more time on the wire than packing takes. f32 is never chosen: on a link so fast that its bytes cost
nothing, bf16's cost nothing either, and the rounding of bf16 makes no visible difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mdiq.core.hop_survey import HopLink
from mdiq.core.wire import frame_bytes
from mdiq.core.wire_formats import AUTO, SMALL, USUAL, row_bytes
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost

WORTH = 0.03  # of the Lap: less than that nobody would notice, and quality is not given away for it
_CHUNK = 64
MAX_DIVERGENCE_NATS = 0.1
"""Maximum cost of i8 where it was chosen: mean Kullback-Leibler divergence per token, in nats, of the logits with i8
from those with bf16, over the text of a rehearsal. It is the increase of the log loss on text that the model itself
would write, so 0.1 is at most a tenth of perplexity. SmolLM2-135M has 0.03 to 0.08 with i8 on all Hops of 2 to 4
Nodes, and on 3,072 tokens of a real text its perplexity grew by 0.3 %; int8 weights cost it 0.4 % there.
"""


@dataclass(frozen=True, slots=True)
class WireCosts:
    """The costs on which the choice depends.

    width: elements of a row. stages: cost of each Stage's forward. cap: Segments of a full MicroBatch.
    packing: additional seconds of i8 over bf16 at both ends together, by rows.
    """

    width: int
    stages: Sequence[StageCost]
    cap: int
    packing: Curve

    def seconds(self, link: HopLink, wire: str, num_segments: int, num_rows: int) -> float:
        """Return the seconds in which a Frame is on a link, its delay not included."""
        return frame_bytes(num_segments, num_rows * row_bytes(wire, self.width)) / link.bytes_per_s


def choose_wires(
    wanted: Sequence[str], links: Sequence[HopLink | None], costs: WireCosts, *, avoid_small: bool = False
) -> tuple[str, ...]:
    """Return the format of each Hop: the wanted one, and where that is "auto", the one that suits its link.

    links: the measured links; a Hop without one gets bf16. avoid_small: i8 failed its check.
    """
    known = [link for link in links if link is not None]
    lap_s = sum(cost.decode.seconds(1) for cost in costs.stages)
    lap_s += sum(link.delay_s + costs.seconds(link, USUAL, 1, 1) for link in known)
    chosen: list[str] = []
    for hop, (wire, link) in enumerate(zip(wanted, links, strict=True)):
        if wire != AUTO:
            chosen.append(wire)
        elif link is None or avoid_small or not _is_worth_it(link, costs, lap_s, is_last=hop == len(links) - 1):
            chosen.append(USUAL)
        else:
            chosen.append(SMALL)
    return tuple(chosen)


def _is_worth_it(link: HopLink, costs: WireCosts, lap_s: float, *, is_last: bool) -> bool:
    if _saved_s(link, costs, 1, 1) >= WORTH * lap_s:
        return True
    loads = [(costs.cap, costs.cap, max(cost.decode.seconds(costs.cap) for cost in costs.stages))]
    if not is_last:  # which carries no rows of a prompt but its last one
        loads.append((1, _CHUNK, max(cost.prompt.seconds(_CHUNK) for cost in costs.stages)))
    return any(
        costs.seconds(link, USUAL, segments, rows) > stage_s and _saved_s(link, costs, segments, rows) > 0
        for segments, rows, stage_s in loads
    )


def _saved_s(link: HopLink, costs: WireCosts, num_segments: int, num_rows: int) -> float:
    usual_s = costs.seconds(link, USUAL, num_segments, num_rows)
    return usual_s - costs.seconds(link, SMALL, num_segments, num_rows) - costs.packing.seconds(num_rows)
