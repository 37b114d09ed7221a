"""Hops over real loopback sockets: what arrives, what is counted, and what a hostile peer cannot do."""

import asyncio
import socket
import struct

import pytest
import zmq
import zmq.asyncio

from mdiq.errors import TransportError
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.sockets import MAX_PARTS, MAX_READY, listen_endpoint
from tests.transport.conftest import Until

ANY_PORT = "tcp://127.0.0.1:0"
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


async def test_the_system_chooses_a_port_and_the_endpoint_tells_it(context: zmq.asyncio.Context) -> None:
    source = await PullSource.bind(context, ANY_PORT)
    host, _, port = source.endpoint.rpartition(":")
    assert host == "tcp://127.0.0.1"
    assert int(port) > 0
    await source.aclose()


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_535, 65_536, 1_000_000])
async def test_parts_arrive_whole_and_both_ends_count_the_same_bytes(context: zmq.asyncio.Context, size: int) -> None:
    source = await PullSource.bind(context, ANY_PORT)
    sink = await PushSink.connect(context, source.endpoint)
    payload = memoryview(bytearray(range(256)) * (size // 256 + 1))[:size]
    await sink.send([b"header", payload])
    parts = await source.receive()
    assert [bytes(part) for part in parts] == [b"header", bytes(payload)]
    # RFC 37: a frame header of 2 bytes up to a body of 255, and of 9 above.
    assert source.bytes_in == sink.bytes_out == 8 + size + (2 if size < 256 else 9)
    await sink.aclose()
    await source.aclose()


async def _inflow(source: PullSource, min_bytes: int) -> int:
    """Return the inflow when so many bytes have arrived; libzmq's thread accepts the connection first."""
    for _ in range(500):
        if source.inflow >= min_bytes:
            break
        await asyncio.sleep(0.01)
    return source.inflow


async def test_bytes_of_a_message_that_is_not_whole_yet_are_seen_to_arrive(context: zmq.asyncio.Context) -> None:
    source = await PullSource.bind(context, ANY_PORT)
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 4) + b"PUSH"
    with socket.create_connection(("127.0.0.1", int(source.endpoint.rpartition(":")[2]))) as peer:
        peer.sendall(GREETING + b"\x04" + bytes([len(ready)]) + ready)
        peer.sendall(b"\x02" + struct.pack(">Q", 100_000))  # RFC 37: a long frame, the last of its message
        await asyncio.sleep(0.05)
        assert source.inflow == 0, "a handshake is nothing that a hop carries"
        peer.sendall(bytes(1_000))
        before = await _inflow(source, 500)
        for _ in range(3):
            peer.sendall(bytes(1_000))
            assert await _inflow(source, before + 1_000) == (before := before + 1_000)
        assert source.bytes_in == 0
    await source.aclose()


async def test_messages_keep_their_order(context: zmq.asyncio.Context) -> None:
    source = await PullSource.bind(context, ANY_PORT)
    sink = await PushSink.connect(context, source.endpoint)

    async def send() -> None:
        for i in range(200):
            await sink.send([b"%d" % i])

    sending = asyncio.create_task(send())
    assert [await source.receive() for _ in range(200)] == [[b"%d" % i] for i in range(200)]
    await sending
    await sink.aclose()
    await source.aclose()


async def test_a_sink_waits_for_its_peer_to_listen(context: zmq.asyncio.Context) -> None:
    """IMMEDIATE: without a connection nothing is queued, so nothing stale can arrive."""
    with socket.socket() as probe:  # libzmq closes its listeners a little later than it is told
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    sink = await PushSink.connect(context, endpoint)
    sending = asyncio.create_task(sink.send([b"x"]))
    await asyncio.sleep(0)
    assert not sending.done()
    source = await PullSource.bind(context, endpoint)
    assert await source.receive() == [b"x"]
    await sending
    await sink.aclose()
    await source.aclose()


@pytest.mark.parametrize(
    ("endpoint", "advice"),
    [
        ("tcp://192.0.2.1:0", "no network interface"),
        ("127.0.0.1:5000", "write tcp://"),
        ("tcp://127.0.0.1:port", "write tcp://"),
        ("carrier-pigeon://roof", "write tcp://"),
    ],
)
async def test_an_address_that_cannot_be_bound_is_named_with_advice(
    context: zmq.asyncio.Context, endpoint: str, advice: str
) -> None:
    with pytest.raises(TransportError) as caught:
        await PullSource.bind(context, endpoint, insecure=True)
    assert str(caught.value).startswith(f"{endpoint}: cannot listen there: ")
    assert advice in str(caught.value)


async def test_a_port_in_use_is_named_with_advice(context: zmq.asyncio.Context) -> None:
    source = await PullSource.bind(context, ANY_PORT)
    with pytest.raises(
        TransportError,
        match="the port is in use; stop what uses it, or choose another one in the topology or by --base-port$",
    ):
        await PullSource.bind(context, source.endpoint)
    await source.aclose()


async def test_a_sink_refuses_what_is_no_endpoint(context: zmq.asyncio.Context) -> None:
    with pytest.raises(TransportError, match="nowhere: cannot connect there: not an endpoint"):
        await PushSink.connect(context, "nowhere")


async def test_ipv6_works_where_it_is_asked_for(context: zmq.asyncio.Context) -> None:
    try:
        source = await PullSource.bind(context, "tcp://[::1]:0")
    except TransportError as error:
        pytest.skip(f"no IPv6 here: {error}")
    sink = await PushSink.connect(context, source.endpoint)
    await sink.send([b"six"])
    assert await source.receive() == [b"six"]
    await sink.aclose()
    await source.aclose()


async def test_a_message_of_many_parts_is_cut_and_the_next_one_is_whole(context: zmq.asyncio.Context) -> None:
    source = await PullSource.bind(context, ANY_PORT)
    hostile = context.socket(zmq.PUSH)
    hostile.connect(source.endpoint)
    await hostile.send_multipart([b"part"] * 1_000)
    await hostile.send_multipart([b"a", b"b"])
    assert await source.receive() == [b"part"] * MAX_PARTS
    assert source.bytes_in == 1_000 * 6
    assert await source.receive() == [b"a", b"b"]
    hostile.close(linger=0)
    await source.aclose()


async def test_a_part_over_the_limit_costs_its_sender_the_connection_and_others_nothing(
    context: zmq.asyncio.Context, until: Until
) -> None:
    source = await PullSource.bind(context, ANY_PORT, max_frame_bytes=1_000)
    hostile = context.socket(zmq.PUSH)
    async with until(hostile, zmq.EVENT_DISCONNECTED):
        hostile.connect(source.endpoint)
        await hostile.send(bytes(1_001))
    hostile.close(linger=0)
    sink = await PushSink.connect(context, source.endpoint)
    await sink.send([bytes(1_000)])
    assert await source.receive() == [bytes(1_000)]
    await sink.aclose()
    await source.aclose()


async def test_a_sink_refuses_a_part_that_its_peer_would_hang_up_for(context: zmq.asyncio.Context) -> None:
    sink = await PushSink.connect(context, "tcp://127.0.0.1:1", max_frame_bytes=1_000)
    with pytest.raises(TransportError, match="1001 bytes is over the 1000"):
        await sink.send([b"header", bytes(1_001)])
    await sink.aclose()


async def test_bytes_that_are_no_zmtp_reach_nobody(context: zmq.asyncio.Context) -> None:
    source = await PullSource.bind(context, ANY_PORT)
    address = ("127.0.0.1", int(source.endpoint.rpartition(":")[2]))
    # Not b"\x01\x00" * 50: that is ZMTP 1.0, whose empty messages libzmq hands up where a link has no security.
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b"\0" * 100):
        with socket.create_connection(address) as raw:
            raw.sendall(junk)
    # The right greeting, and then a frame whose length nobody has the memory for.
    with socket.create_connection(address) as raw:
        raw.sendall(GREETING + b"\x02" + struct.pack(">Q", 2**62))
    sink = await PushSink.connect(context, source.endpoint)
    await sink.send([b"served"])
    assert await source.receive() == [b"served"]
    await sink.aclose()
    await source.aclose()


