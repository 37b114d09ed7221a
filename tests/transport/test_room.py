"""How many connections a listener holds, and whose end when strangers open more."""

import asyncio
import contextlib
import resource
import socket as sockets
from collections.abc import Callable, Iterator

import pytest
import structlog
import zmq.asyncio

from mdiq.transport import watch
from mdiq.transport.curve import DATA, ClientSecurity, Gate, ServerSecurity
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.room import (
    LISTENERS,
    MAX_CONNECTIONS,
    MAX_DESCRIPTORS,
    Room,
    bytes_received,
    connection_limit,
    end_connection,
    raise_descriptor_limit,
)

MOST = 16


class Door:
    """A Room and what it did."""

    def __init__(self, most: int) -> None:
        self.through: set[int] = set()
        self.idle: set[int] = set()
        self.ended: list[int] = []
        self.room = Room[int](most, self.through.__contains__, self.ended.append, self.idle.__contains__)


def test_the_oldest_that_is_not_through_ends_first() -> None:
    door = Door(3)
    for connection in (1, 2, 3):
        door.room.accepted(connection)
    door.through.add(1)
    assert door.ended == []
    for connection in (4, 5):
        door.room.accepted(connection)
    assert door.ended == [2, 3]


def test_where_all_are_through_the_new_one_ends() -> None:
    door = Door(3)
    door.through |= {1, 2, 3}
    for connection in (1, 2, 3, 4, 5):
        door.room.accepted(connection)
    assert door.ended == [4, 5]
    door.room.ended(2)
    door.room.accepted(6)
    assert door.ended == [4, 5]


def test_where_all_are_through_the_oldest_idle_one_makes_room_and_strangers_before_it() -> None:
    door = Door(3)
    door.through |= {1, 2, 3, 5}
    for connection in (1, 2, 3):
        door.room.accepted(connection)
    door.idle |= {2, 3}
    for connection in (4, 5, 6):
        door.room.accepted(connection)
    assert door.ended == [2, 4, 3]


def test_a_descriptor_that_is_used_again_counts_once() -> None:
    door = Door(2)
    for _ in range(5):
        door.room.accepted(7)
    door.room.accepted(8)
    assert door.ended == []
    door.room.clear()
    for connection in (9, 10):
        door.room.accepted(connection)
    assert door.ended == []


def test_peers_that_belong_here_are_let_in_beside_thousands_of_silent_strangers() -> None:
    door = Door(256)
    for connection in range(20_000):
        door.room.accepted(connection)
        if connection % 100 == 0 and connection < 10_000:
            door.through.add(connection)  # within the time of one other connection
    assert not door.through & set(door.ended)
    assert len(door.ended) == 20_000 - 256


@pytest.mark.parametrize(
    ("limits", "raised", "most"),
    [
        ((1_024, 524_288), (MAX_DESCRIPTORS, 524_288), MAX_CONNECTIONS),
        ((1_024, 4_096), (4_096, 4_096), MAX_CONNECTIONS),
        ((256, 256), None, 256 // LISTENERS),
        ((1_024, resource.RLIM_INFINITY), (MAX_DESCRIPTORS, resource.RLIM_INFINITY), MAX_CONNECTIONS),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, MAX_CONNECTIONS),
        ((100_000, 524_288), None, MAX_CONNECTIONS),
        ((20, 20), None, 8),
    ],
)
def test_the_limit_is_raised_to_what_is_permitted_and_listeners_take_a_part_of_it(
    limits: tuple[int, int], raised: tuple[int, int] | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: now.append(limits))
    raise_descriptor_limit()
    assert now[1:] == ([raised] if raised else [])
    assert connection_limit() == most


def test_a_limit_that_may_not_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_024, 4_096))
    monkeypatch.setattr(resource, "setrlimit", refuses)
    raise_descriptor_limit()


def test_a_connection_is_looked_at_and_ended_without_a_descriptor_and_others_are_left_alone() -> None:
    with sockets.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with sockets.create_connection(("127.0.0.1", port)) as near:
            far, _ = listener.accept()
            near.sendall(b"x" * 600)
            assert far.recv(600, sockets.MSG_WAITALL) == b"x" * 600
            assert bytes_received(far.fileno()) == 600
            end_connection(far.fileno(), port + 1)  # the descriptor is another socket's by now
            near.sendall(b"y")
            assert far.recv(1) == b"y"
            end_connection(far.fileno(), port)
            assert near.recv(1) == b""
            number = far.detach()
            sockets.close(number)
    assert bytes_received(number) == 0
    end_connection(number, port)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "connection_limit", lambda: MOST)


@contextlib.contextmanager
def strangers(port: int, count: int, data: bytes = b"") -> Iterator[list[sockets.socket]]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(sockets.create_connection(("127.0.0.1", port))) for _ in range(count)]
        for one in held:
            with contextlib.suppress(OSError):  # it may have ended
                one.sendall(data)
            one.setblocking(False)
        yield held


def num_open(held: list[sockets.socket]) -> int:
    count = 0
    for one in held:
        try:
            while one.recv(4_096):
                pass  # its greeting
        except BlockingIOError:
            count += 1
        except OSError:
            pass
    return count


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("is_secured", [False, True])
@pytest.mark.parametrize("data", [b"", b"\xff\0\0\0\0\0\0\0\1\x7f\3\0CURVE"], ids=["silent", "greeting"])
async def test_strangers_hold_few_connections_and_a_peer_goes_on_and_another_comes_in(
    context: zmq.asyncio.Context, narrow: None, is_secured: bool, data: bytes
) -> None:
    server, client = zmq.curve_keypair(), zmq.curve_keypair()
    gate = Gate(context)
    gate.start()
    guarding = asyncio.create_task(gate.run())
    await gate.replace(DATA, {client[0].decode(): "pi1"})
    guards = ServerSecurity(server[1], DATA, gate) if is_secured else None
    known = ClientSecurity(client[1], server[0].decode()) if is_secured else None
    source = await PullSource.bind(context, "tcp://127.0.0.1:0", security=guards)
    port = int(source.endpoint.rpartition(":")[2])
    first = await PushSink.connect(context, source.endpoint, security=known)
    await first.send([b"first"])
    assert await source.receive() == [b"first"]
    with structlog.testing.capture_logs() as lines, strangers(port, 8 * MOST, data) as held:
        await until(lambda: num_open(held) < MOST)
        second = await PushSink.connect(context, source.endpoint, security=known)
        await second.send([b"second"])
        await first.send([b"first again"])
        assert {bytes((await source.receive())[0]) for _ in range(2)} == {b"second", b"first again"}
        await first.aclose()
        await second.aclose()
    assert any(line["event"] == "too_many_connections" and line["ended"] == "127.0.0.1" for line in lines)
    await source.aclose()
    guarding.cancel()
    await asyncio.gather(guarding, return_exceptions=True)
    await gate.aclose()
