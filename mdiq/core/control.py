"""The messages of the control channel. codec.py encodes them; control/ decides when each is sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from mdiq import errors
from mdiq.core.codec import MAX_ITEMS as MAX_ITEMS
from mdiq.core.codec import MAX_TEXT, Codec
from mdiq.core.noise import RowNoise
from mdiq.core.types import WeightSettings
from mdiq.core.wire import MIN_KEY_BYTES
from mdiq.core.wire_formats import WIRE_FORMATS
from mdiq.core.work import Work

VERSION = 3
MAX_BYTES = 2**20
MAX_BLOB = 64
"""Bytes of a key."""
CHECKSUM_KEY = b"mdiq: no secret, a checksum only"
"""Tags the messages of a Ring over several machines, where CURVE authenticates the sender and encrypts."""
MAX_BURST_FRAMES = 64
MAX_BURST_FRAME_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Hello:
    """A Node joins. ``data_endpoint`` is where it takes Frames."""

    node: str
    data_endpoint: str
    pid: int
    mdiq_version: str


@dataclass(frozen=True, slots=True)
class Assign:
    """Which layers a Node loads and where it sends its Frames.

    model_digest: of the Starter's checkpoint; the Node's must be the same.
    wire: format of the Hop out of this Stage.
    kv_tokens: KV capacity; 0 lets the Node choose from ``memory_share`` of its free memory.
    receive_key, send_key: tag the Frames of the Hops into this Stage and out of it; see wire.hop_key.
    trace: collect Spans.
    previous: the Node before this one, whose key alone may send Frames; empty where nodes have no keys.
    measures: measure what a forward costs. Not on the way of a recovery, which other Nodes wait for.
    noise_clip, noise_sigma: of the rows that leave this Stage, see core/noise.py; 0: they get no noise.
    """

    epoch: int
    layer_start: int
    layer_stop: int
    is_last: bool
    next_endpoint: str
    model: str
    model_digest: str
    weights: WeightSettings
    wire: str
    kv_tokens: int
    memory_share: float
    receive_key: bytes
    send_key: bytes
    trace: bool
    previous: str = ""
    measures: bool = True
    noise_clip: float = 0.0
    noise_sigma: float = 0.0

    @property
    def noise(self) -> RowNoise | None:
        """What the rows that leave this Stage get."""
        return RowNoise(self.noise_clip, self.noise_sigma) if self.noise_clip or self.noise_sigma else None

    def __post_init__(self) -> None:
        _ = self.noise  # raises ValueError if there cannot be such noise
        key_bytes = min(len(self.receive_key), len(self.send_key))
        if self.epoch < 1 or not self.layer_start < self.layer_stop or key_bytes < MIN_KEY_BYTES:
            raise ValueError("it needs an epoch of at least 1, a layer, and keys of at least 16 bytes")


@dataclass(frozen=True, slots=True)
class Loading:
    """Progress of loading: ``done`` of ``total`` tensors."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A Node has loaded its layers.

    decode_s, prompt_s: measured (size, seconds) of a forward, by Segments of one token and by tokens of a prompt; empty
    if it was not to measure.
    free_bytes: memory of its device that is still free; 0 if unknown. peak_bytes: its peak resident memory while it
    loaded and measured; 0 if unknown. cpu: the kind of processor that computes its layers; sums may differ in the
    last bit between kinds. on_disk: Layers whose files it has.
    """

    epoch: int
    kv_tokens: int
    weight_bytes: int
    kv_bytes_per_token: int
    rss_bytes: int
    decode_s: tuple[tuple[int, float], ...]
    prompt_s: tuple[tuple[int, float], ...]
    free_bytes: int = 0
    peak_bytes: int = 0
    cpu: str = ""
    on_disk: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.kv_tokens:
            raise ValueError("it has no KV cache")
        for points in (self.decode_s, self.prompt_s) if self.decode_s or self.prompt_s else ():
            sizes = [size for size, _ in points]
            if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)):
                raise ValueError("its costs need sizes that grow from at least 1")


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring the files of these Layers to this Node's disk, beside what it does; the newest of these counts.

    weights: as in Assign: a Node that stands by gets ready to load them.
    """

    number: int
    layer_start: int
    layer_stop: int
    model_digest: str
    weights: WeightSettings

    def __post_init__(self) -> None:
        if not self.layer_start < self.layer_stop:
            raise ValueError("it needs a layer")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A fetch has ended. on_disk: Layers whose files the Node has now. error: why some are not there, or empty."""

    number: int
    on_disk: tuple[int, ...]
    error: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "error", _clipped(self.error))


@dataclass(frozen=True, slots=True)
class SendBurst:
    """Measure the Hop out of this Stage: send ``num_frames`` BURST Frames of about ``frame_bytes`` each."""

    epoch: int
    number: int
    num_frames: int
    frame_bytes: int

    def __post_init__(self) -> None:
        if not (1 <= self.num_frames <= MAX_BURST_FRAMES and 1 <= self.frame_bytes <= MAX_BURST_FRAME_BYTES):
            raise ValueError(
                f"a burst has 1 to {MAX_BURST_FRAMES} frames of at most {MAX_BURST_FRAME_BYTES} bytes each"
            )


@dataclass(frozen=True, slots=True)
class BurstSent:
    """A burst was sent. ``sent_s``: when its first Frame left, on this Node's clock."""

    epoch: int
    number: int
    sent_s: float


