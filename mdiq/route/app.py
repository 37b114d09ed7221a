"""Routes of the one address: requests are passed to servers, and what only the router knows is answered here.

Prompts and answers are never logged. A client that goes away cancels its handler, and with it what its server does.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from aiohttp import web

from mdiq.api.audit import RECORD
from mdiq.api.bodies import Bodies
from mdiq.api.clients import Client, Clients
from mdiq.api.door import Door
from mdiq.api.hosts import Hosts
from mdiq.api.keys import ApiKey
from mdiq.api.origins import Origins
from mdiq.api.requests import ApiError
from mdiq.api.server import CLIENT_TIMEOUT_S, RETRY_AFTER_S
from mdiq.route.asked import CHATS, COMPLETIONS, MESSAGES, RESPONSES, Asked, asked_of, whole_of
from mdiq.route.pool import Pool
from mdiq.route.run import Run
from mdiq.route.stored import Stored

_ANSWERS = (CHATS, COMPLETIONS, MESSAGES, RESPONSES)
MAX_OPEN_BYTES = 256 << 20
"""Of the bodies of all requests that are open: they are kept until they are answered."""
_WHOLES = ("/tokenize", "/detokenize", f"{MESSAGES}/count_tokens")


class RouteApi:
    """The application.

    keys, cors_origins, allowed_hosts, client_timeout_s: as those of an Api. max_requests: open at once.
    """

    def __init__(
        self,
        pool: Pool,
        keys: Sequence[ApiKey] = (),
        *,
        max_requests: int,
        cors_origins: Sequence[str] = (),
        allowed_hosts: Sequence[str] = (),
        client_timeout_s: float = CLIENT_TIMEOUT_S,
    ) -> None:
        self._pool = pool
        self._stored = Stored(pool)
        self._clients = Clients(keys)
        self._door = Door(
            "router",
            pool,
            self._clients,
            Origins(cors_origins, Hosts(allowed_hosts)),
            status=self.status,
            registry=pool.figures.registry,
            note_refused=lambda reason: pool.figures.refused.labels(reason).inc(),
        )
        self._bodies = Bodies(client_timeout_s)
        self.max_requests = max_requests
        self._num_open = self._num_open_bytes = 0
        self._created = int(time.time())

    def replace_keys(self, keys: Sequence[ApiKey]) -> None:
        """Take over the keys of a file that was read again; requests that run go on."""
        self._clients.replace(keys)

    @property
    def num_open(self) -> int:
        """Prompts of requests that are not answered yet."""
        return self._num_open

    def status(self) -> Mapping[str, Any]:
        """Return what `mdiq status --json` shows of a router."""
        return {
            "is_serving": self._pool.is_serving,
            "state": self._pool.state,
            "servers": self._pool.status(),
            "requests": {"running": self._num_open, "max": self.max_requests},
            "keys": self._clients.counts(),
        }

    def application(self) -> web.Application:
        """Return it with its routes."""
        app = self._door.application()
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.get("/v1/models/{id:.+}", self._model),
                *(web.post(path, self._answer) for path in (*_ANSWERS, *_WHOLES)),
                *self._stored.routes(),
            ]
        )
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        client = request[RECORD].client
        assert client is not None  # else it was refused
        if self._num_open >= self.max_requests or not self._pool.is_serving:
            refusal = self._full() if self._pool.is_serving else self._pool.nobody()
            await self._bodies.discard(request)
            raise refusal
        body = await self._bodies.json_of(request)
        if request.path in _WHOLES:
            asked = whole_of(request.path, body)
        else:
            asked = asked_of(request.path, body, lambda: secrets.randbits(63))
        self._pool.model_of(asked.model)
        return await self._run(request, asked, client)

    async def _run(self, request: web.Request, asked: Asked, client: Client) -> web.StreamResponse:
        if self._num_open + asked.num_prompts > max(self.max_requests, asked.num_prompts):
            raise self._full()
        if self._num_open_bytes + len(asked.data) > MAX_OPEN_BYTES:
            text = f"requests of {self._num_open_bytes >> 20} MiB are open here; ask again in {RETRY_AFTER_S} s"
            raise ApiError(429, text, retry_after_s=RETRY_AFTER_S)
        takes_place = request.path in _ANSWERS
        num_asked, num_choices = asked.num_prompts, asked.num_choices
        in_flight = client.in_flight(num_asked, time.monotonic(), num_choices=num_choices)
        with in_flight if takes_place else nullcontext():
            self._num_open += asked.num_prompts
            self._num_open_bytes += len(asked.data)
            try:
                return await Run(self._pool, self._stored, request, asked).answer()
            finally:
                self._num_open -= asked.num_prompts
                self._num_open_bytes -= len(asked.data)

    def _full(self) -> ApiError:
        text = f"{self._num_open} requests are open here, and at most {self.max_requests} may be; ask again"
        return ApiError(429, f"{text} in {RETRY_AFTER_S} s", retry_after_s=RETRY_AFTER_S)

    async def _models(self, _: web.Request) -> web.Response:
        models = self._pool.models()
        return web.json_response({"object": "list", "data": [self._described(name) for name in models]})

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        self._pool.model_of(name)
        if name not in self._pool.models():
            raise self._pool.nobody()
        return web.json_response(self._described(name))

    def _described(self, name: str) -> Mapping[str, object]:
        room = self._pool.models()[name]
        own = {"created": self._created, "owned_by": "mdiq", "max_model_len": room}
        return {"id": name, "object": "model", **own}
