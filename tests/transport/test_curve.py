"""Secured links over real loopback sockets: who is let in, who is not, what is said of it, and what the wire shows."""

import asyncio
import contextlib
import errno
import itertools
import socket as sockets
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import structlog
import zmq
import zmq.asyncio

from mdiq.errors import ConfigError, TransportError
from mdiq.transport import watch
from mdiq.transport.curve import (
    CONTROL,
    DATA,
    DELISTED,
    FORGET_S,
    LATE_S,
    MAX_REFUSALS,
    ClientSecurity,
    Gate,
    Refusals,
    ServerSecurity,
)
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.router_dealer import DealerLink, RouterServer

ANY_PORT = "tcp://127.0.0.1:0"
WAIT_S = 20.0
Events = list[dict[str, object]]


@dataclass(frozen=True)
class Pair:
    public: str
    secret: bytes


def pair() -> Pair:
    public, secret = zmq.curve_keypair()
    return Pair(public.decode(), secret)


@dataclass
class Ward:
    """A Gate at work and the keys around it: the server's, and those of nodes ``pi1`` and ``pi2``."""

    context: zmq.asyncio.Context
    gate: Gate
    running: "asyncio.Task[None]"
    server: Pair
    pi1: Pair
    pi2: Pair

    def guards(self, domain: str = DATA) -> ServerSecurity:
        return ServerSecurity(self.server.secret, domain, self.gate)

    def client(self, who: Pair) -> ClientSecurity:
        return ClientSecurity(who.secret, self.server.public)


@pytest.fixture
async def ward(context: zmq.asyncio.Context) -> AsyncIterator[Ward]:
    gate = Gate(context)
    gate.start()
    ward = Ward(context, gate, asyncio.create_task(gate.run()), pair(), pair(), pair())
    await gate.replace(DATA, {ward.pi1.public: "pi1", ward.pi2.public: "pi2"})
    await gate.replace(CONTROL, {ward.pi1.public: "pi1"})
    yield ward
    ward.running.cancel()
    await asyncio.gather(ward.running, return_exceptions=True)
    await gate.aclose()


@pytest.fixture
def events() -> Iterator[Events]:
    with structlog.testing.capture_logs() as captured:
        yield captured  # type: ignore[misc]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given up, and clients that try again, sooner than in earnest."""
    monkeypatch.setattr("mdiq.transport.sockets.HANDSHAKE_MS", 1_500)
    monkeypatch.setattr(watch.ClientWatch.__init__, "__defaults__", (0.2,))


async def happens(condition: Callable[[], object]) -> None:
    """Wait for what another task or libzmq's thread will do."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def starts(gate: Gate) -> None:
    """Start a Gate again; libzmq frees the place of the one before a little later than it is told."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(TransportError):
                return gate.start()
            await asyncio.sleep(0.01)


def refused(events: Events, reason: str = "") -> Events:
    return [event for event in events if event["event"] == "peer_refused" and reason in str(event["reason"])]


def told(events: Events) -> Events:
    return [event for event in events if event["event"] in ("refused_by_peer", "peer_not_trusted")]


async def serves(source: PullSource, sink: PushSink, *, name: str = "pi1") -> None:
    """The link works for a good peer; what is sent while connections are made anew may be lost."""
    receiving = asyncio.create_task(source.receive())
    async with asyncio.timeout(WAIT_S):
        while not receiving.done():
            await sink.send([b"served"])
            await asyncio.wait({receiving}, timeout=0.05)
    assert receiving.result() == [b"served"]
    assert source.sender == name


def is_logged_once(events: Events, address: str = "127.0.0.1") -> bool:
    """A peer that fails at once may be gone before its address is read; whatever it does, that is at most two lines."""
    addresses = [event["address"] for event in refused(events)]
    return 1 <= len(addresses) <= 2 and {*addresses} <= {address, watch.UNKNOWN} and len({*addresses}) == len(addresses)


def refuses_more(ward: Ward, before: int) -> Callable[[], bool]:
    return lambda: ward.gate.refusals.num_refused > before


