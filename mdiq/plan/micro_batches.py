"""How many Segments a Batch may take, so that the live Sequences spread over the Stages. The choice is coalesce.py's.

If every Stage takes all that waits, the live Sequences clump into one Batch: one Stage works and the others idle, and
the clump never breaks. With S Sequences in G micro-batches, a Stage that needs t_i(b) = a_i + c_i * b seconds for b
Sequences, and hops of h_i seconds,

    rate(G) = S / max(G * max_i t_i(S / G), sum_i t_i(S / G) + sum_i h_i)

since the slowest Stage serves G micro-batches a Lap, and a Lap cannot be shorter than its parts.
tests/core/test_convoy.py compares the cap that follows with the best fixed one in a simulated Ring.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_LEAST_S = 1e-12  # keeps the rate finite when all costs were measured as 0


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a forward of a Stage takes: ``a_s`` seconds, and ``c_s`` more for every Sequence of the Batch."""

    a_s: float
    c_s: float


def caps(max_live: int, costs: Sequence[StageCost], hops_s: Sequence[float]) -> tuple[int, ...]:
    """Return the MicroBatch cap for 1 to ``max_live`` live Sequences: entry i is for i + 1.

    A negative cost, which a fit to noisy times can give, counts as 0.
    """
    if len(costs) == 1:
        return tuple(range(1, max_live + 1))
    costs = [StageCost(max(cost.a_s, 0.0), max(cost.c_s, 0.0)) for cost in costs]
    return tuple(1 if live <= len(costs) else _cap(live, costs, sum(hops_s)) for live in range(1, max_live + 1))


def rate_tokens_per_s(num_live: int, num_batches: int, costs: Sequence[StageCost], hops_s: float) -> float:
    """Return the tokens per second of ``num_live`` Sequences in ``num_batches`` micro-batches; see the module."""
    size = num_live / num_batches
    times_s = [cost.a_s + cost.c_s * size for cost in costs]
    return num_live / max(num_batches * max(times_s), sum(times_s) + hops_s, _LEAST_S)


def _cap(num_live: int, costs: Sequence[StageCost], hops_s: float) -> int:
    # Of equal rates the smallest G: fewer and larger Frames.
    best = max(range(1, num_live + 1), key=lambda g: rate_tokens_per_s(num_live, g, costs, hops_s))
    return -(-num_live // best)
