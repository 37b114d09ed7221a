"""Frames to parts of bytes and back. No sockets (transport/), no tensors (engine/tensors.py).

Version 1. A Frame is one part, the header, or two, header and payload; all numbers are little endian.

    offset  size  field
    0       3     magic "MQ1": protocol and version
    3       1     kind: 1 HIDDEN, 2 HEAD, 3 RELEASE, 4 PROBE, 5 BURST
    4       4     epoch, at least 1
    8       2     cap, at least 1
    10      1     dtype of the payload, see wire_formats.py; 0: there is none
    11      1     maximum prompt tokens of a Batch, in steps of 16; 0 leaves it to the Stage
    12      4     width: elements of a payload row
    16      2     number of Segments, at least 1; of PROBE and BURST 1
    18      17    of each Segment: seq_id u64, start u32, length u32, flags u8 (bit 0: wants_logits,
                    bit 1: it has a parent, bit 2: wants_rows)
    ...     8     of each Segment with bit 1, in their order: its parent u64, an older id; HIDDEN alone, start over 0
    end-16  16    tag: BLAKE2b keyed with the hop's key, over the header before it and the payload

Bytes from a peer are hostile: sizes are checked first, then the tag, then every field, each before it is used.
"""

import hmac
import struct
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NoReturn

from mdiq.core.frame import MAX_SEGMENTS, NO_ROWS, Buffer, Frame, FrameKind, Payload, Segment
from mdiq.core.types import CHUNK_STEP, Epoch, SeqId
from mdiq.core.wire_formats import WIRE_FORMATS, row_bytes
from mdiq.errors import LocalProtocolError, RemoteProtocolError

VERSION = 1
TAG_BYTES = 16
MIN_KEY_BYTES = 16

_PROTOCOL = b"MQ"
_MAGIC = _PROTOCOL + b"%d" % VERSION
_NO_DTYPE = "none"  # of NO_ROWS
_HEADER = struct.Struct("<3sBIHBBIH")
_SEGMENT = struct.Struct("<QIIB")
_PARENT = struct.Struct("<Q")
_WANTS_LOGITS = 1
_HAS_PARENT = 2
_WANTS_ROWS = 4
_CODES = {_NO_DTYPE: 0} | {name: wire.code for name, wire in WIRE_FORMATS.items()}
_NAMES = {code: name for name, code in _CODES.items()}
_KINDS = {int(kind): kind for kind in FrameKind}
_WITHOUT_TOKENS = (FrameKind.RELEASE, FrameKind.PROBE)
_OF_ONE_SEGMENT = (FrameKind.PROBE, FrameKind.BURST)


def hop_key(ring_key: bytes, receiver: str) -> bytes:
    """Return the key of the Hop into the Node of this name: 32 bytes. A Node keeps it wherever it stands in the Ring.

    Each Hop has its own key: a Frame recorded on one Hop is not accepted on another, where its position may be next.
    """
    return blake2b(b"hop " + receiver.encode(), digest_size=32, key=ring_key).digest()


class BadFrame(RemoteProtocolError):
    """The bytes are not a legal Frame. ``reason`` is one word, for counting."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class WireLimits:
    """The largest Frame that a Ring may send.

    max_width: elements of a payload row, the model's hidden size.
    max_context: tokens of one Sequence.
    max_segments, max_tokens: of one Frame.
    """

    max_width: int = 8_192
    max_context: int = 131_072
    max_segments: int = MAX_SEGMENTS
    max_tokens: int = 4_096

    @property
    def max_frame_bytes(self) -> int:
        """Maximum bytes of a part of a legal Frame."""
        header_bytes = _header_bytes(self.max_segments, self.max_segments)
        return max(header_bytes, self.max_tokens * _widest_row_bytes(self.max_width))


@dataclass(frozen=True, slots=True)
class WirePayload:
    """Rows as received; nothing is copied, so they keep the message part that holds them alive."""

    dtype: str
    width: int
    data: memoryview

    @property
    def num_rows(self) -> int:
        return len(self.data) // row_bytes(self.dtype, self.width)

    def rows(self, start: int, stop: int) -> "WirePayload":
        size = row_bytes(self.dtype, self.width)
        return WirePayload(self.dtype, self.width, self.data[start * size : stop * size])

    def parts(self) -> tuple[str, int, AbstractSequence[Buffer]]:
        return self.dtype, self.width, (self.data,)


def frame_bytes(num_segments: int, payload_bytes: int) -> int:
    """Return the bytes of a Frame without parents, before the transport's own framing."""
    return _header_bytes(num_segments) + payload_bytes


