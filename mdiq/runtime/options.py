"""What a ring on this machine is to be: values only, so that the command line can say it without importing torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mdiq.control.standby import StandingBy as StandingBy
from mdiq.core.noise import NoisePromise, RowNoise, noise_of_hops
from mdiq.core.ring_settings import RingSettings
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.core.wire_formats import AUTO, USUAL, rounds
from mdiq.core.work import Work
from mdiq.errors import ConfigError
from mdiq.plan.pace import PaceSettings
from mdiq.plan.wire_choice import MAX_DIVERGENCE_NATS


@dataclass(frozen=True, slots=True)
class RemoteNode:
    """A Node as a Ring over several machines knows it, the Starter included.

    data_endpoint: where it takes Frames. public_key: of CURVE, in Z85; None in plain text.
    memory_share: the part of its machine's free memory that it may plan with. memory_bytes: most that it may take.
    keeps_standby_layers: it has Layers of others on its disk, to take over at once.
    noise: what is promised of the rows that this Node sees; known at the Starter alone.
    """

    name: str
    data_endpoint: str
    public_key: str | None
    device: str = "cpu"
    memory_share: float = 1.0
    memory_bytes: int | None = None
    keeps_standby_layers: bool = True
    noise: NoisePromise | None = None


@dataclass(frozen=True, slots=True)
class RemoteRing:
    """A Ring over several machines, at the Starter.

    nodes: in ring order, the Starter first. control_endpoint, weights_endpoint: of the Starter.
    secret: the Starter's private key; None: plain text, beyond loopback only where ``insecure`` permits it.
    join_wait_s: how long to wait for the Nodes. transfer_bytes_per_s: of weights, all together; None: no limit.
    standing_by: Nodes of the topology that this Ring goes without. spares: those of them that may have the Layers of a
    Node that is lost.
    """

    nodes: tuple[RemoteNode, ...]
    control_endpoint: str
    weights_endpoint: str
    secret: bytes | None = field(default=None, repr=False)
    insecure: bool = False
    join_wait_s: float = 120.0
    transfer_bytes_per_s: float | None = None
    standing_by: tuple[StandingBy, ...] = ()
    spares: tuple[RemoteNode, ...] = ()


@dataclass(frozen=True, slots=True)
class Outages:
    """When a Node is gone, and what becomes of what runs.

    silence_s: a Node that serves and says nothing for so long is gone. tolerance_s: what runs waits so long for it; 0:
    it ends at once.
    """

    silence_s: float = 5.0
    tolerance_s: float = 60.0


@dataclass(frozen=True, slots=True)
class RingPeers:
    """The others of a Ring over several machines, at a worker.

    nodes: all of the topology, the Starter first. weights_endpoint: of the Starter. secret: this Node's private key;
    None: plain text, beyond loopback only where ``insecure`` permits it.
    """

    nodes: tuple[RemoteNode, ...]
    weights_endpoint: str
    secret: bytes | None = field(default=None, repr=False)
    insecure: bool = False

    def public_key(self, data_endpoint: str) -> str | None:
        """Return the key of the Node that takes Frames there.

        Raises:
            ConfigError: no Node of the Ring does.
        """
        for node in self.nodes:
            if node.data_endpoint == data_endpoint:
                return node.public_key
        raise ConfigError(
            f"{data_endpoint}: no node of this topology is there; copy the starter's topology to this device"
        )

    def check_name(self, name: str) -> None:
        """See that a Node of the Ring, which is to send Frames here, is known here.

        Raises:
            ConfigError: nobody here has its key, so it could never connect.
        """
        if name not in {node.name for node in self.nodes}:
            raise ConfigError(f"{name}: no node of this topology; copy the starter's topology to this device")


class Slowdown(Protocol):
    """Makes one ring of processes slower than its machine: testbed/slow_ring.py. It is closed after they have ended."""

    async def slow_hops(self, endpoints: Sequence[str]) -> list[str]:
        """Return the endpoints at which slow Hops to these begin."""

    def slow_node(self, name: str, pid: int) -> None:
        """Slow the process of a Node down."""

    async def aclose(self) -> None:
        """Undo it."""


@dataclass(frozen=True, slots=True)
class RingOptions:
    """A ring of Nodes: on this machine, or where ``remote`` says.

    model: a model directory or a .gguf file.
    layers: one range a Node, in ring order; the first is the Starter's.
    weights: how all Nodes hold theirs; the Starter says what "auto" is, for all. Its device is the one of Nodes on this
    machine, and of the Starter.
    wires: format of each Hop's activations, "f32", "bf16", "i8", or "auto": in exact mode the dtype, so that a cut
    between Layers changes no bit; else the Ring chooses when it has measured the Hop. Hop i leaves Stage i. One entry
    serves all.
    max_divergence_nats: what i8 may cost where the Ring chose it; see plan/wire_choice.py.
    threads: torch threads of each Node.
    pin: bind Node i to core i.
    in_process: keep all Stages in this process.
    kv_tokens: KV capacity of each Node in tokens; None lets each choose from its free memory.
    base_port: Node i listens for activations on base_port + i; 0 lets the system choose.
    trace: collect Spans of every loop.
    slowdown: what makes this one ring slower than its machine, for measurements.
    pace: what the operator wishes of caps and chunks.
    remote: the Nodes of other machines; None: all are processes of this one, or Stages in this process.
    outages: of Nodes that are processes of their own.
    is_survey: the Layers are some of the model's, to be measured; the Ring does not serve.
    """

    model: Path
    layers: tuple[LayerRange, ...]
    weights: WeightSettings = field(default_factory=WeightSettings)
    wires: tuple[str, ...] = (AUTO,)
    max_divergence_nats: float = MAX_DIVERGENCE_NATS
    threads: int = 1
    pin: bool = False
    in_process: bool = False
    kv_tokens: int | None = None
    base_port: int = 0
    trace: bool = False
    log_level: str = "warning"
    slowdown: Slowdown | None = None
    ring: RingSettings = field(default_factory=RingSettings)
    pace: PaceSettings = field(default_factory=PaceSettings)
    remote: RemoteRing | None = None
    outages: Outages = Outages()
    is_survey: bool = False

    @property
    def node_names(self) -> tuple[str, ...]:
        """The Nodes' names in ring order, the Starter first."""
        if self.remote is not None:
            return tuple(node.name for node in self.remote.nodes)
        return tuple(f"node-{i}" for i in range(self.num_nodes))

    @property
    def num_nodes(self) -> int:
        return len(self.layers)

    @property
    def wanted_wires(self) -> tuple[str, ...]:
        """The format of each Hop, "auto" where the Ring is to choose; none where there are no Hops."""
        if self.num_nodes == 1:
            return ()
        wires = (self.wires[i % len(self.wires)] for i in range(self.num_nodes))
        return tuple(self.weights.dtype if self.weights.exact and wire == AUTO else wire for wire in wires)

    @property
    def noises(self) -> tuple[NoisePromise | None, ...]:
        """The promise for which each Hop gets noise, the Hop out of the Starter first; None: it gets none."""
        if self.remote is None or self.num_nodes == 1:
            return (None,) * self.num_nodes
        return noise_of_hops([node.noise for node in self.remote.nodes])

    @property
    def may_have_noise(self) -> bool:
        """Whether a Hop has noise, or gets some when a Node takes over: no answer comes out the same way twice then."""
        return bool(self.promises)

    @property
    def promises(self) -> dict[str, NoisePromise]:
        """What is promised of the rows that Nodes see, by their names: also of those that see none now."""
        remote = self.remote
        known: tuple[RemoteNode | StandingBy, ...] = ()
        if remote is not None:
            known = (*remote.nodes, *remote.spares, *remote.standing_by)
        return {node.name: node.noise for node in known if node.noise is not None}

    def row_noise(self, stage: int) -> RowNoise | None:
        """Return the noise of the Hop out of a Stage."""
        promise = self.noises[stage]
        return None if promise is None else promise.row

    def rounds(self, wires: Sequence[str]) -> bool:
        """Tell whether Hops of these formats change activations: another number of Nodes may give other tokens."""
        return any(rounds(wire, self.weights.dtype) for wire in wires)

    @property
    def begins_rounding(self) -> bool:
        """Whether Hops change activations in the formats that they begin with."""
        return self.rounds([wire for i in range(self.num_nodes) if (wire := self.wire(i)) is not None])

    def wire(self, stage: int) -> str | None:
        """Return the format that the Hop out of a Stage begins with, or None where there are no Hops."""
        if self.num_nodes == 1:
            return None
        # Inside one process rows are handed over as they are.
        usual = self.weights.dtype if self.in_process else USUAL
        return usual if self.wanted_wires[stage] == AUTO else self.wanted_wires[stage]


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """What one Node did, from its assignment on.

    rss_bytes: resident memory of its process; weight_bytes: of its layers alone.
    busy_s: seconds in which it computed; waiting_s: seconds in which work waited while it did not.
    bytes_in, bytes_out: on its activation sockets, framing included.
    dropped: Frames that it refused, by reason. work: its forwards.
    """

    name: str
    layers: LayerRange
    rss_bytes: int
    weight_bytes: int
    busy_s: float
    waiting_s: float
    bytes_in: int
    bytes_out: int
    dropped: dict[str, int]
    work: Work = Work()


@dataclass(frozen=True, slots=True)
class PaceFigures:
    """The pace of a Ring with the most Sequences that it has had, and what came of it.

    num_live: those Sequences; in_flight: micro-batches that circulate then; cap: most Segments of one.
    hops_s: the way round without computing, as measured; None with one Node.
    predicted_tokens_per_s: what the Plan expects of decoding.
    chunk_tokens: most prompt tokens that a decoding Sequence meets in a Batch.
    decode_gap_s: the longest time between two tokens of a Sequence while a prompt was in the Ring.
    max_live: Sequences that the Ring takes in at once. kv_tokens: its KV cache.
    """

    num_live: int
    in_flight: int
    cap: int
    hops_s: float | None
    predicted_tokens_per_s: float
    chunk_tokens: int
    decode_gap_s: float
    max_live: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class HopFigures:
    """One Hop as it is used, and as it was measured before the Ring served; None where it was not.

    delay_s: one way, of a small Frame; bytes_per_s: what it carries.
    """

    wire: str
    delay_s: float | None
    bytes_per_s: float | None
