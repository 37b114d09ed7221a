"""When each step of a pause was done, for the log, the status and the metrics. Pure: time is an argument."""

from collections.abc import Iterable
from dataclasses import dataclass, field

STEPS = {
    "unheard_s": "unheard of for",
    "back_s": "ring found after",
    "loaded_s": "loaded after",
    "after_s": "went on after",
    "first_token_s": "first token after",
    "replayed_s": "all replayed after",
}
"""The times that ``shown`` has, in words."""


@dataclass(slots=True)
class RecoveryTimes:
    """One pause, and how what ran went on. Times are on the caller's clock; None: it has not come to that.

    reason: why there was one. lost_s: when that was noticed. unheard_s: how long the Node had said nothing by then.
    back_s: there was a Ring that could go on; loaded_s: its Nodes had loaded; begun_s: they began together.
    first_token_s: the first token came after that; replayed_s: each Sequence that ran has gone on, or ended.
    layers: the Ring's split, if it is another one than before. num_sequences: that ran.
    """

    reason: str
    lost_s: float
    unheard_s: float | None = None
    back_s: float | None = None
    loaded_s: float | None = None
    begun_s: float | None = None
    first_token_s: float | None = None
    replayed_s: float | None = None
    layers: str | None = None
    num_sequences: int = 0
    _awaited: set[int] = field(default_factory=set)

    def begun(self, running: Iterable[int], now: float) -> None:
        """Note that the Ring goes on. running: the Sequences that do so with it, by index."""
        self._awaited = set(running)
        self.num_sequences = len(self._awaited)
        self.begun_s = now
        if not self._awaited:
            self.replayed_s = now

    def went_on(self, index: int, now: float, *, has_token: bool) -> bool:
        """Note a token of a Sequence, or its end; return whether it is the last that was waited for."""
        if index not in self._awaited:
            return False
        self._awaited.discard(index)
        if has_token and self.first_token_s is None:
            self.first_token_s = now
        if self._awaited:
            return False
        self.replayed_s = now
        return True

    def shown(self) -> dict[str, object]:
        """Return it for the log and the status: seconds since the loss was noticed, of what has come."""
        steps = {
            "back_s": self.back_s,
            "loaded_s": self.loaded_s,
            "after_s": self.begun_s,
            "first_token_s": self.first_token_s,
            "replayed_s": self.replayed_s,
        }
        return {
            **({} if self.unheard_s is None else {"unheard_s": round(self.unheard_s, 3)}),
            **{name: round(at_s - self.lost_s, 3) for name, at_s in steps.items() if at_s is not None},
            "sequences": self.num_sequences,
            **({} if self.layers is None else {"layers": self.layers}),
        }