def make_tag(key: bytes, *parts: Buffer) -> bytes:
    """Return the 16 bytes that prove to a holder of ``key`` that another holder sent ``parts``.

    Raises:
        LocalProtocolError: the key is too short to prove anything (BLAKE2b takes an empty one for no key at all).
    """
    if len(key) < MIN_KEY_BYTES:
        raise LocalProtocolError(f"key: {len(key)} bytes are too few; use {MIN_KEY_BYTES} to 64")
    digest = blake2b(key=key, digest_size=TAG_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def encode(frame: Frame, key: bytes) -> list[Buffer]:
    """Return the parts that carry the Frame: its header, and its payload if that has any bytes.

    A payload of one buffer is not copied.

    Raises:
        LocalProtocolError: the Frame is not a legal one.
    """
    dtype, width, buffers = frame.payload.parts()
    payload: Buffer = buffers[0] if len(buffers) == 1 else b"".join(buffers)
    payload_bytes = memoryview(payload).nbytes
    if payload_bytes != _payload_bytes(frame, dtype, width):
        raise LocalProtocolError(
            f"{frame}: a payload of {payload_bytes} bytes is not {frame.num_rows} rows of {width} {dtype}"
        )
    try:
        fields = _HEADER.pack(
            _MAGIC,
            frame.kind,
            frame.epoch,
            frame.cap,
            _CODES[dtype],
            frame.chunk_tokens // CHUNK_STEP,
            width,
            len(frame.segments),
        )
        fields += b"".join(_SEGMENT.pack(s.seq_id, s.start, s.length, _flags(s)) for s in frame.segments)
        fields += b"".join(_PARENT.pack(s.parent) for s in frame.segments if s.parent is not None)
    except struct.error as error:
        raise LocalProtocolError(f"{frame}: a field does not fit the wire: {error}") from None
    if not payload_bytes:
        return [fields + make_tag(key, fields)]
    return [fields + make_tag(key, fields, payload), payload]


def decode(parts: AbstractSequence[Buffer], key: bytes, limits: WireLimits) -> Frame:
    """Return the Frame that ``parts`` carry; its payload shares their memory.

    Raises:
        BadFrame: they are not a legal Frame of this Ring.
    """
    if not 1 <= len(parts) <= 2:
        _refuse("parts", f"{len(parts)} parts; a frame has 1 or 2")
    # Links inside one process pass on the engine's own output, which may be a view of floats.
    header, payload = (memoryview(part).cast("B") for part in (*parts, b"")[:2])
    if len(parts) == 2 and not payload.nbytes:
        _refuse("parts", "an empty payload; a frame without one has 1 part")
    num_segments = _check_sizes(header, payload, limits)
    fields = header[:-TAG_BYTES]
    if not hmac.compare_digest(make_tag(key, fields, payload), header[-TAG_BYTES:]):
        _refuse("tag", "the tag does not match; the sender has another ring key, or bytes changed on the way")
    _, kind_code, epoch, cap, dtype_code, chunk_steps, width, _ = _HEADER.unpack_from(fields)
    kind = _KINDS.get(kind_code)
    if kind is None:
        _refuse("kind", f"kind {kind_code} is unknown")
    if epoch == 0:
        _refuse("epoch", "epoch 0 is that of a stage without assignment")
    if cap == 0:
        _refuse("cap", "cap 0 would stop a stage")
    dtype = _NAMES.get(dtype_code)
    if dtype is None:
        _refuse("dtype", f"dtype {dtype_code} is unknown")
    if kind in _WITHOUT_TOKENS and dtype != _NO_DTYPE:
        _refuse("dtype", f"a {kind.name} of dtype {dtype}; it has no payload")
    if width > limits.max_width or (width == 0) != (dtype == _NO_DTYPE):
        _refuse("width", f"width {width} of dtype {dtype}; this model has at most {limits.max_width}")
    split = _HEADER.size + num_segments * _SEGMENT.size
    records = _checked_segments(fields[_HEADER.size : split], kind, limits)
    parents = _checked_parents(fields[split:], records, kind)
    segments = tuple(
        Segment(
            SeqId(seq_id),
            start,
            length,
            bool(flags & _WANTS_LOGITS),
            parents.get(seq_id),
            bool(flags & _WANTS_ROWS),
        )
        for seq_id, start, length, flags in records
    )
    frame = Frame(Epoch(epoch), kind, segments, _payload(dtype, width, payload), cap, chunk_steps * CHUNK_STEP)
    if payload.nbytes != _payload_bytes(frame, dtype, width) or (frame.num_rows and dtype == _NO_DTYPE):
        _refuse("payload", f"{frame}: {payload.nbytes} bytes are not {frame.num_rows} rows of {width} {dtype}")
    return frame


def _check_sizes(header: memoryview, payload: memoryview, limits: WireLimits) -> int:
    """Check what can be checked before the sender is authenticated; return the number of Segments."""
    if bytes(header[:2]) != _PROTOCOL:
        _refuse("magic", "it does not begin with MQ: not a frame of mdiq")
    version = bytes(header[2:3])
    if version != _MAGIC[2:]:
        _refuse(
            "version",
            f"wire version {_printable(version)} came and this is version {VERSION}; install the same mdiq everywhere",
        )
    if header.nbytes < _header_bytes(1):
        _refuse("length", f"a header of {header.nbytes} bytes; the minimum is {_header_bytes(1)}")
    num_segments: int = _HEADER.unpack_from(header)[-1]
    if not 1 <= num_segments <= limits.max_segments:
        _refuse("segments", f"{num_segments} segments; a frame has 1 to {limits.max_segments}")
    parent_bytes = header.nbytes - _header_bytes(num_segments)
    if parent_bytes % _PARENT.size or not 0 <= parent_bytes <= num_segments * _PARENT.size:
        _refuse("length", f"a header of {header.nbytes} bytes for {num_segments} segments")
    if payload.nbytes > limits.max_frame_bytes:
        _refuse("length", f"a payload of {payload.nbytes} bytes; the maximum is {limits.max_frame_bytes}")
    return num_segments


def _checked_segments(data: memoryview, kind: FrameKind, limits: WireLimits) -> list[tuple[int, int, int, int]]:
    segments = list(_SEGMENT.iter_unpack(data))
    if kind in _OF_ONE_SEGMENT and len(segments) != 1:
        _refuse("segments", f"{len(segments)} segments in a {kind.name}; it has 1")
    num_tokens = 0
    for seq_id, start, length, flags in segments:
        if flags & ~(_WANTS_LOGITS | _HAS_PARENT | _WANTS_ROWS):
            _refuse("segments", f"sequence {seq_id}: flags {flags:#x} are unknown")
        if kind in _WITHOUT_TOKENS and (start or length or flags):
            _refuse("segments", f"sequence {seq_id}: a {kind.name} has no tokens")
        if kind is FrameKind.BURST and flags:
            _refuse("segments", f"burst {seq_id}: flags {flags:#x}; its rows belong to no sequence")
        if kind not in _WITHOUT_TOKENS and not length:
            _refuse("segments", f"sequence {seq_id}: a segment without tokens")
        if start + length > limits.max_context:
            _refuse(
                "segments", f"sequence {seq_id}: token {start + length} is past the context of {limits.max_context}"
            )
        num_tokens += length
    if num_tokens > limits.max_tokens:
        _refuse("segments", f"{num_tokens} tokens; a frame has at most {limits.max_tokens}")
    if len({seq_id for seq_id, _, _, _ in segments}) != len(segments):
        _refuse("segments", "a sequence is in it twice")
    return segments


def _checked_parents(data: memoryview, records: list[tuple[int, int, int, int]], kind: FrameKind) -> dict[int, SeqId]:
    """Return the parent of each Sequence that names one."""
    children = [(seq_id, start) for seq_id, start, _, flags in records if flags & _HAS_PARENT]
    if len(data) != len(children) * _PARENT.size:
        _refuse("parents", f"{len(data)} bytes of parents for {len(children)} segments with one")
    parents: dict[int, SeqId] = {}
    for (seq_id, start), (parent,) in zip(children, _PARENT.iter_unpack(data), strict=True):
        if kind is not FrameKind.HIDDEN or not start:
            _refuse("parents", f"sequence {seq_id}: a parent where nothing is taken over")
        if parent >= seq_id:
            _refuse("parents", f"sequence {seq_id}: its parent {parent} is not an older one")
        parents[seq_id] = SeqId(parent)
    return parents


def _flags(segment: Segment) -> int:
    return (
        _WANTS_LOGITS * segment.wants_logits
        | _HAS_PARENT * (segment.parent is not None)
        | _WANTS_ROWS * segment.wants_rows
    )


def _payload_bytes(frame: Frame, dtype: str, width: int) -> int:
    return 0 if dtype == _NO_DTYPE else frame.num_rows * row_bytes(dtype, width)


def _payload(dtype: str, width: int, data: memoryview) -> Payload:
    return NO_ROWS if dtype == _NO_DTYPE else WirePayload(dtype, width, data)


def _header_bytes(num_segments: int, num_parents: int = 0) -> int:
    return _HEADER.size + num_segments * _SEGMENT.size + num_parents * _PARENT.size + TAG_BYTES


def _widest_row_bytes(width: int) -> int:
    return max(row_bytes(dtype, width) for dtype in WIRE_FORMATS)


def _printable(version: bytes) -> str:
    return version.decode("ascii") if version.isdigit() else repr(version)


def _refuse(reason: str, text: str) -> NoReturn:
    raise BadFrame(reason, f"frame: {text}")
