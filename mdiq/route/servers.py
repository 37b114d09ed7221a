"""What a router knows of a server: whether it serves, what it is, and how much it has to do. Time is an argument.

    state      | it serves   it pauses, starts   it refuses the key   nobody listens   not heard for silence_s
    -----------+-----------------------------------------------------------------------------------------------
    any        | serves      waits               locked               gone             gone

Only a server that serves gets new requests. One that waits keeps what it has: a ring that pauses goes on with it. What
one that is gone had is asked elsewhere. A drained server keeps what it has and gets nothing new; that is for an
operator to say, whatever its state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_TEXT = 200


class State(StrEnum):
    """How a server is; see the table above."""

    UNKNOWN = "unknown"
    SERVES = "serves"
    WAITS = "waits"
    LOCKED = "locked"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Report:
    """What a server says of itself.

    num_running: requests of all its clients; num_places: those that it computes at once; max_requests: those that it
    takes. same_tokens: equal for servers that give the same tokens for the same request; None: it cannot promise that.
    kv_free_tokens: KV cache that requests do not hold, with what it would evict for a new one; None: it does not say.
    """

    model: str
    is_serving: bool
    text: str
    num_running: int
    num_places: int
    max_requests: int
    context_tokens: int
    same_tokens: str | None
    kv_free_tokens: int | None = None


def report_of(status: object) -> Report:
    """Return what a server's status says.

    Raises:
        ValueError: it is not the status of an `mdiq serve` that can be routed to.
    """
    found = status if isinstance(status, dict) else {}
    serves, requests = _object(found, "serves"), _object(found, "requests")
    model, same = serves.get("model"), serves.get("same_tokens")
    if not isinstance(model, str) or not model:
        raise ValueError("its status does not say what it serves; it needs the mdiq of this router")
    pace = found.get("pace")
    max_requests = _count(serves, "max_requests", 1)
    return Report(
        model[:MAX_TEXT],
        found.get("is_serving") is True,
        str(found.get("state"))[:MAX_TEXT],
        _count(requests, "running", 0),
        _count(pace, "max_live", 1) if isinstance(pace, dict) else max_requests,
        max_requests,
        _count(serves, "context_tokens", 1),
        same[:MAX_TEXT] if isinstance(same, str) and same else None,
        _kv_free(found),
    )


def _kv_free(found: Mapping[str, Any]) -> int | None:
    if "kv_live_tokens" not in found:  # a ring that pauses, or an older mdiq
        return None
    return max(_count(found, "kv_capacity_tokens", 0) - _count(found, "kv_live_tokens", 0), 0)


def _object(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name)
    return value if isinstance(value, dict) else {}


def _count(found: Mapping[str, Any], name: str, low: int) -> int:
    value = found.get(name)
    if not isinstance(value, int) or not low <= value <= 1 << 40:
        raise ValueError(f"its status has no usable {name}")
    return value


@dataclass(slots=True, eq=False)
class Server:
    """One server.

    num_running: prompts that it has from this router; num_tokens: of these, as far as can be told. num_begun: all
    that it has had. heard_s: when it was heard last; report: what it said last, also if it is gone since. num_gone:
    how often it was gone; what it had may be lost then.
    """

    name: str
    silence_s: float
    state: State = State.UNKNOWN
    text: str = "not asked yet"
    report: Report | None = None
    is_drained: bool = False
    num_running: int = 0
    num_tokens: int = 0
    num_begun: int = 0
    heard_s: float | None = None
    num_gone: int = 0
    _num_known: int = 0  # of num_running, when it reported
    _num_known_tokens: int = 0

    @property
    def takes_requests(self) -> bool:
        """Whether it gets new requests."""
        return self.state is State.SERVES and not self.is_drained

    @property
    def num_all(self) -> int:
        """Prompts that it has, those of other clients too as far as it has told."""
        if self.report is None:
            return self.num_running
        return self.num_running + max(self.report.num_running - self._num_known, 0)

    @property
    def load(self) -> float:
        """Prompts for each that it computes at once."""
        return self.num_all / self._num_places

    @property
    def had(self) -> float:
        """All prompts that it has had, for each that it computes at once."""
        return self.num_begun / self._num_places

    @property
    def _num_places(self) -> int:
        return self.report.num_places if self.report is not None else 1

    @property
    def has_room(self) -> bool:
        """Whether it takes one more, as far as is known."""
        return self.report is None or self.num_all < self.report.max_requests

    @property
    def kv_free_tokens(self) -> int | None:
        """KV cache for new requests; None: it does not say."""
        if self.report is None or self.report.kv_free_tokens is None:
            return None
        return self.report.kv_free_tokens - max(self.num_tokens - self._num_known_tokens, 0)

    def reported(self, report: Report, now: float) -> None:
        """Take in what it says of itself."""
        self.report, self._num_known, self._num_known_tokens = report, self.num_running, self.num_tokens
        self._now(State.SERVES if report.is_serving else State.WAITS, report.text, now)

    def locked(self, now: float) -> None:
        """Note that it refuses the key of this router."""
        self._now(State.LOCKED, "it refuses the key that this router asks for its status with; see key_file", now)

    def misunderstood(self, why: str, now: float) -> None:
        """Note an answer that says nothing usable."""
        self._now(State.WAITS, why, now)

    def heard(self, now: float) -> None:
        """Note that it has sent something: it lives."""
        self.heard_s = now

    def refused(self, why: str) -> None:
        """Note that nobody listens there."""
        self._gone(why[:MAX_TEXT])

    def look(self, now: float) -> None:
        """Note the time: a server that is silent for too long is gone."""
        if self.heard_s is None:
            self.heard_s = now
        if now - self.heard_s >= self.silence_s and self.state is not State.GONE:
            self._gone(f"silent for {self.silence_s:g} s")

    def _gone(self, why: str) -> None:
        self.num_gone += self.state is not State.GONE
        self.state, self.text = State.GONE, why

    def _now(self, state: State, text: str, now: float) -> None:
        self.state, self.text = state, text
        self.heard_s = now
