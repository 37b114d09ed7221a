"""Routes of /v1/responses. An answer is made by a task of its own, so that it outlives the connection that asked."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import structlog
from aiohttp import web

from mdiq.api import streams
from mdiq.api.answering import Answering
from mdiq.api.audit import LEFT, RECORD, Record
from mdiq.api.backend import Backend
from mdiq.api.requests import ApiError, BadRequest, broke
from mdiq.api.response_requests import AskedResponse, parse_response, previous_of, renamed
from mdiq.api.response_shapes import ResponseShape, items_of
from mdiq.api.response_store import MAX_CONVERSATION_BYTES, ResponseStore, StoredResponse, bytes_of
from mdiq.errors import MdiqError

log = structlog.get_logger()

PATH = "/v1/responses"
MAX_INPUT_ITEMS, USUAL_INPUT_ITEMS = 100, 20  # of one page, as OpenAI's
_PREVIOUS = "previous_response_id"


class ResponseRoutes:
    """Creates responses, and finds those that are kept."""

    def __init__(self, backend: Backend, answering: Answering) -> None:
        self._backend = backend
        self._answering = answering
        self._store = ResponseStore(time.monotonic)

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
        """End all that run."""
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
        asked = parse_response(body, history)
        input_bytes += bytes_of(asked.messages[len(history) :])
        if history and input_bytes > MAX_CONVERSATION_BYTES:
            text = f"it is more than {MAX_CONVERSATION_BYTES} bytes with what comes before it; begin anew"
            raise BadRequest(f"{_PREVIOUS}: {text}", _PREVIOUS)
        shape = ResponseShape(self._backend.model_name, asked.shown)
        messages, owner = asked.messages, _owner(request)
        response = StoredResponse(
            shape, owner, messages, asked.is_background, asked.is_stored, input_bytes, record.num_bytes
        )
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        begun.add_done_callback(lambda it: it.cancelled() or it.exception())  # its client may have gone
        # The log has a line for the answer, when it has ended, beside that of the request.
        own = Record(record.request_id, record.begun_s, record.path, record.address, record.client)
        response.task = asyncio.create_task(self._run(response, asked, own, begun), name="response")
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
        return web.json_response(shape.whole())

    async def _run(
        self, response: StoredResponse, asked: AskedResponse, record: Record, begun: "asyncio.Future[None]"
    ) -> None:
        """Make an answer. begun: done when it has its place in the Ring, or with why it cannot have one."""
        shape, status = response.shape, 200
        try:
            async with self._answering.begun(asked.chat, record) as running:
                response.note(shape.begin())
                (answer,) = running.answers
                if response.is_background:
                    begun.set_result(None)
                async for event in running.events:
                    if not begun.done():  # until now an error gets an HTTP status, as those of chats
                        begun.set_result(None)
                    if event is not None:
                        answer.add(event[1])
                        response.note(shape.add([piece for piece, _ in answer.parts()]))
            response.note(shape.end(answer))
        except asyncio.CancelledError:
            status = LEFT
            begun.cancel()
            response.note(shape.cancel())
        except Exception as error:  # of one response; whoever waits for it is told
            status = error.status if isinstance(error, ApiError) else 503 if isinstance(error, MdiqError) else 500
            if not begun.done():
                response.is_kept = False
                begun.set_exception(renamed(error) if isinstance(error, BadRequest) else error)
                return
            if not isinstance(error, MdiqError):
                log.exception("request_broke", path=PATH)
            response.note(shape.fail(error if isinstance(error, MdiqError) else str(broke())))
        finally:
            self._store.ended(response)
            if record.has_run:
                record.log(status, time.monotonic())

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
    client = request[RECORD].client
    return "" if client is None else client.key.digest.hex()  # a name may be another key's after a reload
