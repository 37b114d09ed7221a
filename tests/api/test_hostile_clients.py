"""Clients that mean harm, over real sockets: each is refused or harmless, and others are answered meanwhile."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.api.requests import MAX_BODY_BYTES
from mdiq.api.server import ApiRunner
from mdiq.telemetry.logging import UNLIMITED
from tests.api.test_app import FakeRing

KEY = "secret-key-of-this-ring"
GET = f"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
POST = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
CLOSE = "Connection: close\r\n"


class Listening:
    """An API that listens, and the ring that it pretends to have."""

    def __init__(self, ring: FakeRing, port: int) -> None:
        self.ring, self.port = ring, port

    async def sent(self, data: bytes) -> bytes:
        """Return all that comes until the server closes the connection."""
        return await self.kept_sending(data, b"", 0.01)

    async def kept_sending(self, head: bytes, piece: bytes, pause_s: float) -> bytes:
        """Send a piece again and again, and return what came until the server closed the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        answer = bytearray()

        async def read() -> None:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(1 << 16):
                    answer.extend(data)

        reading = asyncio.create_task(read())
        try:
            writer.write(head)
            async with asyncio.timeout(50):
                with contextlib.suppress(ConnectionError):
                    while not reading.done():
                        writer.write(piece)
                        await writer.drain()
                        await asyncio.sleep(pause_s)
                await reading
        finally:
            writer.close()
        return bytes(answer)

    async def is_well(self) -> None:
        """Check that an honest client is answered."""
        body = b'{"prompt": [1], "max_tokens": 2}'
        answer = await self.sent(f"{POST}{CLOSE}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert _status(answer) == 200 and b'" 0 1"' in answer


@asynccontextmanager
async def _api(client_timeout_s: float = 10.0) -> AsyncIterator[Listening]:
    ring = FakeRing()
    runner = ApiRunner(
        Api(ring, bare_keys([KEY]), client_timeout_s=client_timeout_s).application(), client_timeout_s=client_timeout_s
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        api = Listening(ring, runner.addresses[0][1])
        yield api
        await api.is_well()
        assert not ring.num_running
    finally:
        await runner.cleanup()


def _status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.mark.parametrize(
    "headers",
    [
        "".join(f"X-{i}: 1\r\n" for i in range(10_000)),
        "".join("X: 1\r\n" for _ in range(200)),
        f"X: {'x' * 9_000}\r\n",
        f"{'x' * 9_000}: 1\r\n",
        f"Cookie: {'a=b; ' * 100_000}\r\n",
        f"X-Request-Id: {'x' * 9_000}\r\n",
        f"Authorization: Bearer {'x' * 9_000}\r\n",
    ],
)
async def test_a_flood_of_headers_is_refused(headers: str) -> None:
    async with _api() as api:
        answer = await api.sent(f"{GET}{headers}\r\n".encode())
        assert _status(answer) in (0, 400), answer[:200]
        assert not api.ring.asked


@pytest.mark.parametrize("head", [b"", b"GET /", GET.encode(), GET.encode() + b"X: "])
async def test_a_head_without_an_end_is_cut_off_early(head: bytes) -> None:
    async with _api() as api:
        answer = await api.kept_sending(head, b"x" * 4_096, 0.0)
        assert _status(answer) in (0, 400), answer[:200]


@pytest.mark.parametrize("head", [b"", b"GET ", GET.encode(), GET.encode() + b"X: "])
async def test_a_head_that_trickles_has_its_time_as_a_whole(head: bytes) -> None:
    """Slow loris: each byte comes in time, and the head never ends."""
    async with _api(client_timeout_s=0.5) as api:
        assert _status(await api.kept_sending(head, b"x", 0.05)) in (0, 400, 408)


async def test_a_body_that_trickles_has_its_time_as_a_whole() -> None:
    async with _api(client_timeout_s=0.5) as api:
        head = f"{POST}Content-Length: 100000\r\n\r\n"
        assert _status(await api.kept_sending(head.encode(), b" ", 0.05)) == 408
        head = f"{POST}Transfer-Encoding: chunked\r\n\r\n"
        assert _status(await api.kept_sending(head.encode(), b"1\r\n \r\n", 0.05)) == 408


@pytest.mark.parametrize("key", [KEY, "none"])
async def test_a_body_that_is_too_large_is_refused_whether_or_not_its_length_is_told(key: str) -> None:
    async with _api() as api:
        head = POST.replace(KEY, key)
        told = await api.sent(f"{head}{CLOSE}Content-Length: {1 << 40}\r\n\r\n".encode() + b" " * MAX_BODY_BYTES * 2)
        assert _status(told) in ((413,) if key == KEY else (401,)), told[:200]
        chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
        untold = await api.kept_sending(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), chunk, 0.0)
        # A client that goes on sending may lose the answer with its connection.
        assert _status(untold) in ((0, 413) if key == KEY else (0, 401)), untold[:200]
        assert not api.ring.asked


async def test_requests_that_are_sent_ahead_are_answered_one_after_the_other() -> None:
    async with _api() as api:
        running: list[int] = []
        api.ring.before = lambda _: running.append(api.ring.num_running)
        body = b'{"prompt": [1], "max_tokens": 2}'
        one = f"{POST}Content-Length: {len(body)}\r\n\r\n".encode() + body
        answer = await api.sent(one * 200 + f"{GET}{CLOSE}\r\n".encode())
        assert answer.count(b"HTTP/1.1 200 ") == 201
        assert len(api.ring.asked) == 200 and max(running) == 1
        api.ring.before = lambda _: None


async def test_requests_that_are_sent_ahead_of_one_that_is_refused_need_their_own_key() -> None:
    async with _api() as api:
        answer = await api.sent(f"{GET.replace(KEY, 'none')}\r\n{GET}\r\n{GET.replace(KEY, '')}{CLOSE}\r\n".encode())
        assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [401, 200, 401]


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: +5\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding : chunked\r\n",
    ],
)
async def test_a_body_of_two_lengths_is_no_request_at_all(framing: str) -> None:
    """Else a proxy could take for one request what is two here."""
    async with _api() as api:
        smuggled = f"0\r\n\r\n{POST}Content-Length: 32\r\n\r\n" + '{"prompt": [1], "max_tokens": 2}'
        answer = await api.sent(f"{POST}{framing}\r\n{smuggled}".encode())
        assert _status(answer) == 400 and answer.count(b"HTTP/1.") == 1
        assert not api.ring.asked


