"""How many Segments a Batch may take, so that the live Sequences spread over the Stages. The choice is coalesce.py's.

If every Stage takes all that waits, the live Sequences clump into one Batch: one Stage works and the others idle, and
the clump never breaks. With S Sequences in G micro-batches of sizes b (some S // G, the others one more), a Stage that
needs t_i(b) seconds for b Sequences, and hops of h seconds in all,

    rate(G) = S / |sum_b max_i t_i(b), sum_i t_i(max b) + h|

since the slowest Stage serves every micro-batch once a Lap, and a Lap cannot be shorter than its parts. |x, y| is a
maximum with a rounded corner: times vary, and where both parts are equally long each waits for the other. G is the
number in flight: with equal Stages and a long way it comes to N (1 + delay / stage time), so delay costs latency and
not throughput, as long as there are Sequences enough. tests/core/test_convoy.py compares the cap that follows with
taking one and taking all in a simulated Ring.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_LEAST_S = 1e-12  # keeps the rate finite when all costs were measured as 0
MOST_LIVE = 256
"""Sequences in the Ring that no Plan exceeds."""
LEAST_LIVE = 64
"""Sequences that every Plan lets in: below that, waiting for a place would cost users more than a fuller Ring does."""
_CORNER = 8  # fitted to simulated Rings whose times vary by 20 %: the mean error of the rate is 1 to 2 %
_GAIN = 1.05  # less than that is not worth more Sequences in the Ring


Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by size, as measured: lines between the points, and the last line goes on behind them.

    Times of larger sizes are taken to be no shorter: what a noisy measurement says otherwise is smoothed away.
    """

    points: Points

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"Curve{self.points}: it needs sizes that grow from at least 1")
        most_s, rising = 0.0, []
        for size, time_s in self.points:
            most_s = max(most_s, time_s)
            rising.append((size, most_s))
        object.__setattr__(self, "points", tuple(rising))

    def seconds(self, size: float) -> float:
        """Return the seconds that ``size`` takes."""
        if size <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        line = next((line for line in pairwise(self.points) if size <= line[1][0]), self.points[-2:])
        (low, low_s), (high, high_s) = line
        return low_s + (high_s - low_s) * (size - low) / (high - low)


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """What the Plan makes of its measurements, for 1 to n live Sequences.

    caps: entry i is the MicroBatch cap while i + 1 Sequences are live.
    in_flight: entry i is G, the micro-batches that circulate then.
    rates: entry i is the rate in tokens per second that is predicted then.
    max_live: Sequences that are let in: as many as the Ring needs to be full, and never fewer than LEAST_LIVE.
    """

    caps: tuple[int, ...]
    in_flight: tuple[int, ...]
    rates: tuple[float, ...]
    max_live: int


def plan_micro_batches(costs: Sequence[Curve], hops_s: float, max_live: int | None = None) -> MicroBatches:
    """Return the caps for Stages with these costs of a decode Batch; ``hops_s`` is the sum over the Ring.

    max_live: lets so many Sequences in, whatever the Ring needs.
    """
    most = max_live or MOST_LIVE
    if len(costs) == 1:  # nobody waits for anybody
        rates = [live / max(costs[0].seconds(live), _LEAST_S) for live in range(1, most + 1)]
        return MicroBatches(tuple(range(1, most + 1)), (1,) * most, tuple(rates), max_live or _full(rates))
    times_s = [[curve.seconds(size) for curve in costs] for size in range(1, most + 1)]
    slowest_s = [max(row) for row in times_s]
    sums_s = [sum(row) for row in times_s]

    def rate(num_live: int, num_batches: int) -> float:
        size, num_larger = divmod(num_live, num_batches)
        busy_s = (num_batches - num_larger) * slowest_s[size - 1] + (num_larger and num_larger * slowest_s[size])
        lap_s = sums_s[size - (not num_larger)] + hops_s
        return num_live / max(float((busy_s**_CORNER + lap_s**_CORNER) ** (1 / _CORNER)), _LEAST_S)

    caps: list[int] = []
    in_flight: list[int] = []
    best_rates: list[float] = []
    for num_live in range(1, most + 1):
        # Every cap once; of equal rates the largest one: fewer and larger Frames.
        candidates = sorted({-(-num_live // g) for g in range(1, num_live + 1)}, reverse=True)
        batches = [-(-num_live // cap) for cap in candidates]
        best = max(batches, key=lambda g: rate(num_live, g))
        caps.append(-(-num_live // best))
        in_flight.append(best)
        best_rates.append(rate(num_live, best))
    return MicroBatches(tuple(caps), tuple(in_flight), tuple(best_rates), max_live or _full(best_rates))


def _full(rates: Sequence[float]) -> int:
    """Return the least number of Sequences beyond which the Ring gains nothing that is worth it."""
    best = max(rates)
    return max(next(i for i, rate in enumerate(rates, 1) if rate * _GAIN >= best), min(LEAST_LIVE, len(rates)))
