"""HTTP below the routes: malformed requests, and idle connections.

Nothing that a client sends is logged or echoed.
"""

import asyncio
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from mdiq.api.requests import ApiError
from mdiq.transport.room import Room, connection_limit

log = structlog.get_logger()

CLIENT_TIMEOUT_S = 60.0
"""Maximum wait for the head of a request, and for its body."""
SHUTDOWN_S = 1.0  # for answers that are being sent when the service stops
RETRY_AFTER_S = "5"


def error_response(error: ApiError) -> web.Response:
    """Return an error in OpenAI's form, with the headers that tell clients whether to retry."""
    headers = {"Retry-After": RETRY_AFTER_S} if error.status in (429, 503) else {"x-should-retry": "false"}
    return web.json_response({"error": error.body}, status=error.status, headers=headers)


class _Connection(RequestHandler):
    """One connection. aiohttp's own class would log a malformed request, with traceback, and echo it."""

    has_asked = False
    room: "Room[_Connection]"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.room.accepted(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.room.ended(self)
        super().connection_lost(exc)

    def end(self) -> None:
        """Close the connection to make room."""
        log.warning("too_many_connections", most=connection_limit())
        if self.transport is not None:
            self.transport.abort()

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


class _Server(web.Server):
    room: "Room[_Connection]"

    def __call__(self) -> RequestHandler:
        connection = _Connection(self, loop=self._loop, **self._kwargs)
        connection.room = self.room
        return connection


class ApiRunner(web.AppRunner):
    """Runs the application; a connection is closed when a request's head does not come within client_timeout_s.

    max_connections: beyond it, the oldest connection without a request is closed; see transport/room.py.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        client_timeout_s: float = CLIENT_TIMEOUT_S,
        max_connections: int | None = None,
    ) -> None:
        self._max_connections = max_connections or connection_limit()
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
        server.room = Room[_Connection](self._max_connections, lambda it: it.has_asked, _Connection.end)
        make_request = server.request_factory

        def noted(message: Any, payload: Any, protocol: _Connection, *rest: Any) -> Any:
            protocol.has_asked = True  # the head of a request has arrived
            return make_request(message, payload, protocol, *rest)

        server.request_factory = noted
        return server
