"""Stored responses: requests about one go to the server that has it, or to another one, which makes it again.

A response that nobody here knows, for example after a restart of the router, is looked for at every server.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import structlog
from aiohttp import ClientResponse, web

from mdiq.api.audit import HEADER, RECORD
from mdiq.api.requests import ApiError, BadRequest
from mdiq.api.streams import HEADERS
from mdiq.route.asked import RESPONSES, Asked
from mdiq.route.choice import Wanted
from mdiq.route.events import Event, EventReader, ResponsesDialect, StreamError, encoded
from mdiq.route.links import BrokenError, Link, is_stream, key_headers
from mdiq.route.pool import Pool
from mdiq.route.servers import Report, State
from mdiq.route.sessions import Session, Sessions
from mdiq.route.splice import Lane, Splice, renamed

log = structlog.get_logger()

MAX_BREAKS = 5
NEWS_S = 1.0
_DIALECT = ResponsesDialect()


class Stored:
    """The stored responses of all servers."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._sessions = Sessions()
        self._turns: dict[str, asyncio.Lock] = {}  # of responses that are being made again

    def routes(self) -> list[web.RouteDef]:
        """Return them; what creates a response is an answer like others."""
        one = RESPONSES + "/{id}"
        return [
            web.get(one, self._one),
            web.delete(one, self._one),
            web.post(one + "/cancel", self._one),
            web.get(one + "/input_items", self._one),
        ]

    # Of a request for a response

    def only(self, asked: Asked, request: web.Request) -> frozenset[str] | None:
        """Return the servers that a request which goes on from a response may go to; None if all may.

        Raises:
            ApiError: none may: the response is another client's, or lost.
        """
        session = self._previous(asked, request)
        if session is None:
            return None
        link = self._pool.links.get(session.server)
        if link is not None and link.server.state is not State.GONE:
            return frozenset({session.server})
        able = frozenset(server.name for server in self._pool.servers if _can_make(session, server.report))
        if not able:
            raise _lost(session)
        return able

    async def data_for(self, link: Link, asked: Asked, request: web.Request) -> bytes:
        """Return the body of a request as one server is to get it.

        Raises:
            ApiError: what it goes on from is lost.
            BrokenError: that could not be made again there.
        """
        session = self._previous(asked, request)
        if session is None:
            return asked.data
        await self._be_at(session, link, request, to_end=True)
        if session.id_there == session.id:
            return asked.data
        return json.dumps({**json.loads(asked.data), "previous_response_id": session.id_there}).encode()

    def made(self, link: Link, asked: Asked, request: web.Request, value: Mapping[str, Any]) -> bytes | None:
        """Keep a response that was made; return its JSON if its client knows other ids."""
        names = self._names(asked, request)
        if isinstance(response_id := value.get("id"), str):
            self._keep(link, asked, request, response_id, names)
        return json.dumps(renamed(value, names)).encode() if names else None

    def streamed(
        self, link: Link, asked: Asked, request: web.Request, value: Mapping[str, Any], splice: Splice
    ) -> None:
        """Keep the response of a stream when its id comes, and note when it goes on elsewhere."""
        response = value.get("response")
        there = response.get("id") if isinstance(response, dict) else None
        if not isinstance(there, str):
            return
        session = self._sessions.find(splice.names.get(there, there), _owner(request))
        if session is None:
            self._keep(link, asked, request, there, {}).ids = splice.ids
        elif session.server != link.server.name:
            session.moved(link.server.name, there, {**self._names(asked, request), **splice.names})

    def _keep(
        self, link: Link, asked: Asked, request: web.Request, response_id: str, names: Mapping[str, str]
    ) -> Session:
        report = link.server.report
        session = Session(
            response_id,
            _owner(request),
            link.server.name,
            asked.data,
            asked.previous,
            report.same_tokens if report is not None and asked.is_repeatable else None,
            names=dict(names),
        )
        self._sessions.add(session, time.monotonic())
        return session

    def _previous(self, asked: Asked, request: web.Request) -> Session | None:
        if asked.previous is None:
            return None
        self._check_owner(asked.previous, request, "previous_response_id")
        return self._sessions.find(asked.previous, _owner(request))

    def _names(self, asked: Asked, request: web.Request) -> Mapping[str, str]:
        session = self._previous(asked, request)
        return {} if session is None else session.names

    def _check_owner(self, response_id: str, request: web.Request, param: str = "response_id") -> None:
        if self._sessions.is_others(response_id, _owner(request)):
            raise _unknown(response_id, param)

    # Of a request about one

    async def _one(self, request: web.Request) -> web.StreamResponse:
        response_id = request.match_info["id"]
        self._check_owner(response_id, request)
        session = self._sessions.find(response_id, _owner(request))
        if session is None:
            return await self._search(response_id, request)
        if request.method == "DELETE":
            self._sessions.forget(session.id)
        reading = _Reading(request, session)
        for _ in range(MAX_BREAKS):
            link = await self._link_of(session, request)
            try:
                async with link.ask(request.method, reading.path, headers=_headers(link, request)) as response:
                    if is_stream(response):
                        return await reading.stream(link, response)
                    return _whole(response, await self._pool.whole(link, response), session.names)
            except BrokenError as error:
                log.warning("stored_broken_off", server=link.server.name, why=str(error))
                why = str(error)
                await self._pool.news(NEWS_S)  # whether the server is gone is looked at now
            except ApiError as error:
                if not reading.out.prepared:
                    raise
                why = str(error)
                break
        return await reading.give_up(why)

    async def _search(self, response_id: str, request: web.Request) -> web.StreamResponse:
        session = Session(response_id, _owner(request), "")
        for link in list(self._pool.links.values()):
            if link.server.state is not State.SERVES:
                continue
            reading = _Reading(request, session)
            try:
                async with link.ask(request.method, reading.path, headers=_headers(link, request)) as response:
                    if is_stream(response):
                        return await reading.stream(link, response)
                    body = await self._pool.whole(link, response)
                    if response.status != 404:
                        return _whole(response, body, {})
            except BrokenError:
                if reading.out.prepared:
                    return await reading.give_up(f"{link.server.name} is gone")
        raise _unknown(response_id)

    async def _link_of(self, session: Session, request: web.Request) -> Link:
        """Return a server that has a response, after one has made it again if it has to."""
        link = self._pool.links.get(session.server)
        if link is not None and link.server.state is not State.GONE:
            return link
        until_s = time.monotonic() + self._pool.outage_tolerance_s
        tried: set[str] = set()
        while session.body and session.same_tokens is not None:
            chosen = self._pool.choose(Wanted(same_tokens=session.same_tokens), tried)
            if chosen is None:
                if time.monotonic() >= until_s:
                    break
                await self._pool.news(1.0)
                tried.clear()
                continue
            tried.add(chosen.server.name)
            try:
                await self._be_at(session, chosen, request, to_end=False)
            except BrokenError as error:
                log.warning("stored_not_made_again", server=chosen.server.name, why=str(error))
            else:
                return chosen
        raise _lost(session)

    async def _be_at(self, session: Session, link: Link, request: web.Request, *, to_end: bool) -> None:
        """Have a server make a response again, unless it has it. to_end: wait until it is complete.

        Raises:
            ApiError: it cannot be made again.
            BrokenError: this server does not make it.
        """
        if session.server == link.server.name:
            return
        async with self._turns.setdefault(session.id, asyncio.Lock()):
            if session.server == link.server.name:
                return
            if not _can_make(session, link.server.report):
                raise _lost(session)
            body: dict[str, Any] = {**json.loads(session.body), "stream": True}
            names: Mapping[str, str] = {}
            if session.previous is not None:
                before = self._sessions.find(session.previous, session.owner)
                if before is None:
                    raise ApiError(503, f"what {session.id[:80]} goes on from is not known any more; begin anew")
                await self._be_at(before, link, request, to_end=True)
                body["previous_response_id"], names = before.id_there, before.names
            session.moved(link.server.name, await self._make(link, body, request, to_end=to_end), names)
            log.info("response_made_again", server=link.server.name)
        self._turns.pop(session.id, None)

    async def _make(self, link: Link, body: Mapping[str, Any], request: web.Request, *, to_end: bool) -> str:
        data, reader, found = json.dumps(body).encode(), EventReader(), ""
        async with link.ask("POST", RESPONSES, data=data, headers=_headers(link, request)) as response:
            if response.status != 200:
                raise BrokenError(f"{link.server.name}: it answers {response.status}")
            try:
                async for chunk in link.chunks(response):
                    for event in reader.push(chunk):
                        found = found or _id_of(event)
                        if found and (not to_end or _DIALECT.ends(event)):
                            return found
            except StreamError as error:
                raise BrokenError(f"{link.server.name}: {error}") from None
        raise BrokenError(f"{link.server.name}: its answer broke off")


