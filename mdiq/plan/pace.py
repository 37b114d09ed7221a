"""Compute the Ring's pace (caps and chunks) from the Nodes' measured costs and the delay of the Hops.

Of prompts, a decode Segment waits at a Stage only for the Batch that runs there (see core/stage.py), so on a Lap it
waits for one chunk at every Stage. With S live Sequences, chunks of n tokens that take p_i(n) seconds, and t_i(b)
seconds for b decode Segments,

    longest wait(n) = sum_i p_i(n) + sum_i (t_i(S) + t_i(1)) + h

(its own Batch may hold all S, and another may run before the chunk). The chunk that others may meet is the longest one
that keeps this under the setting, but not much longer than is efficient: longer Batches keep the next Stages idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mdiq.core.types import CHUNK_STEP, RingSpec
from mdiq.plan.micro_batches import Curve, MicroBatches, Points, plan_micro_batches

_SURE = 0.75  # of the setting: contexts grow, and times vary
_USUAL_CHUNK = 64
_EFFICIENT_PASSES = 8  # a prompt Batch that costs as much as this many forwards wastes at most an eighth


@dataclass(frozen=True, slots=True)
class StageCost:
    """The time of a Stage's forward.

    decode: seconds by Segments of one token; on the Starter with the head. prompt: seconds by tokens of a prompt.
    """

    decode: Curve
    prompt: Curve

    @classmethod
    def of(cls, decode_s: Points, prompt_s: Points) -> "StageCost":
        """Return the cost that measured points (size, seconds) give."""
        return cls(Curve(decode_s), Curve(prompt_s))

    def with_handling(self, handling_s: float) -> "StageCost":
        """Return the cost with so many seconds more for each forward; see handling.py."""
        return StageCost(self.decode.plus(handling_s), self.prompt.plus(handling_s))


@dataclass(frozen=True, slots=True)
class PaceSettings:
    """The operator's settings.

    decode_wait_s: maximum wait of a decoding user's token while others' prompts are in the Ring.
    max_live: Sequences in the Ring at once; None lets the Plan choose.
    chunk_tokens: maximum tokens of a chunk.
    """

    decode_wait_s: float = 0.2
    max_live: int | None = None
    chunk_tokens: int = 256


def paced(
    spec: RingSpec, costs: Sequence[StageCost], hops_s: float, settings: PaceSettings, sends: Sequence[Curve] = ()
) -> tuple[RingSpec, MicroBatches]:
    """Return the RingSpec with the pace that follows from costs and hops (their sum), and the prediction for it.

    sends: how long a Frame keeps a Hop's line busy, by rows, where that is known.
    """
    micro_batches = plan_micro_batches([*(cost.decode for cost in costs), *sends], hops_s, settings.max_live)
    return (
        replace(
            spec,
            caps=micro_batches.caps[: micro_batches.max_live],
            max_live=micro_batches.max_live,
            pass_tokens=_pass_tokens(costs),
            shared_chunks=tuple(
                _shared_chunk(costs, hops_s, num_live, settings) for num_live in range(1, micro_batches.max_live + 1)
            ),
            num_chunks=_num_chunks(costs, hops_s),
        ),
        micro_batches,
    )


def _shared_chunk(costs: Sequence[StageCost], hops_s: float, num_live: int, settings: PaceSettings) -> int:
    own_s = sum(cost.decode.seconds(num_live) + cost.decode.seconds(1) for cost in costs) + hops_s
    efficient = max(int(_EFFICIENT_PASSES * _pass_tokens(costs)), _USUAL_CHUNK)
    sizes = range(CHUNK_STEP, max(min(settings.chunk_tokens, efficient), CHUNK_STEP) + 1, CHUNK_STEP)
    left_s = _SURE * settings.decode_wait_s - own_s
    fitting = [size for size in sizes if sum(cost.prompt.seconds(size) for cost in costs) <= left_s]
    return fitting[-1] if fitting else CHUNK_STEP


def _pass_tokens(costs: Sequence[StageCost]) -> float:
    """Return a forward's fixed cost in tokens, at the slowest Stage."""
    slowest = max((cost.prompt for cost in costs), key=lambda curve: curve.seconds(_USUAL_CHUNK))
    slope_s = (slowest.seconds(4 * _USUAL_CHUNK) - slowest.seconds(_USUAL_CHUNK)) / (3 * _USUAL_CHUNK)
    fixed_s = max(slowest.seconds(_USUAL_CHUNK) - slope_s * _USUAL_CHUNK, 0.0)
    return fixed_s / slope_s if slope_s > 0 else 4.0 * _USUAL_CHUNK


def _num_chunks(costs: Sequence[StageCost], hops_s: float) -> int:
    """Return how many chunks keep every Stage busy: one each, one that waits, and those on the Hops."""
    slowest_s = max(cost.prompt.seconds(_USUAL_CHUNK) for cost in costs)
    return len(costs) + 1 + round(min(hops_s / slowest_s if slowest_s > 0 else 0.0, 64))
