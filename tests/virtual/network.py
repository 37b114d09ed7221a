"""The network of a whole service in virtual time: the links of transport/, with machines, cuts, losses and keys.

A link keeps the promises of transport/base.py and no more: a message arrives whole or not at all, perhaps late or
twice; on one connection in order. As with ZeroMQ, senders wait while there is no connection, and what is on its way
when a connection ends is lost.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mdiq.core.frame import Buffer
from mdiq.errors import TransportError
from mdiq.transport.curve import ClientSecurity, ServerSecurity

HWM = 16
CONTROL_HWM = 1_000
RECONNECT_S = 0.1
CUT_S = 6.0  # what the kernel of a sender waits for an answer; then it ends the connection
WINDOW = 4  # messages that a receiver takes whose answers are lost


@dataclass(eq=False)
class Process:
    """A process of a machine of this name; what it sends after its death goes nowhere. skew_s: of its clock.

    is_silent: its machine died with it, so that nobody told the others that its connections have ended.
    """

    machine: str
    skew_s: float = 0.0
    is_alive: bool = True
    is_silent: bool = False


PROCESS: ContextVar[Process] = ContextVar("process")


@dataclass(frozen=True, slots=True)
class Plane:
    """How messages of a plane fare: probabilities, and seconds.

    delay_s: of each; jitter_s: at most that more. gap_s: between two messages on a connection, which is its bandwidth.
    """

    drop: float = 0.0
    double: float = 0.0
    delay_s: float = 0.01
    jitter_s: float = 0.0
    gap_s: float = 1e-6


@dataclass(eq=False)
class _Machine:
    is_up: bool = True
    num_cuts: int = 0
    frozen_until: float = 0.0


@dataclass(eq=False)
class _HopFault:
    """What is wrong with a Hop while control goes on.

    cut_at: since when nothing passes; back_only: data does, and what acknowledges it does not. stuck_at: connections
    made before that carry nothing, and nobody ends them: a router between has forgotten them. plane: it is slow.
    """

    cut_at: float | None = None
    back_only: bool = False
    stuck_at: float = -1.0
    plane: Plane | None = None


class Network:
    """All links of a schedule; ``transports`` are classes like those of transport/."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random, control: Plane, data: Plane) -> None:
        self.loop = loop
        self.planes = {"control": control, "data": data}
        self._rng = rng
        self._machines: dict[str, _Machine] = {}
        self._listeners: dict[int, _Listener] = {}
        self._next_port = 50_000
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._hops: dict[tuple[str, str], _HopFault] = {}
        self.sinks: list[Sink] = []  # those that are open
        self.num_lost = 0
        self.num_to_lose = 0  # of the next messages on Hops
        self.num_doubled = 0
        self.let_in: list[tuple[float, str, str]] = []  # when, on which machine, and who, of each list of a Gate

    def machine(self, name: str) -> _Machine:
        return self._machines.setdefault(name, _Machine())

    def cut(self, name: str) -> None:
        """Unplug a machine: what is on its way to it and from it is lost."""
        machine = self.machine(name)
        machine.is_up = False
        machine.num_cuts += 1
        self.changed()

    def plug(self, name: str) -> None:
        self.machine(name).is_up = True
        self.changed()

    def freeze(self, name: str, seconds: float) -> None:
        """Hold back what a machine sends and is sent."""
        self.machine(name).frozen_until = self.loop.time() + seconds

    def hop(self, sender: str, receiver: str) -> _HopFault:
        return self._hops.setdefault((sender, receiver), _HopFault())

    def cut_hop(self, sender: str, receiver: str, *, back_only: bool = False) -> None:
        """Have a firewall drop what a Hop carries, or what acknowledges it, without a word to anyone."""
        hop = self.hop(sender, receiver)
        if hop.cut_at is None:
            hop.cut_at, hop.back_only = self.loop.time(), back_only
            self.loop.call_later(CUT_S, self._end_connections, sender, receiver, hop.cut_at)

    def mend_hop(self, sender: str, receiver: str) -> None:
        """Let a Hop that was cut, or is slow, carry again; what its sender's kernel still has is sent now."""
        hop = self.hop(sender, receiver)
        hop.cut_at = hop.plane = None
        for sink in self._sinks_of(sender, receiver):
            if not sink.is_stuck:
                sink.release()
        self.changed()

    def stick_hop(self, sender: str, receiver: str) -> None:
        """Have a Hop's connection carry nothing any more, and nobody notice; a new one does."""
        self.hop(sender, receiver).stuck_at = self.loop.time()

    def slow_hop(self, sender: str, receiver: str, plane: Plane) -> None:
        self.hop(sender, receiver).plane = plane

    def _sinks_of(self, sender: str, receiver: str) -> "list[Sink]":
        return [sink for sink in self.sinks if sink.hop_names == (sender, receiver)]

    def _end_connections(self, sender: str, receiver: str, cut_at: float) -> None:
        if self.hop(sender, receiver).cut_at == cut_at:
            for sink in self._sinks_of(sender, receiver):
                sink.lose()

    def kill(self, process: Process) -> None:
        process.is_alive = False
        for listener in [one for one in self._listeners.values() if one.process is process]:
            self.close(listener)
        self.changed()

    def listen(self, listener: "_Listener", endpoint: str) -> str:
        host, _, port_text = endpoint.rpartition(":")
        port = int(port_text)
        if not port:
            self._next_port += 1
            port = self._next_port
        if port in self._listeners:
            raise TransportError(f"{endpoint}: the port is in use")
        self._listeners[port] = listener
        self.changed()
        return f"{host}:{port}"

    def close(self, listener: "_Listener") -> None:
        self._listeners = {port: one for port, one in self._listeners.items() if one is not listener}
        self.changed()

    def reached(self, client: "_Client") -> "_Listener | None":
        """Return the listener that a client is connected to now."""
        listener = self._listeners.get(int(client.endpoint.rpartition(":")[2]))
        if listener is None or not client.process.is_alive or not listener.admits(client):
            return None
        if client.server_public not in (None, listener.public):
            return None
        is_up = self.machine(client.process.machine).is_up and self.machine(listener.process.machine).is_up
        return listener if is_up else None

    async def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            future = self.loop.create_future()
            self._waiting.append(future)
            await future

    def changed(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def carry(self, plane: str, way: "_Way", from_: Process, to: Process, deliver: Callable[[], None]) -> None:
        """Bring a message over, or not: see Plane. Dead processes send nothing."""
        if not from_.is_alive:
            return
        fate = self.planes[plane]
        if plane == "data":
            fate = self.hop(from_.machine, to.machine).plane or fate
        copies = 1
        if plane == "data" and self.num_to_lose:
            self.num_to_lose -= 1
            copies = 0
            self.num_lost += 1
        elif fate.drop and self._rng.random() < fate.drop:
            copies = 0
            self.num_lost += 1
        elif fate.double and self._rng.random() < fate.double:
            copies = 2
            self.num_doubled += 1
        cuts = self._cuts(from_, to)
        for _ in range(copies):
            jitter_s = self._rng.random() * fate.jitter_s if fate.jitter_s else 0.0
            way.last_s = max(self.loop.time() + fate.delay_s + jitter_s, way.last_s + fate.gap_s)
            way.slow_until = way.last_s if fate.gap_s >= 1.0 else way.slow_until
            way.num_coming += 1
            self.loop.call_at(way.last_s, self._arrive, way, from_, to, cuts, deliver)

    def _arrive(
        self, way: "_Way", from_: Process, to: Process, cuts: tuple[int, int], deliver: Callable[[], None]
    ) -> None:
        thaw_s = max(self.machine(from_.machine).frozen_until, self.machine(to.machine).frozen_until)
        if thaw_s > self.loop.time():
            self.loop.call_at(thaw_s, self._arrive, way, from_, to, cuts, deliver)
            return
        way.num_coming -= 1
        if not to.is_alive or cuts != self._cuts(from_, to):
            self.num_lost += 1
        else:
            deliver()

    def _cuts(self, one: Process, other: Process) -> tuple[int, int]:
        return self.machine(one.machine).num_cuts, self.machine(other.machine).num_cuts


@dataclass(eq=False)
class _Way:
    """One direction of a connection, which keeps order."""

    last_s: float = 0.0
    num_coming: int = 0
    held: deque[Callable[[], None]] = field(default_factory=deque)  # in the sender's kernel: the Hop is cut
    num_passed: int = 0  # since it was
    slow_until: float = 0.0  # it is busy all the time with a few messages


class _End:
    def __init__(self, network: Network, endpoint: str) -> None:
        self.network = network
        self.endpoint = endpoint
        self.process = PROCESS.get()


class _Listener(_End):
    def __init__(self, network: Network, endpoint: str, security: ServerSecurity | None) -> None:
        super().__init__(network, endpoint)
        self._security = security
        self.public = None if security is None else public_key(security.secret)
        self.queue: asyncio.Queue[tuple[Any, str | None]] = asyncio.Queue()
        self.sender: str | None = None
        self.endpoint = network.listen(self, endpoint)

    def admits(self, client: "_Client") -> bool:
        return self._security is None or self.name_of(client) is not None

    def name_of(self, client: "_Client") -> str | None:
        """Return the name that goes with the client's key."""
        security, secret = self._security, client.secret
        if security is None or secret is None:
            return None
        gate: Any = security.gate
        name: str | None = gate.lists.get(security.domain, {}).get(public_key(secret))
        return name

    async def receive_one(self) -> Any:
        what, self.sender = await self.queue.get()
        return what

    async def aclose(self) -> None:
        self.network.close(self)


class _Client(_End):
    def __init__(self, network: Network, endpoint: str, security: ClientSecurity | None) -> None:
        super().__init__(network, endpoint)
        self.secret = None if security is None else security.secret
        self.server_public = None if security is None else security.server_public
        self.is_closed = False
        self.there, self.back = _Way(), _Way()

    def reached(self) -> _Listener | None:
        return None if self.is_closed else self.network.reached(self)

    async def connected(self) -> _Listener:
        while (listener := self.reached()) is None:
            if not self.process.is_alive:
                await self.network.loop.create_future()  # the dead wait for ever
            await self.network.until(lambda: self.reached() is not None)
        return listener

    async def aclose(self) -> None:
        self.is_closed = True


class Source(_Listener):
    """A PullSource."""

    bytes_in = 0

    @property
    def inflow(self) -> int:
        """A message that takes seconds for its way comes byte by byte."""
        now = self.network.loop.time()
        is_coming = any(sink.reached() is self and now < sink.there.slow_until for sink in self.network.sinks)
        return self.bytes_in + (int(now * 10) if is_coming else 0)

    async def receive(self) -> list[Buffer]:
        parts: list[Buffer] = await self.receive_one()
        self.bytes_in += sum(memoryview(part).nbytes for part in parts)
        self.network.changed()
        return parts


class Sink(_Client):
    """A PushSink."""

    bytes_out = 0

    def __init__(self, network: Network, endpoint: str, security: ClientSecurity | None) -> None:
        super().__init__(network, endpoint, security)
        self._made_at = network.loop.time()
        network.sinks.append(self)

    @property
    def hop_names(self) -> tuple[str, str]:
        listener = self.network._listeners.get(int(self.endpoint.rpartition(":")[2]))
        return self.process.machine, listener.process.machine if listener else ""

    @property
    def is_stuck(self) -> bool:
        return self._made_at <= self.network.hop(*self.hop_names).stuck_at

    def reached(self) -> _Listener | None:
        cut_at, now = self.network.hop(*self.hop_names).cut_at, self.network.loop.time()
        # A connection that there was is there until the kernel gives it up; a new one is not made.
        is_cut = cut_at is not None and (self._made_at > cut_at or now >= cut_at + CUT_S)
        return None if is_cut else super().reached()

    def release(self) -> None:
        """Send what the kernel has."""
        held, self.there.held, self.there.num_passed = self.there.held, deque(), 0
        for go in held:
            self.there.num_coming -= 1
            go()

    def lose(self) -> None:
        """End the connection: what the kernel has is lost."""
        self.network.num_lost += len(self.there.held)
        self.there.num_coming -= len(self.there.held)
        self.there.held.clear()
        self.there.num_passed = 0

    async def aclose(self) -> None:
        await super().aclose()
        self.lose()
        self.network.sinks = [sink for sink in self.network.sinks if sink is not self]

    def _passes(self) -> bool:
        hop = self.network.hop(*self.hop_names)
        if self.is_stuck:
            return False
        if hop.cut_at is None:
            return True
        self.there.num_passed += 1
        return hop.back_only and self.there.num_passed <= WINDOW

    async def send(self, parts: Sequence[Buffer]) -> None:
        while True:
            listener = await self.connected()
            if listener.queue.qsize() + self.there.num_coming < HWM:
                break
            await asyncio.sleep(self.network.planes["data"].delay_s)
        copied: list[Buffer] = [bytes(part) for part in parts]
        self.bytes_out += sum(memoryview(part).nbytes for part in copied)
        name = listener.name_of(self)

        def deliver() -> None:
            listener.queue.put_nowait((copied, name))

        go = partial(self.network.carry, "data", self.there, self.process, listener.process, deliver)
        if self._passes():
            go()
        else:
            self.there.num_coming += 1
            self.there.held.append(go)


class Router(_Listener):
    """A RouterServer."""

    def __init__(self, network: Network, endpoint: str, security: ServerSecurity | None) -> None:
        self._dealers: dict[bytes, Dealer] = {}
        super().__init__(network, endpoint, security)

    async def receive(self) -> tuple[bytes, bytes]:
        while True:
            (dealer, data), name = await self.queue.get()
            if self.admits(dealer):
                self._dealers[dealer.identity] = dealer
                self.sender = name
                return dealer.identity, data

    async def send(self, identity: bytes, data: bytes) -> None:
        dealer = self._dealers.get(identity)
        if dealer is not None and dealer.reached() is not self and dealer.seems_connected and self.admits(dealer):
            self.network.num_lost += 1
            return
        if dealer is None or dealer.reached() is not self:
            raise TransportError(f"control peer {identity!r}: not connected; check that its process runs")
        if dealer.queue.qsize() + dealer.back.num_coming >= CONTROL_HWM:
            raise TransportError(f"control peer {identity!r}: it does not take its messages; it hangs")
        self.network.carry("control", dealer.back, self.process, dealer.process, lambda: dealer.queue.put_nowait(data))


class Dealer(_Client):
    """A DealerLink."""

    def __init__(self, network: Network, endpoint: str, security: ClientSecurity | None, identity: str) -> None:
        super().__init__(network, endpoint, security)
        self.identity = identity.encode()
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()

    @property
    def seems_connected(self) -> bool:
        """Whether its connection has not ended as far as the other end can know."""
        return self.process.is_silent or (self.process.is_alive and not self.is_closed)

    async def receive(self) -> bytes:
        return await self.queue.get()

    async def send(self, data: bytes) -> None:
        listener = await self.connected()
        name = listener.name_of(self)
        self.network.carry(
            "control",
            self.there,
            self.process,
            listener.process,
            lambda: listener.queue.put_nowait(((self, data), name)),
        )


class KeyList:
    """A Gate: lists of keys by plane."""

    @dataclass
    class Refusals:
        num_refused: int = 0

    def __init__(self, network: Network) -> None:
        self._network = network
        self.lists: dict[str, dict[str, str]] = {}
        self.refusals = KeyList.Refusals()

    def start(self) -> None:
        """Nothing to listen to."""

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def replace(self, domain: str, keys: dict[str, str]) -> None:
        self.lists[domain] = dict(keys)
        now, machine = self._network.loop.time(), PROCESS.get().machine
        self._network.let_in += [(now, machine, name) for name in keys.values()]
        self._network.changed()

    async def aclose(self) -> None:
        """Nothing to close."""


def public_key(secret: bytes) -> str:
    """Keys of the virtual network: the public one can be read off the secret one."""
    return "public " + secret.decode().removeprefix("secret ")


@dataclass(frozen=True)
class Transports:
    """Stand in for the classes of transport/, in the modules that use them."""

    network: Network
    names: tuple[str, ...] = field(default=("PullSource", "PushSink", "RouterServer", "DealerLink", "Gate"))

    def of(self, name: str) -> Any:
        """Return what stands in for a class."""
        network = self.network

        class Made:
            @staticmethod
            async def bind(_: object, endpoint: str, *, security: ServerSecurity | None = None, **__: object) -> Any:
                return (Source if name == "PullSource" else Router)(network, endpoint, security)

            @staticmethod
            async def connect(
                _: object,
                endpoint: str,
                *,
                security: ClientSecurity | None = None,
                identity: str = "",
                **__: object,
            ) -> Any:
                if name == "PushSink":
                    return Sink(network, endpoint, security)
                return Dealer(network, endpoint, security, identity)

        return (lambda _: KeyList(network)) if name == "Gate" else Made
