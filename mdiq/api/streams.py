"""Answers as server-sent events: several prompts in one stream, keep-alive comments, and errors within the stream."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import structlog
from aiohttp import web

from mdiq.api.requests import ApiError, broke
from mdiq.api.shapes import Answer, Shape
from mdiq.errors import MdiqError
from mdiq.runtime.starter_service import StreamEvent

log = structlog.get_logger()

SILENCE_S = 10.0  # after it a comment keeps proxies from closing the stream
HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the stream back until it is complete
}

Events = AsyncGenerator[tuple[int, StreamEvent] | None, None]


async def send_stream(
    request: web.Request, events: Events, out: Shape, answers: Sequence[Answer], wants_usage: bool
) -> web.StreamResponse:
    """Send events as they come. An error before the first event gets an HTTP status instead of a stream."""
    response = web.StreamResponse(headers=HEADERS)
    is_whole = True
    opened: set[int] = set()
    try:
        async for numbered in events:
            if numbered is None:
                await _begun(request, response)
                await response.write(b": keep-alive\n\n")
                continue
            index, event = numbered
            answers[index].add(event)
            await _begun(request, response)
            if out.has_opening and index not in opened:
                await _send(response, out, out.chunk(index, "", None, is_first=True))
                opened.add(index)
            for piece, entries in answers[index].parts():
                await _send(response, out, out.piece_chunk(index, piece, entries))
            if answers[index].finish_reason:
                await _send(response, out, out.chunk(index, "", answers[index].finish_reason))
        if wants_usage:
            await _send(response, out, out.usage(answers))
    except MdiqError as error:
        if not response.prepared:
            raise
        await _send(response, out, {"error": ApiError(503, str(error)).body})
        is_whole = False
    except ConnectionError:  # the client's end of it
        raise
    except Exception:  # of one stream; its client gets an error, and the others go on
        if not response.prepared:
            raise
        # A second response inside this one would leave the client waiting for its end.
        log.exception("request_broke", path=request.path)
        await _send(response, out, {"error": broke().body})
        is_whole = False
    if is_whole:
        await response.write(out.done)
    await response.write_eof()
    return response


async def _begun(request: web.Request, response: web.StreamResponse) -> None:
    if not response.prepared:
        await response.prepare(request)


async def _send(response: web.StreamResponse, out: Shape, value: Mapping[str, Any]) -> None:
    # write() waits while the client does not read; its events queue up, bounded by the length of its Sequence, until
    # server.py ends the connection.
    await response.write(out.encoded(value))


async def merged(streams: Sequence[AsyncGenerator[StreamEvent, None]]) -> Events:
    """Yield the events of all streams with their numbers, and None whenever none came for SILENCE_S seconds."""
    coming = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield None
            for future in sorted(done, key=lambda future: coming[future]):
                i = coming.pop(future)
                try:
                    event = future.result()
                except StopAsyncIteration:
                    continue
                yield i, event
                coming[asyncio.ensure_future(anext(streams[i]))] = i
    finally:
        for future in coming:
            future.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
