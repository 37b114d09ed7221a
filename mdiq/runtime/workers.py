"""The Nodes of a Ring beside the Starter, as the Starter sees them: one interface, whatever they are.

Tasks of this process (in_process.py), processes of this machine (processes.py), or other machines (remote.py).
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from mdiq.core import control
from mdiq.core.hop_survey import HopLink
from mdiq.core.types import Epoch, LayerRange, NodeId, WeightSettings
from mdiq.core.wire import WireLimits, hop_key
from mdiq.errors import MdiqError
from mdiq.runtime.loops import EpochLinks, Supervisor
from mdiq.runtime.options import NodeFigures, RingOptions
from mdiq.runtime.starter_service import StarterService
from mdiq.telemetry.trace import Span
from mdiq.transport.base import FrameSink, FrameSource

log = structlog.get_logger()

RingWithout = Callable[[list[str]], RingOptions | None]
"""Returns the Ring in which others do at once what these Nodes did; None if they cannot."""


@dataclass(frozen=True, slots=True)
class RingEvents:
    """Callbacks of a Ring's Workers.

    on_fault: called with a Node and its Fault; on_lost: called when a Node is gone.
    on_loading: called with (node, done, total).
    """

    on_fault: Callable[[NodeId, control.Fault], None] = lambda *_: None
    on_lost: Callable[[MdiqError], None] = lambda _: None
    on_loading: Callable[[str, int, int], None] = lambda *_: None


class Workers(ABC):
    """Every Node of a Ring but the Starter: ``open``, ``start``, ``begin`` for every Epoch, ``drain``, ``aclose``.

    Between two Epochs ``reload`` has Nodes hold what they are to hold in the next one.

    source: what the last Stage sends; sink: the next Stage. Both are there from ``start`` on, unless there is no Hop.
    can_come_back: a Node that is gone may join again. can_change: other Nodes may have its Layers.
    """

    can_come_back = can_change = False

    def __init__(self, options: RingOptions, ring_key: bytes, events: RingEvents) -> None:
        self._options = options
        self._ring_key = ring_key
        self._events = events
        self._names = [NodeId(name) for name in options.node_names[1:]]
        self._model_digest = ""
        self._ready: dict[NodeId, control.Ready] = {}
        self._is_closing = False
        self._loops = Supervisor(lambda error: self._lost(NodeId(error.node or options.node_names[0]), error))
        self.source: FrameSource | None = None
        self.sink: FrameSink | None = None

    @property
    def missing(self) -> list[str]:
        """The Nodes that have not joined yet."""
        return []

    @property
    def hop_trouble(self) -> str:
        """Which Hops carry nothing though the Ring serves, in words; empty if none."""
        return ""

    async def guard_hops(self, starter: StarterService, without: RingWithout) -> None:
        """Find Hops that carry nothing, until cancelled; see HopGuard. Hops inside a machine do not break."""
        await asyncio.get_running_loop().create_future()

    def silent(self, min_s: float) -> Mapping[str, float]:
        """Return the Nodes that have not been heard for so long, and for how long."""
        return {}

    async def until_leaving(self) -> str:
        """Wait until a Node asks to be drained; return its name."""
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    @property
    def leaving(self) -> str | None:
        """The Node that asks to be drained, if there is one."""
        return None

    async def until_staying(self) -> None:
        """Wait until the Node that asked to be drained has been started again."""
        await asyncio.get_running_loop().create_future()

    @abstractmethod
    async def open(self) -> None:
        """Have the Nodes start, and listen to them.

        Raises:
            MdiqError: a port or a process failed; the message names the Node.
        """

    async def start(self, model_digest: str, weights: WeightSettings) -> Sequence[control.Ready]:
        """Have every Node join and load; return what each has, in ring order. weights: how all hold them.

        Raises:
            MdiqError: a port, a Node or a model failed; the message names the Node.
        """
        self._model_digest = model_digest
        self._options = replace(self._options, weights=weights)
        self._ready = dict(await self._join_and_load())
        return [self._ready[node] for node in self._names]

    @property
    def standing_by(self) -> list[str]:
        """The Nodes that stand by, and are here."""
        return []

    @property
    def at_hand(self) -> Mapping[str, frozenset[int]]:
        """The Layers that Nodes have on their disks, as far as is known."""
        return {}

    async def fetch(self, name: str, layers: LayerRange, bytes_per_s: float | None) -> None:  # noqa: B027  only some do
        """Have a Node bring Layers to its disk, while the Ring serves; it may be one that stands by.

        bytes_per_s: of all such transfers together; None: as fast as they can.

        Raises:
            MdiqError: it is gone, or cannot.
        """

    async def until_joined(self) -> None:
        """Wait until a Node joins, for the first time or again, of the Ring or not."""
        await asyncio.get_running_loop().create_future()

    async def reform(self, options: RingOptions) -> None:
        """Have another Ring from now on: of other Nodes, or of other Layers. ``reload`` has its Nodes load."""
        self._options = replace(options, weights=self._options.weights)
        self._names = [NodeId(name) for name in options.node_names[1:]]

    async def connect(self) -> None:  # noqa: B027  only some change
        """Connect to the Node after the Starter, if that is another one now; ``begin`` ends what was before."""

    def links(self, limits: WireLimits) -> EpochLinks | None:
        """Return the Starter's two Hops; None where it is alone."""
        if self._options.num_nodes == 1:
            return None
        assert self.source is not None and self.sink is not None  # it is connected
        names, key = self._options.node_names, self._ring_key
        return EpochLinks(self.source, self.sink, hop_key(key, names[0]), hop_key(key, names[1]), limits)

    async def reload(self, epoch: Epoch, kv_tokens: int | None) -> Sequence[control.Ready]:
        """Have the Nodes hold what they are to hold, and return it as ``start`` does; who holds it already, keeps it.

        kv_tokens: KV cache that the Ring counts on; None: each chooses.

        Raises:
            MdiqError: a Node is gone, or cannot load.
        """
        return [self._ready[node] for node in self._names]

    @abstractmethod
    async def _join_and_load(self) -> Mapping[NodeId, control.Ready]:
        """See ``start``."""

    async def survey(self, starter: StarterService, epoch: Epoch) -> tuple[HopLink | None, ...]:
        """Return what each Hop is like; nothing where none leads out of this process.

        Raises:
            TransportError: nothing arrives over one of them.
            MdiqError: a Node is gone.
        """
        return ()

    async def measure_hops(self, starter: StarterService, epoch: Epoch) -> tuple[HopLink | None, ...]:
        """Return what each Hop is like while the Ring serves; raises an MdiqError when a Node is gone.

        What runs would wait for it: the caller cancels it when there is something to do.
        """
        return ()

    @property
    def is_fetching(self) -> bool:
        """Whether Layers are on their way, so that links carry less."""
        return False

    @abstractmethod
    async def begin(self, epoch: Epoch, wires: Sequence[str]) -> None:
        """Have every Stage serve in a new Epoch; ``wires[i]`` is the format of the Hop out of Stage i.

        Raises:
            MdiqError: a Node is gone.
        """

    async def drain(self) -> None:
        """Ask the Nodes to end and take their last figures; ``aclose`` does not wait for those that do not answer."""
        self._is_closing = True

    def figures(self) -> list[NodeFigures]:
        """Return the newest figures of every Node, in ring order."""
        heartbeats = self.heartbeats()
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
                work=beat.work,
            )
            for node, layers in zip(self._names, self._options.layers[1:], strict=True)
            if (beat := heartbeats.get(node)) is not None
        ]

    @abstractmethod
    def heartbeats(self) -> Mapping[NodeId, control.Heartbeat]:
        """Return the newest of each Node."""

    @abstractmethod
    def spans(self) -> dict[str, list[Span]]:
        """Return the Spans that came in so far, by Node in ring order."""

    async def aclose(self) -> None:
        """End the loops."""
        self._is_closing = True
        await self._loops.aclose()

    def _assignment(self, i: int, next_endpoint: str) -> control.Assign:
        """Return what Stage ``i`` is to do in a Ring on this machine."""
        options, layers, names = self._options, self._options.layers[i], self._options.node_names
        noise = options.row_noise(i)
        return control.Assign(
            epoch=1,
            layer_start=layers.start,
            layer_stop=layers.stop,
            is_last=i == options.num_nodes - 1,
            next_endpoint=next_endpoint,
            model=str(options.model),
            model_digest=self._model_digest,
            weights=options.weights,
            wire=options.wire(i) or "",
            kv_tokens=options.kv_tokens or 0,
            memory_share=1 / options.num_nodes,
            receive_key=hop_key(self._ring_key, names[i]),
            send_key=hop_key(self._ring_key, names[(i + 1) % len(names)]),
            trace=options.trace,
            noise_clip=noise.clip if noise else 0.0,
            noise_sigma=noise.sigma if noise else 0.0,
        )

    def _lost(self, node: NodeId, error: MdiqError) -> None:
        if not self._is_closing:
            log.info("node_lost", node=node, error=str(error))
            self._events.on_lost(error)
