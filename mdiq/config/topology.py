"""The Topology: what the operator's file says, value by value. Frozen; attributes carry units, keys are as in the file.

Every key has a unit, a default and a description here and nowhere else: the JSON schema, the tables of
configs/README.md and the comments of `mdiq init` are made of them. What is wrong between values is in config/checks.py.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mdiq.config.addresses import is_loopback
from mdiq.config.units import AUTO
from mdiq.config.values import (
    Address,
    Count,
    DecodeWait,
    Delta,
    Device,
    Epsilon,
    FilePath,
    Host,
    HostName,
    Layers,
    ModelName,
    ModelPath,
    Name,
    Norm,
    Origin,
    Port,
    PublicKey,
    Rate,
    Silence,
    Size,
    Timeout,
    Wire,
)
from mdiq.core.known_models import DEFAULT_MODEL
from mdiq.core.types import USUAL_WEIGHTS, WeightFormat
from mdiq.core.wire_formats import DtypeName

VERSION = 1
MAX_NODES = 64


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


def _key(
    default: Any, description: str, *, written: Any = None, example: Any = None, values: str = "", **more: Any
) -> Any:
    """Return a field. written: its default as the file writes it, where that is not the value itself.

    values: what may stand there, where its type does not say it.
    """
    extra: dict[str, Any] = {} if written is None else {"default": written}
    if example is not None:
        extra["examples"] = [example]
    if values:
        extra["x-values"] = values
    return Field(default, description=description, json_schema_extra=extra or None, **more)


class ModelChoice(_Section):
    """The model, and how it is computed."""

    path: ModelPath = _key(
        ...,
        "Model directory, .gguf file, or a known name. Only the Starter's machine has it.",
        example=DEFAULT_MODEL.name,
    )
    name: ModelName | None = _key(
        None, "Name that the API's clients use for the model; null: the name of its file or directory."
    )
    weights: WeightFormat = _key(
        USUAL_WEIGHTS,
        "How weights are held: plain (as dtype says), packed in 8 or 4 bits, or auto (by the model's file).",
    )
    mode: Literal["exact", "fast"] = _key(
        "exact",
        "The same tokens on any number of nodes, alone and among other requests; or the fastest kernels and hops.",
    )
    dtype: DtypeName = _key("f32", "Number format of activations, KV cache and plain weights.")


class Noise(_Section):
    """Noise on the rows that a node sees: clipped to a norm, and differentially private."""

    epsilon: Epsilon = _key(..., "Epsilon of each row; the smaller, the more noise.", example=8)
    delta: Delta = _key(..., "Delta of each row, and of the totals that `mdiq status` shows.", example="1e-6")
    clip: Norm = _key(
        ..., "L2 norm to which rows are scaled down that exceed it; `mdiq privacy` shows usual ones.", example=100
    )


class Node(_Section):
    """One process on one device."""

    name: Name = _key(..., "The node's name; unique in the file. Its private key has the same name.", example="pi1")
    role: Literal["starter", "worker"] = _key(
        "worker", "The Starter has the model, the API and the first layers. There is exactly one."
    )
    address: Address = _key(
        ...,
        "IP address or host name at which the other nodes reach this one; IPv6 without brackets.",
        example="192.168.1.10",
    )
    data_port: Port = _key(7400, "TCP port on which this node receives activations.")
    control_port: Port = _key(7401, "TCP port of the control channel; on the Starter only.")
    weights_port: Port = _key(7402, "TCP port from which the nodes fetch their weights; on the Starter only.")
    device: Device = _key("cpu", "Device that computes.")
    threads: Count = _key(None, "Threads that compute; auto: as many as the device has cores.", written=AUTO)
    memory_bytes: Size = _key(
        None,
        "Max memory that mdiq may use on this device; auto: most of the free memory.",
        alias="memory",
        written=AUTO,
    )
    layers: Layers = _key(
        None, "Layers by hand, for all nodes or for none; auto: planned from measurements.", written=AUTO
    )
    spare: bool = _key(False, "Stands by for a node that fails, and takes its layers then.")
    standby_layers: Literal["auto", "none"] = _key(
        "auto",
        "Layers of other nodes that this one keeps on its disk, so that it takes over at once: those of all workers if "
        "it is spare, else those of its neighbours; or none.",
    )
    noise: Noise | None = _key(
        None,
        "Noise on what this node sees of the users' texts, which spoils answers; workers only. See docs/privacy.md.",
        example="{epsilon: 8, delta: 1e-6, clip: 100}",
        values="`null`, or keys: `{epsilon: 8, delta: 1e-6, clip: 100}`",
    )
    public_key: PublicKey = _key(
        None, "Public key of the node, from `mdiq keys`; not a secret. Needed beyond loopback."
    )

    @property
    def is_starter(self) -> bool:
        return self.role == "starter"

    @property
    def data_endpoint(self) -> str:
        return endpoint(self.address, self.data_port)

    @property
    def control_endpoint(self) -> str:
        return endpoint(self.address, self.control_port)

    @property
    def weights_endpoint(self) -> str:
        return endpoint(self.address, self.weights_port)


class HopWire(_Section):
    """A hop with its own format of activations."""

    sender: str = _key(..., "Name of the node that sends.", alias="from", example="desk")
    receiver: str = _key(..., "Name of the next node in the ring.", alias="to", example="pi1")
    wire: Wire = _key(..., "Format of activations on this hop.", example="i8")


class Links(_Section):
    """How activations and weights travel."""

    wire: Wire = _key(
        "auto", "Format of activations on the hops; auto: dtype in exact mode, else by what a link measures."
    )
    hops: tuple[HopWire, ...] = _key((), "Hops with their own format.")
    transfer_limit_bit_per_s: Rate = _key(
        None, "Max network rate of all transfers of weights together; null: no limit.", alias="transfer_limit"
    )


class Security(_Section):
    """Who may join, and whether connections are encrypted."""

    keys: FilePath = _key("keys", "Folder of the private keys, NAME.key, made by `mdiq keys`; relative to this file.")
    insecure: bool = _key(False, "Send everything in plain text, without keys, even beyond loopback.")


class Listening(_Section):
    """Where an HTTP API listens, and who may ask."""

    host: Host = _key(
        "127.0.0.1", "Address on which the API listens; 0.0.0.0: all interfaces. Beyond loopback it needs keys_file."
    )
    port: Port = _key(8080, "TCP port of the API.")
    keys_file: FilePath | None = _key(
        None,
        "File of API keys, made by `mdiq api-key`; clients must send one of them. null: none needed. Relative to this "
        "file.",
    )
    tls_cert: FilePath | None = _key(
        None, "Certificate (PEM, with its chain) for HTTPS; null: plain HTTP. Relative to this file."
    )
    tls_key: FilePath | None = _key(None, "Private key of tls_cert (PEM, mode 600). Relative to this file.")
    cors_origins: tuple[Origin, ...] = _key(
        (), "Web pages of these origins may use the API from a browser, for example https://chat.example.org; '*': all."
    )
    allowed_hosts: tuple[HostName, ...] = _key(
        (),
        "Names by which clients reach an API without keys, beside its address, localhost and the machine's name; for "
        "example that of a reverse proxy: chat.example.org.",
    )
    client_timeout_s: Timeout = _key(
        60.0,
        "Max wait for a request's head, for its body, and for a client that does not read its answer; slower "
        "connections are closed.",
        alias="client_timeout",
        written="60s",
    )


class Api(Listening):
    """The HTTP API, on the Starter's machine."""

    max_waiting: Count = _key(
        None,
        "Requests that may wait for their turn in the ring, more are refused; auto: twice max_live, at least 64.",
        written=AUTO,
    )


