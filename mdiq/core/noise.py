"""What is promised to the users about the rows that a Node sees, and which Hops get noise for it. Values only.

A promise belongs to the Node that receives: "whoever reads pi1's memory learns no more than this". It is kept by the
Gaussian mechanism on a Hop before that Node: each row is clipped to a norm and gets noise (engine/noise.py). What comes
after that Hop is computed from noisy rows alone, and computing on them does not weaken a promise (post-processing;
Dwork & Roth 2014, proposition 2.1). So a Hop gets noise only where no earlier Hop has as much. Since promises belong to
Nodes, a Ring that goes on after a loss keeps them, whatever its Hops are then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True, slots=True)
class RowNoise:
    """What happens to each row of a Hop. clip: max L2 norm. sigma: standard deviation of the noise of each element."""

    clip: float
    sigma: float

    def __post_init__(self) -> None:
        if not (0 < self.clip and isfinite(self.clip) and 0 < self.sigma and isfinite(self.sigma)):
            raise ValueError(f"{self}: clip and sigma must be above 0")

    @property
    def ratio(self) -> float:
        """The noise in units of the clip: the larger it is, the less the rows tell."""
        return self.sigma / self.clip


@dataclass(frozen=True, slots=True)
class NoisePromise:
    """(epsilon, delta)-differential privacy of each row, and the noise that keeps it; see plan/privacy.py."""

    epsilon: float
    delta: float
    row: RowNoise


def noise_of_hops(promises: Sequence[NoisePromise | None]) -> tuple[NoisePromise | None, ...]:
    """Return the promise for which each Hop gets noise; None where it gets none. Hop i leaves Stage i.

    promises: of the Nodes in ring order. The Starter's is None: it knows the tokens.
    """
    hops: list[NoisePromise | None] = []
    before = 0.0
    for promise in promises[1:]:
        is_needed = promise is not None and promise.row.ratio > before
        hops.append(promise if is_needed else None)
        if promise is not None:
            before = max(before, promise.row.ratio)
    return (*hops, None) if promises else ()
