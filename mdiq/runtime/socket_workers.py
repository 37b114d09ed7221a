"""What every Ring of several processes has at the Starter: its two ends of the Ring, and the Coordinator's part.

How the Nodes come to be, and how they are reached, is for those who build on it: processes.py and remote.py.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog
import zmq.asyncio

import mdiq
from mdiq.control.coordinator import Coordinator
from mdiq.core import control
from mdiq.core.types import Epoch, NodeId, WeightSettings
from mdiq.core.wire import hop_key
from mdiq.errors import MdiqError
from mdiq.runtime.loops import loop_failed
from mdiq.runtime.options import NodeFigures, RingOptions
from mdiq.telemetry.trace import Span
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.router_dealer import RouterServer

log = structlog.get_logger()

LEASE_S = 60.0  # importing torch and loading may starve a child's loop for long on a slow card
DRAIN_S = 1.0


class SocketWorkers(ABC):
    """Every Stage but the Starter's, over sockets.

    on_fault: called with Faults; on_lost: called when a Node is gone; on_loading: called with (node, done, total).
    """

    def __init__(
        self,
        options: RingOptions,
        *,
        ring_key: bytes,
        on_fault: Callable[[control.Fault], None],
        on_lost: Callable[[MdiqError], None],
        on_loading: Callable[[str, int, int], None],
    ) -> None:
        self._options = options
        self._ring_key = ring_key
        self._model_digest = ""
        self._on_fault = on_fault
        self._on_lost = on_lost
        self._on_loading = on_loading
        self._names = [NodeId(name) for name in options.node_names[1:]]
        self._context = zmq.asyncio.Context()
        self._tasks: list[asyncio.Task[None]] = []
        self._coordinator: Coordinator | None = None
        self._server: RouterServer | None = None
        self._ready: dict[NodeId, control.Ready] = {}
        self._endpoints: list[str] = []  # that each Hop leads to, the one out of the Starter first
        self._listening: dict[str, str] = {}  # where Nodes say that they listen
        self._is_drained = False
        self._is_closing = False
        self.source: PullSource | None = None
        self.sink: PushSink | None = None

    @property
    def missing(self) -> list[str]:
        """The Nodes that have not joined yet."""
        return [*self._coordinator.missing] if self._coordinator else [*self._names]

    def silent(self, min_s: float) -> Mapping[str, float]:
        """Return the Nodes that have not been heard for so long, and for how long."""
        return dict[str, float](self._coordinator.silent(min_s).items()) if self._coordinator else {}

    async def until_leaving(self) -> str:
        """Wait until a Node asks to be drained; return its name."""
        assert self._coordinator is not None  # start has run
        return await asyncio.shield(self._coordinator.leaving)

    @abstractmethod
    async def open(self) -> None:
        """Have the Nodes start, and listen to them.

        Raises:
            MdiqError: a port or a process failed.
        """

    async def start(self, model_digest: str, weights: WeightSettings) -> Sequence[control.Ready]:
        """Have every Node join and load; return what each has, in ring order. weights: how they all hold them.

        Raises:
            MdiqError: a port, a Node or a model failed; the message names the Node.
        """
        self._model_digest = model_digest
        self._options = replace(self._options, weights=weights)
        assert self._coordinator is not None  # open has run
        self._run(self._coordinator.run(), "coordinator")
        return await self._join_and_load()

    @abstractmethod
    async def _join_and_load(self) -> Sequence[control.Ready]:
        """See ``start``.

        Raises:
            MdiqError: a port, a Node or a model failed; the message names the Node.
        """

    async def begin(self, epoch: Epoch, wires: Sequence[str]) -> None:
        """Have every Stage serve in a new Epoch; ``wires[i]`` is the format of the Hop out of Stage i.

        Raises:
            MdiqError: a Node is gone.
        """
        assert self._coordinator is not None  # start has run
        await self._coordinator.begin(
            {node: control.Begin(epoch, wire) for node, wire in zip(self._names, wires[1:], strict=True)}
        )

    async def send_burst(self, stage: int, burst: control.SendBurst) -> control.BurstSent:
        """Have a Node measure its Hop; see Coordinator."""
        assert self._coordinator is not None  # start has run
        return await self._coordinator.send_burst(self._names[stage - 1], burst)

    def burst_arrived(self, stage: int, number: int) -> "asyncio.Future[control.BurstArrived]":
        """Return a future of what a Node sees of a burst; see Coordinator."""
        assert self._coordinator is not None  # start has run
        return self._coordinator.burst_arrived(self._names[stage - 1], number)

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
        self._is_closing = True
        if self._coordinator is not None and not self._is_drained:
            self._is_drained = True
            await self._coordinator.drain(DRAIN_S)

    def figures(self) -> list[NodeFigures]:
        """Return the newest figures of every Node, in ring order."""
        heartbeats = self._coordinator.heartbeats if self._coordinator else {}
        return [
            NodeFigures(
                name=node,
                layers=layers,
                rss_bytes=beat.rss_bytes,
                weight_bytes=self._ready[node].weight_bytes if node in self._ready else 0,
                busy_s=beat.busy_s,
                waiting_s=beat.waiting_s,
                bytes_in=beat.bytes_in,
                bytes_out=beat.bytes_out,
                dropped=dict(beat.frames_dropped),
            )
            for node, layers in zip(self._names, self._options.layers[1:], strict=True)
            if (beat := heartbeats.get(node)) is not None
        ]

    def spans(self) -> dict[str, list[Span]]:
        """Return the Spans that came in so far, by Node in ring order."""
        return {node: self._coordinator.spans[node] for node in self._names} if self._coordinator else {}

    async def aclose(self) -> None:
        """Close every socket."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for part in (self.sink, self.source, self._server):
            if part is not None:
                await part.aclose()
        self._context.term()

    def _coordinate(
        self,
        server: RouterServer,
        control_key: bytes,
        *,
        drains_strangers: bool = False,
        standing_by: Mapping[NodeId, str] | None = None,
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
            on_fault=lambda _, fault: self._on_fault(fault),
            on_loading=lambda node, loading: self._on_loading(node, loading.done, loading.total),
            on_lost=self._lost,
            drains_strangers=drains_strangers,
            standing_by=standing_by,
        )
        return coordinator

    def _run(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        """Run a loop until ``aclose``; the Ring is lost if it fails."""
        self._tasks.append(asyncio.create_task(self._supervised(loop, name), name=name))

    async def _supervised(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await loop
        except Exception as error:
            self._lost(NodeId(self._options.node_names[0]), loop_failed(name, error))

    def _assignment(self, i: int, next_endpoint: str) -> control.Assign:
        """Return what Stage ``i`` is to do in a Ring on this machine."""
        options, layers = self._options, self._options.layers[i]
        is_last = i == options.num_nodes - 1
        return control.Assign(
            epoch=1,
            layer_start=layers.start,
            layer_stop=layers.stop,
            is_last=is_last,
            next_endpoint=next_endpoint,
            model=str(options.model),
            model_digest=self._model_digest,
            weights=options.weights,
            wire=options.wire(i) or "",
            kv_tokens=options.kv_tokens or 0,
            memory_share=1 / options.num_nodes,
            receive_key=hop_key(self._ring_key, i),
            send_key=hop_key(self._ring_key, 0 if is_last else i + 1),
            trace=options.trace,
        )

    def _lost(self, node: NodeId, error: MdiqError) -> None:
        if not self._is_closing:
            log.info("node_lost", node=node, error=str(error))
            self._on_lost(error)
