"""What all links over a socket have in common: limits, dead peers, and no socket is left where one cannot begin.

The context of these tests fails where a socket is left open.
"""

from collections.abc import Awaitable, Callable

import pytest
import zmq
import zmq.asyncio

from mdiq.errors import ConfigError, TransportError
from mdiq.transport.curve import ClientSecurity
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.router_dealer import MAX_CONTROL_BYTES, DealerLink, RouterServer
from mdiq.transport.sockets import DEAD_PEER_S, HANDSHAKE_MS, SocketEnd

FREE, CLOSED = "tcp://127.0.0.1:0", "tcp://127.0.0.1:9"
Open = Callable[[zmq.asyncio.Context, str], Awaitable[SocketEnd]]
LISTENERS: dict[str, Open] = {
    "pull": lambda context, at: PullSource.bind(context, at, max_frame_bytes=1_000),
    "router": lambda context, at: RouterServer.bind(context, at, hwm=7),
}
CONNECTORS: dict[str, Open] = {
    "push": lambda context, at: PushSink.connect(context, at, max_frame_bytes=1_000),
    "dealer": lambda context, at: DealerLink.connect(context, at, identity="pi1"),
}


@pytest.mark.parametrize(("kind", "max_bytes"), [("pull", 1_000), ("router", MAX_CONTROL_BYTES)])
async def test_a_listener_bounds_parts_and_handshakes_and_notices_a_dead_peer(
    kind: str, max_bytes: int, context: zmq.asyncio.Context
) -> None:
    link = await LISTENERS[kind](context, FREE)
    socket = link._socket
    try:
        assert socket.get(zmq.MAXMSGSIZE) == max_bytes
        assert socket.get(zmq.HANDSHAKE_IVL) == HANDSHAKE_MS
        assert (socket.get(zmq.TCP_KEEPALIVE), socket.get(zmq.TCP_MAXRT)) == (1, DEAD_PEER_S * 1_000)
        assert link.endpoint.startswith("tcp://127.0.0.1:") and not link.endpoint.endswith(":0")
    finally:
        await link.aclose()


@pytest.mark.parametrize("kind", CONNECTORS)
async def test_what_waits_for_a_peer_waits_here_and_not_in_a_queue_across_a_cut(
    kind: str, context: zmq.asyncio.Context
) -> None:
    link = await CONNECTORS[kind](context, CLOSED)
    assert link._socket.get(zmq.IMMEDIATE) == 1
    await link.aclose()


@pytest.mark.parametrize("kind", LISTENERS)
async def test_a_port_in_use_is_told_and_leaves_no_socket(kind: str, context: zmq.asyncio.Context) -> None:
    first = await LISTENERS[kind](context, FREE)
    with pytest.raises(TransportError, match="cannot listen there: the port is in use"):
        await LISTENERS[kind](context, first.endpoint)
    await first.aclose()


@pytest.mark.parametrize("kind", CONNECTORS)
async def test_an_endpoint_that_is_none_is_told_and_leaves_no_socket(kind: str, context: zmq.asyncio.Context) -> None:
    with pytest.raises(TransportError, match="cannot connect there: not an endpoint; write tcp://ADDRESS:PORT"):
        await CONNECTORS[kind](context, "tcp://127.0.0.1:none")


@pytest.mark.parametrize("kind", [*LISTENERS, *CONNECTORS])
async def test_plain_text_beyond_loopback_is_refused_before_a_socket_is_made(
    kind: str, context: zmq.asyncio.Context
) -> None:
    with pytest.raises(TransportError, match="plain text is for loopback only"):
        await (LISTENERS | CONNECTORS)[kind](context, "tcp://192.0.2.1:7400")
    assert not list(context._sockets)


async def test_a_key_that_is_none_is_told_and_leaves_no_socket(context: zmq.asyncio.Context) -> None:
    _, secret = zmq.curve_keypair()
    with pytest.raises(ConfigError, match="not 40 characters of Z85"):
        await PushSink.connect(context, CLOSED, security=ClientSecurity(secret, "too short"))


async def test_a_name_that_is_none_leaves_no_socket(context: zmq.asyncio.Context) -> None:
    with pytest.raises(TransportError, match="it must have 1 to 255 bytes"):
        await DealerLink.connect(context, CLOSED, identity="")
