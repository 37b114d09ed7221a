"""A stream that goes on at another server: what its client has, what of the other stream is left out, and ids.

    Two servers that say that they give the same tokens answer one request with the same events, but for ids, times
    and what came from a cache. So when a server dies in the middle of an answer, another one is asked the same. Its
    events are compared with those that the client has, up to there, and left out; the rest is passed on under the ids
    that the client knows. A stream that differs in what the client has already cannot be gone on with.

    Events that the client has are kept as a count and a hash for each lane, so a long answer takes no memory. The
    lanes are the choices of a request: events of different choices mix in another order each time.

Values in, values out.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from mdiq.route.events import Dialect, Event, encoded

MAX_IDS = 4_096  # of one lane; a stream with more is passed on, and cannot go on elsewhere
_IDS = frozenset(("id", "item_id", "call_id", "response_id", "previous_response_id"))
_TIMES = frozenset(("created", "created_at"))
_OWN = _TIMES | {"completed_at", "usage"}
"""What differs between two runs of one request: when it ran, and how much of its prompt was cached."""


class DiffersError(Exception):
    """Another server gives other events than the client has."""


@dataclass(slots=True)
class Lane:
    """The events of one lane: their number, their hash, and the ids in them in the order in which they came first."""

    num_events: int = 0
    digest: bytes = b""
    ids: dict[str, int] = field(default_factory=dict)

    def add(self, value: Mapping[str, Any]) -> None:
        """Add an event."""
        text = json.dumps(self._plain(value), sort_keys=True)
        self.digest = blake2b(self.digest + text.encode(), digest_size=16).digest()
        self.num_events += 1

    def _plain(self, value: object) -> object:
        """Return a value with each id as the number of it, and without what differs between two runs."""
        if isinstance(value, dict):
            return {
                key: self._number(each) if key in _IDS and isinstance(each, str) else self._plain(each)
                for key, each in value.items()
                if key not in _OWN
            }
        return [self._plain(each) for each in value] if isinstance(value, list) else value

    def _number(self, an_id: str) -> int:
        return self.ids.setdefault(an_id, len(self.ids))


class Splice:
    """One answer as its client sees it, over all servers that have a part in it.

    names: ids of the server that answers now -> those that the client knows, where they differ.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._sent: dict[int, Lane] = {}
        self._now: dict[int, Lane] = {}
        self._times: dict[str, object] = {}
        self._head_id: str | None = None  # of events of all lanes
        self.names: dict[str, str] = {}

    @property
    def num_events(self) -> int:
        """Events that the client has."""
        return sum(lane.num_events for lane in self._sent.values())

    @property
    def can_go_on(self) -> bool:
        """Whether another server's stream could be compared with this one."""
        return all(len(lane.ids) < MAX_IDS for lane in self._sent.values())

    @property
    def ids(self) -> Collection[str]:
        """The ids that the client knows of an answer with one lane, in their order; they grow with it."""
        return self._sent.setdefault(0, Lane()).ids

    def begin(self) -> None:
        """Begin with the stream of another server, or of the first one."""
        self._now, self.names = {}, {}

    def take(self, event: Event) -> bytes | None:
        """Take the next event in; return what the client gets of it, or None if it has that already.

        Raises:
            DiffersError: it is not what the client has.
        """
        if event.value is None:
            if event.is_done and not self.is_even:
                raise DiffersError("its answer ends earlier")
            return event.raw
        number = self._dialect.lane(event.value)
        sent = self._sent.setdefault(number, Lane())
        now = self._now.setdefault(number, Lane())
        now.add(event.value)
        if now.num_events <= sent.num_events:
            if now.num_events == sent.num_events and now.digest != sent.digest:
                raise DiffersError("its answer is another one")
            if self._dialect.ends(event) and now.num_events < sent.num_events:
                raise DiffersError("its answer ends earlier")
            return None
        return self._passed(event, sent, now)

    @property
    def is_even(self) -> bool:
        """Whether all that the client has was seen again."""
        none = Lane()
        return all(self._now.get(number, none).num_events >= sent.num_events for number, sent in self._sent.items())

    def _passed(self, event: Event, sent: Lane, now: Lane) -> bytes:
        assert event.value is not None  # else it belongs to no lane
        known = list(sent.ids)
        for i, an_id in enumerate(now.ids):
            if i >= len(known):
                sent.ids[an_id] = i
            elif known[i] != an_id:
                self.names[an_id] = known[i]
        if isinstance(head := event.value.get("id"), str):
            self._head_id = self._head_id or head
            if head != self._head_id:
                self.names[head] = self._head_id
        sent.num_events, sent.digest = now.num_events, now.digest
        is_first = not self._times
        for name, when in times_of(event.value).items():
            self._times.setdefault(name, when)
        if is_first or not self.names:
            return event.raw
        return encoded(renamed(event.value, self.names, self._times))


def times_of(value: Mapping[str, Any]) -> dict[str, object]:
    """Return the times at which an answer was begun that an event names."""
    inner = value.get("response")
    found = {name: value[name] for name in _TIMES if name in value}
    return found | (times_of(inner) if isinstance(inner, dict) else {})


def renamed(value: Any, names: Mapping[str, str], times: Mapping[str, object] = {}) -> Any:  # noqa: B006
    """Return a JSON value with other ids, and with these times."""
    if isinstance(value, dict):
        return {
            key: names.get(each, each)
            if key in _IDS and isinstance(each, str)
            else times[key]
            if key in times
            else renamed(each, names, times)
            for key, each in value.items()
        }
    return [renamed(each, names, times) for each in value] if isinstance(value, list) else value
