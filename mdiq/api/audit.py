"""A line in the log for each request, without its content, a span if wanted, and the id by which a client finds it.

Requests that the ring has run are all logged (request_ended): each took its time. Others cost nothing, so their lines
(request_served, request_refused) are limited as all lines are, see telemetry/logging.py: a flood of them fills no disk.
"""

import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from aiohttp import hdrs, web

from mdiq.api.clients import Client
from mdiq.api.request_traces import TRACES, RequestTraces, parent_in

log = structlog.get_logger()

HEADER = "x-request-id"
FOR = "x-mdiq-for"
"""Whose request it is among those of one key: a router asks for many clients, and they do not see each other's."""
LEFT = 499  # status in the log of a request whose client did not wait; nginx has the same
QUIET = ("/health", "/ready", "/metrics", "/status.json")  # they are asked for every few seconds
_ID = re.compile(r"[!-~]{1,64}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Record:
    """What the log says of one request.

    request_id: the client's own, if it is short and printable. begun_s: when its head had come. path: of the route;
    what leads nowhere may be content. client: who asks; None before its key is known. more: further fields of its line.
    traces: gets a span too; method and parent are for that.
    """

    request_id: str
    begun_s: float
    path: str
    address: str
    client: Client | None = None
    has_run: bool = False
    num_bytes: int = 0  # of its body
    num_prompt: int = 0
    num_answer: int = 0
    finish_reason: str = "none"
    more: dict[str, object] = field(default_factory=dict)
    traces: RequestTraces | None = None
    method: str = "POST"
    parent: Mapping[str, str] = field(default_factory=dict)

    def of_answer(self) -> "Record":
        """Return the record of an answer that may outlive its request."""
        own = self.request_id, self.begun_s, self.path, self.address, self.client
        return Record(*own, traces=self.traces, parent=self.parent)

    def log(self, status: int, now: float) -> None:
        """Write the line, and make the span."""
        if self.path in QUIET and status not in (401, LEFT):
            return
        kind = "request_ended" if self.has_run else "request_served" if status < 400 else "request_refused"
        tokens = {"prompt_tokens": self.num_prompt, "tokens": self.num_answer, "finish_reason": self.finish_reason}
        log.info(
            kind,
            request_id=self.request_id,
            client=self.address,
            key=self.client.key.name if self.client is not None else "",
            path=self.path,
            status=status,
            seconds=round(now - self.begun_s, 3),
            **(tokens if self.has_run else {}),
            **self.more,
        )
        if self.traces is not None:
            self.traces.note(self.method, self.path, now - self.begun_s, status, self._attributes(), self.parent)

    def _attributes(self) -> dict[str, Any]:
        own = {"client.address": self.address, "mdiq.request_id": self.request_id}
        if self.client is not None and self.client.key.name:
            own["mdiq.key"] = self.client.key.name
        if not self.has_run:
            return own
        return own | {
            "gen_ai.usage.input_tokens": self.num_prompt,
            "gen_ai.usage.output_tokens": self.num_answer,
            "gen_ai.response.finish_reasons": [self.finish_reason],
        }


RECORD: web.RequestKey[Record] = web.RequestKey("record", Record)


@web.middleware
async def audited(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Log a request when it has ended, whatever became of it."""
    given = request.headers.get(HEADER, "")
    resource = request.match_info.route.resource
    record = request[RECORD] = Record(
        given if _ID.fullmatch(given) else new_request_id(),
        time.monotonic(),
        resource.canonical if resource is not None else "none",
        request.remote or "",
        traces=request.app.get(TRACES),
        method=request.method if request.method in hdrs.METH_ALL else "_OTHER",
        parent=parent_in(request.headers),
    )
    status = LEFT
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        record.log(status, time.monotonic())


def new_request_id() -> str:
    """Return the id of a request whose client gave none."""
    return f"req-{secrets.token_hex(12)}"


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Send the id of a request with its answer."""
    if RECORD in request:
        response.headers[HEADER] = request[RECORD].request_id
