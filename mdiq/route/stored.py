"""Stored responses: requests about one go to the server that has it, or to another one, which makes it again.

A response that nobody here knows, for example after a restart of the router, is looked for at every server.
"""

import json
import time
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import structlog
from aiohttp import ClientResponse, web

from mdiq.api.audit import FOR, HEADER, RECORD
from mdiq.api.request_traces import parent_in
from mdiq.api.requests import ApiError, BadRequest
from mdiq.route.asked import RESPONSES, Asked, packed
from mdiq.route.choice import Wanted
from mdiq.route.ended import cancelled, deleted
from mdiq.route.events import EventReader, ResponsesDialect, StreamError, counts_of, num_tokens_of, response_id_of
from mdiq.route.links import BrokenError, Link, is_stream, key_headers
from mdiq.route.pool import Pool
from mdiq.route.reading import Reading, path_of
from mdiq.route.servers import Report, State
from mdiq.route.sessions import Session, Sessions
from mdiq.route.splice import Splice, renamed

log = structlog.get_logger()

MAX_BREAKS, NEWS_S = 5, 1.0
_PREVIOUS = "previous_response_id"
_UNTOLD = ("cancelled", "failed")  # such a response never tells its tokens
_DIALECT = ResponsesDialect()


class Stored:
    """The stored responses of all servers."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._sessions = Sessions()

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
        if self._holder(session) is not None:
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
        return packed({**json.loads(asked.data), "previous_response_id": session.id_there})

    def made(self, link: Link, asked: Asked, request: web.Request, value: Mapping[str, Any]) -> bytes | None:
        """Keep a response that was made; return its JSON if its client knows other ids."""
        names = self._names(asked, request)
        if isinstance(response_id := value.get("id"), str):
            session = self._keep(link, asked, request, response_id, names)
            session.is_counted = _counts(value) is not None
        return json.dumps(renamed(value, names)).encode() if names else None

    def streamed(
        self, link: Link, asked: Asked, request: web.Request, value: Mapping[str, Any], splice: Splice
    ) -> None:
        """Keep the response of a stream when its id comes, and note when it is made again, there or elsewhere."""
        if not (there := response_id_of(value)):
            return
        known = next(iter(splice.ids), there)  # the first id in a stream is the response's
        session = self._sessions.find(known, self._owner(request))
        if session is None:
            session = self._keep(link, asked, request, there, {})
            session.ids = splice.ids
        elif (session.server, session.id_there) != (link.server.name, there):
            self._moved(session, link, there, self._names(asked, request), request)
        if session.names:
            session.names |= splice.names
        session.is_counted = session.is_counted or _DIALECT.usage(value) is not None

    def left(self, asked: Asked, request: web.Request, splice: Splice) -> bool:
        """Count a stream without its end for its response; return False if there is none that may be read again."""
        session = self._sessions.find(next(iter(splice.ids), ""), self._owner(request))
        if asked.is_stored and session is not None:
            session.saw(splice.num_events, request[RECORD].client, time.monotonic())
        return asked.is_stored and session is not None

    def is_lost(self, link: Link, asked: Asked, request: web.Request) -> bool:
        """Note that a server does not know what a request goes on from; return whether it can be made again."""
        session = self._previous(asked, request)
        return session is not None and self._note_lost(session, link)

    def _keep(
        self, link: Link, asked: Asked, request: web.Request, response_id: str, names: Mapping[str, str]
    ) -> Session:
        report = link.server.report
        session = Session(
            response_id,
            self._owner(request),
            link.server.name,
            asked.data,
            asked.previous,
            report.same_tokens if report is not None and asked.is_repeatable else None,
            names=dict(names),
            num_gone=link.server.num_gone,
            model=report.model if report is not None else "",
        )
        self._sessions.add(session, time.monotonic())
        return session

    def _moved(
        self, session: Session, link: Link, id_there: str, names: Mapping[str, str], request: web.Request
    ) -> None:
        """Note that a server makes a response again. The one that had it does not go on with it when it is back."""
        if (before := self._pool.links.get(session.server)) is not None:
            before.owe("DELETE", path_of(session.id_there), self.headers(before, request))
        session.moved(link.server.name, link.server.num_gone, id_there, names)

    def _previous(self, asked: Asked, request: web.Request) -> Session | None:
        if asked.previous is None:
            return None
        self._check_known(asked.previous, request, _PREVIOUS)
        return self._sessions.find(asked.previous, self._owner(request))

    def _holder(self, session: Session) -> Link | None:
        """Return the server that has a response; None: it is gone, or has lost it."""
        link = self._pool.links.get(session.server)
        return None if link is None or session.is_lost or link.server.state is State.GONE else link

    @staticmethod
    def _note_lost(session: Session, link: Link) -> bool:
        """Note that its server does not know a response; return whether that can be answered without it."""
        was_gone = session.server == link.server.name and session.num_gone != link.server.num_gone
        can_be_made = bool(session.body) and session.same_tokens is not None
        session.is_lost = was_gone and (can_be_made or session.cancelled is not None)
        return session.is_lost

    def headers(self, link: Link, request: web.Request) -> dict[str, str]:
        """Return the headers with which a server is asked for a client."""
        headers = {HEADER: request[RECORD].request_id, **parent_in(request.headers)}
        headers |= key_headers(request.headers) if link.passes_keys else {}
        client = request[RECORD].client
        if client is not None and client.key.digest:  # servers do not see whose key it is
            headers[FOR] = blake2b(client.key.digest, digest_size=16).hexdigest()
        return headers

    def _owner(self, request: web.Request) -> str:
        client = request[RECORD].client
        if client is not None and client.key.digest:
            return client.key.digest.hex()
        if not any(link.passes_keys and link.key is not None for link in self._pool.links.values()):
            return ""
        sent = key_headers(request.headers)  # servers check it, and this router does not
        return blake2b("\n".join(sent.values()).encode()).hexdigest()

    def _names(self, asked: Asked, request: web.Request) -> Mapping[str, str]:
        session = self._previous(asked, request)
        return {} if session is None else session.names

    def _check_known(self, response_id: str, request: web.Request, param: str = "response_id") -> None:
        owner = self._owner(request)
        found = self._sessions.find(response_id, owner)
        if self._sessions.is_others(response_id, owner) or (found is not None and found.is_deleted):
            raise _unknown(response_id, param)

    # Of a request about one

    async def _one(self, request: web.Request) -> web.StreamResponse:
        response_id = request.match_info["id"]
        self._check_known(response_id, request)
        session = self._sessions.find(response_id, self._owner(request))
        if session is None:
            return await self._search(response_id, request)
        reading = Reading(request, session)
        why = ""
        for _ in range(MAX_BREAKS):
            if self._holder(session) is None and (answer := self._without_server(session, reading, request)):
                return answer
            try:
                link = await self._link_of(session, request)
                headers = self.headers(link, request)
                async with link.ask(request.method, reading.path, headers=headers) as response:
                    if is_stream(response):
                        return await reading.stream(link, response)
                    body = await self._pool.whole(link, response)
                if response.status == 404 and self._note_lost(session, link):
                    continue
                if request.method == "DELETE" and response.status < 500:
                    session.saw(session.num_read, request[RECORD].client, time.monotonic())
                    self._sessions.forget(session.id)
                if not reading.out.prepared:
                    self._note_usage(session, request, response, body)
                    return self._pool.held(_whole(response, body, session.names), len(body))
                why = f"{link.server.name} answers {response.status}"  # a second answer in one would be no HTTP
                break
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

    def _without_server(self, session: Session, reading: Reading, request: web.Request) -> web.StreamResponse | None:
        """Answer a client that ends a response, or asks for one that it has cancelled; None: it asks for anything else.

        Raises:
            ApiError: the response cannot be cancelled: it has ended.
        """
        is_about_all = request.path.endswith(session.id)
        if request.method == "DELETE":
            self._tell_later(session, "DELETE", "", request)
            self._sessions.drop_body(session)
            session.is_deleted = True
            return deleted(session.id)
        if request.method == "POST" and session.cancelled is None:
            if session.is_counted:
                raise ApiError(409, f"{session.id[:80]} has ended, so there is nothing to cancel")
            self._tell_later(session, "POST", "/cancel", request)
            created_at = int(time.time() - (time.monotonic() - session.kept_s))
            session.cancelled = cancelled(session.id, session.model, session.body, created_at)
            self._sessions.drop_body(session)
        if session.cancelled is None or not (request.method == "POST" or is_about_all):
            return None
        is_stream = request.method == "GET" and request.query.get("stream") in ("true", "1")
        return session.cancelled.answer(is_stream=is_stream, after=reading.after)

    def _tell_later(self, session: Session, method: str, end: str, request: web.Request) -> None:
        """Have the server that had a response hear, when it is back, that its client has ended it."""
        if not session.is_lost and (link := self._pool.links.get(session.server)) is not None:
            link.owe(method, path_of(session.id_there) + end, self.headers(link, request))

    async def _search(self, response_id: str, request: web.Request) -> web.StreamResponse:
        session = Session(response_id, self._owner(request), "")
        silent: list[str] = []  # they may have it
        for link in list(self._pool.links.values()):
            reading = Reading(request, session)
            try:
                if link.server.state not in (State.SERVES, State.WAITS):
                    raise BrokenError(link.server.text)
                headers = self.headers(link, request)
                async with link.ask(request.method, reading.path, headers=headers) as response:
                    if is_stream(response):
                        return await reading.stream(link, response)
                    body = await self._pool.whole(link, response)
                    if response.status >= 500:
                        silent.append(link.server.name)
                    elif response.status != 404:
                        return self._pool.held(_whole(response, body, {}), len(body))
            except BrokenError:
                if reading.out.prepared:
                    return await reading.give_up(f"{link.server.name} is gone")
                silent.append(link.server.name)
        if silent:
            text = f"no other server has {response_id[:80]!r}, and {', '.join(silent)} cannot be asked for it now"
            raise ApiError(503, f"{text}; ask again")
        raise _unknown(response_id)

    def _note_usage(self, session: Session, request: web.Request, response: ClientResponse, body: bytes) -> None:
        """Count the tokens of a response whose end its client had not seen yet, such as one in the background."""
        if session.is_counted or response.status != 200 or not body.startswith(b"{"):
            return
        value, client, now = json.loads(body), request[RECORD].client, time.monotonic()
        session.count(_counts(value), client, now)
        session.num_read = num_tokens_of(value)
        session.saw(session.num_read if value.get("status") in _UNTOLD else 0, client, now)

    async def _link_of(self, session: Session, request: web.Request) -> Link:
        """Return a server that has a response, after one has made it again if it has to."""
        if (holder := self._holder(session)) is not None:
            return holder
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
        if self._holder(session) is link:
            return
        async with session.turn:
            if self._holder(session) is link:
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
            id_there = await self._make(link, body, request, to_end=to_end)
            if session.is_deleted or session.cancelled is not None:  # meanwhile
                link.owe("DELETE", path_of(id_there), self.headers(link, request))
                raise _unknown(session.id) if session.is_deleted else _lost(session)
            self._moved(session, link, id_there, names, request)
            log.info("response_made_again", server=link.server.name)

    async def _make(self, link: Link, body: Mapping[str, Any], request: web.Request, *, to_end: bool) -> str:
        data, reader, found, is_made = packed(body), EventReader(), "", False
        headers = self.headers(link, request)
        try:
            async with link.ask("POST", RESPONSES, data=data, headers=headers) as response:
                if response.status != 200:
                    raise BrokenError(f"{link.server.name}: it answers {response.status}")
                async for chunk in link.chunks(response):
                    for event in reader.push(chunk):
                        found = found or response_id_of(event.value)
                        if found and (not to_end or _DIALECT.ends(event)):
                            is_made = True
                            return found
        except StreamError as error:
            raise BrokenError(f"{link.server.name}: {error}") from None
        finally:
            if found and not is_made:  # nobody would ask for it
                link.owe("DELETE", path_of(found), headers)
        raise BrokenError(f"{link.server.name}: its answer broke off")


def _whole(response: ClientResponse, body: bytes, names: Mapping[str, str]) -> web.Response:
    if names and response.status == 200:
        body = json.dumps(renamed(json.loads(body), names)).encode()
    headers = {name: response.headers[name] for name in ("Retry-After", "x-should-retry") if name in response.headers}
    return web.Response(status=response.status, body=body, content_type="application/json", headers=headers)


def _lost(session: Session) -> ApiError:
    text = f"{session.server}, which has {session.id[:80]}, is gone, and no other server can make it again"
    return ApiError(503, f"{text}; begin the conversation anew")


def _can_make(session: Session, report: Report | None) -> bool:
    mark = session.same_tokens
    return bool(session.body) and mark is not None and report is not None and report.same_tokens == mark


def _counts(value: Mapping[str, Any]) -> tuple[int, int] | None:
    return counts_of(value.get("usage"), "input_tokens", "output_tokens")


def _unknown(response_id: str, param: str = "response_id") -> ApiError:
    text = f"{param}: no response {response_id[:80]!r} is kept here; one that is stored is kept for an hour"
    if param == _PREVIOUS:  # as mdiq serve has it: clients know by the code to send the whole chat again
        return BadRequest(text, param, code="previous_response_not_found")
    return ApiError(404, text, param=param)