def raw_client(context: zmq.asyncio.Context, kind: int = zmq.PUSH, **options: object) -> zmq.asyncio.Socket:
    """A peer that is not ours: a bare socket whose handshake fails and is not tried again."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    for name, value in options.items():
        setattr(socket, name, value)
    return socket


async def test_a_listed_peer_is_let_in_and_known_by_its_name(ward: Ward) -> None:
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    sinks = [
        await PushSink.connect(ward.context, source.endpoint, security=ward.client(who)) for who in (ward.pi1, ward.pi2)
    ]
    names = {}
    for i, sink in enumerate(sinks):
        await sink.send([b"%d" % i, b"payload"])
        parts = await source.receive()
        names[bytes(parts[0])] = source.sender
    assert names == {b"0": "pi1", b"1": "pi2"}
    for part in (*sinks, source):
        await part.aclose()


async def test_a_control_link_is_secured_both_ways(ward: Ward) -> None:
    server = await RouterServer.bind(ward.context, ANY_PORT, security=ward.guards(CONTROL))
    link = await DealerLink.connect(ward.context, server.endpoint, identity="pi1", security=ward.client(ward.pi1))
    await link.send(b"hello")
    identity, data = await server.receive()
    assert (data, server.sender) == (b"hello", "pi1")
    assert identity.startswith(b"pi1.")
    await server.send(identity, b"welcome")
    assert await link.receive() == b"welcome"
    # Another one with the same key does not take over, and is not kept out: nobody can guess the first one's identity.
    again = await DealerLink.connect(ward.context, server.endpoint, identity="pi1", security=ward.client(ward.pi1))
    await again.send(b"me too")
    other, data = await server.receive()
    assert (data, server.sender) == (b"me too", "pi1")
    assert other != identity
    for part in (link, again, server):
        await part.aclose()


async def test_an_unlisted_key_is_refused_and_comes_in_when_it_is_listed(
    ward: Ward, events: Events, fast: None
) -> None:
    stranger = pair()
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    sink = await PushSink.connect(ward.context, source.endpoint, security=ward.client(stranger))
    sending = asyncio.create_task(sink.send([b"secret"]))
    await happens(lambda: ward.gate.refusals.num_refused)
    assert not sending.done()
    assert [(event["address"], event["plane"], event["public_key"]) for event in refused(events)] == [
        ("127.0.0.1", "data", stranger.public)
    ]
    assert not told(events), "once is nothing: the ring may be changing"
    await happens(lambda: ward.gate.refusals.num_refused >= 4)
    assert [event["event"] for event in told(events)] == ["refused_by_peer"]
    await ward.gate.replace(DATA, {ward.pi1.public: "pi1", stranger.public: "pi3"})
    assert await source.receive() == [b"secret"]
    assert source.sender == "pi3"
    await sending
    await sink.aclose()
    await source.aclose()


async def test_a_key_counts_only_on_the_planes_that_list_it(ward: Ward, events: Events) -> None:
    server = await RouterServer.bind(ward.context, ANY_PORT, security=ward.guards(CONTROL))
    link = await DealerLink.connect(ward.context, server.endpoint, identity="pi2", security=ward.client(ward.pi2))
    await happens(lambda: refused(events))
    assert refused(events)[0]["plane"] == "control"
    await link.aclose()
    await server.aclose()


async def test_a_revoked_peers_live_connection_ends_and_good_peers_come_back(ward: Ward, events: Events) -> None:
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    good = await PushSink.connect(ward.context, source.endpoint, security=ward.client(ward.pi1))
    # A peer of its own make: it does not come back, so that the end of its connection shows.
    bad = raw_client(
        ward.context,
        curve_publickey=ward.pi2.public.encode(),
        curve_secretkey=ward.pi2.secret,
        curve_serverkey=ward.server.public.encode(),
    )
    ended = bad.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    bad.connect(source.endpoint)
    await bad.send(b"while listed")
    assert await source.receive() == [b"while listed"]
    assert source.sender == "pi2"
    await serves(source, good)
    await ward.gate.replace(DATA, {ward.pi1.public: "pi1"})
    async with asyncio.timeout(WAIT_S):
        await ended.recv_multipart()
    await serves(source, good)
    bad.connect(source.endpoint)
    await happens(lambda: refused(events, DELISTED))
    assert [event["log_level"] for event in refused(events)] == ["info"], "a change of the ring is no alarm"
    assert [event["nodes"] for event in events if event["event"] == "keys_revoked"] == ["pi2"]
    bad.disable_monitor()
    ended.close(linger=0)
    bad.close()
    await good.aclose()
    await source.aclose()


async def test_what_a_revoked_peer_sent_before_is_dropped_unread(ward: Ward) -> None:
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    bad = await PushSink.connect(ward.context, source.endpoint, security=ward.client(ward.pi2))
    await bad.send([b"first"])
    assert await source.receive() == [b"first"]
    for _ in range(3):
        await bad.send([b"too late"])
    assert await source._socket.poll(10_000)
    await ward.gate.replace(DATA, {ward.pi1.public: "pi1"})
    good = await PushSink.connect(ward.context, source.endpoint, security=ward.client(ward.pi1))
    await good.send([b"served"])
    assert await source.receive() == [b"served"]
    await good.aclose()
    await bad.aclose()
    await source.aclose()


async def test_a_new_key_for_a_name_ends_the_connections_of_the_old_one(ward: Ward) -> None:
    server = await RouterServer.bind(ward.context, ANY_PORT, security=ward.guards(CONTROL))
    link = await DealerLink.connect(ward.context, server.endpoint, identity="pi1", security=ward.client(ward.pi1))
    await link.send(b"hello")
    identity, _ = await server.receive()
    new = pair()
    await ward.gate.replace(CONTROL, {new.public: "pi1"})

    async def is_gone() -> None:
        while True:
            await server.send(identity, b"still there?")
            await asyncio.sleep(0.01)

    with pytest.raises(TransportError, match="not connected"):
        async with asyncio.timeout(WAIT_S):
            await is_gone()
    await link.aclose()
    link = await DealerLink.connect(ward.context, server.endpoint, identity="pi1", security=ward.client(new))
    await link.send(b"with the new key")
    assert (await server.receive())[1] == b"with the new key"
    await link.aclose()
    await server.aclose()


async def test_peers_that_send_all_the_time_go_on_over_many_revocations(ward: Ward) -> None:
    """Connections are cut in the middle of messages: some are lost, none is cut short, and nobody fails."""
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    sinks = [
        await PushSink.connect(ward.context, source.endpoint, security=ward.client(who)) for who in (ward.pi1, ward.pi2)
    ]
    listed = {ward.pi1.public: "pi1", ward.pi2.public: "pi2"}
    came: list[tuple[str | None, bytes, int]] = []

    async def send(sink: PushSink) -> None:
        for i in itertools.count():
            await sink.send([b"%d" % i, bytes(100_000), b"end"])

    async def receive() -> None:
        while True:
            parts = await source.receive()
            assert len(parts) == 3 and parts[2] == b"end"
            came.append((source.sender, bytes(parts[0]), len(parts[1])))

    def came_since(before: int, *names: str) -> bool:
        return {*names} <= {name for name, *_ in came[before:]}

    tasks = [asyncio.create_task(send(sink)) for sink in sinks] + [asyncio.create_task(receive())]
    for i in range(6):
        before = len(came)
        await happens(partial(came_since, before, "pi1", "pi2"))
        # A new name for the same key: as good as a revocation and at once a new listing.
        await ward.gate.replace(DATA, {**listed, pair().public: "pi3", ward.pi2.public: f"pi2-{i}"})
        before = len(came)
        await happens(partial(came_since, before, f"pi2-{i}"))
        await ward.gate.replace(DATA, listed)
    assert not [task for task in tasks if task.done()]
    assert {size for *_, size in came} == {100_000}
    for name in ("pi1", "pi2"):
        numbers = [int(number) for who, number, _ in came if who == name]
        assert numbers == sorted(set(numbers)), "in order, and none twice"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for part in (*sinks, source):
        await part.aclose()


async def test_a_peer_that_left_much_unread_is_heard_again_behind_a_revocation(ward: Ward) -> None:
    server = await RouterServer.bind(ward.context, ANY_PORT, security=ward.guards(CONTROL))
    await ward.gate.replace(CONTROL, {ward.pi1.public: "pi1", ward.pi2.public: "pi2"})
    links = [
        await DealerLink.connect(ward.context, server.endpoint, identity=name, security=ward.client(who))
        for name, who in (("pi1", ward.pi1), ("pi2", ward.pi2))
    ]
    for link in links:
        await link.send(b"hello")
    identities = {}
    for _ in links:
        identity, _ = await server.receive()
        identities[server.sender] = identity
    with pytest.raises(TransportError, match="does not take its messages"):
        while True:
            await server.send(identities["pi1"], bytes(100_000))
    await ward.gate.replace(CONTROL, {ward.pi1.public: "pi1"})

    async def read() -> None:
        while await links[0].receive() != b"all that":
            pass

    reading = asyncio.create_task(read())  # while it does not, it does not see that its connection has ended
    receiving = asyncio.create_task(server.receive())
    async with asyncio.timeout(WAIT_S):
        while not receiving.done():
            await links[0].send(b"still here")
            await asyncio.wait({receiving}, timeout=0.1)
    assert receiving.result() == (identities["pi1"], b"still here")
    await server.send(identities["pi1"], b"all that")
    await reading
    for part in (*links, server):
        part._socket.setsockopt(zmq.LINGER, 0)
        await part.aclose()


async def test_a_list_that_takes_nobodys_place_cuts_no_connection(ward: Ward) -> None:
    server = await RouterServer.bind(ward.context, ANY_PORT, security=ward.guards(CONTROL))
    link = await DealerLink.connect(ward.context, server.endpoint, identity="pi1", security=ward.client(ward.pi1))
    await link.send(b"hello")
    identity, _ = await server.receive()
    await ward.gate.replace(CONTROL, {ward.pi1.public: "pi1", ward.pi2.public: "pi2"})
    await ward.gate.replace(CONTROL, {ward.pi1.public: "pi1"})  # pi2 never came
    await server.send(identity, b"same connection")
    assert await link.receive() == b"same connection"
    await link.aclose()
    await server.aclose()


@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN"])
async def test_a_peer_without_a_key_is_refused(ward: Ward, events: Events, mechanism: str) -> None:
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    options: dict[str, Any] = {} if mechanism == "NULL" else {"plain_username": b"pi1", "plain_password": b"guess"}
    for _ in range(2):
        bad = raw_client(ward.context, **options)
        before = ward.gate.refusals.num_refused
        bad.connect(source.endpoint)
        await happens(refuses_more(ward, before))
        bad.close()
    assert is_logged_once(events)
    sink = await PushSink.connect(ward.context, source.endpoint, security=ward.client(ward.pi1))
    await serves(source, sink)
    await sink.aclose()
    await source.aclose()


async def test_a_peer_with_a_wrong_key_of_the_server_is_refused(ward: Ward, events: Events) -> None:
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    sink = await PushSink.connect(
        ward.context, source.endpoint, security=ClientSecurity(ward.pi1.secret, pair().public)
    )
    await happens(lambda: refused(events) and ward.gate.refusals.num_refused >= 2)
    assert is_logged_once(events)
    assert "wrong public key of ours" in str(refused(events)[0]["reason"])
    await happens(lambda: [event for event in events if event["event"] == "peer_not_trusted"])
    await sink.aclose()
    await source.aclose()


async def test_an_agent_refuses_a_coordinator_with_another_key(ward: Ward, events: Events) -> None:
    """pi2 listens where the Starter should: pi1 tells it nothing, although both are nodes of the ring."""
    impostor = ServerSecurity(ward.pi2.secret, CONTROL, ward.gate)
    server = await RouterServer.bind(ward.context, ANY_PORT, security=impostor)
    link = await DealerLink.connect(ward.context, server.endpoint, identity="pi1", security=ward.client(ward.pi1))
    sending = asyncio.create_task(link.send(b"hello"))
    await happens(lambda: [event for event in events if event["event"] == "peer_not_trusted"])
    assert not sending.done()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    await link.aclose()
    await server.aclose()


async def test_an_agent_says_nothing_to_a_coordinator_without_a_key(
    context: zmq.asyncio.Context, events: Events
) -> None:
    server = await RouterServer.bind(context, ANY_PORT)
    link = await DealerLink.connect(
        context, server.endpoint, identity="pi1", security=ClientSecurity(pair().secret, pair().public)
    )
    sending = asyncio.create_task(link.send(b"hello"))
    await happens(lambda: [event for event in events if event["event"] == "peer_not_trusted"])
    assert not sending.done()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    await link.aclose()
    await server.aclose()


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b"\0" * 100, b"\x01\x00" * 50, b"\xff" + bytes(8) + b"\x7f\x03"],
    ids=["http", "ff", "zeros", "zmtp1", "half"],
)
async def test_bytes_that_are_no_handshake_are_refused_and_logged_once(
    ward: Ward, events: Events, fast: None, junk: bytes
) -> None:
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    for _ in range(2):
        before = ward.gate.refusals.num_refused
        with sockets.create_connection(("127.0.0.1", _port(source))) as raw:
            raw.sendall(junk)
            await happens(refuses_more(ward, before))
    assert is_logged_once(events)
    sink = await PushSink.connect(ward.context, source.endpoint, security=ward.client(ward.pi1))
    await serves(source, sink)
    await sink.aclose()
    await source.aclose()


@pytest.mark.parametrize("is_patient", [False, True])
async def test_a_handshake_that_is_replayed_is_refused(ward: Ward, events: Events, is_patient: bool) -> None:
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    async with _tap(_port(source)) as (endpoint, heard):
        sink = await PushSink.connect(ward.context, endpoint, security=ward.client(ward.pi1))
        await serves(source, sink)
        await sink.aclose()
    recorded = bytes(heard["forth"])
    assert recorded[66:72] == b"\x05HELLO", "a greeting of 64 bytes, then a command; RFC 26"
    while await source._socket.poll(200):
        await source._socket.recv_multipart()
    assert not refused(events)
    before = source.bytes_in
    reader, writer = await asyncio.open_connection("127.0.0.1", _port(source))
    # A patient one waits for the server's greeting and its WELCOME, as the node had done.
    for piece in (recorded[:64], recorded[64:266], recorded[266:]) if is_patient else (recorded,):
        writer.write(piece)
        if is_patient:
            await reader.read(1_000)
    await happens(lambda: refused(events))
    writer.close()
    assert is_logged_once(events)
    assert "recording" in str(refused(events)[0]["reason"])
    assert source.bytes_in == before
    assert not await source._socket.poll(200)
    await source.aclose()


async def test_strangers_of_all_kinds_at_once_are_each_logged_once(ward: Ward, events: Events, fast: None) -> None:
    """Connections fail in another order than they end; none is taken for another."""
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    strangers = []
    for i in range(10, 26):
        keys = pair()
        options: dict[str, Any] = {
            "curve_publickey": keys.public.encode(),
            "curve_secretkey": keys.secret,
            "curve_serverkey": ward.server.public.encode(),
        }
        bad = raw_client(ward.context, **(options if i % 2 else {}))
        bad.connect(f"tcp://127.0.0.{i}:0;127.0.0.1:{_port(source)}")
        strangers.append(bad)
    await happens(lambda: ward.gate.refusals.num_refused >= 16)
    await asyncio.sleep(0.3)  # whatever would be logged twice
    assert ward.gate.refusals.num_refused == 16
    shown = [str(event["address"]) for event in refused(events) if "public_key" in event]
    assert sorted(shown) == [f"127.0.0.{i}" for i in range(11, 26, 2)]
    others = [str(event["address"]) for event in refused(events) if "public_key" not in event]
    assert len(others) == len({*others}) and {*others} <= {*(f"127.0.0.{i}" for i in range(10, 26, 2)), watch.UNKNOWN}
    for bad in strangers:
        bad.close()
    await source.aclose()


@contextlib.contextmanager
def told_server(context: zmq.asyncio.Context) -> Iterator[tuple[watch.ServerWatch, Callable[[int, int], object]]]:
    """A watch, and what tells it an event as libzmq does; it reads them when it is asked to."""
    with (
        context.socket(zmq.PULL) as socket,
        zmq.Context() as plain,
        plain.socket(zmq.PAIR) as libzmq,
        plain.socket(zmq.PAIR) as monitor,
    ):
        libzmq.bind("inproc://events")
        monitor.connect("inproc://events")
        server = watch.ServerWatch(socket, DATA, Refusals())
        server._monitor = monitor
        yield server, lambda event, value: libzmq.send_multipart([struct.pack("=Hi", event, value), b""])


@pytest.mark.parametrize(
    ("ends_meanwhile", "address"), [(False, "10.0.0.2"), (True, watch.UNKNOWN)], ids=["told later", "told already"]
)
async def test_no_peer_is_logged_with_the_address_of_another_that_has_its_descriptor(
    context: zmq.asyncio.Context, events: Events, monkeypatch: pytest.MonkeyPatch, ends_meanwhile: bool, address: str
) -> None:
    monkeypatch.setattr(watch, "_address", lambda _: "10.0.0.2")
    with told_server(context) as (server, tell):
        tell(zmq.EVENT_ACCEPTED, 7)
        if not ends_meanwhile:
            server._take_in()
        tell(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, errno.EPROTO)
        tell(zmq.EVENT_DISCONNECTED, 7)
        server._take_in()
    assert [event["address"] for event in refused(events)] == [address]


async def test_a_peer_that_the_gate_has_noted_is_not_noted_again_when_it_is_gone_before_its_address_is_read(
    context: zmq.asyncio.Context, events: Events
) -> None:
    with told_server(context) as (server, tell):
        for event, value in (
            (zmq.EVENT_ACCEPTED, 7),
            (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400),
            (zmq.EVENT_DISCONNECTED, 7),
        ):
            tell(event, value)
        server._take_in()
    assert refused(events) == []


@pytest.mark.parametrize("is_socket_left", [True, False])
async def test_a_dead_gate_refuses_everybody(ward: Ward, events: Events, fast: None, is_socket_left: bool) -> None:
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    known = await PushSink.connect(ward.context, source.endpoint, security=ward.client(ward.pi1))
    await serves(source, known)
    ward.running.cancel()
    await asyncio.gather(ward.running, return_exceptions=True)
    if is_socket_left:  # as if the task hung: nobody answers
        await starts(ward.gate)
    sink = await PushSink.connect(ward.context, source.endpoint, security=ward.client(ward.pi2))
    sending = asyncio.create_task(sink.send([b"let me in"]))
    await happens(lambda: ward.gate.refusals.num_refused >= 2)
    assert not sending.done()
    assert is_logged_once(events)
    # Who is in stays in, and a gate that runs again lets in who waits.
    await serves(source, known)
    if not is_socket_left:
        await starts(ward.gate)
    ward.running = asyncio.create_task(ward.gate.run())
    await sending
    receiving = [bytes((await source.receive())[0])]
    while receiving[-1] != b"let me in":
        receiving.append(bytes((await source.receive())[0]))
    assert source.sender == "pi2"
    for part in (sink, known, source):
        await part.aclose()


async def test_a_server_without_a_gate_lets_nobody_in(context: zmq.asyncio.Context, events: Events, fast: None) -> None:
    server, client = pair(), pair()
    gate = Gate(context)
    await gate.replace(DATA, {client.public: "pi1"})
    source = await PullSource.bind(context, ANY_PORT, security=ServerSecurity(server.secret, DATA, gate))
    sink = await PushSink.connect(context, source.endpoint, security=ClientSecurity(client.secret, server.public))
    await happens(lambda: refused(events))
    await sink.aclose()
    await source.aclose()


async def test_a_gate_that_fails_says_so_and_closes(
    ward: Ward, events: Events, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(ward.gate, "_answer", fails)
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    sink = await PushSink.connect(ward.context, source.endpoint, security=ward.client(ward.pi1))
    with pytest.raises(TransportError, match="gate: it failed, and lets no node in any more: .*broken"):
        await ward.running
    assert [event["event"] for event in events if event["event"] == "gate_failed"] == ["gate_failed"]
    await happens(lambda: ward.gate.refusals.num_refused >= 2)
    assert len([event for event in events if event["event"] == "gate_not_running"]) == 1
    assert is_logged_once(events)
    await sink.aclose()
    await source.aclose()


async def test_a_context_has_one_gate(ward: Ward) -> None:
    with pytest.raises(TransportError, match="has one already"):
        Gate(ward.context).start()


async def test_lists_that_cannot_be_are_refused_and_change_nothing(ward: Ward) -> None:
    for keys, message in [
        ({"x" * 39: "pi1"}, "pi1: 'x+' is not a public key"),
        ({ward.pi1.public: "pi1", ward.pi2.public: "pi1"}, "pi1: two keys on the data plane"),
    ]:
        with pytest.raises(ConfigError, match=message):
            await ward.gate.replace(DATA, keys)
    assert ward.gate.admits(DATA, "pi2")
    with pytest.raises(ConfigError, match="'short': not 40 characters"):
        await PushSink.connect(ward.context, ANY_PORT, security=ClientSecurity(ward.pi1.secret, "short"))


async def test_secrets_stand_in_no_repr(ward: Ward) -> None:
    text = repr((ward.guards(), ward.client(ward.pi1)))
    assert ward.server.secret.decode() not in text
    assert ward.pi1.secret.decode() not in text
    assert ward.server.public in text


MARKER = b"the prompt of a user, in plain words " * 40


async def test_the_wire_shows_a_payload_in_plain_text_and_not_with_security(ward: Ward) -> None:
    shown = {}
    for security in (None, ward.guards()):
        source = await PullSource.bind(ward.context, ANY_PORT, security=security)
        async with _tap(_port(source)) as (endpoint, heard):
            client = ward.client(ward.pi1) if security else None
            sink = await PushSink.connect(ward.context, endpoint, security=client)
            await sink.send([b"header", MARKER])
            assert await source.receive() == [b"header", MARKER]
            await sink.aclose()
        await source.aclose()
        shown[security is not None] = MARKER in heard["forth"] or b"in plain words" in heard["forth"]
        assert len(heard["forth"]) > len(MARKER)
    assert shown == {False: True, True: False}


async def test_bytes_that_are_changed_on_the_way_end_the_connection_and_it_comes_back(ward: Ward, fast: None) -> None:
    source = await PullSource.bind(ward.context, ANY_PORT, security=ward.guards())
    async with _tap(_port(source)) as (endpoint, heard):
        sink = await PushSink.connect(ward.context, endpoint, security=ward.client(ward.pi1))
        await serves(source, sink)
        heard["garble"] = bytearray(b"once")
        await sink.send([bytes(1_000)])
        await happens(lambda: not heard["garble"])
        await serves(source, sink)
        await sink.aclose()
    await source.aclose()


@pytest.mark.parametrize("endpoint", ["tcp://192.0.2.1:0", "tcp://0.0.0.0:0", "tcp://*:0", "tcp://[2001:db8::1]:0"])
async def test_plain_text_beyond_loopback_is_refused(context: zmq.asyncio.Context, endpoint: str) -> None:
    with pytest.raises(TransportError, match="plain text is for loopback only"):
        await PullSource.bind(context, endpoint)
    with pytest.raises(TransportError, match="plain text is for loopback only"):
        await DealerLink.connect(context, endpoint, identity="pi1")


async def test_plain_text_that_is_asked_for_warns_at_every_start(context: zmq.asyncio.Context, events: Events) -> None:
    for _ in range(2):
        server = await RouterServer.bind(context, "tcp://0.0.0.0:0", insecure=True)
        await server.aclose()
    assert [event["event"] for event in events if event["log_level"] == "warning"] == ["link_in_plain_text"] * 2


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://localhost:0", "tcp://127.8.9.1:0"])
async def test_plain_text_on_loopback_needs_no_word(
    context: zmq.asyncio.Context, events: Events, endpoint: str
) -> None:
    await (await PullSource.bind(context, endpoint)).aclose()
    assert events == []


def test_refusals_are_logged_once_and_again_after_an_hour(events: Events) -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    for key in ("one", "another"):
        refusals.note("data", "10.0.0.1", "not listed", public_key=key)
    refusals.note("data", "10.0.0.1", "no CURVE")
    refusals.note("data", "10.0.0.1", "bytes replayed")
    assert [event["reason"] for event in events] == ["not listed", "no CURVE"]
    now = FORGET_S
    refusals.note("data", "10.0.0.1", "no CURVE")
    assert len(events) == 3
    refusals.forget("control")
    refusals.note("data", "10.0.0.1", "no CURVE")
    assert len(events) == 3
    refusals.forget("data")
    refusals.note("data", "10.0.0.1", "no CURVE")
    assert len(events) == 4
    assert refusals.num_refused == 7


def test_a_node_that_sent_before_a_change_of_the_ring_is_an_alarm_if_it_goes_on(events: Events) -> None:
    times_s = [0.0, 2.0, LATE_S, 2 * LATE_S, 0.0, 0.0]
    refusals = Refusals(lambda: times_s.pop(0))
    for _ in range(4):
        refusals.note("data", "10.0.0.1", DELISTED, public_key="one")
    assert [event["log_level"] for event in events] == ["info", "warning"]
    refusals.forget("data")
    refusals.note("data", "10.0.0.1", DELISTED, public_key="one")
    refusals.note("control", "10.0.0.1", DELISTED, public_key="one")
    assert [event["log_level"] for event in events[2:]] == ["info", "warning"]


def test_a_flood_of_addresses_fills_neither_log_nor_memory(events: Events) -> None:
    refusals = Refusals(lambda: 0.0)
    for i in range(3 * MAX_REFUSALS):
        refusals.note("data", f"2001:db8::{i:x}", "no key")
    assert len(events) == MAX_REFUSALS + 1
    assert events[-1]["event"] == "refusals_no_longer_logged"
    assert len(refusals._noted) == MAX_REFUSALS
    assert refusals.num_refused == 3 * MAX_REFUSALS


def _port(source: PullSource) -> int:
    return int(source.endpoint.rpartition(":")[2])


@contextlib.asynccontextmanager
async def _tap(port: int) -> AsyncIterator[tuple[str, dict[str, bytearray]]]:
    """A relay that keeps what the near side sends; it changes one byte of the next piece while ``garble`` holds any."""
    heard: dict[str, bytearray] = {"forth": bytearray(), "garble": bytearray()}
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_forth: bool) -> None:
        try:
            while data := await reader.read(65_536):
                if is_forth:
                    heard["forth"] += data
                    if heard["garble"] and len(data) > 1_000:
                        heard["garble"].clear()
                        data = data[:500] + bytes([data[500] ^ 1]) + data[501:]
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        for task in (
            asyncio.create_task(pump(reader, far_writer, is_forth=True)),
            asyncio.create_task(pump(far_reader, writer, is_forth=False)),
        ):
            tasks.add(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", heard
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the next turn of the loop
