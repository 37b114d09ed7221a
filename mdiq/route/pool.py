"""The servers of a router, and what is known of them together: which is best, what they serve, and any news."""

import asyncio
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any
from weakref import finalize

from aiohttp import ClientResponse, web

from mdiq.api.requests import ApiError
from mdiq.route.choice import Wanted, choose, models_of
from mdiq.route.figures import RouteFigures
from mdiq.route.links import BrokenError, Link
from mdiq.route.prefixes import Prefixes
from mdiq.route.servers import Server, State

MAX_WHOLE_BYTES = 32 << 20
"""Of an answer that is not a stream."""
MAX_HELD_BYTES = 512 << 20
"""Of answers that are not streams, all together: they are held until they are complete, and their clients have them."""


class Pool:
    """Links by the names of their servers. outage_tolerance_s: see config/routes.py."""

    def __init__(self, outage_tolerance_s: float) -> None:
        self.outage_tolerance_s = outage_tolerance_s
        self.links: dict[str, Link] = {}
        self.prefixes = Prefixes()
        self.figures = RouteFigures(lambda: self.servers)
        self._news = asyncio.Event()
        self._num_held = 0

    @property
    def servers(self) -> Iterator[Server]:
        """The servers in the order of the file."""
        return (link.server for link in self.links.values())

    @property
    def is_serving(self) -> bool:
        """Whether any server takes requests."""
        return any(server.takes_requests for server in self.servers)

    def choose(self, wanted: Wanted, tried: Collection[str]) -> Link | None:
        """Return the best server for a request that was not tried; None if there is none now."""
        server = choose(self.servers, wanted, tried)
        return None if server is None else self.links[server.name]

    def model_of(self, name: str | None) -> str | None:
        """Return the model that a request is for.

        Raises:
            ApiError: nobody serves it, or there are several to choose from.
        """
        models = models_of(self.servers)
        if name is None:
            if len(models) > 1:
                text = f"model: several are served here; name one of {', '.join(sorted(models))}"
                raise ApiError(400, text, param="model")
            return None
        if models and name not in models:
            text = f"model {name[:80]!r} is not served here; these are: {', '.join(sorted(models))}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return name

    def models(self) -> dict[str, int]:
        """Return the models and the largest context of each."""
        return models_of(self.servers)

    def nobody(self) -> ApiError:
        """Return the error of a request that no server takes."""
        return ApiError(503, "no server takes requests now; GET /health says what they wait for")

    @property
    def state(self) -> str:
        """Return in words how the servers are."""
        return "; ".join(
            f"{server.name}: {'drained, ' if server.is_drained else ''}{server.state}"
            + (f" ({server.text})" if server.state is not State.SERVES else "")
            for server in self.servers
        )

    def changed(self, server: Server, before: State) -> None:
        """Note that the state of a server has changed, and wake who waits for that."""
        if server.state is State.GONE:
            self.prefixes.forget(server.name)
        self.tell()

    def tell(self) -> None:
        """Wake who waits for news."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def news(self, timeout_s: float) -> None:
        """Wait for news of any server, for so long at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()

    async def whole(self, link: Link, response: ClientResponse) -> bytes:
        """Return an answer that is not a stream.

        Raises:
            ApiError: too much is held of such answers already.
            BrokenError: it breaks off, or is too large.
        """
        body = bytearray()
        try:
            async for data in link.chunks(response):
                body += data
                self._num_held += len(data)
                if self._num_held > MAX_HELD_BYTES:
                    raise ApiError(503, "this router holds too much of other answers; ask again")
                if len(body) > MAX_WHOLE_BYTES:
                    raise BrokenError(f"{link.server.name}: its answer has more than {MAX_WHOLE_BYTES} bytes")
            return bytes(body)
        finally:
            self._num_held -= len(body)

    def held(self, answer: web.Response, num_bytes: int) -> web.Response:
        """Return an answer whose bytes count as held until its client has read it."""
        self._num_held += num_bytes
        finalize(answer, self._let_go, num_bytes)
        return answer

    def _let_go(self, num_bytes: int) -> None:
        self._num_held -= num_bytes

    def status(self) -> list[Mapping[str, Any]]:
        """Return what the status shows of each server."""
        return [_shown(link) for link in self.links.values()]


def _shown(link: Link) -> Mapping[str, Any]:
    server, report = link.server, link.server.report
    return {
        "name": server.name,
        "url": link.url,
        "state": server.state.value,
        "text": server.text,
        "drained": server.is_drained,
        "running": server.num_running,
        "begun": server.num_begun,
        "model": report and report.model,
        "context_tokens": report and report.context_tokens,
        "places": report and report.num_places,
        "max_requests": report and report.max_requests,
        "kv_free_tokens": server.kv_free_tokens,
        "same_tokens": report and report.same_tokens,
    }
