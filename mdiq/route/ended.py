"""Stored responses that their clients end while their servers are gone. Nothing is computed for that. Pure."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from mdiq.api.requests import ApiError
from mdiq.api.response_requests import parse_response
from mdiq.api.response_shapes import ResponseShape
from mdiq.api.response_store import as_sse
from mdiq.api.streams import HEADERS


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A response that was cancelled before anyone here saw its answer. events: as a stream has them."""

    whole: bytes
    events: Sequence[bytes]

    def answer(self, *, is_stream: bool, after: int) -> web.Response:
        """Return it as the answer to a client. after: number of the last event that the client has; -1: none."""
        if is_stream:
            return web.Response(body=b"".join(self.events[after + 1 :] or self.events[-1:]), headers=HEADERS)
        return web.Response(body=self.whole, content_type="application/json")


def cancelled(response_id: str, model: str, body: bytes, created_at: int) -> Cancelled:
    """Return a response without an answer. body: of its request, as its server got it. created_at: Unix time."""
    shown: Mapping[str, Any] = {}
    with suppress(ApiError, ValueError, RecursionError):
        shown = parse_response(json.loads(body)).shown
    shape = ResponseShape(model, shown, response_id=response_id, created_at=created_at)
    events = [*shape.begin(), *shape.cancel()]
    return Cancelled(json.dumps(shape.whole()).encode(), [as_sse(event) for event in events])


def deleted(response_id: str) -> web.Response:
    """Return the answer to a client that has deleted a response."""
    return web.json_response({"id": response_id, "object": "response", "deleted": True})
