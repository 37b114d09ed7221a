"""The messages of the control channel, and their bytes. Who sends which when is control/; sockets are transport/.

A message is a version byte, a msgpack map with its type's name and its fields, and a tag keyed with the control key.
Every field is checked against its annotation, so a message that decodes has the types that mypy believes it has.
"""

import hmac
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

import msgpack

from mdiq.core.wire import LEAST_KEY_BYTES, TAG_BYTES, WIRES, make_tag
from mdiq.errors import LocalProtocolError, RemoteProtocolError

VERSION = 1
MOST_BYTES = 2**20
MOST_TEXT = 4_096
"""Characters of a string."""
MOST_ITEMS = 16_384
"""Items of a sequence or a map."""
MOST_BURST_FRAMES = 64
MOST_BURST_FRAME_BYTES = 2**20
_TYPE = "type"


@dataclass(frozen=True, slots=True)
class Hello:
    """A Node joins. ``data_endpoint`` is where it takes Frames."""

    node: str
    data_endpoint: str
    pid: int
    mdiq_version: str


@dataclass(frozen=True, slots=True)
class Assign:
    """What a Node is to load and where it sends its Frames.

    model_digest: of the Starter's checkpoint; the Node's must be the same.
    weights, exact: format and mode of the weights. wire: format of the Hop out of this Stage.
    kv_tokens: KV capacity; 0 lets the Node choose from ``memory_share`` of its free memory.
    receive_key, send_key: tag the Frames of the Hops into this Stage and out of it; see wire.hop_key.
    trace: collect Spans.
    """

    epoch: int
    layer_start: int
    layer_stop: int
    is_last: bool
    next_endpoint: str
    model: str
    model_digest: str
    dtype: str
    weights: str
    exact: bool
    wire: str
    device: str
    kv_tokens: int
    memory_share: float
    receive_key: bytes
    send_key: bytes
    trace: bool

    def __post_init__(self) -> None:
        least = min(len(self.receive_key), len(self.send_key))
        if self.epoch < 1 or not self.layer_start < self.layer_stop or least < LEAST_KEY_BYTES:
            raise ValueError("it needs an epoch of at least 1, a layer, and keys of at least 16 bytes")


@dataclass(frozen=True, slots=True)
class Loading:
    """Progress of loading: ``done`` of ``total`` tensors."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A Node has loaded its layers.

    decode_s, prompt_s: measured (size, seconds) of a forward, by Segments of one token and by tokens of a prompt.
    """

    epoch: int
    kv_tokens: int
    weight_bytes: int
    kv_bytes_per_token: int
    rss_bytes: int
    decode_s: tuple[tuple[int, float], ...]
    prompt_s: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        for points in (self.decode_s, self.prompt_s):
            sizes = [size for size, _ in points]
            if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)):
                raise ValueError("its costs need sizes that grow from at least 1")


@dataclass(frozen=True, slots=True)
class SendBurst:
    """Measure the Hop out of this Stage: send so many BURST Frames of about so many bytes. ``number`` names them."""

    epoch: int
    number: int
    num_frames: int
    frame_bytes: int

    def __post_init__(self) -> None:
        if not (1 <= self.num_frames <= MOST_BURST_FRAMES and 1 <= self.frame_bytes <= MOST_BURST_FRAME_BYTES):
            raise ValueError(
                f"a burst has 1 to {MOST_BURST_FRAMES} frames of at most {MOST_BURST_FRAME_BYTES} bytes each"
            )


@dataclass(frozen=True, slots=True)
class BurstSent:
    """A burst has left. ``sent_s``: when its first Frame did, on this Node's clock."""

    epoch: int
    number: int
    sent_s: float


@dataclass(frozen=True, slots=True)
class BurstArrived:
    """A burst is here, whole.

    first_s, last_s: when its first and its last Frame came, on this Node's clock; later_bytes: those behind the first.
    """

    epoch: int
    number: int
    first_s: float
    last_s: float
    later_bytes: int

    def __post_init__(self) -> None:
        if self.last_s < self.first_s:
            raise ValueError("its last frame came before its first")


@dataclass(frozen=True, slots=True)
class Begin:
    """Serve in a new Epoch with the same layers: forget every Sequence, and count anew.

    wire: format of the Hop out of this Stage from now on.
    """

    epoch: int
    wire: str

    def __post_init__(self) -> None:
        if self.epoch < 1 or self.wire not in WIRES:
            raise ValueError(f"it needs an epoch of at least 1 and one of the formats {', '.join(WIRES)}")


@dataclass(frozen=True, slots=True)
class Begun:
    """A Node serves in this Epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A Node lives; its figures since it began to serve.

    frames_dropped: Frames that it refused, by reason.
    queue_depth: Segments that wait.
    """

    epoch: int
    rss_bytes: int
    busy_s: float
    waiting_s: float
    bytes_in: int
    bytes_out: int
    frames_dropped: Mapping[str, int]
    kv_tokens_in_use: int
    queue_depth: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Sequences that a Node cannot go on with: after a gap (``reason`` is "gap") or an error (its class)."""

    epoch: int
    seq_ids: tuple[int, ...]
    reason: str
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _clipped(self.text))


@dataclass(frozen=True, slots=True)
class Failed:
    """A Node could not do what it was told. ``kind`` is the class of the error."""

    kind: str
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _clipped(self.text))


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish, report and end."""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """A Node ends: the last that it sends."""


