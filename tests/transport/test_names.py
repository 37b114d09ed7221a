"""Peers that are given by name: looked up beside everything else, again when they are away, in both families."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import structlog
import zmq.asyncio

from mdiq.transport import names, watch
from mdiq.transport.names import addresses_of, has_ipv6, look_up, name_in, plain_address, with_address
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.router_dealer import DealerLink, RouterServer
from mdiq.transport.sockets import listen_endpoint

Lookup = Callable[[str], list[str]]
ANY_PORT = "tcp://127.0.0.1:0"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(watch, "SLOW_S", 0.05)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Lookup], None]:
    """Have names looked up by the test."""
    return lambda lookup: monkeypatch.setattr(names, "addresses_of", lookup)


@pytest.fixture
def hanging() -> Iterator[Lookup]:
    """A name server that does not answer before the test ends."""
    ended = threading.Event()

    def hang(_: str) -> list[str]:
        ended.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    yield hang
    ended.set()


def port_of(endpoint: str) -> str:
    return endpoint.rpartition(":")[2]


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        ("tcp://pi1.lan:7400", "pi1.lan"),
        ("tcp://node_1-a:1", "node_1-a"),
        ("tcp://localhost:1", "localhost"),
        ("tcp://192.0.2.1:0;pi1:7400", "pi1"),
        ("tcp://127.0.0.1:7400", None),
        ("tcp://[fd00::1]:7400", None),
        ("tcp://[fe80::1%eth0]:7400", None),
        ("tcp://*:7400", None),
        ("tcp://pi1", None),
        ("tcp://pi1:port", None),
        ("inproc://pi1:7400", None),
    ],
)
def test_names_are_told_from_addresses(endpoint: str, name: str | None) -> None:
    assert name_in(endpoint) == name


def test_an_address_takes_the_place_of_the_name() -> None:
    assert with_address("tcp://pi1:7400", "192.0.2.7") == "tcp://192.0.2.7:7400"
    assert with_address("tcp://pi1:7400", "fd00::7") == "tcp://[fd00::7]:7400"
    assert with_address("tcp://192.0.2.1:0;pi1:7400", "192.0.2.7") == "tcp://192.0.2.1:0;192.0.2.7:7400"


def test_addresses_of_both_families_are_taken_those_of_ipv4_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, 1, 6, "", ("fd00::7", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("192.0.2.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [*found, *found])
    assert addresses_of("pi1") == ["192.0.2.7", "fd00::7"]


def test_mapped_addresses_are_shown_as_people_write_them() -> None:
    assert plain_address("::ffff:192.0.2.7") == "192.0.2.7"
    for address in ("192.0.2.7", "fd00::7", "fe80::7%eth0", "unknown"):
        assert plain_address(address) == address


async def test_a_name_server_that_does_not_answer_holds_up_nobody_else(
    context: zmq.asyncio.Context, answers: Callable[[Lookup], None], hanging: Lookup
) -> None:
    answers(hanging)
    with structlog.testing.capture_logs() as lines:
        async with asyncio.timeout(20):
            named = [await PushSink.connect(context, "tcp://pi9.lan:7400", insecure=True) for _ in range(40)]
            waiting = asyncio.create_task(named[0].send([b"for pi9"]))
            source = await PullSource.bind(context, ANY_PORT)
            sink = await PushSink.connect(context, source.endpoint)
            for i in range(100):
                await sink.send([b"%d" % i])
                assert await source.receive() == [b"%d" % i]
            assert await asyncio.to_thread(lambda: "a thread is left") == "a thread is left"
            while not any(line["event"] == "name_server_silent" for line in lines):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    for part in (*named, sink, source):
        await part.aclose()


async def test_a_name_that_is_not_known_yet_is_asked_for_again_and_named_once(
    context: zmq.asyncio.Context, answers: Callable[[Lookup], None]
) -> None:
    asked: list[str] = []

    def lookup(name: str) -> list[str]:
        asked.append(name)
        if len(asked) < 4:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ["127.0.0.1"]

    answers(lookup)
    server = await RouterServer.bind(context, ANY_PORT)
    endpoint = f"tcp://desk.lan:{port_of(server.endpoint)}"
    with structlog.testing.capture_logs() as lines:
        link = await DealerLink.connect(context, endpoint, identity="pi1", insecure=True)
        await link.send(b"hello")
        assert await server.receive() == (b"pi1", b"hello")
    (line,) = [line for line in lines if line["event"] == "name_not_found"]
    assert "desk.lan: Name or service not known" in str(line["error"])
    assert asked == ["desk.lan"] * 4  # and not again while the connection is there
    await link.aclose()
    await server.aclose()


async def test_each_address_of_a_name_is_tried_and_a_new_one_is_found(
    context: zmq.asyncio.Context, answers: Callable[[Lookup], None]
) -> None:
    address = ["127.0.0.2", "127.0.0.3"]
    answers(lambda _: list(address))
    source = await PullSource.bind(context, "tcp://127.0.0.3:0")
    port = port_of(source.endpoint)
    sink = await PushSink.connect(context, f"tcp://pi1.lan:{port}", insecure=True)
    await sink.send([b"to the second address"])
    assert await source.receive() == [b"to the second address"]
    await source.aclose()
    address[:] = ["127.0.0.4"]  # the host has another address by now
    source = await PullSource.bind(context, f"tcp://127.0.0.4:{port}")
    receiving = asyncio.create_task(source.receive())
    async with asyncio.timeout(20):
        while not receiving.done():
            await sink.send([b"to its new one"])  # what is sent just as the link is cut may be lost
            await asyncio.wait({receiving}, timeout=0.05)
    assert receiving.result() == [b"to its new one"]
    await sink.aclose()
    await source.aclose()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_a_host_with_an_ipv6_address_only_is_reached_where_it_listens_by_its_name(
    context: zmq.asyncio.Context, answers: Callable[[Lookup], None]
) -> None:
    answers(lambda _: ["::1"])
    source = await PullSource.bind(context, listen_endpoint("tcp://pi1.lan:0"), insecure=True)
    for host in ("pi1.lan", "[::1]", "127.0.0.1"):
        sink = await PushSink.connect(context, f"tcp://{host}:{port_of(source.endpoint)}", insecure=True)
        await sink.send([host.encode()])
        assert await source.receive() == [host.encode()]
        await sink.aclose()
    await source.aclose()


async def test_a_name_that_cannot_be_one_is_told(context: zmq.asyncio.Context) -> None:
    with structlog.testing.capture_logs() as lines:
        sink = await PushSink.connect(context, f"tcp://{'x' * 70}.lan:7400", insecure=True)
        async with asyncio.timeout(20):
            while not any(line["event"] == "name_not_found" for line in lines):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    await sink.aclose()


async def test_a_look_up_that_breaks_is_an_error_and_does_not_hang(
    answers: Callable[[Lookup], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda broken: noted.append(broken.exc_value))

    def lookup(_: str) -> list[str]:
        raise RuntimeError("a table is full")

    answers(lookup)
    async with asyncio.timeout(20):
        with pytest.raises(OSError, match="the look-up broke"):
            await look_up("pi1")
        while not noted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert "a table is full" in str(noted[0])


async def test_an_answer_that_comes_too_late_is_nobodys(answers: Callable[[Lookup], None]) -> None:
    gate = threading.Event()

    def lookup(_: str) -> list[str]:
        gate.wait(20)
        return ["127.0.0.1"]

    answers(lookup)
    asking = asyncio.create_task(look_up("pi1"))
    await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    gate.set()
    await asyncio.sleep(0.05)