async def test_a_flood_does_not_keep_other_tasks_from_running(context: zmq.asyncio.Context) -> None:
    source = await PullSource.bind(context, ANY_PORT)
    received = turns = 0
    most_between_turns = 0
    hostile = context.socket(zmq.PUSH)
    hostile.connect(source.endpoint)
    num_messages = 2_000

    def flood() -> None:
        blocking: zmq.Socket[bytes] = zmq.Socket.shadow(hostile.underlying)
        for _ in range(num_messages):
            blocking.send(b"x")

    async def read() -> None:
        nonlocal received
        while received < num_messages:
            await source.receive()
            received += 1

    flooding = asyncio.create_task(asyncio.to_thread(flood))
    reading = asyncio.create_task(read())
    while not reading.done():
        before = received
        await asyncio.sleep(0)
        turns += 1
        most_between_turns = max(most_between_turns, received - before)
    await flooding
    assert received == num_messages
    assert most_between_turns <= 2 * MAX_READY
    hostile.close(linger=0)
    await source.aclose()


async def test_a_source_that_comes_back_on_its_port_is_found_again(context: zmq.asyncio.Context, until: Until) -> None:
    source = await PullSource.bind(context, ANY_PORT)
    sink = await PushSink.connect(context, source.endpoint)
    await sink.send([b"before"])
    assert await source.receive() == [b"before"]
    endpoint = source.endpoint
    async with until(sink._socket, zmq.EVENT_DISCONNECTED):
        await source.aclose()

    async def bind() -> PullSource:
        while True:
            try:
                return await PullSource.bind(context, endpoint)
            except TransportError:  # the port is free a little later
                await asyncio.sleep(0.01)

    async with asyncio.timeout(20):
        source = await bind()
    receiving = asyncio.create_task(source.receive())
    while not receiving.done():
        # What is sent just as the link is cut may be lost.
        await sink.send([b"after"])
        await asyncio.wait({receiving}, timeout=0.05)
    assert receiving.result() == [b"after"]
    await sink.aclose()
    await source.aclose()


@pytest.mark.parametrize(
    ("reached", "listens"),
    [
        ("tcp://192.168.1.10:7400", "tcp://192.168.1.10:7400"),
        ("tcp://[fd00::1]:7400", "tcp://[fd00::1]:7400"),
        ("tcp://localhost:7400", "tcp://127.0.0.1:7400"),
        ("tcp://pi1.lan:7400", "tcp://[::]:7400"),
    ],
)
def test_a_node_that_is_reached_by_name_listens_on_all_interfaces_of_both_families(
    reached: str, listens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdiq.transport.sockets.has_ipv6", lambda: True)
    assert listen_endpoint(reached) == listens
    monkeypatch.setattr("mdiq.transport.sockets.has_ipv6", lambda: False)
    assert listen_endpoint(reached) == listens.replace("[::]", "0.0.0.0")
