"""Clients that read their answers slowly or not at all, and one that sends slowly: in virtual time, without sockets."""

import asyncio
import json
import socket as sockets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import pytest

from mdiq.api.app import Api
from mdiq.api.server import CLIENT_TIMEOUT_S, SEND_BUFFER_BYTES, ApiRunner
from mdiq.core.logprobs import LogprobsWanted
from mdiq.core.sequence import FinishReason, SamplingParams, TokenEvent
from mdiq.runtime.starter_service import StreamEvent
from tests.api.test_app import FakeRing
from tests.virtual.clock import VirtualTimeLoop, run_virtual

HIGH_BYTES, LOW_BYTES = 64 * 1024, 16 * 1024  # asyncio's own
TOKEN_S = 0.1


class TalkingRing(FakeRing):
    """Gives a token of 1 KB each TOKEN_S, whoever reads it: a real ring does not wait for readers."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self._num_tokens = num_tokens
        self.num_left = 0
        self.ended_s: dict[int, float] = {}

    async def answer(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        logprobs: LogprobsWanted | None = None,
        owner: str = "",
        share: int = 1,
    ) -> AsyncGenerator[StreamEvent, None]:
        now = asyncio.get_running_loop().time
        queue: asyncio.Queue[StreamEvent] = asyncio.Queue()
        talking = asyncio.create_task(self._talk(prompt[0], queue), name="talk")
        is_done = False
        try:
            while not is_done:
                event = await queue.get()
                is_done = event.step.finish_reason is not None
                yield event
        finally:
            self.num_left += not is_done
            self.ended_s[prompt[0]] = now()
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)

    async def _talk(self, index: int, queue: "asyncio.Queue[StreamEvent]") -> None:
        for i in range(self._num_tokens):
            await asyncio.sleep(TOKEN_S)
            reason = FinishReason.LENGTH if i == self._num_tokens - 1 else None
            queue.put_nowait(StreamEvent(TokenEvent(index, i, 1 + i, reason), "x" * 1_000, time.monotonic()))


class Line(asyncio.Transport):
    """The server's end of a connection whose client reads when the test says so."""

    def __init__(self, connection: asyncio.Protocol) -> None:
        super().__init__()
        self.connection = connection
        self.options: dict[int, int] = {}
        self.unread = bytearray()
        self.read_bytes = 0
        self.text = bytearray()
        self.is_paused = self.is_closing_ = self.is_over = False
        connection.connection_made(self)

    def ask(self, index: int, *, is_streamed: bool) -> None:
        body = json.dumps({"prompt": [index], "stream": is_streamed, "max_tokens": 1_000_000}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        self.connection.data_received(head.encode() + body)

    def read(self, num_bytes: int) -> None:
        """Take in what came, as a client does."""
        self.text += self.unread[:num_bytes]
        del self.unread[:num_bytes]
        if self.is_paused and len(self.unread) <= LOW_BYTES:
            self.is_paused = False
            self.connection.resume_writing()
        if self.is_closing_ and not self.unread:
            self._lose()

    async def read_at(self, bytes_per_s: int, until: Callable[[], bool]) -> None:
        while not until():
            await asyncio.sleep(1.0)
            self.read(bytes_per_s)

    def write(self, data: Any) -> None:
        if self.is_over:
            return
        self.unread += data
        if not self.is_paused and len(self.unread) > HIGH_BYTES:
            self.is_paused = True
            self.connection.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def get_write_buffer_size(self) -> int:
        return len(self.unread)

    def is_closing(self) -> bool:
        return self.is_closing_ or self.is_over

    def close(self) -> None:
        self.is_closing_ = True
        if not self.unread:
            self._lose()

    def abort(self) -> None:
        self.unread.clear()
        self._lose()

    def pause_reading(self) -> None:
        """The client sends nothing more anyway."""

    def resume_reading(self) -> None:
        """See above."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"socket": self, "peername": ("192.168.1.9", 4_711)}.get(name, default)

    family = sockets.AF_INET

    def setsockopt(self, level: int, option: int, value: int) -> None:
        if level in (sockets.SOL_SOCKET, sockets.IPPROTO_TCP):
            self.options[option] = value

    def _lose(self) -> None:
        if not self.is_over:
            self.is_over = True
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)


class Service:
    """An API before a TalkingRing, and the connections to it."""

    def __init__(self, num_tokens: int) -> None:
        self.ring = TalkingRing(num_tokens)
        self.ring.context_tokens = 2_000_000
        self.api = Api(self.ring)
        self._runner = ApiRunner(self.api.application(), on_cut_off=self.api.note_cut_off)

    async def __aenter__(self) -> "Service":
        await self._runner.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await asyncio.sleep(1.0)

    def connect(self) -> Line:
        assert self._runner.server is not None
        return Line(self._runner.server())

    @property
    def requests(self) -> Mapping[str, Any]:
        return self.api.status()["requests"]  # type: ignore[no-any-return]


def _run(test: Callable[[Service], Awaitable[None]], num_tokens: int) -> None:
    async def main(_: VirtualTimeLoop) -> None:
        async with Service(num_tokens) as service:
            await test(service)

    run_virtual(main)


@pytest.mark.parametrize("bytes_per_s", [0, 1, 100])
def test_a_client_that_does_not_read_its_stream_is_cut_off_and_others_go_on(bytes_per_s: int) -> None:
    async def test(service: Service) -> None:
        slow, quick = service.connect(), service.connect()
        slow.ask(1, is_streamed=True)
        quick.ask(2, is_streamed=True)
        both_s = asyncio.gather(
            slow.read_at(bytes_per_s, lambda: slow.is_over), quick.read_at(1_000_000, lambda: 2 in service.ring.ended_s)
        )
        await both_s
        assert quick.text.count(b"x" * 1_000) == 2_000 and b"[DONE]" in quick.text
        assert (service.ring.num_left, service.requests["cut_off"]) == (1, 1)
        # 64 KB are there after 6 s; from then on it has CLIENT_TIMEOUT_S.
        assert CLIENT_TIMEOUT_S < service.ring.ended_s[1] < CLIENT_TIMEOUT_S + 10 < service.ring.ended_s[2]
        assert not slow.unread and not service.ring.num_running

    _run(test, num_tokens=2_000)


def test_a_client_that_reads_slowly_but_steadily_gets_all_of_it() -> None:
    async def test(service: Service) -> None:
        line = service.connect()
        line.ask(1, is_streamed=True)
        await line.read_at(2_000, lambda: b"[DONE]" in line.text)
        assert line.text.count(b"x" * 1_000) == 600
        assert service.requests["cut_off"] == 0

    _run(test, num_tokens=600)  # in 60 s; it reads for five minutes


@pytest.mark.parametrize(("bytes_per_s", "num_cut_off"), [(1, 1), (2_000, 0)])
def test_a_whole_answer_is_not_kept_for_a_client_that_does_not_read_it(bytes_per_s: int, num_cut_off: int) -> None:
    async def test(service: Service) -> None:
        line = service.connect()
        line.ask(1, is_streamed=False)
        await line.read_at(bytes_per_s, lambda: line.is_over or line.text.endswith(b"}}"))
        assert line.text.endswith(b"}}") == (not num_cut_off)
        assert service.requests["cut_off"] == num_cut_off
        assert service.ring.num_left == 0, "it was answered long before"

    _run(test, num_tokens=400)


@pytest.mark.parametrize("sends", [True, False])
def test_a_client_that_is_refused_is_told_so_when_it_has_sent_all_or_had_its_time(sends: bool) -> None:
    """Some clients do not look at an answer that comes while they send, and take its end for a failure."""

    async def test(service: Service) -> None:
        service.ring.num_running = service.ring.max_requests
        line = service.connect()
        line.connection.data_received(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 20000\r\n\r\n")
        for _ in range(3):
            await asyncio.sleep(1.0)
            assert not line.unread
            line.connection.data_received(b" " * 5_000)
        if sends:
            line.connection.data_received(b" " * 5_000)
        await asyncio.sleep(1.0 if sends else CLIENT_TIMEOUT_S)
        assert line.unread.startswith(b"HTTP/1.1 429 ") and b"Retry-After: 5" in line.unread
        assert service.requests["refused"]["busy"] == 1
        line.read(10_000)
        await asyncio.sleep(20.0)
        assert line.is_over

    _run(test, num_tokens=1)


@pytest.mark.parametrize(("error", "num_cut_off"), [(TimeoutError(110, "timed out"), 1), (None, 0)])
def test_a_client_of_which_the_kernel_hears_nothing_is_cut_off_and_one_that_leaves_is_not(
    error: OSError | None, num_cut_off: int
) -> None:
    async def test(service: Service) -> None:
        line, idle = service.connect(), service.connect()
        line.ask(1, is_streamed=True)
        await asyncio.sleep(1.0)
        for each in (line, idle):
            each.is_over = True
            each.connection.connection_lost(error)
        await asyncio.sleep(1.0)
        assert (service.ring.num_left, service.requests["cut_off"]) == (1, num_cut_off)

    _run(test, num_tokens=100)


def test_the_kernel_keeps_little_for_a_client_and_notices_one_that_has_vanished() -> None:
    async def test(service: Service) -> None:
        options = service.connect().options
        assert options[sockets.SO_SNDBUF] == SEND_BUFFER_BYTES
        assert options[sockets.SO_KEEPALIVE]
        assert options[sockets.TCP_USER_TIMEOUT] == 1_000 * CLIENT_TIMEOUT_S
        assert options[sockets.TCP_KEEPIDLE] + options[sockets.TCP_KEEPINTVL] < CLIENT_TIMEOUT_S

    _run(test, num_tokens=1)
