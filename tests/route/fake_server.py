"""Servers without a model that can die, hang and refuse, and a router in front of them, over real sockets."""

import asyncio
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from mdiq.api.app import Api
from mdiq.api.keys import ApiKey, bare_keys
from mdiq.core.logprobs import LogprobsWanted
from mdiq.core.sequence import FinishReason, SamplingParams, TokenEvent
from mdiq.route.app import RouteApi
from mdiq.route.links import Link
from mdiq.route.pool import Pool
from mdiq.route.servers import State
from mdiq.runtime.starter_service import StreamEvent
from tests.api.test_app import FakeRing

Client = TestClient[web.Request, web.Application]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ACCEPTING = "_accept_connection2"  # asyncio's, of a connection that is not a protocol's yet


def holding(token: int) -> tuple[asyncio.Event, Callable[[int], Awaitable[object] | None]]:
    """Return the event that is set when a model reaches a token, and what makes it stay there, as its ``before``."""
    reached = asyncio.Event()

    def before(i: int) -> Awaitable[object] | None:
        if i < token:
            return None
        reached.set()
        return asyncio.Event().wait()

    return reached, before


class FakeModel(FakeRing):
    """Its words follow from the prompt, the seed and the position alone, and from what kind of model it is."""

    kind = 0
    same_tokens: str | None = "same"
    num_places = 4
    kv_live_tokens = 0

    async def answer(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        logprobs: LogprobsWanted | None = None,
        owner: str = "",
        share: int = 1,
    ) -> AsyncGenerator[StreamEvent, None]:
        index = len(self.asked)
        self.asked.append((prompt, params))
        self.owners.append((owner, share))
        self.num_running += 1
        try:
            for i in range(params.max_tokens):
                waiting = self.before(i)
                if waiting is not None:
                    await waiting
                seed = params.seed if params.temperature else "greedy"
                word = random.Random(f"{prompt} {seed} {self.kind if i > 1 else 0} {i}").randrange(1_000_000)
                reason = FinishReason.LENGTH if i == params.max_tokens - 1 else None
                yield StreamEvent(TokenEvent(index, i, len(prompt) + i, reason), f" {word}", time.monotonic())
        finally:
            self.num_running -= 1
            self.closed.set()

    def status(self) -> Mapping[str, Any]:
        serves = {"model": self.model_name, "context_tokens": self.context_tokens, "max_requests": self.max_requests}
        requests = {"waiting": 0, "running": self.num_running, "done": 0, "failed": 0, "left": 0, "refused": 0}
        return {
            "is_serving": self.is_serving,
            "state": self.state,
            "nodes": [],
            "rings_formed": 1,
            "requests": requests,
            "pace": {"max_live": self.num_places},
            "kv_live_tokens": self.kv_live_tokens,
            "kv_capacity_tokens": 4_096,
            "serves": {**serves, "same_tokens": self.same_tokens},
        }


class FakeServer:
    """An `mdiq serve` of a FakeModel. refuses: status of its answers, if it gives none. hangs: nothing is answered."""

    def __init__(self, name: str, *keys: str) -> None:
        self.name, self._keys = name, keys
        self.model = FakeModel(context_tokens=4_096, max_requests=16)
        self.refuses: int | None = None
        self.retry_after = "7"
        self.hangs = False
        self.asked: list[Any] = []
        self.port = 0
        self.tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; again at the same port."""
        app = Api(self.model, bare_keys(self._keys)).application()
        app.middlewares.insert(0, self._faults)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        assert self._runner.server is not None  # it is set up
        where = ("127.0.0.1", self.port)
        self._listener = await loop.create_server(self._runner.server, *where, reuse_address=True, ssl=self.tls)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """Die as by kill -9: every connection is reset, and nobody listens."""
        if (server := self._runner.server) is None:
            return  # it is dead already
        for listening in self._listener.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        self._reset(server)
        # asyncio would leave connections open that are just being accepted when their listener closes.
        while any(getattr(each.get_coro(), "__name__", "") == ACCEPTING for each in asyncio.all_tasks()):  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._reset(server)
        self._listener.close()
        await self._runner.cleanup()

    @staticmethod
    def _reset(server: "web.Server[Any]") -> None:
        for connection in list(server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    @web.middleware
    async def _faults(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.hangs:
            await asyncio.Event().wait()
        if request.method == "POST":
            body = await request.json() if request.can_read_body else None
            self.asked.append((request.path, dict(request.headers), body))
            if self.refuses is not None:
                error = {"error": {"message": "no", "type": "unavailable_error", "param": None, "code": None}}
                return web.json_response(error, status=self.refuses, headers={"Retry-After": self.retry_after})
        return await handler(request)


class Router:
    """A router in front of fake servers. client: of its API."""

    def __init__(self, client: Client, pool: Pool, api: RouteApi) -> None:
        self.client, self.pool, self.api = client, pool, api

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something is so; the test's own time limit ends it."""
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def until_state(self, server: FakeServer, state: State) -> None:
        await self.until(lambda: self.pool.links[server.name].server.state is state)

    def figure(self, name: str, **labels: str) -> float:
        """Return a figure of its metrics."""
        return self.pool.figures.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def routed(
    *servers: FakeServer,
    keys: Sequence[ApiKey] = (),
    server_keys: Mapping[str, str] | None = None,
    pass_keys: bool = False,
    silence_s: float = 30.0,
    outage_tolerance_s: float = 10.0,
    max_requests: int = 64,
    waits_for: int | None = None,
) -> AsyncIterator[Router]:
    """Start servers and a router in front of them. waits_for: how many of them are to serve before the test begins."""
    async with AsyncExitStack() as stack:
        pool = Pool(outage_tolerance_s)
        for server in servers:
            if not server.port:
                await server.start()
                stack.push_async_callback(server.kill)
            key = (server_keys or {}).get(server.name)
            link = pool.links[server.name] = Link(
                server.name, server.url, key, None, silence_s, pool.changed, passes_keys=pass_keys
            )
            stack.push_async_callback(link.aclose)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        for link in pool.links.values():
            stack.callback(group.create_task(link.watch()).cancel)
        api = RouteApi(pool, keys, max_requests=max_requests)
        client: Client = TestClient(TestServer(api.application()), timeout=aiohttp.ClientTimeout(20))
        await stack.enter_async_context(client)
        router = Router(client, pool, api)
        wanted = len(servers) if waits_for is None else waits_for
        await router.until(lambda: sum(each.state is State.SERVES for each in pool.servers) >= wanted)
        yield router
