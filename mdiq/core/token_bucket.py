"""A limit of bytes or tokens a second that several share. Pure: time is an argument."""

from dataclasses import dataclass


@dataclass(slots=True)
class TokenBucket:
    """A sender takes its bytes at once and then waits for the returned time, so no sender is overtaken for ever.

    rate_per_s: bytes or tokens. burst: how many may be taken at once after a pause.
    """

    rate_per_s: float
    burst: float
    _level: float = 0.0
    _at_s: float | None = None

    def __post_init__(self) -> None:
        if not self.rate_per_s > 0 or not self.burst >= 0:
            raise ValueError(f"TokenBucket: {self.rate_per_s} a second and a burst of {self.burst}")

    def take(self, num: float, now: float) -> float:
        """Take ``num`` and return the seconds to wait before they may be sent."""
        self._level = self._level_at(now) - num
        self._at_s = now
        return max(-self._level / self.rate_per_s, 0.0)

    def wait_s(self, num: float, now: float) -> float:
        """Return the seconds until ``num`` are there; for more than a burst, until the bucket is full."""
        return max(min(num, self.burst) - self._level_at(now), 0.0) / self.rate_per_s

    def _level_at(self, now: float) -> float:
        if self._at_s is None:
            return self.burst
        return min(self._level + (now - self._at_s) * self.rate_per_s, self.burst)
