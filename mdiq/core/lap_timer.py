"""The timeout after which a Lap counts as lost, from measured Laps. Pure; time is an argument.

A decode Lap may take a few times the measured mean plus four mean deviations (Jacobson and Karels 1988; RFC 6298), plus
four times the measured time of a prompt token for every token in flight. So a ring that is slow, or becomes slower, is
not mistaken for one that loses Frames, and a lost Frame costs a few Laps. Before any measurement the limit holds.

While nothing at all returns (probes do every second), nothing counts as lost before the limit: what is sent again
into a cut cable is lost again. When something is heard after a silence, all timeouts start again.
"""

from dataclasses import dataclass

_LAPS = 3
_DEVIATIONS = 4
_SLACK = 4  # over what a token in flight takes
_GAIN, _GAIN_DEVIATION = 1 / 8, 1 / 4  # RFC 6298, 2.3
_KEEP = 0.9  # decay, per sample, of the sums from which the time of a token is computed


@dataclass(slots=True)
class Flight:
    """A Segment or probe in flight. stop: where a Segment stops. due: when it is overdue; limit: the latest ``due``."""

    stop: int
    sent_at: float
    num_tokens: int
    num_replays: int
    due: float
    limit: float


class LapTimer:
    """Deadlines of what is in flight.

    min_s, limit_s: the shortest and the longest timeout; token_s is added for every token in flight.
    silence_s: a Ring counts as silent when nothing was heard for this long.
    """

    def __init__(self, *, min_s: float, limit_s: float, token_s: float, silence_s: float) -> None:
        self._min_s = min_s
        self._limit_s = limit_s
        self._token_s = token_s
        self._silence_s = silence_s
        self._heard_at = float("-inf")
        self._lap_s: float | None = None
        self._deviation_s = 0.0
        self._excess_s = self._num_tokens = 0.0

    def sent(self, stop: int, num_tokens: int, now: float, num_replays: int = 0) -> Flight:
        """Return a Flight that begins now. num_tokens: in the Ring with it. num_replays: each doubles the timeout."""
        limit = now + self._limit_s + self._token_s * num_tokens
        flight = Flight(stop, now, num_tokens, num_replays, limit, limit)
        flight.due = self._due(flight, now)
        return flight

    def followed(self, flight: Flight, num_tokens: int) -> None:
        """Note that a chunk of a prompt was sent after it: every Stage may run that first."""
        if flight.due < flight.limit:
            flight.due = max(flight.due, self._due(flight, flight.sent_at, num_tokens))

    def returned(self, flight: Flight, now: float, *, is_decode: bool) -> None:
        """Take in how long a Lap took."""
        took_s = now - flight.sent_at
        if not is_decode:
            self._excess_s = self._excess_s * _KEEP + max(took_s - (self._lap_s or 0.0), 0.0)
            self._num_tokens = self._num_tokens * _KEEP + flight.num_tokens
        elif self._lap_s is None:
            self._lap_s, self._deviation_s = took_s, took_s / 2
        else:
            self._deviation_s += _GAIN_DEVIATION * (abs(took_s - self._lap_s) - self._deviation_s)
            self._lap_s += _GAIN * (took_s - self._lap_s)

    def heard(self, now: float) -> bool:
        """Note that something returned; return whether the Ring was silent before."""
        was_silent = self.is_silent(now)
        self._heard_at = now
        return was_silent

    def is_silent(self, now: float) -> bool:
        return now - self._heard_at > self._silence_s

    def is_overdue(self, flight: Flight, now: float) -> bool:
        """Whether it is lost. In a silent Ring that is so only at its limit, which becomes its due time."""
        if flight.due <= now < flight.limit and self.is_silent(now):
            flight.due = flight.limit
        return flight.due <= now

    def begin_anew(self, flight: Flight, now: float) -> None:
        """Start the timeout again: the Ring was silent."""
        flight.due = self._due(flight, now)

    def _due(self, flight: Flight, since: float, num_more: int = 0) -> float:
        if self._lap_s is None:
            return flight.limit
        token_s = self._excess_s / self._num_tokens if self._num_tokens else self._token_s
        patience_s = _LAPS * self._lap_s + _DEVIATIONS * self._deviation_s
        patience_s += _SLACK * token_s * (flight.num_tokens + num_more)
        return min(since + max(patience_s, self._min_s) * 2.0**flight.num_replays, flight.limit)
