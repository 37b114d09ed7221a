"""The delay of all Hops together, measured with PROBE Frames that every Stage forwards at once. No I/O."""

from collections import deque

WINDOW = 5
NEWS = 0.2  # a change by this share, and by MIN_NEWS_S, is worth a new pace
MIN_NEWS_S = 2e-3
_MAX_UNDER_WAY = 16


class HopMeter:
    """Keeps the shortest Lap of the newest few probes: waiting only adds to it."""

    def __init__(self) -> None:
        self._sent: dict[int, float] = {}
        self._laps_s: deque[float] = deque(maxlen=WINDOW)
        self._told_s: float | None = None
        self._number = 0

    @property
    def hops_s(self) -> float | None:
        """Seconds of all Hops together; None before the first probe is back."""
        return min(self._laps_s, default=None)

    @property
    def num_sent(self) -> int:
        """The number of the newest probe; 0 before the first."""
        return self._number

    def send(self, now: float) -> int:
        """Return the number of a new probe that is sent now. A probe that never returns is dropped in time."""
        self._number += 1
        self._sent[self._number] = now
        if len(self._sent) > _MAX_UNDER_WAY:
            del self._sent[next(iter(self._sent))]
        return self._number

    def returned(self, number: int, now: float) -> float | None:
        """Return the new delay of the Hops if it changed noticeably, else None. Unknown numbers are ignored."""
        sent_at = self._sent.pop(number, None)
        if sent_at is None:
            return None
        self._laps_s.append(now - sent_at)
        hops_s = min(self._laps_s)
        if self._told_s is not None and abs(hops_s - self._told_s) <= max(NEWS * self._told_s, MIN_NEWS_S):
            return None
        self._told_s = hops_s
        return hops_s
