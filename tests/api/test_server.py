"""What is not HTTP, what comes too slowly, and what of it is told: over real sockets."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog
from aiohttp import web

from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.api.server import ApiRunner
from tests.api.test_app import FakeRing

KEY = "secret-key-of-this-ring"
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"


@asynccontextmanager
async def _port(client_timeout_s: float = 10.0, max_connections: int | None = None) -> AsyncIterator[int]:
    api = Api(FakeRing(), bare_keys([KEY]), client_timeout_s=client_timeout_s)
    runner = ApiRunner(api.application(), client_timeout_s=client_timeout_s, max_connections=max_connections)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def _sent(port: int, text: str) -> str:
    """Return all that comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text.encode())
    try:
        return (await reader.read()).decode()
    finally:
        writer.close()


@pytest.mark.parametrize(
    "text",
    [
        f"GET /health HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\nWrong header\x01 my diary\r\n\r\n",
        f"{HEAD}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\nmy diary\r\nmy diary\r\n\r\n",
        f"{HEAD}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\nmy diary\r\n\r\n",
        f"{HEAD}Connection: close\r\nContent-Encoding: deflate\r\nContent-Length: 8\r\n\r\nmy diary",
        f"{HEAD}Connection: close\r\nContent-Length: 8\r\n\r\nmy diary",
        f"{HEAD}Content-Length: my diary\r\n\r\n",
        f"{KEY} my diary\r\n\r\n",
        f"GET /{'x' * 9000}{KEY} HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_refused_in_json_and_nothing_of_it_is_logged(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with structlog.testing.capture_logs() as lines:
        async with _port() as port:
            head, _, body = (await _sent(port, text)).partition("\r\n\r\n")
    assert head.split(" ", 2)[1] == "400", head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    told = f"{lines}{caplog.text}{body}"
    assert "diary" not in told and KEY not in told and "Traceback" not in told
    assert len([line for line in lines if line["event"] != "request_refused"]) <= 1


async def test_heads_and_bodies_that_do_not_come_are_closed() -> None:
    async with _port(client_timeout_s=0.3) as port:
        half_head, half_body, nothing = await asyncio.gather(
            _sent(port, HEAD), _sent(port, f"{HEAD}Content-Length: 9\r\n\r\n{{"), _sent(port, "")
        )
    assert half_head == nothing == ""
    assert half_body.startswith("HTTP/1.1 408 ")
    assert "within 0.3 s" in half_body


async def test_silent_connections_are_bounded_and_requests_are_answered_beside_them() -> None:
    async with _port(max_connections=8) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        asking, writer = await asyncio.open_connection("127.0.0.1", port)
        models = f"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        writer.write(f"{models}\r\n".encode())
        assert (await asking.readline()).startswith(b"HTTP/1.1 200 ")
        more = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        await asyncio.sleep(0)
        writer.write(f"{models}Connection: close\r\n\r\n".encode())  # it has not been closed
        assert (await asking.read()).count(b"HTTP/1.1 200 ") == 1
        for reader, _ in silent:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 20) == b""
        for _, each in [*silent, *more, (asking, writer)]:
            each.close()


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_whoever_only_asks_and_stays_keeps_no_other_out(path: str) -> None:
    """A stranger may ask for the health; a client that may ask for more is idle in between."""
    key = KEY if path == "/v1/models" else "none"
    head = f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    async with _port(max_connections=8) as port:
        staying = []
        for _ in range(8):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            staying.append(writer)
        for _ in range(20):
            body = '{"prompt": [1], "max_tokens": 1}'
            answer = await _sent(port, f"{HEAD}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}")
            assert answer.startswith("HTTP/1.1 200 ")
        for writer in staying:
            writer.close()
