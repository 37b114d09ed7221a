"""Routes of the HTTP API. Prompts and answers are never logged.

A client that disconnects cancels its Sequence: aiohttp cancels its handler, which closes the Backend's iterator. The
connection of one that does not read its answer is ended by server.py.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from aiohttp import web

from mdiq.api.admission import Admission
from mdiq.api.answering import Answering
from mdiq.api.audit import RECORD
from mdiq.api.backend import Backend
from mdiq.api.clients import Clients
from mdiq.api.door import Door
from mdiq.api.figures import Figures
from mdiq.api.hosts import Hosts
from mdiq.api.keys import ApiKey
from mdiq.api.lasting import KeptResponse, ResponseJournal
from mdiq.api.messages import PATH, Messages, parse_messages
from mdiq.api.metrics import metrics_registry
from mdiq.api.origins import Origins
from mdiq.api.requests import ApiError, parse, too_long
from mdiq.api.responses import ResponseRoutes
from mdiq.api.server import CLIENT_TIMEOUT_S
from mdiq.api.shapes import Chat, Completion, Shape
from mdiq.api.streams import send_stream
from mdiq.api.token_routes import TokenRoutes
from mdiq.errors import CapacityError, MdiqError


class Api:
    """The application.

    keys: every request but /health and /ready must carry one of them; if empty, none is needed. cors_origins: web pages
    of these origins may call the API from a browser; "*": of all. allowed_hosts: further names by which it may be asked
    where there are no keys; see Hosts. journal: keeps what outlives the service.
    """

    def __init__(
        self,
        backend: Backend,
        keys: Sequence[ApiKey] = (),
        *,
        cors_origins: Sequence[str] = (),
        allowed_hosts: Sequence[str] = (),
        client_timeout_s: float = CLIENT_TIMEOUT_S,
        journal: ResponseJournal | None = None,
    ) -> None:
        self._backend = backend
        self._clients = Clients(keys)
        self._created = int(time.time())
        self._admission = Admission()
        self.registry = metrics_registry(self.status)
        figures = Figures(self.registry)
        self._answering = Answering(backend, self._clients, self._admission, figures, client_timeout_s=client_timeout_s)
        self._journal = journal
        self._door = Door(
            "ring",
            backend,
            self._clients,
            Origins(cors_origins, Hosts(allowed_hosts)),
            status=self.status,
            registry=self.registry,
            note_refused=self._note_refused,
            as_answer=self._as_answer,
        )
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

    def _note_refused(self, reason: str) -> None:
        self._admission.refused[reason] += 1

    def _as_answer(self, error: MdiqError) -> ApiError:
        is_too_long = isinstance(error, CapacityError)
        return too_long(str(error), self._backend.context_tokens) if is_too_long else ApiError(503, str(error))

    def application(self) -> web.Application:
        """Return it with its routes."""
        app = self._door.application()
        app.on_cleanup.append(self._close)
        app.add_routes(
            [
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
