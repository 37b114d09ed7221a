"""Routes of /v1/responses. An answer is made by a task of its own, so that it outlives the connection that asked."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import structlog
from aiohttp import web

from mdiq.api import streams
from mdiq.api.answering import Answering, Begun
from mdiq.api.audit import FOR, LEFT, RECORD, Record, new_request_id
from mdiq.api.backend import Backend
from mdiq.api.clients import Clients
from mdiq.api.forming import tools_about
from mdiq.api.lasting import Ending, KeptResponse, LastingAnswer, ResponseJournal
from mdiq.api.requests import MAX_BODY_BYTES, ApiError, BadRequest, broke
from mdiq.api.response_requests import AskedResponse, parse_response, previous_of, renamed
from mdiq.api.response_shapes import Event, ResponseShape, items_of
from mdiq.api.response_store import (
    KEEP_S,
    ResponseStore,
    StoredResponse,
    as_sse,
    bytes_of,
)
from mdiq.api.shapes import Answer
from mdiq.errors import MdiqError, RingError

log = structlog.get_logger()

PATH = "/v1/responses"
MAX_AT_ONCE = 64  # events of one response before others have their turn
MAX_INPUT_ITEMS, USUAL_INPUT_ITEMS = 100, 20  # of one page, as OpenAI's
_PREVIOUS = "previous_response_id"
_PART = re.compile(r"[0-9a-f]{32}")


class ResponseRoutes:
    """Creates responses, and finds those that are kept."""

    def __init__(
        self, backend: Backend, answering: Answering, clients: Clients, journal: ResponseJournal | None = None
    ) -> None:
        self._backend = backend
        self._answering = answering
        self._clients = clients
        self._journal = journal
        self._store = ResponseStore(time.monotonic, self._gone)

    def routes(self) -> list[web.RouteDef]:
        """Return them."""
        one = PATH + "/{id}"
        return [
            web.post(PATH, self._create),
            web.get(one, self._get),
            web.delete(one, self._delete),
            web.post(one + "/cancel", self._cancel),
            web.get(one + "/input_items", self._input_items),
        ]

    async def aclose(self) -> None:
        """End all that run; those that the journal has go on in the next process."""
        await self._store.aclose()

    async def _create(self, request: web.Request) -> web.StreamResponse:
        record = request[RECORD]
        body = await self._answering.asked(request, record)
        previous = previous_of(body)
        history: Sequence[Any] = ()
        input_bytes = 0
        if previous is not None:
            before = self._found(request, previous, _PREVIOUS)
            if before.shape.status not in ("completed", "incomplete"):
                text = f"{_PREVIOUS}: that response is {before.shape.status}; wait for its end"
                raise BadRequest(text, _PREVIOUS)
            history = [*before.input, *before.shape.messages]
            input_bytes = before.conversation_bytes
        num_bytes = record.num_bytes + input_bytes
        asked = await self._answering.parsed(num_bytes, partial(parse_response, body, history))
        input_bytes += bytes_of(asked.messages[len(history) :])
        if history and input_bytes > MAX_BODY_BYTES:  # all of it together is what one request may have at once
            text = f"it is more than {MAX_BODY_BYTES} bytes with what comes before it; begin anew"
            raise BadRequest(f"{_PREVIOUS}: {text}", _PREVIOUS)
        shape = ResponseShape(self._backend.model_name, asked.shown)
        messages, owner = asked.messages, _owner(request)
        response = StoredResponse(
            shape, owner, messages, asked.is_background, asked.is_stored, input_bytes, record.num_bytes
        )
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        begun.add_done_callback(lambda it: it.cancelled() or it.exception())  # its client may have gone
        # The log has a line for the answer, when it has ended, beside that of the request.
        own = record.of_answer()
        make = partial(self._begin, response, asked, own, begun)
        response.task = asyncio.create_task(self._run(response, make, own, begun), name="response")
        self._store.add(response)
        try:
            await asyncio.shield(begun)
        except asyncio.CancelledError:
            response.cancel()
            raise
        if asked.chat.is_streamed:
            return await self._send(request, response)
        if not asked.is_background:
            try:
                await asyncio.shield(response.task)
            except asyncio.CancelledError:
                response.cancel()  # its client has gone, and does not know its id
                raise
            if shape.status == "failed":
                raise ApiError(503, str(shape.whole()["error"]["message"]))
        return web.json_response(response.shape.whole())

    def take_up(self, found: Sequence[KeptResponse]) -> None:
        """Have the responses of an earlier process here; those that have not ended go on when the ring serves."""
        for kept in found:
            try:
                self._take_up(kept)
            except (LookupError, TypeError, ValueError, AttributeError) as error:  # the service and the others go on
                log.warning("response_not_kept", error=type(error).__name__)
                if self._journal is not None:
                    self._journal.forget_soon(kept.id)

    def _take_up(self, kept: KeptResponse) -> None:
        about, ending = kept.about, kept.ending
        client = self._clients.of_digest(bytes.fromhex(about["owner"].partition(":")[0]), about["key"])
        if ending is not None:
            shape = ResponseShape.ended(ending.whole, ending.messages)
        else:
            shape = ResponseShape(about["model"], about["shown"], response_id=kept.id, created_at=about["created_at"])
        sizes = about["input_bytes"], about["body_bytes"]
        response = StoredResponse(shape, about["owner"], about["input"], True, True, *sizes, is_journalled=True)
        if ending is not None:
            response.note_sent(ending.events)
            self._store.add(response)
            self._ended(response, max(time.time() - ending.at_s, 0.0))  # the clock may have been set
            return
        self._store.add(response)
        own = Record(new_request_id(), time.monotonic(), PATH, "", client)
        make = partial(self._go_on, response, kept, own)
        response.task = asyncio.create_task(self._run(response, make, own), name="response")

    async def _run(
        self,
        response: StoredResponse,
        make: Callable[[], Awaitable[None]],
        record: Record,
        begun: "asyncio.Future[None] | None" = None,
    ) -> None:
        """Make an answer. begun: done when it has its place in the Ring, or with why it cannot have one."""
        status = 200
        try:
            status = await self._made(response, make, begun)
        except asyncio.CancelledError:  # also while its failure is being written
            status = LEFT
            if begun is not None:
                begun.cancel()
            if response.is_wanted and response.is_journalled:
                return  # the service ends, and the next one goes on with it
            await self._end(response, ResponseShape.cancel)
        finally:
            if response.shape.is_ended or not response.is_journalled:
                self._ended(response)
            if record.has_run:
                record.log(status, time.monotonic())

    async def _made(
        self, response: StoredResponse, make: Callable[[], Awaitable[None]], begun: "asyncio.Future[None] | None"
    ) -> int:
        """Make an answer; return the status for the log."""
        try:
            await make()
            return 200
        except Exception as error:  # of one response; whoever waits for it is told
            status = error.status if isinstance(error, ApiError) else 503 if isinstance(error, MdiqError) else 500
            if begun is not None and not begun.done():
                response.is_kept = False
                self._gone(response)  # its client does not know it
                response.is_journalled = False
                begun.set_exception(renamed(error) if isinstance(error, BadRequest) else error)
                return status
            if not isinstance(error, MdiqError | ApiError):
                log.exception("request_broke", path=PATH)
            said = str(error if isinstance(error, MdiqError | ApiError) else broke())
            await self._end(response, lambda shape: shape.fail(said))
            return status

    async def _begin(
        self, response: StoredResponse, asked: AskedResponse, record: Record, begun: "asyncio.Future[None]"
    ) -> None:
        lasts = response.is_background and self._journal is not None
        async with self._answering.begun(asked.chat, record, lasts=lasts) as running:
            if running.lasting is not None:
                await self._accept(response, asked, running.lasting, running.answers[0], record)
            response.note(response.shape.begin())
            if response.is_background:
                begun.set_result(None)
            await self._follow(response, running, begun)

    async def _go_on(self, response: StoredResponse, kept: KeptResponse, record: Record) -> None:
        assert self._journal is not None  # it comes from there
        response.note(response.shape.begin())
        if kept.obstacle:
            raise RingError(kept.obstacle)
        async with self._answering.resumed(kept, record, partial(self._journal.tries, kept.id)) as running:
            assert running.lasting is not None  # all that are kept are
            self._journal.follow(kept.id, running.lasting.tokens)
            await self._follow(response, running)

    async def _accept(
        self, response: StoredResponse, asked: AskedResponse, lasting: LastingAnswer, answer: Answer, record: Record
    ) -> None:
        """Have a response kept before its client knows of it."""
        assert self._journal is not None and record.client is not None  # else it does not last
        shape = response.shape
        about = {
            "owner": response.owner,
            "key": record.client.key.name,
            "model": shape.model,
            "created_at": shape.created_at,
            "shown": asked.shown,
            "input": response.input,
            "input_bytes": response.input_bytes,
            "body_bytes": response.body_bytes,
            "tools": tools_about(answer.parser),
        }
        response.is_journalled = True  # also if its client leaves meanwhile
        try:
            kept = KeptResponse(shape.id, about, lasting.prompt, lasting.params)
            await self._journal.accept(kept, lasting.tokens)
        except MdiqError:  # it names files of this machine
            response.is_journalled = False
            text = "background: the service cannot write its journal now, and could lose the response; its log says why"
            raise ApiError(503, f"{text}. Ask again later, or without background", param="background") from None

    async def _follow(
        self, response: StoredResponse, running: Begun, begun: "asyncio.Future[None] | None" = None
    ) -> None:
        (answer,) = running.answers
        num_events = 0
        async for event in running.events:
            if begun is not None and not begun.done():  # until now an error gets an HTTP status, as those of chats
                begun.set_result(None)
            if event is not None:
                answer.add(event[1])
                response.note(response.shape.add([piece for piece, _ in answer.parts()]))
            num_events += 1
            if num_events % MAX_AT_ONCE == 0:
                await asyncio.sleep(0)  # those that are known already come all at once
        await self._end(response, lambda shape: shape.end(answer))

    async def _end(self, response: StoredResponse, end: Callable[[ResponseShape], list[Event]]) -> None:
        """End a response. One that outlives the service is not seen to have ended before that is kept."""
        if self._journal is None or not response.is_journalled:
            response.note(end(response.shape))
            return
        events = end(shape := response.shape.forked())
        sent = [*response.events, *map(as_sse, events)]
        await self._journal.end(shape.id, Ending(time.time(), shape.whole(), shape.messages, sent))
        response.shape = shape
        response.note(events)

    def _ended(self, response: StoredResponse, ago_s: float = 0.0) -> None:
        self._store.ended(response, ago_s)
        if response.is_journalled:  # it goes from the disk too, also where nobody asks any more
            asyncio.get_running_loop().call_later(max(KEEP_S - ago_s, 0.0) + 1.0, self._store.tidy)

    def _gone(self, response: StoredResponse) -> None:
        if self._journal is not None and response.is_journalled:
            self._journal.forget_soon(response.shape.id)

    async def _get(self, request: web.Request) -> web.StreamResponse:
        response = self._found(request, request.match_info["id"])
        if request.query.get("stream") in ("true", "1"):
            after = request.query.get("starting_after", "-1")
            if not after.removeprefix("-").isdecimal() or len(after) > 12:
                raise BadRequest("starting_after: not the number of an event", "starting_after")
            return await self._send(request, response, int(after))
        return web.json_response(response.shape.whole())

    async def _delete(self, request: web.Request) -> web.Response:
        response = self._found(request, request.match_info["id"])
        self._store.forget(response)
        if self._journal is not None and response.is_journalled:
            await self._journal.forget(response.shape.id)  # first of all: its client may go away
        return web.json_response({"id": response.shape.id, "object": "response", "deleted": True})

    async def _cancel(self, request: web.Request) -> web.Response:
        response = self._found(request, request.match_info["id"])
        response.cancel()
        if response.task is not None:
            await asyncio.wait({response.task})
        return web.json_response(response.shape.whole())

    async def _input_items(self, request: web.Request) -> web.Response:
        response, query = self._found(request, request.match_info["id"]), request.query
        items = items_of(response.input)
        if query.get("order", "desc") != "asc":
            items.reverse()
        ids = [item["id"] for item in items]
        if (after := query.get("after")) is not None:
            if after not in ids:
                raise BadRequest("after: no such item", "after")
            items = items[ids.index(after) + 1 :]
        limit = query.get("limit", str(USUAL_INPUT_ITEMS))
        number = int(limit) if limit.isdecimal() and len(limit) <= 3 else 0
        if not 1 <= number <= MAX_INPUT_ITEMS:
            raise BadRequest(f"limit: not a number from 1 to {MAX_INPUT_ITEMS}", "limit")
        more = len(items) > number
        items = items[:number]
        first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
        return web.json_response(
            {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": more}
        )

    def _found(self, request: web.Request, response_id: str, param: str = "response_id") -> StoredResponse:
        found = self._store.find(response_id, _owner(request))
        if found is None:
            text = f"{param}: no response {response_id[:80]!r} is kept here; one that is stored is kept for an hour"
            if param == _PREVIOUS:  # with OpenAI's status and code: clients know by them to send the whole chat again
                raise BadRequest(text, param, code="previous_response_not_found")
            raise ApiError(404, text, param=param, code=None)
        return found

    async def _send(self, request: web.Request, response: StoredResponse, after: int = -1) -> web.StreamResponse:
        out = web.StreamResponse(headers=streams.HEADERS)
        with response.reader():
            await out.prepare(request)
            async with aclosing(response.read(after, silence_s=streams.SILENCE_S)) as events:
                async for data in events:
                    await out.write(b": keep-alive\n\n" if data is None else data)
        await out.write_eof()
        return out


def _owner(request: web.Request) -> str:
    client, part = request[RECORD].client, request.headers.get(FOR, "")
    owner = "" if client is None else client.key.digest.hex()  # a name may be another key's after a reload
    return f"{owner}:{part}" if _PART.fullmatch(part) else owner
