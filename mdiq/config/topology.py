"""The Topology: what the operator's file says, value by value. Frozen; attributes carry units, keys are as in the file.

Every key has a unit, a default and a description here and nowhere else: the JSON schema, the tables of
configs/README.md and the comments of `mdiq init` are made of them. What is wrong between values is in config/checks.py.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)

from mdiq.config import units
from mdiq.config.addresses import check_address, is_loopback
from mdiq.config.units import AUTO, shown
from mdiq.core.known_models import DEFAULT_MODEL
from mdiq.core.types import USUAL_WEIGHTS, LayerRange, WeightFormat
from mdiq.core.wire_formats import DtypeName, WireName

VERSION = 1
MOST_NODES = 64
LEAST_MEMORY = "64M"

Wire = Literal["auto", WireName]
_Port = Annotated[int, Field(ge=1024, le=65535)]


def _text_schema(pattern: str, values: str, *, or_auto: bool = False, or_null: bool = False) -> WithJsonSchema:
    """Return the JSON schema of a text with a unit. values: what the table says of it."""
    schema: dict[str, Any] = {"type": "string", "pattern": f"^({'auto|' if or_auto else ''}{pattern})$"}
    if or_null:
        schema["type"] = ["string", "null"]
    return WithJsonSchema(schema | {"x-values": values})


_NO_VALUE = "it has no value; remove the line, or write auto"


def _count_or_auto(value: object) -> object:
    if value is None:
        raise ValueError(_NO_VALUE)
    if isinstance(value, str) and value != AUTO:
        if value.isascii() and value.isdigit():
            raise ValueError(f"it is a text because of the quotes; write {shown(value)}")
        raise ValueError(f"{shown(value)} is neither auto nor a number; write auto or for example 2")
    return None if value == AUTO else value


def _memory(value: object) -> int | None:
    if value is None:
        raise ValueError(_NO_VALUE)
    if value == AUTO:
        return None
    if isinstance(value, str) and value.endswith("%"):
        raise ValueError(f"{shown(value)} is a share; write a size, for example 700M, or auto")
    num_bytes = units.parse_size(value)
    if num_bytes < units.parse_size(LEAST_MEMORY):
        raise ValueError(f"{shown(value)} is too little to hold anything; write at least {LEAST_MEMORY}, or auto")
    return num_bytes


def _layers(value: object) -> LayerRange | None:
    if value is None:
        raise ValueError(_NO_VALUE)
    return None if value == AUTO else units.parse_layers(value)


def _rate(value: object) -> float | None:
    return None if value is None else units.parse_rate(value)


def _decode_wait(value: object) -> float:
    seconds = units.parse_time(value)
    if not 0.001 <= seconds <= 60:
        raise ValueError(f"{shown(value)} is out of range; write 1ms to 60s, for example 200ms")
    return seconds


def _client_timeout(value: object) -> float:
    seconds = units.parse_time(value)
    if not 1 <= seconds <= 3600:
        raise ValueError(f"{shown(value)} is out of range; write 1s to 3600s, for example 60s")
    return seconds


def _name(value: str) -> str:
    if re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
        return value
    better = re.sub(r"[^a-z0-9-]+", "-", value.lower())[:63].strip("-")
    advice = f"write for example {better}" if better else "write for example pi1"
    raise ValueError(f"{shown(value)} is not a node's name: a-z, 0-9 and - inside, at most 63; {advice}")


def _device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", value):
        return value
    if re.fullmatch(r"gpu|nvidia|jetson", value, re.IGNORECASE):
        raise ValueError(f"{value} is not a device's name; write cuda")
    raise ValueError(f"{shown(value)} is not a device; write cpu, cuda, cuda:0 or auto")


def _model_path(value: str) -> str:
    if not value.strip():
        raise ValueError(f"it is empty; write a model directory, a .gguf file or a known name: {DEFAULT_MODEL.name}")
    if re.match(r"[a-z]+://", value):
        raise ValueError(
            "mdiq does not download it; fetch it on the Starter's machine and write its directory or .gguf file"
        )
    if value.endswith((".safetensors", ".safetensors.index.json", "config.json")):
        raise ValueError("that is one file of a model; write the directory that holds it")
    if value.endswith((".bin", ".pt", ".pth", ".onnx", ".ckpt")):
        raise ValueError("this kind of file is not read; write a .gguf file or a directory with .safetensors files")
    return value


def _model_name(value: str) -> str:
    if re.fullmatch(r"[\w.:/@+-]{1,128}", value, re.ASCII):
        return value
    raise ValueError(f"{shown(value)} is not a name for clients: letters, digits and . _ - : / @ +, at most 128")


def _origin(value: str) -> str:
    if value == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", value):
        return value
    raise ValueError(f"{shown(value)} is not an origin; write for example https://chat.example.org, or '*' for all")


def _public_key(value: str) -> str:
    if len(value) != 40:
        raise ValueError(f"it has {len(value)} characters and a public key has 40; copy it whole, or run `mdiq keys`")
    if wrong := re.search(r"[^0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]", value):
        raise ValueError(f"{wrong[0]!r} at character {wrong.start() + 1} is no sign of a key (Z85); copy it again")
    return value


def _path(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError("it is empty; write a path (a relative one begins beside this file)")
    return value


def _host(value: str) -> str:
    check_address(value, may_be_wildcard=True)
    return value


def _address(value: str) -> str:
    check_address(value)
    return value


Size = Annotated[
    int | None,
    BeforeValidator(_memory),
    _text_schema(units.SIZE_PATTERN, "`auto`, or a size: `700M`, `2G` (powers of 1024)", or_auto=True),
]
Layers = Annotated[
    LayerRange | None,
    BeforeValidator(_layers),
    _text_schema(units.LAYERS_PATTERN, "`auto`, or the first and the last layer, from 0: `0-11`", or_auto=True),
]
Rate = Annotated[
    float | None,
    BeforeValidator(_rate),
    _text_schema(units.RATE_PATTERN, "`null`, or a rate: `20mbit` (a second)", or_null=True),
]
Count = Annotated[
    Annotated[int, Field(ge=1, le=1024)] | None,
    BeforeValidator(_count_or_auto),
    WithJsonSchema(
        {
            "anyOf": [{"const": AUTO}, {"type": "integer", "minimum": 1, "maximum": 1024}],
            "x-values": "`auto`, or 1 to 1024",
        }
    ),
]
DecodeWait = Annotated[
    float, BeforeValidator(_decode_wait), _text_schema(units.TIME_PATTERN, "a time: `200ms`, `5s`; 1ms to 60s")
]
ClientTimeout = Annotated[
    float, BeforeValidator(_client_timeout), _text_schema(units.TIME_PATTERN, "a time: `60s`; 1s to 3600s")
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


def _key(default: Any, description: str, *, written: Any = None, example: Any = None, **more: Any) -> Any:
    """Return a field. written: its default as the file writes it, where that is not the value itself."""
    extra: dict[str, Any] = {} if written is None else {"default": written}
    if example is not None:
        extra["examples"] = [example]
    return Field(default, description=description, json_schema_extra=extra or None, **more)


class ModelChoice(_Section):
    """The model, and how it is computed."""

    path: Annotated[str, AfterValidator(_model_path)] = _key(
        ...,
        "Model directory, .gguf file, or a known name. Only the Starter's machine has it.",
        example=DEFAULT_MODEL.name,
    )
    name: Annotated[str, AfterValidator(_model_name)] | None = _key(
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


class Node(_Section):
    """One process on one device."""

    name: Annotated[
        str, AfterValidator(_name), _text_schema(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a-z, 0-9, -; at most 63")
    ] = _key(..., "The node's name; unique in the file. Its private key has the same name.", example="pi1")
    role: Literal["starter", "worker"] = _key(
        "worker", "The Starter has the model, the API and the first layers. There is exactly one."
    )
    address: Annotated[str, AfterValidator(_address)] = _key(
        ...,
        "IP address or host name at which the other nodes reach this one; IPv6 without brackets.",
        example="192.168.1.10",
    )
    data_port: _Port = _key(7400, "TCP port on which this node receives activations.")
    control_port: _Port = _key(7401, "TCP port of the control channel; on the Starter only.")
    weights_port: _Port = _key(7402, "TCP port from which the nodes fetch their weights; on the Starter only.")
    device: Annotated[
        str, AfterValidator(_device), _text_schema(r"auto|cpu|cuda(:\d{1,2})?", "`cpu`, `cuda`, `cuda:0`, `auto`")
    ] = _key("cpu", "Device that computes.")
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
    spare: bool = _key(False, "Stands by for a node that fails. It does not step in by itself yet.")
    public_key: Annotated[
        Annotated[str, AfterValidator(_public_key)] | None,
        _text_schema(r".{40}", "`null`, or 40 characters (Z85) in quotes", or_null=True),
    ] = _key(None, "Public key of the node, from `mdiq keys`; not a secret. Needed beyond loopback.")

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

    keys: Annotated[str, AfterValidator(_path)] = _key(
        "keys", "Folder of the private keys, NAME.key, made by `mdiq keys`; relative to this file."
    )
    insecure: bool = _key(False, "Send everything in plain text, without keys, even beyond loopback.")


class Api(_Section):
    """The HTTP API, on the Starter's machine."""

    host: Annotated[str, AfterValidator(_host)] = _key(
        "127.0.0.1", "Address on which the API listens; 0.0.0.0: all interfaces. Beyond loopback it needs keys_file."
    )
    port: _Port = _key(8080, "TCP port of the API.")
    keys_file: Annotated[str, AfterValidator(_path)] | None = _key(
        None,
        "File of API keys, one per line, of which clients must send one; null: none needed. Relative to this file.",
    )
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = _key(
        (), "Web pages of these origins may use the API from a browser, for example https://chat.example.org; '*': all."
    )
    client_timeout_s: ClientTimeout = _key(
        60.0,
        "Max wait for a request's head, and for its body; slower connections are closed.",
        alias="client_timeout",
        written="60s",
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
    max_live: Count = _key(None, "Requests in the ring at once; auto: what fills it.", written=AUTO)
    prefix_reuse: bool = _key(True, "Use the KV cache of an earlier request that began with the same tokens.")


def _some_nodes(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    if not nodes:
        raise ValueError("the list is empty; begin each node with `- name: ...` on a line of its own")
    if len(nodes) > MOST_NODES:
        raise ValueError(f"these are {len(nodes)} nodes, and a ring has up to {MOST_NODES}; remove the others")
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
    journal: Annotated[str, AfterValidator(_path)] | None = _key(
        None, "File that keeps accepted requests over a restart of the Starter; not written yet. Relative to this file."
    )

    @property
    def starter(self) -> Node:
        return next(node for node in self.nodes if node.is_starter)

    @property
    def ring_nodes(self) -> tuple[Node, ...]:
        """The nodes in ring order, the Starter first, without the spare ones."""
        return tuple(sorted((node for node in self.nodes if not node.spare), key=lambda node: not node.is_starter))

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
