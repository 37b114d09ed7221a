"""From the times of tokens to figures: rates, times to first token, latencies; their medians and ratios. Pure maths."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from mdiq.bench.workload import ApartCell, Cell


@dataclass(frozen=True, slots=True)
class UserTimes:
    """When one user asked, and when each token came: seconds on one clock. answer: the tokens, where they are kept."""

    submitted_s: float
    tokens_s: tuple[float, ...]
    answer: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What a Load took.

    total_tokens_per_s: tokens of all answers over the time from the first question to the last token.
    decode_tokens_per_s: the same from the moment on at which every user has a first token, so without prompts;
        0 where answers have one token.
    ttft: time to first token; itl: inter-token latency, from a token of a user to that user's next.
    """

    total_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_median_s: float
    ttft_p95_s: float
    itl_median_s: float
    itl_p95_s: float


def load_figures(users: Sequence[UserTimes]) -> LoadFigures:
    """Return the figures of one run of a Load; every user has at least one token."""
    start_s = min(user.submitted_s for user in users)
    end_s = max(user.tokens_s[-1] for user in users)
    all_answer_s = max(user.tokens_s[0] for user in users)
    num_tokens = sum(len(user.tokens_s) for user in users)
    num_decoded = sum(at_s > all_answer_s for user in users for at_s in user.tokens_s)
    first = [user.tokens_s[0] - user.submitted_s for user in users]
    gaps = [later - earlier for user in users for earlier, later in zip(user.tokens_s, user.tokens_s[1:], strict=False)]
    return LoadFigures(
        total_tokens_per_s=_rate(num_tokens, end_s - start_s),
        decode_tokens_per_s=_rate(num_decoded, end_s - all_answer_s),
        ttft_median_s=statistics.median(first),
        ttft_p95_s=percentile(first, 95),
        itl_median_s=statistics.median(gaps) if gaps else 0.0,
        itl_p95_s=percentile(gaps, 95) if gaps else 0.0,
    )


def num_ended_early(users: Sequence[UserTimes]) -> int:
    """Return how many users had their whole answer before every user had a first token.

    They are not in the rate of decoding, which is then one of fewer users than asked.
    """
    all_answer_s = max(user.tokens_s[0] for user in users)
    return sum(user.tokens_s[-1] < all_answer_s for user in users)


def median_figures(runs: Sequence[LoadFigures]) -> LoadFigures:
    """Return the median of each figure over the repeats."""
    return LoadFigures(*(statistics.median(getattr(run, f.name) for run in runs) for f in fields(LoadFigures)))


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that at least ``percent`` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def median_ratio(
    runs: Sequence[LoadFigures], base: Sequence[LoadFigures], figure: str = "decode_tokens_per_s"
) -> float | None:
    """Return the median over the rounds of a figure against the base's in the same round.

    Both stand in the order of the rounds. Ratios are taken within a round, since what slows the machine for a while
    slows both. None where the base has nothing in a round.
    """
    pairs = [(getattr(run, figure), getattr(other, figure)) for run, other in zip(runs, base, strict=True)]
    return statistics.median(mine / other for mine, other in pairs) if all(other for _, other in pairs) else None


@dataclass(frozen=True, slots=True)
class Scaling:
    """Decode tokens/s of a cell against those of the ring with the fewest Nodes.

    same_per_node: against as many users per Node there; fixed_total: against as many users in all.
    apart: what as many rings of one Node reach together against one of them alone: see apart.py; None if not measured.
    """

    cell: Cell
    same_per_node: float | None
    fixed_total: float | None
    apart: float | None = None


def scalings(
    runs: Mapping[Cell, Sequence[LoadFigures]], apart_runs: Mapping[ApartCell, Sequence[LoadFigures]]
) -> list[Scaling]:
    """Return how the rate grows with the Nodes, for every cell that something can be compared with."""
    least = min(cell.nodes for cell in runs)
    result = []
    for cell in runs:
        if cell.nodes == least:
            continue
        link = cell.link if least > 1 else None
        per_node = replace(cell, nodes=least, users=cell.users * least // cell.nodes, link=link)
        is_whole = cell.users * least % cell.nodes == 0
        total = replace(cell, nodes=least, link=link)
        apart = ApartCell.beside(cell) if least == 1 else None
        scaling = Scaling(
            cell,
            median_ratio(runs[cell], runs[per_node]) if is_whole and per_node in runs else None,
            median_ratio(runs[cell], runs[total]) if total in runs else None,
            median_ratio(apart_runs[apart], runs[per_node])
            if apart and apart in apart_runs and per_node in runs
            else None,
        )
        if scaling.same_per_node is not None or scaling.fixed_total is not None:
            result.append(scaling)
    return result


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
