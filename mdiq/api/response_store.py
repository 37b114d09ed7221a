"""Responses that run, or have ended and may be asked for again. A stream can be read anew from any of its events.

A response goes on for a while without a reader, so that a client whose network has failed can come back to it, and
to its end if it runs in the background. What has ended is kept for KEEP_S, and less long if it takes too much memory.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mdiq.api.response_shapes import Event, ResponseShape

KEEP_S = 3_600.0
MAX_KEPT = 1_000
MAX_BYTES = 64 << 20
ALONE_S = 180.0
"""How long a response that nobody reads goes on, unless it runs in the background."""

_LINE_ENDS = "\x85\u2028\u2029"


def as_sse(event: Event) -> bytes:
    """Return an event as a server-sent one."""
    data = json.dumps(event, ensure_ascii=False)
    for sign in _LINE_ENDS:  # some clients end a line there
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return f"event: {event['type']}\ndata: {data}\n\n".encode(errors="replace")


@dataclass(eq=False)
class StoredResponse:
    """One response. owner: whose key asked for it. input: messages that it answers, those of responses before it too.
    input_bytes: of these messages; body_bytes: of the request.

    is_kept: False: it ends with its reader, and cannot be asked for again. is_journalled: it outlives the service.
    """

    shape: ResponseShape
    owner: str
    input: Sequence[Mapping[str, Any]]
    is_background: bool
    is_kept: bool
    input_bytes: int = 0
    body_bytes: int = 0
    ended_s: float | None = None
    num_bytes: int = field(init=False)
    task: "asyncio.Task[None] | None" = None
    is_wanted: bool = True  # nobody has cancelled it
    is_journalled: bool = False
    _events: list[bytes] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _num_readers: int = 0
    _leaving: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.num_bytes = self.input_bytes + self.body_bytes

    @property
    def conversation_bytes(self) -> int:
        """What a response that goes on from this one begins with, as JSON."""
        return self.input_bytes + bytes_of(self.shape.messages)

    @property
    def events(self) -> list[bytes]:
        """A copy of its events so far, as they are sent."""
        return [*self._events]

    def note(self, events: Sequence[Event]) -> None:
        """Add events, and wake who reads."""
        self.note_sent([as_sse(event) for event in events])

    def note_sent(self, events: Sequence[bytes]) -> None:
        """Add events as they are sent, and wake who reads."""
        self._events += events
        self.num_bytes += sum(map(len, events))
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def read(self, after: int = -1, *, silence_s: float) -> AsyncGenerator[bytes | None, None]:
        """Yield its events, those that have been and those that come, from the one after this number on.

        None whenever none has come for ``silence_s``.
        """
        at = max(after + 1, 0)
        while True:
            news = self._news
            while at < len(self._events):
                at += 1
                yield self._events[at - 1]
            if self.shape.is_ended and at >= len(self._events):
                return
            if news is not self._news:
                continue
            try:
                async with asyncio.timeout(silence_s):
                    await news.wait()
            except TimeoutError:
                yield None

    @contextmanager
    def reader(self) -> Iterator[None]:
        """Have a reader. Without any, it goes on for a while."""
        self._num_readers += 1
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        try:
            yield
        finally:
            self._num_readers -= 1
            self._left()

    def cancel(self) -> None:
        """End it, if it runs. Once: a second time would break off what its end takes, such as the journal's writing."""
        was_wanted, self.is_wanted = self.is_wanted, False
        if self.task is not None and was_wanted and not self.shape.is_ended:
            self.task.cancel()

    def _left(self) -> None:
        if self._num_readers or self.is_background or self.shape.is_ended:
            return
        if not self.is_kept:
            self.cancel()
        else:
            self._leaving = asyncio.get_running_loop().call_later(ALONE_S, self.cancel)


def bytes_of(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return what messages hold, as JSON."""
    return len(json.dumps(messages, ensure_ascii=False).encode(errors="replace"))


class ResponseStore:
    """All of them. clock: seconds, monotonic. on_gone: called with each that is let go of, but those forgotten."""

    def __init__(self, clock: Callable[[], float], on_gone: Callable[[StoredResponse], None] = lambda _: None) -> None:
        self._clock, self._on_gone = clock, on_gone
        self._responses: dict[str, StoredResponse] = {}

    def add(self, response: StoredResponse) -> None:
        """Keep a response."""
        self.tidy()
        self._responses[response.shape.id] = response

    def find(self, response_id: str, owner: str) -> StoredResponse | None:
        """Return a response of this owner, or None."""
        self.tidy()
        found = self._responses.get(response_id)
        return found if found is not None and found.owner == owner and found.is_kept else None

    def forget(self, response: StoredResponse) -> None:
        """Let go of a response; one that runs ends."""
        response.cancel()
        self._responses.pop(response.shape.id, None)

    def ended(self, response: StoredResponse, ago_s: float = 0.0) -> None:
        """Note that a response has ended, so long ago."""
        response.ended_s = self._clock() - ago_s
        if not response.is_kept:
            self._responses.pop(response.shape.id, None)
        self.tidy()

    async def aclose(self) -> None:
        """End all that run."""
        tasks = [each.task for each in self._responses.values() if each.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def tidy(self) -> None:
        """Let go of what has ended long ago; where there are too many, of the oldest of the owner that has the most."""
        now = self._clock()
        for each in [it for it in self._responses.values() if it.ended_s is not None and now - it.ended_s >= KEEP_S]:
            self._let_go(each)
        while (too_many := len(self._responses) > MAX_KEPT) or self.num_bytes > MAX_BYTES:
            held: Counter[str] = Counter()
            for each in self._responses.values():
                held[each.owner] += 1 if too_many else each.num_bytes
            most = max(held.values())
            ended = [it for it in self._responses.values() if it.ended_s is not None and held[it.owner] == most]
            if not ended:  # what runs is bounded by the places that there are
                return
            self._let_go(min(ended, key=lambda it: it.ended_s or 0.0))

    def _let_go(self, response: StoredResponse) -> None:
        del self._responses[response.shape.id]
        self._on_gone(response)

    @property
    def num_bytes(self) -> int:
        """What all of them hold."""
        return sum(each.num_bytes for each in self._responses.values())