class RingWishes(_Section):
    """What the ring is planned for."""

    objective: Literal["throughput", "latency"] = _key(
        "throughput", "Goal of the plan of `auto` layers: max tokens/s of all users together, or of a single user."
    )
    users: Annotated[int, Field(ge=1, le=256)] = _key(
        8, "Number of users at once that throughput is planned for. More users keep more devices at work."
    )
    kv_tokens: Annotated[int, Field(ge=32, le=16_777_216)] = _key(
        2_048, "Min KV cache that a plan leaves room for, in tokens of all users together, prompts included."
    )
    decode_wait_s: DecodeWait = _key(
        0.2,
        "Max wait between two tokens of an answer while prompts of other requests are computed.",
        alias="decode_wait",
        written="200ms",
    )
    silence_s: Silence = _key(
        5.0,
        "A node of a ring that serves is gone when nothing is heard of it for so long.",
        alias="silence",
        written="5s",
    )
    outage_tolerance_s: Timeout = _key(
        60.0,
        "Max wait for a node that is gone: what runs pauses, and goes on when the node is back.",
        alias="outage_tolerance",
        written="60s",
    )
    max_live: Count = _key(None, "Requests in the ring at once; auto: what fills it.", written=AUTO)
    prefix_reuse: bool = _key(True, "Use the KV cache of an earlier request that began with the same tokens.")
    min_starter_layers: Annotated[int, Field(ge=1, le=1024)] = _key(
        1, "The first so many layers always stay on the Starter, with embedding and head; see docs/privacy.md."
    )


