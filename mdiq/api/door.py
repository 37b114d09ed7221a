"""What every application of ours has at its door: keys, origins, errors as answers, and the routes about itself."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest

from mdiq import __version__
from mdiq.api.audit import RECORD, add_request_id, audited
from mdiq.api.clients import Clients
from mdiq.api.messages import errors_in_their_form
from mdiq.api.origins import Origins
from mdiq.api.request_traces import traced
from mdiq.api.requests import MAX_BODY_BYTES, ApiError, broke
from mdiq.api.server import error_response, let_in
from mdiq.errors import MdiqError

log = structlog.get_logger()

_PUBLIC = ("/health", "/ready")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Served(Protocol):
    """What an application serves."""

    @property
    def is_serving(self) -> bool:
        """Whether it takes requests."""

    @property
    def state(self) -> str:
        """What it does, or what it waits for."""


class Door:
    """Lets clients with a key in, and turns every error into an answer.

    name: of what is served, as in "this ring". clients: who may; every request but /health and /ready must carry a key
    if there are any. status: what /status.json shows. note_refused: told the reason of each refused POST. as_answer: of
    errors that are not the API's own.
    """

    def __init__(
        self,
        name: str,
        served: Served,
        clients: Clients,
        origins: Origins,
        *,
        status: Callable[[], Mapping[str, Any]],
        registry: CollectorRegistry,
        note_refused: Callable[[str], None],
        as_answer: Callable[[MdiqError], ApiError] = lambda error: ApiError(503, str(error)),
    ) -> None:
        self._name, self._served, self._clients, self._origins = name, served, clients, origins
        self._status_of, self._registry = status, registry
        self._note_refused, self._as_answer = note_refused, as_answer

    def application(self) -> web.Application:
        """Return an application that has this door, and no routes but those about itself."""
        middlewares = [audited, errors_in_their_form, self._errors]
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
        app.cleanup_ctx.append(traced)
        app.on_response_prepare.extend([self._origins.allow, add_request_id])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._metrics),
                web.get("/status.json", self._status),
                web.get("/version", self._version),
            ]
        )
        return app

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.method == "OPTIONS" and self._origins.allowed(request):
                return web.Response(status=204)  # browsers ask without the key
            client = request[RECORD].client = self._clients.find(request.headers)
            if not self._clients.has_keys and request.path not in _PUBLIC:
                self._origins.hosts.check(request)  # where there are keys, no page has one
            self._origins.check(request, has_key=self._clients.has_keys and client is not None)
            if request.path not in _PUBLIC:
                if client is None:
                    text = f"a key of this {self._name}'s API is missing or wrong; send Authorization: Bearer KEY"
                    raise ApiError(401, text)
                let_in(request)
            return await handler(request)
        except ApiError as error:
            return self._refused(request, error)
        except web.HTTPException as error:
            return self._refused(request, ApiError(error.status, _no_route(request, error)))
        except MdiqError as error:
            answer = self._as_answer(error)
            return self._refused(request, answer) if answer.status < 500 else error_response(answer)
        except ConnectionError:  # the client has closed the connection
            raise
        except Exception:  # of one request; the answer must not show our internals
            log.exception("request_broke", path=request.path)
            return error_response(broke())

    def _refused(self, request: web.Request, error: ApiError) -> web.Response:
        if request.method == "POST":
            self._note_refused(error.reason)
        return error_response(error)

    async def _health(self, _: web.Request) -> web.Response:
        if self._served.is_serving:
            return web.json_response({"status": "ok"})
        raise ApiError(503, self._served.state, code=503)

    async def _ready(self, _: web.Request) -> web.Response:
        if self._served.is_serving:
            return web.json_response({"status": "ready"})
        raise ApiError(503, f"this {self._name} does not serve; GET /health says what it waits for")

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response(self._status_of())

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": __version__})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


def _no_route(request: web.Request, error: web.HTTPException) -> str:
    if error.status == 404 and request.path.endswith("/embeddings"):
        return (
            "this API has no embeddings: the hidden states of a model that writes are no measure of likeness, however "
            "they are averaged; run a model made for embeddings, by another program"
        )
    text = f"{request.method} {request.path[:200]}: {error.reason}"
    return f"{text}; the API is under /v1, as in POST /v1/chat/completions" if error.status == 404 else text
