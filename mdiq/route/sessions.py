"""Which server has which stored response, and under which id there. Pure: time is an argument.

A response that its server took with it can be made again: servers that give the same tokens make the same one of the
same request. So the request is kept as long as the response, within a bound.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mdiq.api.clients import Client
from mdiq.route.ended import Cancelled

KEEP_S = 3_600.0
"""As long as `mdiq serve` keeps one; see api/response_store.py."""
MAX_KEPT = 10_000
MAX_BYTES = 64 << 20


@dataclass(slots=True, eq=False)
class Session:
    """A stored response.

    id: as its client knows it; id_there: as its server does. owner: whose key asked for it. body: of the request, with
    its seed; empty: it cannot be made again. previous: the response that it goes on from. same_tokens, model: of the
    server that made it first. ids: all in its stream, in the order in which its client saw them. names: ids there ->
    those ids, where they differ. num_gone: how often its server had been gone when it made it. is_lost: the server has
    been gone since, and does not know it any more. is_counted: it has ended, and its tokens have been counted for its
    key. told: tokens of its answer that were counted before its end, as far as could be told; None: not even the
    request was. num_read: tokens of its answer, roughly, that its client has had without a stream. is_deleted,
    cancelled: its client has ended it while its server was gone. turn: of who makes it again.
    """

    id: str
    owner: str
    server: str
    body: bytes = b""
    previous: str | None = None
    same_tokens: str | None = None
    id_there: str = ""
    ids: Collection[str] = ()
    names: dict[str, str] = field(default_factory=dict)
    kept_s: float = 0.0
    num_gone: int = 0
    model: str = ""
    is_lost: bool = False
    is_counted: bool = False
    told: int | None = None
    num_read: int = 0
    is_deleted: bool = False
    cancelled: Cancelled | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    def __post_init__(self) -> None:
        self.id_there = self.id_there or self.id

    def moved(self, server: str, num_gone: int, id_there: str, names: Mapping[str, str]) -> None:
        """Note that a server has made it again. names: ids there of responses before it -> their own."""
        self.server, self.num_gone, self.id_there = server, num_gone, id_there
        self.is_lost = False
        self.names = {**names, id_there: self.id}

    def count(self, counts: tuple[int, int] | None, client: Client | None, now: float) -> None:
        """Count its tokens for its key, once. counts: of prompt and answer; None: they are not known yet."""
        if counts is not None and client is not None and self.server and not self.is_counted:
            self.is_counted = True
            client.told(counts[0], max(counts[1] - (self.told or 0), 0), now, is_new=self.told is None)

    def saw(self, num_tokens: int, client: Client | None, now: float) -> None:
        """Count what its client has had of its answer without the end, which it may never ask for."""
        more = num_tokens - (self.told or 0)
        if more > 0 and client is not None and self.server and not self.is_counted:
            client.told(0, more, now, is_new=self.told is None)
            self.told = num_tokens


class Sessions:
    """The newest of them."""

    def __init__(self, max_kept: int = MAX_KEPT, max_bytes: int = MAX_BYTES) -> None:
        self._max_kept, self._max_bytes = max_kept, max_bytes
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: Session, now: float) -> None:
        """Keep a session; the oldest make room, or lose their requests first."""
        self.forget(session.id)
        session.kept_s = now
        self._sessions[session.id] = session
        self._num_bytes += len(session.body)
        while self._sessions and (len(self._sessions) > self._max_kept or self._is_old(now)):
            self.forget(next(iter(self._sessions)))
        for each in self._sessions.values():
            if self._num_bytes <= self._max_bytes:
                break
            self.drop_body(each)

    def find(self, response_id: str, owner: str) -> Session | None:
        """Return the session of a response of this owner, or None."""
        found = self._sessions.get(response_id)
        return found if found is not None and found.owner == owner else None

    def is_others(self, response_id: str, owner: str) -> bool:
        """Return whether a response is known, and another's."""
        found = self._sessions.get(response_id)
        return found is not None and found.owner != owner

    def drop_body(self, session: Session) -> None:
        """Have a session forget its request: it is not made again."""
        if self._sessions.get(session.id) is session:
            self._num_bytes -= len(session.body)
        session.body = b""

    def forget(self, response_id: str) -> None:
        """Forget a session; one that is unknown is ignored."""
        if (found := self._sessions.pop(response_id, None)) is not None:
            self._num_bytes -= len(found.body)

    def _is_old(self, now: float) -> bool:
        return now - next(iter(self._sessions.values())).kept_s >= KEEP_S
