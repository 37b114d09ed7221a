"""The connections to one server: requests to it, and what is heard of it. What is asked, and why, is for others."""

import asyncio
import io
import json
import os
import socket as sockets
import ssl
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import aiohttp
import structlog

from mdiq.route.servers import Server, State, report_of

log = structlog.get_logger()

LOOK_S = 1.0
"""Between two looks at a server."""
CONNECT_S = 3.0
MAX_STATUS_BYTES = 4 << 20
MAX_SHORT_BYTES = 1 << 20
_READ_BYTES = 64 * 1024
OWED_S = 3_600.0
"""How long a message waits for its server: as long as `mdiq serve` keeps a response."""
MAX_OWED = 1_000
TELL_S = 3.0


class BrokenError(Exception):
    """A server has not given its answer: nobody listens there, the connection has broken, or it is gone.

    is_refused: nobody listens there, so it has not got the request. event: the last one of a stream, which says why.
    """

    def __init__(self, text: str, *, is_refused: bool = False, event: bytes = b"") -> None:
        super().__init__(text)
        self.is_refused, self.event = is_refused, event


@dataclass(frozen=True, slots=True)
class Owed:
    """A request without a body that a server gets when it is there. headers: of the client that it is for."""

    method: str
    path: str
    headers: Mapping[str, str]
    since_s: float


