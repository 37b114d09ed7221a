"""Nodes on other machines, as the Starter sees them: it waits for them, gives them weights, and lets nobody else in.

Each plane has its list of names (transport/curve.py): activations come from the Node before, control messages and
questions for weights from the workers, and everyone speaks for its own name only.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import structlog

from mdiq.cache import cache_directory
from mdiq.control.coordinator import Coordinator
from mdiq.control.weight_server import WEIGHTS_HWM, LayerSource, WeightServer
from mdiq.core import control
from mdiq.core.token_bucket import TokenBucket
from mdiq.core.types import Epoch, LayerRange, NodeId
from mdiq.core.weights import PIECE_BYTES
from mdiq.errors import CapacityError, MdiqError, TransportError, first_of
from mdiq.runtime.options import RemoteNode, RemoteRing, RingOptions
from mdiq.runtime.socket_workers import SocketWorkers
from mdiq.runtime.takeover import rekeyed
from mdiq.runtime.workers import RingEvents
from mdiq.transport.base import FrameSink
from mdiq.transport.curve import CONTROL, DATA, WEIGHTS, ClientSecurity, Gate, ServerSecurity
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.router_dealer import RouterServer
from mdiq.transport.sockets import listen_endpoint

if TYPE_CHECKING:
    from mdiq.engine.model.layer_packing import LayerPacking

log = structlog.get_logger()

TELL_S = 5.0


class RemoteWorkers(SocketWorkers):
    """Every Stage but the Starter's, each a `mdiq node` that joins by itself."""

    can_change = True
    _gate: Gate | None = None
    _sink_to: RemoteNode | None = None
    _old_sink: FrameSink | None = None
    _weights: RouterServer | None = None
    _packing: "LayerPacking | None" = None
    _weight_server: WeightServer | None = None
    _num_fetches = 0

    def __init__(self, options: RingOptions, ring_key: bytes, events: RingEvents) -> None:
        super().__init__(options, ring_key, events)
        self._fetches: dict[str, LayerRange] = {}  # what Nodes fetch beside what they serve

    async def open(self) -> None:
        """Listen to the Nodes, also where there are only some that stand by: they may come in later.

        Raises:
            MdiqError: a port cannot be used.
        """
        await super().open()
        ring = self._ring
        if ring.secret is not None:
            self._gate = await self._open_gate(ring)
        insecure, listen = ring.insecure, listen_endpoint
        server = await RouterServer.bind(
            self._context, listen(ring.control_endpoint), security=self._server_security(CONTROL), insecure=insecure
        )
        self._coordinate(server, control.CHECKSUM_KEY, ring.standing_by)
        self.source = await PullSource.bind(
            self._context, listen(ring.nodes[0].data_endpoint), security=self._server_security(DATA), insecure=insecure
        )
        self._weights = await RouterServer.bind(
            self._context,
            listen(ring.weights_endpoint),
            hwm=WEIGHTS_HWM,
            security=self._server_security(WEIGHTS),
            insecure=insecure,
        )

    async def _join_and_load(self) -> Mapping[NodeId, control.Ready]:
        """Wait for the Nodes, have them fetch and load their Layers."""
        coordinator = self._opened_coordinator
        assert self._weights is not None  # open has run
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._serve_weights(self._weights), name="serve-weights")
                joining = tasks.create_task(self._all_joined(coordinator), name="join")
        except* MdiqError as group:
            raise first_of(group) from None
        self._listening = {node: hello.data_endpoint for node, hello in joining.result().items()}
        await self.connect()
        return await self._assign()

    @property
    def at_hand(self) -> Mapping[str, frozenset[int]]:
        """The Layers that Nodes have on their disks; see Workers."""
        return dict[str, frozenset[int]](self._coordinator.on_disk.items()) if self._coordinator else {}

    @property
    def is_fetching(self) -> bool:
        """Whether Layers are on their way; see Workers."""
        return bool(self._fetches)

    async def fetch(self, name: str, layers: LayerRange, bytes_per_s: float | None) -> None:
        """Have a Node bring Layers to its disk; see Workers."""
        self._limit_transfers(bytes_per_s)
        self._fetches[name] = layers
        self._num_fetches += 1
        weights = self._options.weights
        devices = {node.name: node.device for node in (*self._ring.nodes, *self._ring.spares)}  # one may be let in next
        weights = replace(weights, device=devices.get(name, weights.device))
        fetch = control.Fetch(self._num_fetches, layers.start, layers.stop, self._model_digest, weights)
        try:
            fetched = await self._opened_coordinator.ask(NodeId(name), fetch, control.Fetched)
        finally:
            self._fetches.pop(name, None)
            if self._weight_server is not None:
                await self._weight_server.end_refused()  # it may be needed for what others wait for
        if fetched.error:
            raise CapacityError(f"{name}: {fetched.error}")

    async def reload(self, epoch: Epoch, kv_tokens: int | None) -> Sequence[control.Ready]:
        """Have the Nodes hold what they are to hold; see Workers."""
        self._limit_transfers(None)  # others wait for it
        return await super().reload(epoch, kv_tokens)

    def _limit_transfers(self, bytes_per_s: float | None) -> None:
        """Limit the rate of weights by this, and by what the operator says."""
        limits = [limit for limit in (bytes_per_s, self._ring.transfer_bytes_per_s) if limit is not None]
        if self._weight_server is not None:
            self._weight_server.limit = TokenBucket(min(limits), PIECE_BYTES) if limits else None

    async def reform(self, options: RingOptions) -> None:
        """Have another Ring from now on; see Workers."""
        with_new_key = {*rekeyed(self._options, options)}
        await super().reform(options)
        coordinator = self._opened_coordinator
        coordinator.reform(self._names, self._ring.standing_by)
        for node in {
            *self._names,
            *coordinator.standing_by,
        } & with_new_key:  # at once: it may come with the new key next
            coordinator.revoke(NodeId(node))
        if self._gate is not None:  # before anybody is told anything: a list that lacks a Node cuts all connections
            for domain, listed in self._lists().items():
                await self._gate.replace(domain, listed)
        await coordinator.tell_idle()

    async def begin(self, epoch: Epoch, wires: Sequence[str]) -> None:
        """Have every Stage serve in a new Epoch; see Workers."""
        if self._old_sink is not None:
            await self._old_sink.aclose()
            self._old_sink = None
        await super().begin(epoch, wires)

    async def connect(self) -> None:
        """Connect to the Node after the Starter, if it is another one now, or the Hop was dead; see Workers."""
        ring = self._ring
        self._endpoints = [node.data_endpoint for node in (*ring.nodes[1:], ring.nodes[0])]
        following = ring.nodes[1] if self._names else None
        if following == self._sink_to and ring.nodes[0].name not in self._reconnects:
            return
        self._old_sink, self.sink, self._sink_to = self.sink, None, following
        if following is not None:
            self.sink = await PushSink.connect(
                self._context,
                following.data_endpoint,
                security=self._client_security(following.public_key),
                insecure=ring.insecure,
            )

    async def aclose(self) -> None:
        """Send the Nodes back to waiting for a Starter, and close every socket."""
        await self.drain()
        if self._packing is not None:
            self._packing.stop()
        await self._loops.aclose()
        if self._packing is not None:
            await asyncio.to_thread(self._packing.close)
        if self._weights is not None:
            await self._weights.aclose()
        if self._gate is not None:
            await self._gate.aclose()
        if self._old_sink is not None:
            await self._old_sink.aclose()
        await super().aclose()

    @property
    def _ring(self) -> RemoteRing:
        assert self._options.remote is not None  # it is what this class is for
        return self._options.remote

    async def _open_gate(self, ring: RemoteRing) -> Gate:
        gate = Gate(self._context)
        gate.start()
        for domain, listed in self._lists().items():
            await gate.replace(domain, listed)
        self._loops.run(gate.run(), "gate")
        return gate

    def _lists(self) -> dict[str, dict[str, str]]:
        """Return who may send on which plane, by key."""
        ring = self._ring
        workers = {node.public_key or "": node.name for node in ring.nodes[1:]}
        idle = {node.public_key or "": node.name for node in ring.standing_by}
        last = {ring.nodes[-1].public_key or "": ring.nodes[-1].name}
        return {CONTROL: workers | idle, WEIGHTS: workers | idle, DATA: last}

    async def _serve_weights(self, server: RouterServer) -> None:
        """Begin to serve weights."""
        from mdiq.engine.model.layer_packing import LayerPacking

        options = self._options
        self._packing = packing = await asyncio.to_thread(
            LayerPacking, options.model, options.weights.format, cache_directory() / "packed"
        )
        self._weight_server = WeightServer(
            server,
            LayerSource(packing.digest, packing.num_layers, packing.find),
            clock=time.monotonic,
            may_fetch=self._may_fetch,
        )
        self._limit_transfers(None)
        self._loops.run(self._weight_server.run(), "weights")

    def _may_fetch(self, node: str, layers: LayerRange) -> bool:
        """Tell whether Layers are those of the Node that asks, or that it was asked to fetch."""
        own = dict(zip(self._options.node_names[1:], self._options.layers[1:], strict=True))
        return layers in (own.get(node), self._fetches.get(node))

    async def _all_joined(self, coordinator: Coordinator) -> Mapping[NodeId, control.Hello]:
        ring = self._ring
        telling = asyncio.create_task(_tell(coordinator), name="telling")
        try:
            async with asyncio.timeout(ring.join_wait_s):
                return await coordinator.all_joined()
        except TimeoutError:
            num_refused = self._gate.refusals.num_refused if self._gate else 0
            refused = f"; {num_refused} connections were refused here, see the log above" if num_refused else ""
            names, them = ", ".join(coordinator.missing), "it" if len(coordinator.missing) == 1 else "them"
            raise TransportError(
                f"{names}: not joined within {ring.join_wait_s:g} s{refused}; see whether mdiq node runs there, "
                f"whether {ring.control_endpoint} can be reached from {them}, and whether both have "
                "this topology and its keys"
            ) from None
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    def _assignment_of(self, i: int) -> control.Assign:
        ring = self._ring
        node, following = ring.nodes[i], ring.nodes[(i + 1) % len(ring.nodes)]
        return replace(
            self._assignment(i, following.data_endpoint),
            model="",
            weights=replace(self._options.weights, device=node.device),
            memory_share=node.memory_share,
            previous=ring.nodes[i - 1].name,
        )

    def _server_security(self, domain: str) -> ServerSecurity | None:
        secret = self._ring.secret
        return None if secret is None or self._gate is None else ServerSecurity(secret, domain, self._gate)

    def _client_security(self, public_key: str | None) -> ClientSecurity | None:
        secret = self._ring.secret
        return None if secret is None else ClientSecurity(secret, public_key or "")


async def _tell(coordinator: Coordinator) -> NoReturn:
    """Say which Nodes are missing, when they have been for a while and when that changes."""
    told: list[NodeId] = []
    while True:
        await asyncio.sleep(TELL_S)
        if coordinator.missing and coordinator.missing != told:
            told = coordinator.missing
            log.warning("waiting_for_nodes", missing=", ".join(told))