@pytest.mark.parametrize(
    "header",
    [
        "",
        f"Authorization: {KEY}\r\n",
        f"Authorization: Bearer {KEY}x\r\n",
        "x-api-key: \r\n",
        f"x-api-key: {KEY[:-1]}\r\n",
    ],
)
async def test_without_a_right_key_nothing_is_read_or_told(header: str) -> None:
    async with _api() as api:
        head = POST.replace(f"Authorization: Bearer {KEY}\r\n", header)
        body = b'{"prompt": "my diary", "max_tokens": 2}'
        answer = await api.sent(f"{head}{CLOSE}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert _status(answer) == 401 and error["type"] == "authentication_error"
        assert not api.ring.asked and KEY.encode() not in answer


async def test_a_hundred_at_once_harm_nobody() -> None:
    async with _api() as api:
        piece = f"{GET}X: {'x' * 9_000}\r\n\r\n".encode()
        wrong = f"{GET.replace(KEY, 'wrong')}{CLOSE}\r\n".encode()
        answers = await asyncio.gather(*(api.sent(data) for data in (piece, wrong) * 50), api.is_well())
        assert {_status(answer) for answer in answers if answer is not None} == {400, 401}


def test_lines_that_strangers_cause_are_limited() -> None:
    assert not {"request_refused", "request_served", "request_malformed", "reader_cut_off"} & UNLIMITED