def _some_nodes(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    if not nodes:
        raise ValueError("the list is empty; begin each node with `- name: ...` on a line of its own")
    if len(nodes) > MAX_NODES:
        raise ValueError(f"these are {len(nodes)} nodes, and a ring has up to {MAX_NODES}; remove the others")
    return nodes


class Topology(_Section):
    """The operator's file: the devices, the model, and who may talk to whom."""

    version: Literal[1] = _key(..., "Version of this file's format.", example=VERSION)
    model: ModelChoice = _key(..., "The model.", example=f"{{path: {DEFAULT_MODEL.name}}}")
    nodes: Annotated[tuple[Node, ...], AfterValidator(_some_nodes)] = _key(
        ...,
        "The devices, in ring order: the Starter, then each passes on to the one below it, the last to the Starter.",
    )
    links: Links = _key(Links(), "How activations and weights travel.")
    security: Security = _key(Security(), "Who may join, and whether connections are encrypted.")
    api: Api = _key(Api(), "The HTTP API, on the Starter's machine.")
    ring: RingWishes = _key(RingWishes(), "What the ring is planned for.")
    journal: FilePath | None = _key(
        AUTO,
        "File that keeps responses in the background over a restart of the Starter, relative to this one; auto: "
        "`journal` in the service's $STATE_DIRECTORY, and none where there is no such folder; null: none.",
    )

    @property
    def starter(self) -> Node:
        return next(node for node in self.nodes if node.is_starter)

    @property
    def ring_nodes(self) -> tuple[Node, ...]:
        """The nodes in ring order, the Starter first, without the spare ones."""
        return tuple(sorted((node for node in self.nodes if not node.spare), key=lambda node: not node.is_starter))

    @property
    def hops(self) -> tuple[tuple[str, str], ...]:
        """Sender and receiver of each hop, in ring order; one node alone sends to itself."""
        names = [node.name for node in self.ring_nodes]
        return tuple(zip(names, [*names[1:], *names[:1]], strict=True))

    @property
    def spares(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.spare)

    @property
    def is_on_loopback(self) -> bool:
        """Nothing of the ring leaves the machine."""
        return all(is_loopback(node.address) for node in self.nodes)

    @property
    def is_plain_text(self) -> bool:
        """The sockets of the ring are not encrypted."""
        return self.security.insecure or all(node.public_key is None for node in self.nodes)

    def node(self, name: str) -> Node:
        """Return the node of that name.

        Raises:
            KeyError: there is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def wire_of(self, sender: str, receiver: str) -> str:
        """Return the format that the file wants on a hop, maybe ``auto``."""
        hops = (hop.wire for hop in self.links.hops if (hop.sender, hop.receiver) == (sender, receiver))
        return next(hops, self.links.wire)


def endpoint(address: str, port: int) -> str:
    """Return ZeroMQ's name of an address and a port."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
