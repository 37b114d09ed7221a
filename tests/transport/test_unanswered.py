"""Peers whose machine or firewall drops what comes: a connection that is asked for has no answer at all."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
import structlog
import zmq.asyncio

from mdiq.transport import sockets, watch
from mdiq.transport.curve import ClientSecurity
from mdiq.transport.router_dealer import DealerLink


@pytest.fixture
def full() -> Iterator[socket.socket]:
    """A listener with no room for another connection: the kernel drops what asks for one, as a firewall does."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    waiting = [socket.socket() for _ in range(4)]
    for one in waiting:
        one.setblocking(False)
        one.connect_ex(listener.getsockname())
    yield listener
    for one in (*waiting, listener):
        one.close()


async def link_to(context: zmq.asyncio.Context, port: int) -> DealerLink:
    (_, secret), (public, _) = zmq.curve_keypair(), zmq.curve_keypair()
    security = ClientSecurity(secret, public.decode())
    return await DealerLink.connect(context, f"tcp://127.0.0.1:{port}", identity="pi1", security=security)


async def test_it_is_said_once_what_to_do_and_tried_again_soon(
    full: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "CONNECT_MS", 100)
    monkeypatch.setattr(watch, "ANSWER_S", 0.05)
    context, port = zmq.asyncio.Context(), full.getsockname()[1]
    with structlog.testing.capture_logs() as lines:
        link = await link_to(context, port)
        async with asyncio.timeout(20):
            while not lines:  # noqa: ASYNC110  (a log tells nobody)
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
    await link.aclose()
    context.term()
    (line,) = lines
    assert (line["event"], line["endpoint"]) == ("peer_does_not_answer", f"tcp://127.0.0.1:{port}")
    assert "see whether it is switched on" in line["error"] and "a firewall there lets this port in" in line["error"]


async def test_the_kernels_two_minutes_are_not_waited_for(full: socket.socket) -> None:
    context = zmq.asyncio.Context()
    link = await link_to(context, full.getsockname()[1])
    assert link._socket.getsockopt(zmq.CONNECT_TIMEOUT) == sockets.CONNECT_MS == 5_000
    await link.aclose()
    context.term()


async def test_a_closed_port_answers_and_is_tried_again_without_a_word() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        context = zmq.asyncio.Context()
        with structlog.testing.capture_logs() as lines:
            link = await link_to(context, closed.getsockname()[1])
            await asyncio.sleep(0.5)
        await link.aclose()
        context.term()
    assert lines == []
