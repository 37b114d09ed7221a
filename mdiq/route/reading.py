"""A client that reads one stored response, maybe of one server after another."""

import time
from collections.abc import Mapping
from urllib.parse import quote

from aiohttp import ClientResponse, web

from mdiq.api.audit import RECORD
from mdiq.api.requests import ApiError, BadRequest
from mdiq.api.streams import HEADERS
from mdiq.route.asked import RESPONSES
from mdiq.route.events import Event, EventReader, ResponsesDialect, StreamError, encoded
from mdiq.route.links import BrokenError, Link
from mdiq.route.sessions import Session
from mdiq.route.splice import Lane, renamed

_DIALECT = ResponsesDialect()


class Reading:
    """A client that reads one response, maybe of one server after another. path: what a server is asked."""

    def __init__(self, request: web.Request, session: Session) -> None:
        self._request, self._session = request, session
        self.out = web.StreamResponse(headers=HEADERS)
        after = request.query.get("starting_after", "-1")
        if not after.removeprefix("-").isdecimal() or len(after) > 12:
            raise BadRequest("starting_after: not the number of an event", "starting_after")
        self._after = max(int(after), -1)
        self._end = request.path.partition(f"/{session.id}")[2]

    @property
    def after(self) -> int:
        """Number of the last event that the client has; -1: none."""
        return self._after

    @property
    def path(self) -> str:
        """A response that has moved is read from its beginning: that tells which of its ids is which."""
        query = dict(self._request.query)
        if self._session.names:
            query.pop("starting_after", None)
        elif self._after >= 0:
            query["starting_after"] = str(self._after)
        words = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in query.items())
        return f"{path_of(self._session.id_there)}{self._end}{'?' if words else ''}{words}"

    async def stream(self, link: Link, response: ClientResponse) -> web.StreamResponse:
        """Pass a stream on.

        Raises:
            BrokenError: it breaks off.
        """
        reader, lane, session = EventReader(), Lane(), self._session
        known, names = list(session.ids) or [session.id], dict(session.names)
        client, num_seen = self._request[RECORD].client, 0
        if not self.out.prepared:
            await self.out.prepare(self._request)
        try:
            async for data in link.chunks(response):
                for event in reader.push(data):
                    if event.value is None:
                        await self.out.write(event.raw)
                        continue
                    if session.names:
                        lane.add(event.value)
                        names |= dict(zip(lane.ids, known, strict=False))
                    session.count(_DIALECT.usage(event.value), client, time.monotonic())
                    number = event.value.get("sequence_number")
                    num_seen = number if isinstance(number, int) else num_seen
                    if isinstance(number, int) and number > self._after:
                        await self.out.write(_renamed_event(event, names))
                        self._after = number
                    if _DIALECT.ends(event):
                        await self.out.write_eof()
                        return self.out
        except StreamError as error:
            raise BrokenError(f"{link.server.name}: {error}") from None
        finally:
            session.saw(num_seen, client, time.monotonic())  # its client may have left, and cancel it
        raise BrokenError(f"{link.server.name}: its answer broke off")

    async def give_up(self, why: str) -> web.StreamResponse:
        """End a stream with what has gone wrong; raise that if none has begun."""
        if not self.out.prepared:
            raise ApiError(503, why)
        await self.out.write(_DIALECT.error(why, self._after + 1))
        await self.out.write_eof()
        return self.out


def path_of(id_there: str) -> str:
    """Return the path of a response at a server."""
    return f"{RESPONSES}/{quote(id_there, safe='')}"


def _renamed_event(event: Event, names: Mapping[str, str]) -> bytes:
    return encoded(renamed(event.value, names)) if names and event.value is not None else event.raw
