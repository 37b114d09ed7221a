"""Relays between real sockets. Times are lower bounds only: a machine may be slow, a link must not be fast."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator

import pytest
import zmq.asyncio

from mdiq.errors import ConfigError, TransportError
from mdiq.testbed.link_shape import LinkShape
from mdiq.testbed.relay import (
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    QUEUE_BYTES,
    UNLIMITED_BUFFER_BYTES,
    Relay,
    RelayProcess,
    _host_and_port,
    buffer_bytes,
    chunk_bytes,
)
from mdiq.transport.push_pull import PullSource, PushSink

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Ends:
    """A relay and what is behind it; ``near`` and ``far`` are the two ends of a connection."""

    def __init__(self, relay: Relay, near: Streams, far: Streams) -> None:
        self.relay, self.near, self.far = relay, near, far


@contextlib.asynccontextmanager
async def joined(shape: LinkShape) -> AsyncIterator[Ends]:
    """Connect through a relay of that shape."""
    accepted: asyncio.Future[Streams] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda r, w: accepted.set_result((r, w)), "127.0.0.1", 0)
    relay = Relay(shape, "127.0.0.1", server.sockets[0].getsockname()[1])
    await relay.start()
    near = await asyncio.open_connection("127.0.0.1", relay.port)
    far = await accepted
    try:
        yield Ends(relay, near, far)
    finally:
        await relay.aclose()
        for _, writer in (near, far):
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        server.close()


async def test_a_relay_listens_at_a_socket_that_it_is_given() -> None:
    """One that was made in another network, for example."""
    far = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda *streams: far.set_result(streams), "127.0.0.1", 0)
    listener = socket.create_server(("127.0.0.9", 0))
    relay = Relay(LinkShape(), "127.0.0.1", server.sockets[0].getsockname()[1], listener=listener)
    await relay.start()
    assert relay.port == listener.getsockname()[1]
    _, writer = await asyncio.open_connection("127.0.0.9", relay.port)
    writer.write(b"through")
    reader, far_writer = await far
    assert await reader.readexactly(7) == b"through"
    await relay.aclose()
    for end in (writer, far_writer):
        end.close()
        with contextlib.suppress(OSError):
            await end.wait_closed()
    server.close()


@pytest.mark.parametrize(
    "shape", [LinkShape(), LinkShape(0.002, 0.002), LinkShape(0.001, 0.0005, 50e6)], ids=["free", "jitter", "limited"]
)
async def test_bytes_arrive_whole_and_in_order_both_ways(shape: LinkShape) -> None:
    data = bytes(range(256)) * 400
    async with joined(shape) as ends:
        for (_, writer), (reader, _) in ((ends.near, ends.far), (ends.far, ends.near)):
            for start in range(0, len(data), 1000):
                writer.write(data[start : start + 1000])
                await writer.drain()
                if start % 10_000 == 0:
                    await asyncio.sleep(0)
            assert await reader.readexactly(len(data)) == data


async def test_a_round_trip_takes_the_delay_twice() -> None:
    async with joined(LinkShape(delay_s=0.05)) as ends:
        start_s = time.monotonic()
        ends.near[1].write(b"ping")
        ends.far[1].write(await ends.far[0].readexactly(4))
        await ends.near[0].readexactly(4)
        assert time.monotonic() - start_s >= 0.1


async def test_many_bytes_take_what_the_bandwidth_says() -> None:
    async with joined(LinkShape(bandwidth_bit_per_s=4e6)) as ends:
        start_s = time.monotonic()
        ends.near[1].write(bytes(100_000))
        await ends.far[0].readexactly(100_000)
        assert time.monotonic() - start_s >= 0.2


async def test_a_sender_that_is_faster_than_the_link_has_to_wait() -> None:
    async with joined(LinkShape(bandwidth_bit_per_s=1e5)) as ends:
        ends.near[1].write(bytes(64 << 20))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await ends.near[1].drain()
        ends.near[1].transport.abort()


async def test_an_end_comes_behind_what_was_sent_before_it() -> None:
    async with joined(LinkShape(delay_s=0.02)) as ends:
        ends.near[1].write(b"last words")
        ends.near[1].close()
        assert await ends.far[0].read() == b"last words"


@pytest.mark.parametrize("is_near", [True, False])
async def test_a_cut_on_one_side_closes_the_other(is_near: bool) -> None:
    async with joined(LinkShape(delay_s=0.001)) as ends:
        ends.near[1].write(b"x")
        await ends.far[0].readexactly(1)
        cut, other = (ends.near, ends.far) if is_near else (ends.far, ends.near)
        cut[1].transport.abort()
        with contextlib.suppress(ConnectionResetError):
            assert await other[0].read() == b""


async def test_a_relay_that_ends_closes_both_sides() -> None:
    async with joined(LinkShape(delay_s=10.0)) as ends:
        ends.near[1].write(b"never arrives")
        await asyncio.sleep(0.01)
        await ends.relay.aclose()
        assert await ends.far[0].read() == b""
        with contextlib.suppress(ConnectionResetError):
            assert await ends.near[0].read() == b""


async def test_a_target_that_is_not_there_closes_the_connection() -> None:
    relay = Relay(LinkShape(), "127.0.0.1", 1)
    await relay.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    assert await reader.read() == b""
    writer.close()
    await relay.aclose()


def test_pieces_are_small_on_slow_links() -> None:
    assert chunk_bytes(LinkShape()) == MAX_CHUNK_BYTES
    assert chunk_bytes(LinkShape(bandwidth_bit_per_s=1e9)) == MAX_CHUNK_BYTES
    assert chunk_bytes(LinkShape(bandwidth_bit_per_s=1e8)) == 12_500
    assert chunk_bytes(LinkShape(bandwidth_bit_per_s=1e6)) == MIN_CHUNK_BYTES


def test_the_buffer_holds_what_travels_and_little_more() -> None:
    assert buffer_bytes(LinkShape(0.02)) == UNLIMITED_BUFFER_BYTES
    assert buffer_bytes(LinkShape(0.02, 0.0, 1e7)) == 25_000 + QUEUE_BYTES
    assert buffer_bytes(LinkShape(10.0, 0.0, 1e12)) == UNLIMITED_BUFFER_BYTES


async def test_frames_pass_relays_in_a_process_of_their_own() -> None:
    context = zmq.asyncio.Context()
    source = await PullSource.bind(context, "tcp://127.0.0.1:0")
    relays = await RelayProcess.start(LinkShape(0.005, 0.001, 1e7), [source.endpoint])
    sink = await PushSink.connect(context, relays.endpoints[0])
    try:
        frames = [[b"header %d" % i, bytes(2000)] for i in range(20)]
        for frame in frames:
            await sink.send(frame)
        for frame in frames:
            assert [bytes(part) for part in await source.receive()] == frame
    finally:
        await sink.aclose()
        await source.aclose()
        await relays.aclose()
        context.term()


async def test_relays_that_do_not_start_are_one_line() -> None:
    with pytest.raises(TransportError, match="--link delay=1ms: the relays' process does not start"):
        await RelayProcess.start(LinkShape(0.001), ["ipc://nowhere"])


@pytest.mark.parametrize(
    ("endpoint", "expected"), [("tcp://127.0.0.1:5", ("127.0.0.1", 5)), ("tcp://[::1]:80", ("::1", 80))]
)
def test_endpoints_are_taken_apart(endpoint: str, expected: tuple[str, int]) -> None:
    assert _host_and_port(endpoint) == expected


@pytest.mark.parametrize("endpoint", ["ipc://x", "tcp://host", "tcp://:5", "tcp://host:x", "host:5"])
def test_what_is_no_tcp_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="not tcp://HOST:PORT"):
        _host_and_port(endpoint)