@dataclass(frozen=True, slots=True)
class TraceChunk:
    """Some of a Node's Spans: (loop, label, start_s, stop_s)."""

    spans: tuple[tuple[str, str, float, float], ...]


Message = (
    Hello
    | Assign
    | Loading
    | Ready
    | SendBurst
    | BurstSent
    | BurstArrived
    | Begin
    | Begun
    | Heartbeat
    | Fault
    | Failed
    | Drain
    | Goodbye
    | TraceChunk
)


def encode(message: Message, key: bytes) -> bytes:
    """Return the bytes of a message.

    Raises:
        LocalProtocolError: a field is out of bounds, or the whole is too long.
    """
    name = type(message).__name__
    try:
        values = {field: check(getattr(message, field), field) for field, check in _CHECKS[name].items()}
        body: bytes = bytes([VERSION]) + msgpack.packb({_TYPE: name, **values})
    except ValueError as error:
        raise LocalProtocolError(f"{name}: {error}") from None
    if len(body) + TAG_BYTES > MOST_BYTES:
        raise LocalProtocolError(f"{name}: {len(body)} bytes; a control message has at most {MOST_BYTES}")
    return body + make_tag(key, body)


def decode(data: bytes, key: bytes) -> Message:
    """Return the message that ``data`` carries. Fields that this version does not know are ignored.

    Raises:
        RemoteProtocolError: it is no message of a holder of ``key``, or a field is missing or of the wrong type.
    """
    if not 1 + TAG_BYTES < len(data) <= MOST_BYTES:
        raise RemoteProtocolError(f"control message: {len(data)} bytes; it has more than 17 and at most {MOST_BYTES}")
    if data[0] != VERSION:
        raise RemoteProtocolError(
            f"control message: version {data[0]} came and this is version {VERSION}; install the same mdiq everywhere"
        )
    body = data[:-TAG_BYTES]
    if not hmac.compare_digest(make_tag(key, body), data[-TAG_BYTES:]):
        raise RemoteProtocolError("control message: the tag does not match; the sender has another key")
    values = _unpack(body[1:])
    name = values.get(_TYPE)
    if not isinstance(name, str) or name not in _TYPES:
        raise RemoteProtocolError("control message: its type is missing or unknown")
    try:
        checked = {field: check(values.get(field, MISSING), field) for field, check in _CHECKS[name].items()}
        return _TYPES[name](**checked)
    except ValueError as error:
        raise RemoteProtocolError(f"{name}: {error}") from None


def _unpack(body: bytes) -> dict[str, object]:
    try:
        values = msgpack.unpackb(
            body,
            strict_map_key=True,
            use_list=False,
            max_str_len=4 * MOST_TEXT,
            max_bin_len=MOST_TEXT,
            max_array_len=MOST_ITEMS,
            max_map_len=MOST_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"control message: not msgpack: {type(error).__name__}") from None
    if not isinstance(values, dict):
        raise RemoteProtocolError("control message: not a map")
    return values


def _clipped(text: str) -> str:
    """Return a text that can be sent: a cut-off error message is better than none."""
    return text[:MOST_TEXT].encode("utf-8", "replace").decode()


Check = Callable[[object, str], Any]
"""Returns the value as its annotation has it, or raises ValueError; the text names the field."""


def _check_int(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where} is not an integer")
    if not 0 <= value < 2**64:
        raise ValueError(f"{where} is out of range")
    return int(value)


def _check_float(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} is not a finite number")
    return float(value)


def _check_bool(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} is not true or false")
    return value


def _check_str(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > MOST_TEXT:
        raise ValueError(f"{where} is not a text of at most {MOST_TEXT} characters")
    return value


def _check_bytes(value: object, where: str) -> bytes:
    if not isinstance(value, bytes) or len(value) > MOST_TEXT:
        raise ValueError(f"{where} is not at most {MOST_TEXT} bytes")
    return value


_SCALARS: dict[object, Check] = {
    int: _check_int,
    float: _check_float,
    bool: _check_bool,
    str: _check_str,
    bytes: _check_bytes,
}


def _check_of(annotation: Any) -> Check:
    """Return the check that an annotation calls for."""
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    items = [_check_of(argument) for argument in get_args(annotation) if argument is not ...]
    if get_origin(annotation) is Mapping:
        key, item = items
        return lambda value, where: _checked_map(value, where, key, item)
    if ... in get_args(annotation):
        return lambda value, where: _checked_list(value, where, items[0])
    return lambda value, where: _checked_record(value, where, items)


def _checked_map(value: object, where: str, key: Check, item: Check) -> dict[Any, Any]:
    if not isinstance(value, Mapping) or len(value) > MOST_ITEMS:
        raise ValueError(f"{where} is not a map of at most {MOST_ITEMS} items")
    return {key(name, where): item(number, where) for name, number in value.items()}


def _checked_list(value: object, where: str, item: Check) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) > MOST_ITEMS:
        raise ValueError(f"{where} is not a list of at most {MOST_ITEMS} items")
    return tuple(item(entry, where) for entry in value)


def _checked_record(value: object, where: str, items: list[Check]) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) != len(items):
        raise ValueError(f"{where} is not {len(items)} values")
    return tuple(check(entry, where) for check, entry in zip(items, value, strict=True))


_TYPES: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}
_CHECKS: dict[str, dict[str, Check]] = {
    name: {field.name: _check_of(get_type_hints(kind)[field.name]) for field in fields(kind)}
    for name, kind in _TYPES.items()
}
