"""What every Ring of several processes has at the Starter: its two ends of the Ring, and the Coordinator's part.

How the Nodes come to be, and how they are reached, is for those who build on it: processes.py and remote.py.
"""

import asyncio
import contextlib
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import zmq.asyncio

import mdiq
from mdiq.control.coordinator import Coordinator
from mdiq.control.standby import StandingBy
from mdiq.core import control
from mdiq.core.hop_survey import HopLink
from mdiq.core.types import Epoch, NodeId, WeightSettings
from mdiq.errors import NodeDiedError
from mdiq.runtime.hop_guard import HopGuard
from mdiq.runtime.link_survey import survey_hops
from mdiq.runtime.loops import is_first
from mdiq.runtime.options import RingOptions
from mdiq.runtime.starter_service import StarterService
from mdiq.runtime.workers import RingEvents, RingWithout, Workers
from mdiq.telemetry.trace import Span
from mdiq.transport.router_dealer import RouterServer

LEASE_S = 60.0  # while a Node starts: importing torch and loading may starve its loop for long on a slow card
DRAIN_S = 1.0


class SocketWorkers(Workers):
    """Every Stage but the Starter's, over sockets."""

    can_come_back = True
    _context: zmq.asyncio.Context  # from ``open`` on

    def __init__(self, options: RingOptions, ring_key: bytes, events: RingEvents) -> None:
        super().__init__(options, ring_key, events)
        self._opened = contextlib.ExitStack()
        self._coordinator: Coordinator | None = None
        self._server: RouterServer | None = None
        self._endpoints: list[str] = []  # that each Hop leads to, the one out of the Starter first
        self._listening: dict[str, str] = {}  # where Nodes say that they listen
        self._held: dict[NodeId, control.Assign] = {}  # as in the first Epoch: a later one asks for no less
        self._bursts = count(1)  # of all surveys: see HopSurvey
        self._is_drained = False
        self._guard: HopGuard | None = None

    @property
    def missing(self) -> list[str]:
        """The Nodes that have not joined yet, and those that a dead Hop keeps from their work."""
        gone: list[str] = [*self._coordinator.missing] if self._coordinator else [*self._names]
        return gone + [name for name in self._barred if name in self._names and name not in gone]

    @property
    def hop_trouble(self) -> str:
        """Which Hops carry nothing though the Ring serves, in words; empty if none."""
        return self._guard.trouble if self._guard else ""

    @property
    def _barred(self) -> list[str]:
        return self._guard.barred if self._guard else []

    def silent(self, min_s: float) -> Mapping[str, float]:
        """Return the Nodes that have not been heard for so long, and for how long."""
        return dict[str, float](self._coordinator.silent(min_s).items()) if self._coordinator else {}

    @property
    def _opened_coordinator(self) -> Coordinator:
        assert self._coordinator is not None  # open has run
        return self._coordinator

    async def until_leaving(self) -> str:
        """Wait until a Node asks to be drained; return its name."""
        return await asyncio.shield(self._opened_coordinator.leavers.first)

    @property
    def leaving(self) -> str | None:
        """The Node that asks to be drained, if there is one."""
        return self._opened_coordinator.leavers.now

    async def until_staying(self) -> None:
        """Wait until the Node that asked to be drained has been started again."""
        await self._opened_coordinator.leavers.until_over()

    async def open(self) -> None:
        """Make the context of all sockets; see Workers."""
        self._context = zmq.asyncio.Context()
        self._opened.callback(self._context.term)

    async def start(self, model_digest: str, weights: WeightSettings) -> Sequence[control.Ready]:
        """Watch the Nodes, and have them join and load; see Workers."""
        self._loops.run(self._opened_coordinator.run(), "coordinator")
        return await super().start(model_digest, weights)

    @property
    def standing_by(self) -> list[str]:
        """The Nodes that stand by, are here, and can be reached by the others as far as is known."""
        here = self._coordinator.standing_by if self._coordinator else []
        return [node for node in here if node not in self._barred]

    async def until_joined(self) -> None:
        """Wait until a Node joins, or a dead Hop carries again; see Workers."""
        joined = self._opened_coordinator.until_joined()
        if self._guard is None:
            await joined
            return
        self._guard.changed.clear()
        await is_first(joined, self._guard.changed.wait())

    async def guard_hops(self, starter: StarterService, without: RingWithout) -> None:
        """Find Hops that carry nothing, until cancelled; see HopGuard."""
        if not self.can_change:
            await super().guard_hops(starter, without)
        silence_s = self._options.outages.silence_s
        self._guard = HopGuard(self, starter, silence_s=silence_s, without=without)
        await self._guard.run()

    @property
    def ring_names(self) -> tuple[str, ...]:
        """All Nodes, the Starter first."""
        return self._options.node_names

    def is_any_gone(self) -> bool:
        """Return whether a Node has not joined, or not again since it was lost."""
        return bool(self._opened_coordinator.missing)

    def lost_hop(self, error: NodeDiedError) -> None:
        """Have the Ring recover from a Hop that carries nothing."""
        if not self._is_closing:
            self._events.on_lost(error)

    async def reload(self, epoch: Epoch, kv_tokens: int | None) -> Sequence[control.Ready]:
        """Have the Nodes hold what they are to hold; see Workers."""
        ready = await self._assign(epoch=epoch, kv_tokens=kv_tokens or 0, measures=False)
        self._ready = {node: ready[node] for node in self._names}
        return [self._ready[node] for node in self._names]

    async def _assign(self, **changes: Any) -> Mapping[NodeId, control.Ready]:
        """Assign all Nodes what they do not hold yet, with these changes; return what each has.

        Raises:
            MdiqError: a Node is gone, or cannot load.
        """
        coordinator = self._opened_coordinator
        wanted = {node: self._assignment_of(i) for i, node in enumerate(self._names, 1)}
        idle = coordinator.without_work
        lacking = {node: each for node, each in wanted.items() if node in idle or self._held.get(node) != each}
        for node in lacking:
            self._held.pop(node, None)  # until it says so
        await coordinator.assign({node: replace(each, **changes) for node, each in lacking.items()})
        self._held.update(wanted)
        return coordinator.ready

    @abstractmethod
    def _assignment_of(self, i: int) -> control.Assign:
        """Return what Stage ``i`` is to do."""

    async def survey(self, starter: StarterService, epoch: Epoch) -> tuple[HopLink | None, ...]:
        """Measure every Hop; see Workers."""
        num_hops = self._options.num_nodes
        if num_hops == 1:
            return ()
        return await survey_hops(
            starter, self._surveyed(), epoch, num_hops, time.monotonic, numbers=self._bursts, unreached=self.unreached
        )

    async def measure_hops(self, starter: StarterService, epoch: Epoch) -> tuple[HopLink | None, ...]:
        """Measure every Hop while the Ring serves; see Workers."""
        num_hops = self._options.num_nodes
        if num_hops == 1:
            return ()
        return await survey_hops(starter, self._surveyed(), epoch, num_hops, time.monotonic, numbers=self._bursts)

    def _surveyed(self) -> "_Surveyed":
        return _Surveyed(tuple(self._names), self._opened_coordinator)

    async def begin(self, epoch: Epoch, wires: Sequence[str]) -> None:
        """Have every Stage serve in a new Epoch; see Workers."""
        anew = self._reconnects
        await self._opened_coordinator.begin(
            {
                node: control.Begin(epoch, wire, reconnects=node in anew)
                for node, wire in zip(self._names, wires[1:], strict=True)
            }
        )
        anew.clear()

    @property
    def _reconnects(self) -> set[str]:
        """Nodes whose Hop to the next one is to be connected anew."""
        return self._guard.reconnects if self._guard else set()

    def unreached(self, hop: int) -> str:
        """Return what is wrong when nothing arrives over a Hop, and what to do."""
        names = self._options.node_names
        sender, receiver, endpoint = names[hop], names[(hop + 1) % len(names)], self._endpoints[hop]
        port, own = endpoint.rpartition(":")[2], self._listening.get(receiver, endpoint).rpartition(":")[2]
        if own != port:
            return (
                f"{sender} to {receiver}: {sender} sends to {endpoint}, and {receiver} listens on port {own} by its "
                "copy of the topology; copy the starter's topology to it"
            )
        return (
            f"{sender} to {receiver}: nothing that {sender} sends to {endpoint} arrives there; see whether a firewall "
            f"on {receiver} lets port {port} in, whether {receiver} has that address, and what its log says of peers "
            "that it refused"
        )

    async def drain(self) -> None:
        """Ask the Nodes to end and take their last figures; ``aclose`` does not wait for those that do not answer."""
        await super().drain()
        if self._coordinator is not None and not self._is_drained:
            self._is_drained = True
            await self._coordinator.drain(DRAIN_S)

    def heartbeats(self) -> Mapping[NodeId, control.Heartbeat]:
        """Return the newest of each Node."""
        return self._coordinator.heartbeats if self._coordinator else {}

    def spans(self) -> dict[str, list[Span]]:
        """Return the Spans that came in so far, by Node in ring order."""
        return {node: self._coordinator.spans[node] for node in self._names} if self._coordinator else {}

    async def aclose(self) -> None:
        """Close every socket."""
        await super().aclose()
        for part in (self.sink, self.source, self._server):
            if part is not None:
                await part.aclose()
        self._opened.close()

    def _coordinate(
        self,
        server: RouterServer,
        control_key: bytes,
        standing_by: Sequence[StandingBy] | None = None,
    ) -> Coordinator:
        """Have a Coordinator for the Nodes; it watches them from ``start`` on: importing torch stops all loops here."""
        self._server = server
        self._coordinator = coordinator = Coordinator(
            server,
            control_key,
            mdiq.__version__,
            self._names,
            clock=time.monotonic,
            lease_s=LEASE_S,
            silence_s=self._options.outages.silence_s,
            on_fault=self._events.on_fault,
            on_loading=lambda node, loading: self._events.on_loading(node, loading.done, loading.total),
            on_lost=self._lost,
            drains_strangers=standing_by is not None,
            standing_by=standing_by or (),
        )
        return coordinator


@dataclass(frozen=True, slots=True)
class _Surveyed:
    """The Nodes whose Hops are measured, by their Stages when that began: the Ring may become another one meanwhile."""

    names: tuple[NodeId, ...]
    coordinator: Coordinator

    async def send_burst(self, stage: int, burst: control.SendBurst) -> control.BurstSent:
        """Have a Node measure its Hop; see Coordinator."""
        return await self.coordinator.ask(self.names[stage - 1], burst, control.BurstSent)

    def burst_arrived(self, stage: int, number: int) -> "asyncio.Future[control.BurstArrived]":
        """Return a future of what a Node sees of a burst; see Coordinator."""
        return self.coordinator.burst_arrived(self.names[stage - 1], number)
