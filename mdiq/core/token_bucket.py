"""A limit of bytes a second that several transfers share. Pure: time is an argument."""

from dataclasses import dataclass


@dataclass(slots=True)
class TokenBucket:
    """A sender takes its bytes at once and then waits for the returned time, so no sender is overtaken for ever.

    burst_bytes: bytes that may be sent at once after a pause.
    """

    rate_bytes_per_s: float
    burst_bytes: float
    _level: float = 0.0
    _at_s: float | None = None

    def __post_init__(self) -> None:
        if not self.rate_bytes_per_s > 0 or not self.burst_bytes >= 0:
            raise ValueError(f"TokenBucket: {self.rate_bytes_per_s} bytes/s and a burst of {self.burst_bytes}")

    def take(self, num_bytes: int, now: float) -> float:
        """Take ``num_bytes`` and return the seconds to wait before they may be sent."""
        since_s = now - self._at_s if self._at_s is not None else 0.0
        start = self.burst_bytes if self._at_s is None else self._level
        self._level = min(start + since_s * self.rate_bytes_per_s, self.burst_bytes) - num_bytes
        self._at_s = now
        return max(-self._level / self.rate_bytes_per_s, 0.0)
