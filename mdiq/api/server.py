"""HTTP below the routes: malformed requests, idle connections, and clients that do not read.

Nothing that a client sends is logged or echoed.
"""

import asyncio
import contextlib
import socket as sockets
import ssl
from collections.abc import AsyncIterator, Callable
from math import ceil
from pathlib import Path
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from mdiq.api.requests import ApiError
from mdiq.errors import TransportError
from mdiq.transport.room import Room, connection_limit

log = structlog.get_logger()

CLIENT_TIMEOUT_S = 60.0
"""Maximum wait for the head of a request, for its body, and for a client that does not read its answer."""
MAX_CONNECTIONS = 1024
MIN_READ_BYTES = 16 * 1024
"""What a client has to read within the timeout when more waits for it than 64 KiB, as asyncio counts it."""
SEND_BUFFER_BYTES = 16 * 1024
"""Of the kernel, for each connection. It would take megabytes of what is not read."""
SHUTDOWN_S = 1.0  # for answers that are being sent when the service stops
RETRY_AFTER_S = 5
HANDSHAKE_S = 5.0  # of TLS
SEND_AHEAD_BYTES = 64 * 1024
"""That wait to be encrypted; asyncio would keep 512 KiB, and notice a client that does not read that much later."""


def error_response(error: ApiError) -> web.Response:
    """Return an error in OpenAI's form, with the headers that tell clients whether to retry."""
    is_passing = error.status in (429, 503)
    headers = {"Retry-After": str(error.retry_after_s or RETRY_AFTER_S)} if is_passing else {"x-should-retry": "false"}
    response = web.json_response({"error": error.body}, status=error.status, headers=headers)
    if is_passing:  # its connection may be needed, and may be closed as idle just when the client comes again
        response.force_close()
    return response


