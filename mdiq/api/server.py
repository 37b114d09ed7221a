"""HTTP below the routes: bytes that are not HTTP, and connections on which nothing comes.

Nothing that a client sends is logged, and nothing of it is sent back.
"""

from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from mdiq.api.requests import ApiError

log = structlog.get_logger()

CLIENT_TIMEOUT_S = 60.0
"""Longest wait for the head of a request, and for its body: what is slower holds a connection for nothing."""
SHUTDOWN_S = 1.0  # for answers that are on their way when the service ends
RETRY_AFTER_S = "5"


def error_response(error: ApiError) -> web.Response:
    """Return an error in OpenAI's form, with what tells clients whether to ask again."""
    headers = {"Retry-After": RETRY_AFTER_S} if error.status in (429, 503) else {"x-should-retry": "false"}
    return web.json_response({"error": error.body}, status=error.status, headers=headers)


class _Connection(RequestHandler):
    """One connection. aiohttp's own would log what came, with traceback, and send it back as plain text."""

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
        text = "this is not HTTP as it should be" if status < 500 else "mdiq failed at this request"
        response = error_response(ApiError(status, text))
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        log.warning("connection_broke", kind=type(kwargs.get("exc_info")).__name__)


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class ApiRunner(web.AppRunner):
    """Runs the application; a connection is closed when a request's head does not come within client_timeout_s."""

    def __init__(self, app: web.Application, *, client_timeout_s: float = CLIENT_TIMEOUT_S) -> None:
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
        return server
