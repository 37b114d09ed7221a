"""The limits of the ring protocol, as its owner sets them; see core/ring.py."""

from dataclasses import dataclass

from mdiq.core.lap_timer import LapTimer


@dataclass(frozen=True, slots=True)
class RingSettings:
    """Limits of the ring protocol.

    chunk_tokens, prefill_tokens: see Scheduler.
    lap_timeout_s: most that a Lap may take, and token_timeout_s more for every token in flight; that long while no Lap
    has been measured, or nothing at all comes round. min_timeout_s: a Lap may always take this long.
    silence_s: nothing that came round for so long is a silence.
    max_replays: a Sequence that has been replayed so often without a new token ends with an error.
    prefix_tokens: most tokens that ended Sequences keep cached for others that begin alike; they never hold up a
    Sequence. None: all that is free; 0: nothing is reused, not even from Sequences in the Ring.
    """

    chunk_tokens: int = 256
    prefill_tokens: int = 2048
    lap_timeout_s: float = 60.0
    token_timeout_s: float = 0.1
    min_timeout_s: float = 2.0
    silence_s: float = 1.5
    max_replays: int = 5
    prefix_tokens: int | None = None

    def new_timer(self) -> LapTimer:
        """Return a timer of Laps with these limits."""
        return LapTimer(
            min_s=self.min_timeout_s,
            limit_s=self.lap_timeout_s,
            token_s=self.token_timeout_s,
            silence_s=self.silence_s,
        )