class Link:
    """One server. on_news: called when its state has changed.

    passes_keys: requests have the key of their client; key is for the status alone then.
    """

    def __init__(
        self,
        name: str,
        url: str,
        key: str | None,
        tls: ssl.SSLContext | None,
        silence_s: float,
        on_news: Callable[[Server, State], None],
        *,
        passes_keys: bool = False,
    ) -> None:
        self.server = Server(name, silence_s)
        self.url, self._tls = url, tls
        self.key, self.passes_keys = key, passes_keys or key is None
        self._on_news = on_news
        self._hurry = asyncio.Event()
        self._scopes: set[asyncio.Timeout] = set()
        self._owed: deque[Owed] = deque(maxlen=MAX_OWED)
        self._session: aiohttp.ClientSession | None = None
        self._in_use: Counter[aiohttp.ClientSession] = Counter()  # requests of each, also of those before

    async def watch(self) -> NoReturn:
        """Look at the server again and again."""
        while True:
            before = self.server.state
            await self._look()
            if self.server.state is not before:
                log.info("server_changed", server=self.server.name, state=self.server.state, text=self.server.text)
                if self.server.state is State.GONE:
                    self._end_all()
                self._on_news(self.server, before)
            self._hurry.clear()
            await self._tell_owed()
            await self._close_idle()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._hurry.wait()

    def look_soon(self) -> None:
        """Look at the server now: something went wrong with it."""
        self._hurry.set()

    def owe(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Send a request as soon as the server is there, and send it again until the server has answered it."""
        self._owed.append(Owed(method, path, headers, time.monotonic()))
        self.look_soon()

    async def _tell_owed(self) -> None:
        for owed in list(self._owed):
            if self.server.state not in (State.SERVES, State.WAITS):
                return
            if time.monotonic() - owed.since_s < OWED_S and not await self._tell(owed):
                return  # it is sent again after the next look
            with suppress(ValueError):  # others have pushed it out
                self._owed.remove(owed)

    async def _tell(self, owed: Owed) -> bool:
        """Send a request; return whether the server has answered it."""
        try:
            async with asyncio.timeout(TELL_S), self.ask(owed.method, owed.path, headers=owed.headers) as response:
                await self.short(response, MAX_STATUS_BYTES)
        except (BrokenError, TimeoutError):
            return False
        if response.status >= 500:
            return False
        log.info("server_told", server=self.server.name, method=owed.method, status=response.status)
        return True

    async def aclose(self) -> None:
        """Close all connections."""
        for session in list(self._in_use):
            await session.close()

    def take_over(self, key: str | None, tls: ssl.SSLContext | None, silence_s: float, *, passes_keys: bool) -> None:
        """Use another key and other certificates from now on. Requests that run end as they began."""
        self.key, self.passes_keys = key, passes_keys or key is None
        self.server.silence_s = silence_s
        if tls is not None:  # a connection that is open was let in by the certificates before
            self._tls, self._session = tls, None
        self.look_soon()

    async def _close_idle(self) -> None:
        """Close the connections before a change when nothing runs over them any more."""
        for session in [each for each, num in self._in_use.items() if not num and each is not self._session]:
            del self._in_use[session]
            await session.close()

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, *, data: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask the server; its connection is closed at the end, unless all of the answer was read.

        headers: of a client's request, with its key where that is passed on; None: the router asks for itself.

        Raises:
            BrokenError: it is not answered, or the server is gone meanwhile.
        """
        try:
            async with asyncio.timeout(None) as scope:
                self._scopes.add(scope)
                session = self._client()
                self._in_use[session] += 1
                try:
                    response = await self._begin(session, method, path, data, headers)
                    try:
                        yield response
                    finally:
                        response.close()
                finally:
                    self._in_use[session] -= 1
                    self._scopes.discard(scope)
        except TimeoutError:
            if not scope.expired():
                raise
            raise BrokenError(f"{self.server.name}: {self.server.text}") from None

    async def _begin(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str] | None,
    ) -> aiohttp.ClientResponse:
        is_own = self.key is not None and (headers is None or not self.passes_keys)
        own = {"Authorization": f"Bearer {self.key}"} if is_own else {}
        kind = {} if data is None else {"Content-Type": "application/json"}
        body = None if data is None else io.BytesIO(data)
        all_headers = {"Accept-Encoding": "identity", **(headers or {}), **own, **kind}
        try:
            return await session.request(method, self.url + path, data=body, headers=all_headers, allow_redirects=False)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._broken(error) from None

    async def chunks(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """Yield an answer as it comes.

        Raises:
            BrokenError: it breaks off.
        """
        while True:
            try:
                data = await response.content.read(_READ_BYTES)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise self._broken(error) from None
            if not data:
                return
            self.server.heard(time.monotonic())
            yield data

    async def short(self, response: aiohttp.ClientResponse, max_bytes: int = MAX_SHORT_BYTES) -> bytes:
        """Return an answer that is short: a status, or a refusal.

        Raises:
            BrokenError: it breaks off, or is too large.
        """
        body = bytearray()
        async for data in self.chunks(response):
            body += data
            if len(body) > max_bytes:
                raise BrokenError(f"{self.server.name}: its answer has more than {max_bytes} bytes")
        return bytes(body)

    async def _look(self) -> None:
        server = self.server
        since_s = 0.0 if server.heard_s is None else time.monotonic() - server.heard_s
        wait_s = server.silence_s if server.state is State.GONE else max(server.silence_s - since_s, 0.1)
        try:
            async with asyncio.timeout(wait_s), self.ask("GET", "/status.json") as response:
                body = await self.short(response, MAX_STATUS_BYTES)
            self._told(response.status, body)
        except BrokenError as error:
            if error.is_refused:
                server.refused(str(error))
        except TimeoutError:
            pass
        server.look(time.monotonic())

    def _told(self, status: int, body: bytes) -> None:
        now = time.monotonic()
        if status in (401, 403):
            self.server.locked(now)
            return
        try:
            self.server.reported(report_of(json.loads(body) if status == 200 else None), now)
        except (ValueError, RecursionError) as error:
            why = str(error) if status == 200 else f"it answers its status with {status}"
            self.server.misunderstood(why, now)

    def _broken(self, error: Exception) -> BrokenError:
        self.look_soon()
        if isinstance(error, aiohttp.ClientSSLError):
            wrong = getattr(error, "certificate_error", None) or getattr(error, "os_error", error)
            why = getattr(wrong, "verify_message", None) or getattr(wrong, "reason", None) or "no TLS"
            return BrokenError(f"{self.server.name}: its certificate is refused ({why}); see ca_file", is_refused=True)
        if isinstance(error, aiohttp.ClientConnectorError):
            cause = error.os_error
            why = f"nobody answers at {self.url} ({os.strerror(cause.errno) if cause.errno else type(cause).__name__})"
            return BrokenError(f"{self.server.name}: {why}", is_refused=True)
        return BrokenError(f"{self.server.name}: the connection broke ({type(error).__name__})")

    def _end_all(self) -> None:
        """End all that waits for this server: it is gone."""
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            scope.reschedule(now)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            tls = self._tls if self._tls is not None else True
            connector = aiohttp.TCPConnector(limit=0, ssl=tls, socket_factory=watched_socket)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=_READ_BYTES,
                auto_decompress=False,
                skip_auto_headers=["User-Agent"],
            )
        return self._session


def watched_socket(address: Any) -> sockets.socket:
    """Return a socket that notices when nobody knows its connection any more, though the server lives.

    address: as getaddrinfo returns it.
    """
    family, kind, protocol, _, _ = address
    made = sockets.socket(family, kind, protocol)
    made.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)
    for option, value in ((sockets.TCP_KEEPIDLE, 15), (sockets.TCP_KEEPINTVL, 5), (sockets.TCP_KEEPCNT, 3)):
        made.setsockopt(sockets.IPPROTO_TCP, option, value)
    return made


def key_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers with a client's own key, for servers that are to get that. What is not ASCII is no key."""
    found = {name: headers.get(name, "") for name in ("Authorization", "x-api-key")}
    return {name: value for name, value in found.items() if value and value.isascii()}


def is_stream(response: aiohttp.ClientResponse) -> bool:
    """Return whether an answer is a stream of events."""
    return response.content_type == "text/event-stream"
