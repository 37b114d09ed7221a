"""What the protocols may expect of a link (base.py), asked of those inside this process and of real sockets."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import zmq.asyncio

from mdiq.core.weights import MAX_BYTES
from mdiq.errors import TransportError
from mdiq.transport.base import ControlLink, ControlServer, FrameSink, FrameSource
from mdiq.transport.memory import MemoryControlServer, MemoryLink
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.router_dealer import DealerLink, RouterServer

ANY_PORT = "tcp://127.0.0.1:0"
Hop = tuple[FrameSource, FrameSink]
Control = tuple[ControlServer, Callable[[bytes], Awaitable[ControlLink]]]


@pytest.fixture(params=["memory", "sockets"])
async def hop(request: pytest.FixtureRequest, context: zmq.asyncio.Context) -> AsyncIterator[Hop]:
    if request.param == "memory":
        link = MemoryLink()
        yield link, link
        return
    source = await PullSource.bind(context, ANY_PORT)
    sink = await PushSink.connect(context, source.endpoint)
    yield source, sink
    await sink.aclose()
    await source.aclose()


@pytest.fixture(params=["memory", "sockets"])
async def control(request: pytest.FixtureRequest, context: zmq.asyncio.Context) -> AsyncIterator[Control]:
    """A server, and what connects a peer of a name to it."""
    if request.param == "memory":
        memory = MemoryControlServer()

        async def connect_memory(identity: bytes) -> ControlLink:
            return memory.connect(identity)

        yield memory, connect_memory
        return
    server = await RouterServer.bind(context, ANY_PORT)
    links: list[DealerLink] = []

    async def connect(identity: bytes) -> ControlLink:
        links.append(await DealerLink.connect(context, server.endpoint, identity=identity.decode()))
        return links[-1]

    yield server, connect
    for part in (*links, server):
        await part.aclose()


async def test_messages_arrive_whole_and_in_order_and_both_ends_count_the_same(
    hop: Hop,
) -> None:
    source, sink = hop
    for i in range(3):
        await sink.send([b"%d" % i, memoryview(b"cde"), b""])
        assert [bytes(part) for part in await source.receive()] == [b"%d" % i, b"cde", b""]
        assert source.bytes_in == sink.bytes_out >= 4 * (i + 1)
    for i in range(10):
        await sink.send([b"%d" % i])
    assert [await source.receive() for _ in range(10)] == [[b"%d" % i] for i in range(10)]


async def test_messages_go_both_ways_by_identity_and_an_unknown_peer_is_a_transport_error(control: Control) -> None:
    server, connect = control
    one, two = await connect(b"one"), await connect(b"two")
    for link, data in ((one, b"from one"), (two, b"")):
        await link.send(data)
    assert dict([await server.receive(), await server.receive()]) == {b"one": b"from one", b"two": b""}
    assert server.sender is None, "the links have no keys"
    await server.send(b"two", b"x" * MAX_BYTES)
    await server.send(b"one", b"for one")
    assert await one.receive() == b"for one"
    assert await two.receive() == b"x" * MAX_BYTES
    with pytest.raises(TransportError, match="b'nobody': not connected"):
        await server.send(b"nobody", b"x")
