"""From a request to the events of its answers: its place, its body, its prompts, and the ring.

The routes, and the forms of answers, are for others.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog
from aiohttp import web

from mdiq.api.admission import Admission, Asker, Places
from mdiq.api.audit import RECORD, Record
from mdiq.api.backend import Backend
from mdiq.api.bodies import LARGE_BODY_BYTES, Bodies
from mdiq.api.clients import Client, Clients
from mdiq.api.figures import Figures
from mdiq.api.forming import formed, parser_of
from mdiq.api.lasting import KeptResponse, LastingAnswer
from mdiq.api.logprobs import AnswerLogprobs
from mdiq.api.requests import ApiError, Asked, BadRequest, too_long
from mdiq.api.shapes import Answer
from mdiq.api.streams import Events, merged
from mdiq.core.sequence import SamplingParams
from mdiq.errors import CapacityError, ConfigError, MdiqError, ModelError
from mdiq.runtime.starter_service import StreamEvent

log = structlog.get_logger()

TEXT_THREADS = 2  # a short text does not wait for a long one; the other threads are the ring's

MAX_OPEN_TEXTS = 32  # requests that only count or make tokens; each may hold megabytes
MAX_ECHO_CHARACTERS = 8 << 20  # of all answers of one request

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Begun:
    """The answers of a request that runs, and their events, which are to be added to them. lasting: see ``begun``."""

    answers: Sequence[Answer]
    events: Events
    lasting: LastingAnswer | None = None


class Answering:
    """Runs requests on a Backend."""

    def __init__(
        self, backend: Backend, clients: Clients, admission: Admission, figures: Figures, *, client_timeout_s: float
    ) -> None:
        self._backend = backend
        self._clients = clients
        self._admission = admission
        self._figures = figures
        self._bodies = Bodies(client_timeout_s)
        self._texts = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="texts")
        self._text_turns = asyncio.Semaphore(TEXT_THREADS)
        self._open_texts: list[bytes] = []  # the digests of their keys

    def close(self) -> None:
        """Let go of the threads."""
        self._texts.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def open_text(self, request: web.Request) -> AsyncIterator[None]:
        """Have a request open that needs no place in the Ring, but memory and a thread.

        Raises:
            ApiError: too many are.
        """
        key = _client_of(request[RECORD]).key.digest
        if len(self._open_texts) >= MAX_OPEN_TEXTS or self._open_texts.count(key) >= self._max_open_of_key:
            waiting = len(self._open_texts)
            await self._bodies.discard(request)
            raise ApiError(429, f"{waiting} texts are waiting for their tokens", retry_after_s=1)
        self._open_texts.append(key)
        try:
            yield
        finally:
            self._open_texts.remove(key)

    @property
    def _max_open_of_key(self) -> int:
        """A quarter of them is for others, where there are others."""
        return MAX_OPEN_TEXTS * 3 // 4 if self._clients.has_keys else MAX_OPEN_TEXTS

    def check_model(self, name: str) -> None:
        """Raise ApiError for the name of a model that is not served."""
        if name != self._backend.model_name:
            text = f"model {name[:80]!r} is not served here; this ring serves {self._backend.model_name!r}"
            raise ApiError(404, text, param="model", code="model_not_found")

    async def asked(self, request: web.Request, record: Record) -> object:
        """Return the JSON of a request for an answer, if there is a place for it.

        Raises:
            ApiError: there is none now, or the body is not JSON.
        """
        backend, client = self._backend, _client_of(record)
        try:
            if not backend.takes_requests:
                raise ApiError(503, backend.state)
            client.check(1, time.monotonic())
            running, asker = backend.num_running, self._asker(client)
            self._admission.check(1, backend.max_requests, time.monotonic(), num_running=running, asker=asker)
        except ApiError:
            await self._bodies.discard(request)
            raise
        return await self.body(request)

    @asynccontextmanager
    async def begun(self, asked: Asked, record: Record, *, lasts: bool = False) -> AsyncIterator[Begun]:
        """Run a request; what of it is not finished at the end is cancelled. record: notes what becomes of it.

        lasts: its one answer goes on over other rings, and other processes.

        Raises:
            ApiError: it cannot be served, or not now.
        """
        backend, client = self._backend, _client_of(record)
        if asked.model is not None:
            self.check_model(asked.model)
        # Requests that are still being tokenized are not running yet, and count too.
        num_asked = asked.num_answers
        num_choices = asked.num_choices
        with client.in_flight(num_asked, time.monotonic(), num_choices=num_choices):
            places = self._admission.take(
                num_asked,
                backend.max_requests,
                time.monotonic(),
                num_running=backend.num_running,
                asker=self._asker(client),
                num_choices=num_choices,
            )
            try:
                begun = await self._begin(asked, record, places, lasts=lasts)
                async with self._recorded(begun, record):
                    yield begun
            finally:
                self._admission.leave(places, time.monotonic())

    @asynccontextmanager
    async def resumed(self, kept: KeptResponse, record: Record, tries: Callable[[], Any]) -> AsyncIterator[Begun]:
        """Go on with a response of an earlier process; it has a place, whoever has one besides. See ``begun``.

        tries: awaited before a ring computes it.

        Raises:
            ApiError: it cannot be served.
        """
        backend, client = self._backend, _client_of(record)
        prompt, params = kept.prompt, kept.params
        if params.grammar:
            await self.in_thread(partial(backend.check_grammar, params.grammar))
        answer = Answer(len(prompt), params.max_tokens, parser=parser_of(kept.about.get("tools"), backend))
        with client.in_flight(1, time.monotonic(), is_checked=False):
            places = self._admission.take_again(1, time.monotonic(), owner=client.key.owner)
            try:
                places.answers = [answer]
                record.num_prompt, record.has_run = len(prompt), True
                lasting = self._lasting(prompt, params, record, kept.tokens)
                begun = Begun([answer], merged([lasting.events(tries)]), lasting)
                async with self._recorded(begun, record):
                    yield begun
            finally:
                self._admission.leave(places, time.monotonic())

    @asynccontextmanager
    async def _recorded(self, begun: Begun, record: Record) -> AsyncIterator[None]:
        """End a request at the end, and note what it was."""
        try:
            async with aclosing(begun.events):
                yield
        finally:
            record.num_answer = sum(answer.num_tokens for answer in begun.answers)
            record.finish_reason = begun.answers[-1].finish_reason or "none"

    def _lasting(
        self, prompt: tuple[int, ...], params: SamplingParams, record: Record, tokens: Sequence[int] = ()
    ) -> LastingAnswer:
        client = _client_of(record)

        def watch(events: AsyncGenerator[StreamEvent, None], num_before: int) -> AsyncGenerator[StreamEvent, None]:
            return self._figures.watched(events, 0, record.begun_s, client, num_before=num_before)

        key = client.key
        return LastingAnswer(
            self._backend,
            prompt,
            params,
            tokens,
            owner=key.owner,
            share=key.share,
            in_thread=self.in_thread,
            watch=watch,
        )

    async def _begin(self, asked: Asked, record: Record, places: Places, *, lasts: bool) -> Begun:
        backend, client = self._backend, _client_of(record)
        asked, make_parser = await formed(asked, backend, self.in_thread)
        prompts = await self.prompts(asked)
        params = asked.all_params([len(prompt) for prompt in prompts], backend.context_tokens)
        if (largest := max((token for token, _ in params[0].logit_bias), default=0)) >= backend.vocab_size:
            raise BadRequest(f"logit_bias: {_no_token(largest, backend)}", "logit_bias")
        choices = range(asked.num_choices)
        # Answers to one prompt follow each other, so that all but the first find it in the KV cache.
        wanted = [(prompt, each.of_choice(i)) for prompt, each in zip(prompts, params, strict=True) for i in choices]
        answers = [
            Answer(0 if number % len(choices) else len(prompt), each.max_tokens, parser=make_parser())
            for number, (prompt, each) in enumerate(wanted)
        ]
        now = time.monotonic()
        self._admission.fill(places, answers, now)
        await self._prepare(asked, prompts, answers)
        record.num_prompt = sum(map(len, prompts))
        client.begin(record.num_prompt, now)
        record.has_run = True
        if lasts:
            ((prompt, params_of_it),) = wanted
            self._figures.took(len(prompt))
            lasting = self._lasting(prompt, params_of_it, record)
            return Begun(answers, merged([lasting.events()]), lasting)
        key, watched, logprobs = client.key, self._figures.watched, asked.logprobs.wanted
        streams = [
            watched(
                backend.answer(*each, logprobs=logprobs, owner=key.owner, share=key.share),
                answer.num_prompt,
                record.begun_s,
                client,
            )
            for each, answer in zip(wanted, answers, strict=True)
        ]
        return Begun(answers, merged(streams))

    def _asker(self, client: Client) -> Asker:
        return Asker(client.key.owner, self._clients.place_share(client.key))

    async def body(self, request: web.Request) -> object:
        """Return the JSON of a request; raise ApiError if it is none."""
        return await self._bodies.json_of(request)

    async def parsed(self, num_bytes: int, parse: Callable[[], T]) -> T:
        """Return what a parser makes of a body of this size: in a thread if it is large, else others' tokens wait."""
        return await self.in_thread(parse) if num_bytes > LARGE_BODY_BYTES else parse()

    async def _prepare(self, asked: Asked, prompts: Sequence[tuple[int, ...]], answers: Sequence[Answer]) -> None:
        """Have answers begin with their prompts, and hold log-probabilities, where that is asked for."""
        shown, backend = asked.logprobs, self._backend
        # The answers to one prompt follow each other.
        places = [i * len(prompts) // len(answers) for i in range(len(answers))]
        try:
            shown.check_size(sum(len(prompts[place]) for place in places))
        except ConfigError as error:
            raise BadRequest(str(error), "logprobs") from None
        num_echoed = 0
        for answer, place in zip(answers, places, strict=True):
            prompt = prompts[place] if shown.echo else ()
            answer.drops_answer = shown.drops_answer
            if shown.wanted is not None:
                answer.logprobs = AnswerLogprobs(backend.spell, prompt, drops_answer=shown.drops_answer)
            if shown.echo:
                given = asked.prompts[place]
                if not isinstance(given, str):
                    given = await self.in_thread(partial(backend.decode, given))
                num_echoed += len(given)
                if num_echoed > MAX_ECHO_CHARACTERS:
                    text = (
                        f"echo: all answers together repeat more than {MAX_ECHO_CHARACTERS} characters; ask for fewer"
                    )
                    raise BadRequest(text, "echo")
                answer.repeat(given)

    async def prompts(self, asked: Asked) -> list[tuple[int, ...]]:
        """Return the tokens of each prompt; raise BadRequest if there can be none."""
        backend = self._backend
        field = "messages" if asked.is_chat else "prompt"
        try:
            # Long texts take long, and others' tokens must not wait.
            if asked.messages is not None:
                tools = asked.tools.told if asked.tools else ()
                chat_ids = partial(backend.chat_ids, asked.messages, asked.template_kwargs, tools)
                prompts = [tuple(await self.in_thread(chat_ids))]
            else:
                texts = [prompt for prompt in asked.prompts if isinstance(prompt, str)]
                encoded = iter(await self.in_thread(partial(backend.encode, texts)) if texts else ())
                prompts = [tuple(next(encoded)) if isinstance(prompt, str) else prompt for prompt in asked.prompts]
        except CapacityError as error:
            raise too_long(str(error), backend.context_tokens, field) from None
        except ModelError as error:  # it names files of this machine
            log.warning("template_failed", error=str(error))
            text = f"{field}: the model's chat template cannot render them; the service's log says why"
            raise BadRequest(text, field) from None
        except MdiqError as error:
            raise BadRequest(str(error), field) from None
        if not all(prompts):
            raise BadRequest(f"{field}: it is empty; give at least one token", field)
        # A token id without an embedding would fail the whole Batch.
        if (largest := max(map(max, prompts))) >= backend.vocab_size:
            raise BadRequest(f"{field}: {_no_token(largest, backend)}", field)
        return prompts

    async def in_thread(self, job: Callable[[], T]) -> T:
        """Run a job in a thread. One whose client has gone keeps its thread, and nothing waits there for its turn."""
        await self._text_turns.acquire()
        loop, running = asyncio.get_running_loop(), self._texts.submit(job)

        def ended(_: object) -> None:
            with suppress(RuntimeError):  # the service has ended meanwhile
                loop.call_soon_threadsafe(self._text_turns.release)

        running.add_done_callback(ended)
        return await asyncio.wrap_future(running)


def _client_of(record: Record) -> Client:
    assert record.client is not None  # else it was refused
    return record.client


def _no_token(token: int, backend: Backend) -> str:
    return f"token id {token}: the model has {backend.vocab_size} tokens only"
