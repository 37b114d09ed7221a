"""A ZeroMQ context in which no test may forget a socket, and a way to wait for what libzmq does in the background."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import zmq.asyncio

Until = Callable[[zmq.asyncio.Socket, int], AbstractAsyncContextManager[None]]


@pytest.fixture
def context() -> Iterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    yield context
    forgotten = [socket for socket in context._sockets if not socket.closed]
    context.destroy(linger=0)  # ``term`` alone would wait for a forgotten socket for ever
    assert not forgotten


@pytest.fixture
def until() -> Until:
    """``async with until(socket, zmq.EVENT_...)`` ends when that has happened to the socket."""

    @asynccontextmanager
    async def wait(socket: zmq.asyncio.Socket, event: int) -> AsyncIterator[None]:
        monitor = socket.get_monitor_socket(event)
        try:
            yield
            await monitor.recv_multipart()
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)

    return wait
