"""Links inside one process: order, counts, back-pressure and the faults that tests ask for."""

import asyncio

import pytest

from mdiq.errors import TransportError
from mdiq.transport.memory import MemoryControlServer, MemoryLink


async def test_a_full_link_makes_its_sender_wait() -> None:
    link = MemoryLink(max_waiting=1)
    await link.send([b"1"])
    sending = asyncio.create_task(link.send([b"2"]))
    await asyncio.sleep(0)
    assert not sending.done()
    assert await link.receive() == [b"1"]
    await sending
    assert await link.receive() == [b"2"]


async def test_a_link_drops_and_doubles_what_its_hook_says() -> None:
    fates = iter([0, 2, 1])
    link = MemoryLink(copies=lambda _: next(fates))
    for data in (b"lost", b"twice", b"once"):
        await link.send([data])
    assert [await link.receive() for _ in range(3)] == [[b"twice"], [b"twice"], [b"once"]]


async def test_a_peer_that_is_unknown_or_gone_or_hangs_is_a_transport_error() -> None:
    server = MemoryControlServer(max_waiting=1)
    with pytest.raises(TransportError, match="not connected"):
        await server.send(b"nobody", b"x")
    link = server.connect(b"one")
    await server.send(b"one", b"x")
    with pytest.raises(TransportError, match="does not take"):
        await server.send(b"one", b"y")
    await link.aclose()
    with pytest.raises(TransportError, match="not connected"):
        await server.send(b"one", b"z")


async def test_a_second_peer_of_a_name_does_not_take_over_the_first() -> None:
    server = MemoryControlServer()
    first = server.connect(b"one")
    second = server.connect(b"one")
    await second.aclose()
    await server.send(b"one", b"x")
    assert await first.receive() == b"x"
