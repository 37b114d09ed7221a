"""Routes, errors and keys of the HTTP API. Prompts and answers are never logged.

A client that disconnects cancels its Sequence: aiohttp cancels its handler, which closes the Backend's iterator. The
connection of one that does not read its answer is ended by server.py.
"""

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from mdiq import __version__
from mdiq.api.admission import Admission, Places
from mdiq.api.backend import Backend
from mdiq.api.metrics import metrics_registry
from mdiq.api.requests import ApiError, Asked, BadRequest, broke, parse, too_long
from mdiq.api.server import CLIENT_TIMEOUT_S, error_response, let_in
from mdiq.api.shapes import Answer, Chat, Completion, Shape
from mdiq.api.streams import merged, send_stream
from mdiq.api.token_routes import TokenRoutes
from mdiq.errors import CapacityError, MdiqError

log = structlog.get_logger()

MAX_BODY_BYTES = 2 << 20  # a context of 128,000 tokens is half of it; larger JSON would hold up others' tokens
LARGE_BODY_BYTES = 64 * 1024  # as much is kept of every body before it is read
MAX_LARGE_BODIES = 16  # that are read at once
TEXT_THREADS = 2  # a short text does not wait for a long one; the other threads are the ring's
_PUBLIC = ("/health", "/ready")

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """The application.

    keys: every request but /health and /ready must carry one of them; if empty, no key is required. cors_origins: web
    pages of these origins may call the API from a browser; "*": of all.
    """

    def __init__(
        self,
        backend: Backend,
        keys: Sequence[str] = (),
        *,
        cors_origins: Sequence[str] = (),
        client_timeout_s: float = CLIENT_TIMEOUT_S,
    ) -> None:
        self._backend = backend
        self._cors_origins = cors_origins
        self._client_timeout_s = client_timeout_s
        self._keys = [key.encode() for key in keys]
        self._created = int(time.time())
        self._admission = Admission()
        self._large_bodies = asyncio.Semaphore(MAX_LARGE_BODIES)
        self._texts = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="texts")
        self._text_turns = asyncio.Semaphore(TEXT_THREADS)
        self._registry = metrics_registry(self.status)

    def status(self) -> Mapping[str, Any]:
        """Return what `mdiq status --json` shows."""
        status = self._backend.status()
        return {**status, "requests": {**status["requests"], **self._admission.counts()}}

    def note_cut_off(self) -> None:
        """Count an answer whose connection was ended because nobody read it."""
        self._admission.num_cut_off += 1

    def application(self) -> web.Application:
        """Return it with its routes."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._errors])
        app.on_response_prepare.append(self._allow_origin)
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
                *TokenRoutes(self._backend, self._body, self._in_thread, self._check_model).routes(),
            ]
        )
        return app

    async def _close(self, _: web.Application) -> None:
        self._texts.shutdown(wait=False, cancel_futures=True)

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.method == "OPTIONS" and self._origin(request):
                return web.Response(status=204)  # browsers ask without the key
            if request.path not in _PUBLIC and not self._is_allowed(request):
                raise ApiError(401, "a key of this ring's API is missing or wrong; send Authorization: Bearer KEY")
            if request.path not in _PUBLIC:
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

    def _origin(self, request: web.Request) -> str | None:
        """Return the request's origin if its web pages may call the API."""
        origin = request.headers.get("Origin")
        return origin if {origin, "*"} & {*self._cors_origins} else None

    async def _allow_origin(self, request: web.Request, response: web.StreamResponse) -> None:
        if origin := self._origin(request):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"
            if request.method == "OPTIONS":
                asked = request.headers.get("Access-Control-Request-Headers", "Authorization, Content-Type")
                response.headers["Access-Control-Allow-Headers"] = asked
                response.headers["Access-Control-Allow-Methods"] = "GET, POST"
                response.headers["Access-Control-Max-Age"] = "600"

    def _is_allowed(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        sent = given.strip().encode(errors="surrogateescape") if scheme.lower() == "bearer" else b""
        # All are compared, so that the time taken reveals nothing.
        return not self._keys or any([hmac.compare_digest(sent, key) for key in self._keys])

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
        self._check_model(request.match_info["id"])
        return web.json_response(self._described())

    def _described(self) -> dict[str, object]:
        return {
            "id": self._backend.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "mdiq",
            "max_model_len": self._backend.context_tokens,
        }

    def _check_model(self, name: str) -> None:
        if name != self._backend.model_name:
            text = f"model {name[:80]!r} is not served here; this ring serves {self._backend.model_name!r}"
            raise ApiError(404, text, param="model", code="model_not_found")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, Chat)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, Completion)

    async def _answer(self, request: web.Request, shape: type[Shape]) -> web.StreamResponse:
        backend, admission = self._backend, self._admission
        try:
            if not backend.takes_requests:
                raise ApiError(503, backend.state)
            admission.check(1, backend.max_requests, time.monotonic(), num_running=backend.num_running)
        except ApiError:
            await self._discard_body(request)
            raise
        asked = parse(await self._body(request), is_chat=shape is Chat)
        if asked.model is not None:
            self._check_model(asked.model)
        # Requests that are still being tokenized are not running yet, and count too.
        num_asked, now = asked.num_answers, time.monotonic()
        if asked.num_choices > 1 and num_asked > backend.max_requests:
            text = f"n: {num_asked} answers; this ring gives {backend.max_requests} at once, so ask for fewer"
            raise BadRequest(text, "n")
        places = admission.take(num_asked, backend.max_requests, now, num_running=backend.num_running)
        try:
            return await self._run(request, asked, shape, places)
        finally:
            admission.leave(places, time.monotonic())

    async def _discard_body(self, request: web.Request) -> None:
        """Let a client send its body, and keep nothing of it: some do not see an answer that comes before that."""
        with suppress(TimeoutError, web.RequestPayloadError, HttpProcessingError):
            async with asyncio.timeout(self._client_timeout_s):
                while await request.content.readany():
                    pass

    async def _body(self, request: web.Request) -> object:
        size = request.content_length
        turn = self._large_bodies if size is None or size > LARGE_BODY_BYTES else nullcontext()
        try:
            async with asyncio.timeout(self._client_timeout_s), turn:
                body = await request.read()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._client_timeout_s:g} s") from None
        except (web.RequestPayloadError, HttpProcessingError):  # their messages quote the request
            raise BadRequest("the body is not valid HTTP") from None
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise BadRequest(f"the body is not JSON ({reason})") from None

    async def _run(self, request: web.Request, asked: Asked, shape: type[Shape], places: Places) -> web.StreamResponse:
        backend = self._backend
        prompts = await self._prompts(asked)
        params = asked.all_params([len(prompt) for prompt in prompts], backend.context_tokens)
        if (largest := max((token for token, _ in params[0].logit_bias), default=0)) >= backend.vocab_size:
            raise BadRequest(f"logit_bias: {_no_token(largest, backend)}", "logit_bias")
        choices = range(asked.num_choices)
        # Answers to one prompt follow each other, so that all but the first find it in the KV cache.
        wanted = [(prompt, each.of_choice(i)) for prompt, each in zip(prompts, params, strict=True) for i in choices]
        answers = [
            Answer(0 if number % len(choices) else len(prompt), each.max_tokens)
            for number, (prompt, each) in enumerate(wanted)
        ]
        out, start_s = shape(backend.model_name), time.monotonic()
        self._admission.fill(places, answers, start_s)
        streams = [backend.answer(*each) for each in wanted]
        try:
            async with aclosing(merged(streams)) as events:
                if asked.is_streamed:
                    return await send_stream(request, events, out, answers, asked.wants_usage)
                async for event in events:
                    if event is not None:
                        answers[event[0]].add(event[1])
        finally:
            log.info(
                "request_ended",
                prompt_tokens=sum(answer.num_prompt for answer in answers),
                tokens=sum(answer.num_tokens for answer in answers),
                finish_reason=answers[-1].finish_reason or "none",
                seconds=round(time.monotonic() - start_s, 3),
            )
        return web.json_response(out.whole(answers))

    async def _prompts(self, asked: Asked) -> list[tuple[int, ...]]:
        backend = self._backend
        field = "messages" if asked.is_chat else "prompt"
        try:
            # Long texts take long, and others' tokens must not wait.
            if asked.messages is not None:
                chat_ids = partial(backend.chat_ids, asked.messages, asked.template_kwargs)
                prompts = [tuple(await self._in_thread(chat_ids))]
            else:
                texts = [prompt for prompt in asked.prompts if isinstance(prompt, str)]
                encoded = iter(await self._in_thread(partial(backend.encode, texts)) if texts else ())
                prompts = [tuple(next(encoded)) if isinstance(prompt, str) else prompt for prompt in asked.prompts]
        except CapacityError as error:
            raise too_long(str(error), backend.context_tokens, field) from None
        except MdiqError as error:
            raise BadRequest(str(error), field) from None
        if not all(prompts):
            raise BadRequest(f"{field}: it is empty; give at least one token", field)
        # A token id without an embedding would fail the whole Batch.
        if (largest := max(map(max, prompts))) >= backend.vocab_size:
            raise BadRequest(f"{field}: {_no_token(largest, backend)}", field)
        return prompts

    async def _in_thread(self, job: Callable[[], T]) -> T:
        """Run a job in a thread. One whose client has gone keeps its thread, and nothing waits there for its turn."""
        await self._text_turns.acquire()
        loop, running = asyncio.get_running_loop(), self._texts.submit(job)

        def ended(_: object) -> None:
            with suppress(RuntimeError):  # the service has ended meanwhile
                loop.call_soon_threadsafe(self._text_turns.release)

        running.add_done_callback(ended)
        return await asyncio.wrap_future(running)


def _no_token(token: int, backend: Backend) -> str:
    return f"token id {token}: the model has {backend.vocab_size} tokens only"


def _no_route(request: web.Request, error: web.HTTPException) -> str:
    text = f"{request.method} {request.path[:200]}: {error.reason}"
    return f"{text}; the API is under /v1, as in POST /v1/chat/completions" if error.status == 404 else text