@dataclass(frozen=True, slots=True)
class BurstArrived:
    """A burst has arrived completely.

    first_s, last_s: arrival of its first and last Frame, on this Node's clock; later_bytes: all after the first Frame.
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
    """Serve in a new Epoch with the same layers: forget every Sequence and reset the counts.

    wire: format of the Hop out of this Stage from now on. reconnects: connect that Hop anew.
    """

    epoch: int
    wire: str
    reconnects: bool = False

    def __post_init__(self) -> None:
        if self.epoch < 1 or self.wire not in WIRE_FORMATS:
            raise ValueError(f"it needs an epoch of at least 1 and one of the formats {', '.join(WIRE_FORMATS)}")


@dataclass(frozen=True, slots=True)
class Begun:
    """A Node serves in this Epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A Node is alive; its figures since it began to serve.

    frames_dropped: Frames that it refused, by reason.
    queue_depth: Segments that wait. work: its forwards.
    probe, inflow: what has come over the Hop into this Stage; see core/hop_watch.py.
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
    work: Work
    probe: int = 0
    inflow: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """Sequences that a Node cannot continue. ``reason``: "gap", or the class of the error."""

    epoch: int
    seq_ids: tuple[int, ...]
    reason: str
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _clipped(self.text))


@dataclass(frozen=True, slots=True)
class Failed:
    """A Node failed to carry out a request. ``kind``: the class of the error."""

    kind: str
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _clipped(self.text))

    def as_error(self, node: str) -> errors.MdiqError:
        """Return the error of a Node, as the class that it names if that is one of ours."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, errors.MdiqError)):
            kind = errors.EngineError
        return kind(f"{node}: {self.text}")


@dataclass(frozen=True, slots=True)
class StandBy:
    """Answer to the Hello of a Node that the Ring does not use, with the reason."""

    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", _clipped(self.reason))


@dataclass(frozen=True, slots=True)
class Leaving:
    """A serving Node asks to be drained when the Ring's Sequences have ended. If it is not, the Node sends Failed."""


@dataclass(frozen=True, slots=True)
class Ping:
    """The Starter sees whether it can be sent; there is no answer, and nothing to do."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish, report and stop."""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The last message of a Node."""


@dataclass(frozen=True, slots=True)
class TraceChunk:
    """Some of a Node's Spans: (loop, label, start_s, stop_s)."""

    spans: tuple[tuple[str, str, float, float], ...]


Message = (
    Hello
    | Assign
    | Loading
    | Ready
    | Fetch
    | Fetched
    | SendBurst
    | BurstSent
    | BurstArrived
    | Begin
    | Begun
    | Heartbeat
    | Fault
    | Failed
    | StandBy
    | Leaving
    | Ping
    | Drain
    | Goodbye
    | TraceChunk
)


_CODEC = Codec[Message]("control message", VERSION, get_args(Message), max_bytes=MAX_BYTES, max_blob_bytes=MAX_BLOB)


def encode(message: Message, key: bytes) -> bytes:
    """Return the bytes of a message.

    Raises:
        LocalProtocolError: a field is out of bounds, or the whole is too long.
    """
    return _CODEC.encode(message, key)


def decode(data: bytes, key: bytes) -> Message:
    """Return the message that ``data`` carries. Fields that this version does not know are ignored.

    Raises:
        RemoteProtocolError: it was not made by a holder of ``key``, or a field is missing or of the wrong type.
    """
    return _CODEC.decode(data, key)


def _clipped(text: str) -> str:
    """Return a text that can be sent: a cut-off error message is better than none."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode()