class _Connection(RequestHandler):
    """One connection. aiohttp's own class would log a malformed request, with traceback, and echo it.

    server: whose connection it is. is_let_in: its client may use the API.
    """

    server: "_Server"
    is_let_in = False
    _link: asyncio.Transport  # aiohttp forgets its own when it closes
    _num_unread = 0
    _reading: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return not self._request_in_progress

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._link = cast(asyncio.Transport, transport)
        if transport.get_extra_info("sslcontext") is not None:
            self._link.set_write_buffer_limits(SEND_AHEAD_BYTES)
        _bound(transport.get_extra_info("socket"), self.server.client_timeout_s)
        self.server.room.accepted(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.server.room.ended(self)
        self._stop_watching()
        if isinstance(exc, TimeoutError) and not self.is_idle:  # the kernel has noticed it first; see _bound
            self._note_cut_off()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Watch a client that does not read: asyncio holds much for it already."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Trust it again."""
        self._stop_watching()
        super().resume_writing()

    def end(self) -> None:
        """Close the connection to make room."""
        log.warning("too_many_connections", most=self.server.max_connections)
        self._link.abort()

    def _watch_reader(self) -> None:
        self._num_unread = self._link.get_write_buffer_size()
        self._reading = self._loop.call_later(self.server.client_timeout_s, self._check_reader)

    def _check_reader(self) -> None:
        num_unread = self._link.get_write_buffer_size()
        # More was written meanwhile, for aiohttp does not wait at once: what was read cannot be told from that.
        if num_unread <= self._num_unread - MIN_READ_BYTES or num_unread > self._num_unread:
            self._watch_reader()
            return
        self._note_cut_off()
        self._link.abort()  # its handler is cancelled, and its Sequence with it

    def _note_cut_off(self) -> None:
        peer = self._link.get_extra_info("peername")
        log.warning("reader_cut_off", client=peer and peer[0])
        self.server.on_cut_off()

    def _stop_watching(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        log.warning("request_malformed", client=request.remote, status=status, kind=type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        text = "this is not valid HTTP" if status < 500 else "mdiq failed at this request"
        response = error_response(ApiError(status, text))
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        log.warning("connection_broke", kind=type(kwargs.get("exc_info")).__name__)


class _Handshake(asyncio.Protocol):
    """A connection that agrees on TLS, and becomes a _Connection then. It counts as a stranger's until that."""

    is_let_in = is_idle = False

    def __init__(self, server: "_Server", context: ssl.SSLContext, tasks: "set[asyncio.Task[None]]") -> None:
        self._server, self._context, self._tasks = server, context, tasks
        self._early: list[bytes] = []
        self._is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._link = cast(asyncio.Transport, transport)
        self._link.pause_reading()  # until TLS reads
        self._server.room.accepted(self)
        shaking = asyncio.create_task(self._shake_hands(), name="handshake")
        self._tasks.add(shaking)
        shaking.add_done_callback(self._tasks.discard)

    def data_received(self, data: bytes) -> None:
        self._early.append(data)  # with the last message of the handshake

    def connection_lost(self, exc: BaseException | None) -> None:
        self._is_lost = True

    def end(self) -> None:
        """Close the connection to make room."""
        log.warning("too_many_connections", most=self._server.max_connections)
        self._link.abort()

    async def _shake_hands(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            link = await loop.start_tls(
                self._link, self, self._context, server_side=True, ssl_handshake_timeout=HANDSHAKE_S
            )
        except OSError:  # no TLS, or none that both know, or it took too long; a stranger's doing
            return
        finally:
            self._server.room.ended(self)
        if link is None or self._is_lost:  # None: the connection has ended meanwhile
            return
        connection = self._server()
        link.set_protocol(connection)
        connection.connection_made(link)
        for data in self._early:
            connection.data_received(data)


class TlsSite(web.TCPSite):
    """Listens for HTTPS. Handshakes are bounded like connections, which aiohttp's own site leaves open."""

    def __init__(self, runner: "ApiRunner", host: str, port: int, context: ssl.SSLContext) -> None:
        super().__init__(runner, host, port)
        self._context = context
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be used.
        """
        await web.BaseSite.start(self)
        server = cast(_Server, self._runner.server)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Handshake(server, self._context, self._tasks), self._host, self._port
        )

    async def stop(self) -> None:
        """Listen no more, and end the handshakes that are under way."""
        await super().stop()
        for shaking in self._tasks:
            shaking.cancel()


class _Server(web.Server):
    room: "Room[_Connection | _Handshake]"
    max_connections: int
    client_timeout_s: float
    on_cut_off: Callable[[], None]

    def __call__(self) -> RequestHandler:
        connection = _Connection(self, loop=self._loop, **self._kwargs)
        connection.server = self
        return connection


def let_in(request: web.Request) -> None:
    """Note that the client of a request may ask: its connection is not closed to make room for others."""
    if isinstance(request.protocol, _Connection):
        request.protocol.is_let_in = True


def _bound(socket: sockets.socket, timeout_s: float) -> None:
    """Bound what the kernel keeps for a client, and how long one may acknowledge nothing, or take nothing in."""
    options = (
        (sockets.SOL_SOCKET, sockets.SO_SNDBUF, SEND_BUFFER_BYTES),
        (sockets.IPPROTO_TCP, sockets.TCP_USER_TIMEOUT, ceil(timeout_s * 1_000)),
        (sockets.IPPROTO_TCP, sockets.TCP_KEEPIDLE, ceil(timeout_s / 2)),
        (sockets.IPPROTO_TCP, sockets.TCP_KEEPINTVL, ceil(timeout_s / 4)),
    )
    for level, option, value in options:
        socket.setsockopt(level, option, value)


class ApiRunner(web.AppRunner):
    """Runs the application. A connection is closed when a request's head does not come within client_timeout_s, or an
    answer is not read; on_cut_off is called then.

    max_connections: beyond it, the oldest connection of a client that may not ask is closed, else the oldest idle one.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        client_timeout_s: float = CLIENT_TIMEOUT_S,
        max_connections: int | None = None,
        on_cut_off: Callable[[], None] = lambda: None,
    ) -> None:
        self._max_connections = max_connections or connection_limit(MAX_CONNECTIONS)
        self._client_timeout_s = client_timeout_s
        self._on_cut_off = on_cut_off
        super().__init__(
            app,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=client_timeout_s,
            shutdown_timeout=SHUTDOWN_S,
        )

    async def _make_server(self) -> Any:
        server = cast(Any, await super()._make_server())
        server.__class__ = _Server  # aiohttp has no parameter for the class of its connections
        server.max_connections = self._max_connections
        server.client_timeout_s, server.on_cut_off = self._client_timeout_s, self._on_cut_off
        server.room = Room[_Connection | _Handshake](
            self._max_connections, lambda it: it.is_let_in, lambda it: it.end(), lambda it: it.is_idle
        )
        return server


@contextlib.asynccontextmanager
async def listening(
    runner: ApiRunner, file: Path, host: str, port: int, context: ssl.SSLContext | None
) -> AsyncIterator[None]:
    """Have an application answer at an address, over HTTPS where there is a ``context``. file: says so, for errors.

    Raises:
        TransportError: the address cannot be used.
        MdiqError: the application cannot start.
    """
    try:
        await runner.setup()
        site = web.TCPSite(runner, host, port) if context is None else TlsSite(runner, host, port, context)
        try:
            await site.start()
        except OSError as error:  # it may be free, or this machine's, in a while: a service manager tries again
            raise TransportError(
                f"{file}: api: {host} port {port} cannot be used ({error.strerror}); "
                "see what listens there and whether this machine has that address, or choose others"
            ) from None
        yield
    finally:
        await runner.cleanup()
