"""The bodies of requests, bounded in time, and in memory where many large ones come at once."""

import asyncio
import json
from contextlib import nullcontext, suppress
from weakref import WeakValueDictionary

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from mdiq.api.audit import RECORD
from mdiq.api.nesting import TooDeepError, loads
from mdiq.api.requests import ApiError, BadRequest

LARGE_BODY_BYTES = 64 * 1024  # as much is kept of every body before it is read
MAX_LARGE_BODIES = 16  # that are read at once


class Bodies:
    """Reads them. client_timeout_s: maximum wait for one."""

    def __init__(self, client_timeout_s: float) -> None:
        self._client_timeout_s = client_timeout_s
        self._large_bodies = asyncio.Semaphore(MAX_LARGE_BODIES)
        self._of_keys: WeakValueDictionary[bytes, asyncio.Semaphore] = WeakValueDictionary()

    async def json_of(self, request: web.Request) -> object:
        """Return the JSON of a request; raise ApiError if it is none."""
        size = request.content_length
        is_large = size is None or size > LARGE_BODY_BYTES or "Content-Encoding" in request.headers
        own_turn, turn = (self._own_turns(request), self._large_bodies) if is_large else (nullcontext(), nullcontext())
        try:
            async with asyncio.timeout(self._client_timeout_s), own_turn, turn:
                body = await request.read()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._client_timeout_s:g} s") from None
        except (web.RequestPayloadError, HttpProcessingError):  # their messages quote the request
            raise BadRequest("the body is not valid HTTP") from None
        request[RECORD].num_bytes = len(body)
        try:
            return loads(body)
        except TooDeepError as error:
            raise BadRequest(f"the body cannot be read: {error}") from None
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise BadRequest(f"the body is not JSON ({reason})") from None

    def _own_turns(self, request: web.Request) -> asyncio.Semaphore:
        """Return the turns of a request's key: a quarter of all is for others, where there are others."""
        client = request[RECORD].client
        digest = b"" if client is None else client.key.digest
        if (turns := self._of_keys.get(digest)) is None:
            num_turns = MAX_LARGE_BODIES * 3 // 4 if digest else MAX_LARGE_BODIES
            self._of_keys[digest] = turns = asyncio.Semaphore(num_turns)
        return turns

    async def discard(self, request: web.Request) -> None:
        """Let a client send its body, and keep nothing of it: some do not see an answer that comes before that."""
        with suppress(TimeoutError, web.RequestPayloadError, HttpProcessingError):
            async with asyncio.timeout(self._client_timeout_s):
                while await request.content.readany():
                    pass
