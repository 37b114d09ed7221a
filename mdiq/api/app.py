"""Routes, errors and keys of the HTTP API. Prompts and answers are never logged.

A client that disconnects cancels its Sequence: aiohttp cancels its handler, which closes the Backend's iterator. The
connection of one that does not read its answer is ended by server.py.
"""

import asyncio
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
from mdiq.api.audit import RECORD, add_request_id, audited
from mdiq.api.backend import Backend
from mdiq.api.clients import Client, Clients
from mdiq.api.figures import Figures
from mdiq.api.forming import formed
from mdiq.api.keys import ApiKey
from mdiq.api.logprobs import AnswerLogprobs
from mdiq.api.messages import PATH, Messages, errors_in_their_form, parse_messages
from mdiq.api.metrics import metrics_registry
from mdiq.api.requests import ApiError, Asked, BadRequest, broke, parse, too_long
from mdiq.api.server import CLIENT_TIMEOUT_S, error_response, let_in
from mdiq.api.shapes import Answer, Chat, Completion, Shape
from mdiq.api.streams import merged, send_stream
from mdiq.api.token_routes import TokenRoutes
from mdiq.errors import CapacityError, ConfigError, MdiqError

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

    keys: every request but /health and /ready must carry one of them; if empty, none is needed. cors_origins: web pages
    of these origins may call the API from a browser; "*": of all.
    """

    def __init__(
        self,
        backend: Backend,
        keys: Sequence[ApiKey] = (),
        *,
        cors_origins: Sequence[str] = (),
        client_timeout_s: float = CLIENT_TIMEOUT_S,
    ) -> None:
        self._backend = backend
        self._cors_origins = cors_origins
        self._client_timeout_s = client_timeout_s
        self._clients = Clients(keys)
        self._created = int(time.time())
        self._admission = Admission()
        self._large_bodies = asyncio.Semaphore(MAX_LARGE_BODIES)
        self._texts = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="texts")
        self._text_turns = asyncio.Semaphore(TEXT_THREADS)
        self._registry = metrics_registry(self.status)
        self._figures = Figures(self._registry)

    def status(self) -> Mapping[str, Any]:
        """Return what `mdiq status --json` shows."""
        status = self._backend.status()
        requests = {**status["requests"], **self._admission.counts()}
        return {**status, "requests": requests, "keys": self._clients.counts()}

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
        app.on_response_prepare.extend([self._allow_origin, add_request_id])
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
                web.post(PATH, self._messages),
                web.post(f"{PATH}/count_tokens", self._count_tokens),
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
            request[RECORD].client = self._clients.find(request.headers)
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

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, Messages)

    async def _count_tokens(self, request: web.Request) -> web.Response:
        asked = parse_messages(await self._body(request), is_count=True)
        if asked.model is not None:
            self._check_model(asked.model)
        (prompt,) = await self._prompts(asked)
        return web.json_response({"input_tokens": len(prompt)})

    async def _answer(self, request: web.Request, shape: type[Shape]) -> web.StreamResponse:
        backend, admission, client = self._backend, self._admission, request[RECORD].client
        assert client is not None  # else it was refused
        try:
            if not backend.takes_requests:
                raise ApiError(503, backend.state)
            client.check(1, time.monotonic())
            admission.check(1, backend.max_requests, time.monotonic(), **self._whose(client))
        except ApiError:
            await self._discard_body(request)
            raise
        body = await self._body(request)
        asked = parse_messages(body) if shape is Messages else parse(body, is_chat=shape is Chat)
        if asked.model is not None:
            self._check_model(asked.model)
        # Requests that are still being tokenized are not running yet, and count too.
        num_asked = asked.num_answers
        if asked.num_choices > 1 and num_asked > backend.max_requests:
            text = f"n: {num_asked} answers; this ring gives {backend.max_requests} at once, so ask for fewer"
            raise BadRequest(text, "n")
        with client.in_flight(num_asked, time.monotonic()):
            now = time.monotonic()
            places = admission.take(num_asked, backend.max_requests, now, **self._whose(client))
            try:
                return await self._run(request, asked, shape, places)
            finally:
                admission.leave(places, time.monotonic())

    def _whose(self, client: Client) -> dict[str, Any]:
        """Return what the places of a request depend on."""
        part = self._clients.place_share(client.key)
        return {"num_running": self._backend.num_running, "owner": client.key.name, "part": part}

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
        backend, record = self._backend, request[RECORD]
        assert (client := record.client) is not None  # else it was refused
        asked, make_parser = await formed(asked, backend, self._in_thread)
        prompts = await self._prompts(asked)
        params = [asked.params(len(prompt), backend.context_tokens) for prompt in prompts]
        if (
            largest := max((token for each in params for token, _ in each.logit_bias), default=0)
        ) >= backend.vocab_size:
            raise BadRequest(f"logit_bias: {_no_token(largest, backend)}", "logit_bias")
        choices = range(asked.num_choices)
        # Answers to one prompt follow each other, so that all but the first find it in the KV cache.
        wanted = [(prompt, each.of_choice(i)) for prompt, each in zip(prompts, params, strict=True) for i in choices]
        answers = [
            Answer(0 if number % len(choices) else len(prompt), each.max_tokens, parser=make_parser())
            for number, (prompt, each) in enumerate(wanted)
        ]
        out, now = shape(backend.model_name), time.monotonic()
        out.answers = answers
        self._admission.fill(places, answers, now)
        await self._prepare(asked, prompts, answers)
        record.num_prompt = sum(map(len, prompts))
        client.begin(record.num_prompt, now)
        record.has_run = True
        key, watched, logprobs = client.key, self._figures.watched, asked.logprobs.wanted
        streams = [
            watched(
                backend.answer(*each, logprobs=logprobs, owner=key.name, share=key.share),
                answer.num_prompt,
                record.begun_s,
                client,
            )
            for each, answer in zip(wanted, answers, strict=True)
        ]
        try:
            async with aclosing(merged(streams)) as events:
                if asked.is_streamed:
                    return await send_stream(request, events, out, answers, asked.wants_usage)
                async for event in events:
                    if event is not None:
                        answers[event[0]].add(event[1])
        finally:
            record.num_answer = sum(answer.num_tokens for answer in answers)
            record.finish_reason = answers[-1].finish_reason or "none"
        if logprobs is None:
            return web.json_response(out.whole(answers))
        text = await self._in_thread(partial(out.whole_text, answers))
        return web.json_response(text=text)

    async def _prepare(self, asked: Asked, prompts: Sequence[tuple[int, ...]], answers: Sequence[Answer]) -> None:
        """Have answers begin with their prompts, and hold log-probabilities, where that is asked for."""
        shown, backend = asked.logprobs, self._backend
        # The answers to one prompt follow each other.
        places = [i * len(prompts) // len(answers) for i in range(len(answers))]
        try:
            shown.check_size(sum(len(prompts[place]) for place in places))
        except ConfigError as error:
            raise BadRequest(str(error), "logprobs") from None
        for answer, place in zip(answers, places, strict=True):
            prompt = prompts[place] if shown.echo else ()
            answer.drops_answer = shown.drops_answer
            if shown.wanted is not None:
                answer.logprobs = AnswerLogprobs(backend.spell, prompt, drops_answer=shown.drops_answer)
            if shown.echo:
                given = asked.prompts[place]
                if not isinstance(given, str):
                    given = await self._in_thread(partial(backend.decode, given))
                answer.repeat(given)

    async def _prompts(self, asked: Asked) -> list[tuple[int, ...]]:
        backend = self._backend
        field = "messages" if asked.is_chat else "prompt"
        try:
            # Long texts take long, and others' tokens must not wait.
            if asked.messages is not None:
                tools = asked.tools.told if asked.tools else ()
                chat_ids = partial(backend.chat_ids, asked.messages, asked.template_kwargs, tools)
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