class _Reading:
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
    def path(self) -> str:
        """A response that has moved is read from its beginning: that tells which of its ids is which."""
        query = dict(self._request.query)
        if self._session.names:
            query.pop("starting_after", None)
        elif self._after >= 0:
            query["starting_after"] = str(self._after)
        words = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in query.items())
        return f"{RESPONSES}/{quote(self._session.id_there, safe='')}{self._end}{'?' if words else ''}{words}"

    async def stream(self, link: Link, response: ClientResponse) -> web.StreamResponse:
        """Pass a stream on.

        Raises:
            BrokenError: it breaks off.
        """
        reader, lane, session = EventReader(), Lane(), self._session
        known, names = list(session.ids) or [session.id], dict(session.names)
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
                    number = event.value.get("sequence_number")
                    if isinstance(number, int) and number > self._after:
                        await self.out.write(_renamed_event(event, names))
                        self._after = number
                    if _DIALECT.ends(event):
                        await self.out.write_eof()
                        return self.out
        except StreamError as error:
            raise BrokenError(f"{link.server.name}: {error}") from None
        raise BrokenError(f"{link.server.name}: its answer broke off")

    async def give_up(self, why: str) -> web.StreamResponse:
        """End a stream with what has gone wrong; raise that if none has begun."""
        if not self.out.prepared:
            raise ApiError(503, why)
        await self.out.write(_DIALECT.error(why, self._after + 1))
        await self.out.write_eof()
        return self.out


