"""The control channel over real loopback sockets."""

import asyncio

import pytest
import zmq
import zmq.asyncio

from mdiq.errors import TransportError
from mdiq.transport.router_dealer import MAX_CONTROL_BYTES, DealerLink, RouterServer
from tests.transport.conftest import Until

ANY_PORT = "tcp://127.0.0.1:0"


async def test_a_peer_that_is_unknown_or_gone_is_a_transport_error(context: zmq.asyncio.Context) -> None:
    server = await RouterServer.bind(context, ANY_PORT)
    with pytest.raises(TransportError, match="b'nobody': not connected"):
        await server.send(b"nobody", b"x")
    link = await DealerLink.connect(context, server.endpoint, identity="one")
    await link.send(b"hello")
    await server.receive()
    await link.aclose()

    async def send() -> None:
        while True:
            await server.send(b"one", b"x")
            await asyncio.sleep(0.01)

    with pytest.raises(TransportError, match="b'one': not connected"):
        async with asyncio.timeout(20):
            await send()
    await server.aclose()


async def test_a_peer_that_hangs_does_not_hold_up_the_server(context: zmq.asyncio.Context) -> None:
    server = await RouterServer.bind(context, ANY_PORT)
    link = await DealerLink.connect(context, server.endpoint, identity="one")
    await link.send(b"hello")
    await server.receive()
    with pytest.raises(TransportError, match="does not take its messages"):
        for _ in range(3_000):
            await server.send(b"one", bytes(100_000))
    server._socket.setsockopt(zmq.LINGER, 0)
    await server.aclose()
    await link.aclose()


async def test_a_second_peer_of_a_name_does_not_take_over_the_first(context: zmq.asyncio.Context, until: Until) -> None:
    server = await RouterServer.bind(context, ANY_PORT)
    first = await DealerLink.connect(context, server.endpoint, identity="one")
    await first.send(b"first")
    assert await server.receive() == (b"one", b"first")
    second = context.socket(zmq.DEALER)
    second.setsockopt(zmq.ROUTING_ID, b"one")
    async with until(second, zmq.EVENT_HANDSHAKE_SUCCEEDED):
        second.connect(server.endpoint)
        await second.send(b"second")
    await server.send(b"one", b"for the first")
    assert await first.receive() == b"for the first"
    await first.send(b"again")
    assert await server.receive() == (b"one", b"again")
    second.close(linger=0)
    await first.aclose()
    await server.aclose()


async def test_messages_with_odd_part_counts_are_dropped_and_counted(context: zmq.asyncio.Context) -> None:
    server = await RouterServer.bind(context, ANY_PORT)
    hostile = context.socket(zmq.DEALER)
    hostile.connect(server.endpoint)
    for num_parts in (2, 3, 500):
        await hostile.send_multipart([b"junk"] * num_parts)
    await hostile.send(b"one part")
    identity, data = await server.receive()
    assert data == b"one part"
    assert server.num_dropped == 3
    hostile.close(linger=0)
    link = await DealerLink.connect(context, server.endpoint, identity="one")
    await link.send(b"hello")
    assert await server.receive() == (b"one", b"hello")
    await server._socket.send_multipart([b"one", b"two", b"parts"])
    await server.send(b"one", b"one part")
    assert await link.receive() == b"one part"
    assert link.num_dropped == 1
    await link.aclose()
    await server.aclose()


async def test_a_message_over_the_limit_never_arrives(context: zmq.asyncio.Context, until: Until) -> None:
    server = await RouterServer.bind(context, ANY_PORT)
    hostile = context.socket(zmq.DEALER)
    async with until(hostile, zmq.EVENT_DISCONNECTED):
        hostile.connect(server.endpoint)
        await hostile.send(bytes(MAX_CONTROL_BYTES + 1))
    hostile.close(linger=0)
    link = await DealerLink.connect(context, server.endpoint, identity="one")
    await link.send(b"hello")
    assert await server.receive() == (b"one", b"hello")
    await link.aclose()
    await server.aclose()


async def test_what_was_sent_last_still_arrives(context: zmq.asyncio.Context) -> None:
    server = await RouterServer.bind(context, ANY_PORT)
    other = zmq.asyncio.Context()
    link = await DealerLink.connect(other, server.endpoint, identity="one")
    await link.send(b"goodbye")
    await link.aclose()
    await asyncio.to_thread(other.term)
    assert await server.receive() == (b"one", b"goodbye")
    await server.aclose()


@pytest.mark.parametrize("name", ["", "x" * 256])
async def test_a_name_that_no_peer_can_have_is_refused(context: zmq.asyncio.Context, name: str) -> None:
    with pytest.raises(TransportError, match="1 to 255 bytes"):
        await DealerLink.connect(context, "tcp://127.0.0.1:1", identity=name)


async def test_a_message_that_waits_for_a_peer_ends_with_an_error_when_its_link_is_closed(
    context: zmq.asyncio.Context,
) -> None:
    link = await DealerLink.connect(context, "tcp://127.0.0.1:9", identity="node-1")  # nobody is there
    sending = asyncio.create_task(link.send(b"I leave"))
    await asyncio.sleep(0)
    await link.aclose()
    with pytest.raises(TransportError, match="closed"):
        await sending
    with pytest.raises(TransportError, match="closed"):
        await link.send(b"I leave")
