"""How many Segments a Batch may take, so that the live Sequences spread over the Stages. coalesce.py chooses them.

If every Stage takes all that waits, the live Sequences clump into one Batch: one Stage works and the others idle, and
the clump never breaks up. With S Sequences in G micro-batches of sizes b (some S // G, the others one more), Stages
that need t_i(b) seconds for b Sequences, and hops of h seconds in all,

    rate(G) = S / |max_i sum_b t_i(b), sum_i t_i(max b) + h|

since every Stage serves every micro-batch once a Lap, and a Lap cannot be shorter than its parts. A Hop whose bytes
take time counts as one more Stage, with the seconds that its line is busy; its delay is part of h. |x, y| is a
smooth maximum: times vary, and where both parts are equally long each waits for the other. A single micro-batch never
waits: its rate is S / Lap. G is the number in flight: with equal Stages and a long delay it is about
N (1 + delay / stage time), so delay costs latency and not throughput, as long as there are enough Sequences.
tests/simulation/test_convoy.py compares the resulting cap with taking one and taking all in a simulated Ring.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_MIN_S = 1e-12  # keeps the rate finite when all costs were measured as 0
MAX_LIVE = 256
"""Maximum Sequences in the Ring under any Plan."""
MIN_LIVE = 64
"""Sequences that every Plan admits: below that, waiting for a place would cost users more than a fuller Ring does."""
_CORNER = 8  # fitted to simulated Rings whose times vary by 20 %: the mean error of the rate is 1 to 2 %
_GAIN = 1.05  # less than that is not worth more Sequences in the Ring


Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by size, as measured: linear between the points, and extrapolated from the last line.

    Times must not fall with the size. Where a noisy measurement does, both points get their mean (isotonic regression
    by pooling adjacent violators).
    """

    points: Points

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"Curve{self.points}: it needs sizes that grow from at least 1")
        pools: list[tuple[float, int]] = []  # mean, and of how many
        for _, time_s in self.points:
            mean_s, count = max(time_s, 0.0), 1
            while pools and pools[-1][0] > mean_s:
                other_s, others = pools.pop()
                mean_s = (mean_s * count + other_s * others) / (count + others)
                count += others
            pools.append((mean_s, count))
        times = [mean_s for mean_s, count in pools for _ in range(count)]
        object.__setattr__(self, "points", tuple(zip(sizes, times, strict=True)))

    def scaled(self, factor: float) -> "Curve":
        """Return the same sizes with so many times the seconds."""
        return Curve(tuple((size, factor * time_s) for size, time_s in self.points))

    def plus(self, time_s: float) -> "Curve":
        """Return the same sizes with so many seconds more for each."""
        return Curve(tuple((size, known_s + time_s) for size, known_s in self.points))

    def seconds(self, size: float) -> float:
        """Return the seconds that ``size`` takes."""
        if size <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        line = next((line for line in pairwise(self.points) if size <= line[1][0]), self.points[-2:])
        (low, low_s), (high, high_s) = line
        return low_s + (high_s - low_s) * (size - low) / (high - low)


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """The micro-batches that follow from the measurements, for 1 to n live Sequences.

    caps: entry i is the MicroBatch cap while i + 1 Sequences are live.
    in_flight: entry i is G, the number of micro-batches in flight then.
    rates: entry i is the rate predicted then, in tokens per second.
    max_live: Sequences that are admitted: as many as fill the Ring, and at least MIN_LIVE.
    """

    caps: tuple[int, ...]
    in_flight: tuple[int, ...]
    rates: tuple[float, ...]
    max_live: int


@dataclass(frozen=True, slots=True)
class Grouping:
    """Sequences in ``num_batches`` micro-batches: ``num_larger`` of them hold one more than ``size``."""

    num_batches: int
    size: int
    num_larger: int

    @property
    def num_live(self) -> int:
        """All Sequences."""
        return self.num_batches * self.size + self.num_larger

    @property
    def largest(self) -> int:
        """Sequences of the largest micro-batch: the cap."""
        return self.size + (self.num_larger > 0)

    def busy_s(self, size_s: float, largest_s: float) -> float:
        """Return the seconds of all micro-batches together, from those of one of ``size`` and one of ``largest``."""
        return (self.num_batches - self.num_larger) * size_s + self.num_larger * largest_s

    def rate(self, busy_s: float, lap_s: float) -> float:
        """Return the tokens per second of a Ring whose slowest Stage is busy for ``busy_s`` a Lap of ``lap_s``."""
        if self.num_batches == 1:  # it never waits
            return self.num_live / max(lap_s, _MIN_S)
        return self.num_live / max(float((busy_s**_CORNER + lap_s**_CORNER) ** (1 / _CORNER)), _MIN_S)


def groupings(num_live: int) -> list[Grouping]:
    """Return the ways to group so many Sequences: every cap once, the largest first."""
    caps = sorted({-(-num_live // g) for g in range(1, num_live + 1)}, reverse=True)
    batches = [-(-num_live // cap) for cap in caps]
    return [Grouping(num, *divmod(num_live, num)) for num in batches]


def best_grouping(costs: Sequence[Curve], hops_s: float, num_live: int) -> tuple[Grouping, float]:
    """Return the best grouping of Sequences in a Ring with these costs, and the rate; see plan_micro_batches."""
    return _Times(costs, hops_s, num_live).best(num_live)


def plan_micro_batches(costs: Sequence[Curve], hops_s: float, max_live: int | None = None) -> MicroBatches:
    """Return the caps for Stages with these costs of a decode Batch; ``hops_s`` is the sum over the Ring.

    max_live: admits so many Sequences, however many fill the Ring.
    """
    most = max_live or MAX_LIVE
    times = _Times(costs, hops_s, most)
    best = [times.best(num_live) for num_live in range(1, most + 1)]
    rates = [rate for _, rate in best]
    return MicroBatches(
        tuple(grouping.largest for grouping, _ in best),
        tuple(grouping.num_batches for grouping, _ in best),
        tuple(rates),
        max_live or _full(rates),
    )


class _Times:
    """The Stages' seconds, by size - 1: of all Stages together, and of each Stage that is the slowest at some size."""

    def __init__(self, costs: Sequence[Curve], hops_s: float, most: int) -> None:
        rows = [tuple(curve.seconds(size) for size in range(1, most + 1)) for curve in costs]
        self._is_alone = len(costs) == 1
        self._laps_s = [sum(column) + hops_s for column in zip(*rows, strict=True)]
        different = set(rows)
        self._slowest = [
            row
            for row in different
            if not any(all(a >= b for a, b in zip(other, row, strict=True)) for other in different if other is not row)
        ]

    def best(self, num_live: int) -> tuple[Grouping, float]:
        """Return the Grouping with the highest rate; of equal ones that with the largest cap: fewer, larger Frames."""
        if self._is_alone:  # a Ring of one Stage
            alone = Grouping(1, num_live, 0)
            return alone, alone.rate(0.0, self._laps_s[num_live - 1])

        def rate(grouping: Grouping) -> float:
            busy_s = max(grouping.busy_s(row[grouping.size - 1], row[grouping.largest - 1]) for row in self._slowest)
            return grouping.rate(busy_s, self._laps_s[grouping.largest - 1])

        best = max(groupings(num_live), key=rate)
        return best, rate(best)


def _full(rates: Sequence[float]) -> int:
    """Return the smallest number of Sequences from which more of them gain less than _GAIN."""
    best = max(rates)
    return max(next(i for i, rate in enumerate(rates, 1) if rate * _GAIN >= best), min(MIN_LIVE, len(rates)))