def _renamed_event(event: Event, names: Mapping[str, str]) -> bytes:
    return encoded(renamed(event.value, names)) if names and event.value is not None else event.raw


def _whole(response: ClientResponse, body: bytes, names: Mapping[str, str]) -> web.Response:
    if names and response.status == 200:
        body = json.dumps(renamed(json.loads(body), names)).encode()
    headers = {name: response.headers[name] for name in ("Retry-After", "x-should-retry") if name in response.headers}
    return web.Response(status=response.status, body=body, content_type="application/json", headers=headers)


def _id_of(event: Event) -> str:
    response = event.value.get("response") if event.value is not None else None
    found = response.get("id") if isinstance(response, dict) else None
    return found if isinstance(found, str) else ""


def _lost(session: Session) -> ApiError:
    text = f"{session.server}, which has {session.id[:80]}, is gone, and no other server can make it again"
    return ApiError(503, f"{text}; begin the conversation anew")


def _can_make(session: Session, report: Report | None) -> bool:
    mark = session.same_tokens
    return bool(session.body) and mark is not None and report is not None and report.same_tokens == mark


def _headers(link: Link, request: web.Request) -> dict[str, str]:
    return {HEADER: request[RECORD].request_id} | (key_headers(request.headers) if not link.key else {})


def _owner(request: web.Request) -> str:
    client = request[RECORD].client
    return "" if client is None else client.key.digest.hex()


def _unknown(response_id: str, param: str = "response_id") -> ApiError:
    text = f"{param}: no response {response_id[:80]!r} is kept here; one that is stored is kept for an hour"
    return ApiError(404, text, param=param)
