"""Routes, errors and keys of the HTTP API. Prompts and answers are never logged.

A client that disconnects cancels its Sequence: aiohttp cancels its handler, which closes the Backend's iterator. The
connection of one that does not read its answer is ended by server.py.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from mdiq import __version__
from mdiq.api.admission import Admission
from mdiq.api.answering import Answering
from mdiq.api.audit import RECORD, add_request_id, audited
from mdiq.api.backend import Backend
from mdiq.api.clients import Clients
from mdiq.api.figures import Figures
from mdiq.api.keys import ApiKey
from mdiq.api.lasting import KeptResponse, ResponseJournal
from mdiq.api.messages import PATH, Messages, errors_in_their_form, parse_messages
from mdiq.api.metrics import metrics_registry
from mdiq.api.origins import Origins
from mdiq.api.requests import MAX_BODY_BYTES, ApiError, broke, parse, too_long
from mdiq.api.responses import ResponseRoutes
from mdiq.api.server import CLIENT_TIMEOUT_S, error_response, let_in
from mdiq.api.shapes import Chat, Completion, Shape
from mdiq.api.streams import send_stream
from mdiq.api.token_routes import TokenRoutes
from mdiq.errors import CapacityError, MdiqError

log = structlog.get_logger()

_PUBLIC = ("/health", "/ready")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """The application.

    keys: every request but /health and /ready must carry one of them; if empty, none is needed. cors_origins: web pages
    of these origins may call the API from a browser; "*": of all. journal: keeps what outlives the
    service.
    """

    def __init__(
        self,
        backend: Backend,
        keys: Sequence[ApiKey] = (),
        *,
        cors_origins: Sequence[str] = (),
        client_timeout_s: float = CLIENT_TIMEOUT_S,
        journal: ResponseJournal | None = None,
    ) -> None:
        self._backend = backend
        self._origins = Origins(cors_origins)
        self._clients = Clients(keys)
        self._created = int(time.time())
        self._admission = Admission()
        self._registry = metrics_registry(self.status)
        figures = Figures(self._registry)
        self._answering = Answering(backend, self._clients, self._admission, figures, client_timeout_s=client_timeout_s)
        self._journal = journal
        self._responses = ResponseRoutes(backend, self._answering, self._clients, journal)

    def status(self) -> Mapping[str, Any]:
        """Return what `mdiq status --json` shows."""
        status = self._backend.status()
        requests = {**status["requests"], **self._admission.counts()}
        journal = None if self._journal is None else self._journal.status()
        return {**status, "requests": requests, "keys": self._clients.counts(), "journal": journal}

    def take_up(self, found: Sequence[KeptResponse]) -> None:
        """Have the responses of an earlier process here; they go on when the ring serves."""
        self._responses.take_up(found)

    def replace_keys(self, keys: Sequence[ApiKey]) -> None:
        """Take over the keys of a file that was read again; requests that run go on."""
        self._clients.replace(keys)

    def note_cut_off(self) -> None:
        """Count an answer whose connection was ended because nobody read it."""
        self._admission.num_cut_off += 1

    def application(self) -> web.Application:
        """Return it with its routes."""
        middlewares = [audited, errors_in_their_form, self._errors]
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
        app.on_response_prepare.extend([self._origins.allow, add_request_id])
        app.on_cleanup.append(self._close)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._metrics),
                web.get("/status.json", self._status),
                web.get("/version", self._version),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{id:.+}", self._model),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completions),
                *TokenRoutes(self._backend, self._answering).routes(),
                *self._responses.routes(),
                web.post(PATH, self._messages),
                web.post(f"{PATH}/count_tokens", self._count_tokens),
            ]
        )
        return app

    async def _close(self, _: web.Application) -> None:
        await self._responses.aclose()
        self._answering.close()

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.method == "OPTIONS" and self._origins.allowed(request):
                return web.Response(status=204)  # browsers ask without the key
            request[RECORD].client = self._clients.find(request.headers)
            has_key = self._clients.has_keys and request[RECORD].client is not None
            self._origins.check(request, has_key=has_key)
            if request.path not in _PUBLIC:
                if request[RECORD].client is None:
                    raise ApiError(401, "a key of this ring's API is missing or wrong; send Authorization: Bearer KEY")
                let_in(request)
            return await handler(request)
        except ApiError as error:
            return self._refused(request, error)
        except web.HTTPException as error:
            return self._refused(request, ApiError(error.status, _no_route(request, error)))
        except CapacityError as error:
            return self._refused(request, too_long(str(error), self._backend.context_tokens))
        except MdiqError as error:
            return error_response(ApiError(503, str(error)))
        except ConnectionError:  # the client has closed the connection
            raise
        except Exception:  # of one request; the answer must not show our internals
            log.exception("request_broke", path=request.path)
            return error_response(broke())

    def _refused(self, request: web.Request, error: ApiError) -> web.Response:
        if request.method == "POST":
            self._admission.refused[error.reason] += 1
        return error_response(error)

    async def _health(self, _: web.Request) -> web.Response:
        if self._backend.is_serving:
            return web.json_response({"status": "ok"})
        raise ApiError(503, self._backend.state, code=503)

    async def _ready(self, _: web.Request) -> web.Response:
        if self._backend.is_serving:
            return web.json_response({"status": "ready"})
        raise ApiError(503, "the ring does not serve; GET /health says what it waits for")

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response(self.status())

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": __version__})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._described()]})

    async def _model(self, request: web.Request) -> web.Response:
        self._answering.check_model(request.match_info["id"])
        return web.json_response(self._described())

    def _described(self) -> dict[str, object]:
        return {
            "id": self._backend.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "mdiq",
            "max_model_len": self._backend.context_tokens,
        }

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, Chat)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, Completion)

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, Messages)

    async def _count_tokens(self, request: web.Request) -> web.Response:
        answering = self._answering
        async with answering.open_text(request):
            body = await answering.body(request)
            asked = await answering.parsed(request[RECORD].num_bytes, partial(parse_messages, body, is_count=True))
            if asked.model is not None:
                answering.check_model(asked.model)
            (prompt,) = await answering.prompts(asked)
        return web.json_response({"input_tokens": len(prompt)})

    async def _answer(self, request: web.Request, shape: type[Shape]) -> web.StreamResponse:
        answering, record = self._answering, request[RECORD]
        body = await answering.asked(request, record)
        parser = partial(parse_messages, body) if shape is Messages else partial(parse, body, is_chat=shape is Chat)
        asked = await answering.parsed(record.num_bytes, parser)
        async with answering.begun(asked, record) as begun:
            out = shape(self._backend.model_name)
            out.answers = answers = begun.answers
            if asked.is_streamed:
                return await send_stream(request, begun.events, out, answers, asked.wants_usage)
            async for event in begun.events:
                if event is not None:
                    answers[event[0]].add(event[1])
            if asked.logprobs.wanted is None and not asked.logprobs.echo:
                return web.json_response(out.whole(answers))
            text = await answering.in_thread(partial(out.whole_text, answers))
            return web.json_response(text=text)


def _no_route(request: web.Request, error: web.HTTPException) -> str:
    text = f"{request.method} {request.path[:200]}: {error.reason}"
    return f"{text}; the API is under /v1, as in POST /v1/chat/completions" if error.status == 404 else text
