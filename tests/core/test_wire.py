"""Frames survive the wire, and nothing else does."""

import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core import wire
from mdiq.core.frame import MAX_SEGMENTS, NO_ROWS, Buffer, Frame, FrameKind, Payload, Segment, TokenIds
from mdiq.core.types import Epoch, SeqId
from mdiq.core.wire import BadFrame, WireLimits, WirePayload
from mdiq.core.wire_formats import row_bytes
from mdiq.errors import LocalProtocolError, RemoteProtocolError

KEY = bytes(range(32))
LIMITS = WireLimits(max_width=64, max_context=1_000, max_segments=20, max_tokens=100)
WITHOUT_TOKENS = (FrameKind.RELEASE, FrameKind.PROBE)
OF_ONE_SEGMENT = (FrameKind.PROBE, FrameKind.BURST)
GOLDEN = Path(__file__).parent.parent / "golden" / "wire_v1.txt"
GOLDEN_PARENTS = GOLDEN.with_name("wire_v1_parents.txt")
GOLDEN_ROWS = GOLDEN.with_name("wire_v1_rows.txt")


class Rows:
    """A payload whose bytes lie in one buffer or in several."""

    def __init__(self, num_rows: int, width: int, dtype: str = "f32", num_buffers: int = 1) -> None:
        self.num_rows = num_rows
        self.data = bytes(i % 251 for i in range(num_rows * row_bytes(dtype, width)))
        self._width, self._dtype, self._num_buffers = width, dtype, num_buffers

    def rows(self, start: int, stop: int) -> Payload:
        raise NotImplementedError

    def parts(self) -> tuple[str, int, list[Buffer]]:
        size = max(-(-len(self.data) // self._num_buffers), 1)
        buffers: list[Buffer] = [self.data[i : i + size] for i in range(0, len(self.data), size)]
        return self._dtype, self._width, [self.data] if self._num_buffers == 1 else buffers


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    kind = draw(st.sampled_from(FrameKind))
    most = 1 if kind in OF_ONE_SEGMENT else 12
    seq_ids = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=most, unique=True))
    segments = tuple(
        Segment(SeqId(seq_id), 0, 0)
        if kind in WITHOUT_TOKENS
        else Segment(
            SeqId(seq_id),
            draw(st.integers(0, 990)),
            draw(st.integers(1, 8)),
            draw(st.booleans()) and kind is not FrameKind.BURST,
            wants_rows=draw(st.booleans()) and kind is not FrameKind.BURST,
        )
        for seq_id in seq_ids
    )
    if kind is FrameKind.HIDDEN:
        segments = tuple(
            replace(s, parent=SeqId(draw(st.integers(0, s.seq_id - 1))))
            if s.start and s.seq_id and draw(st.booleans())
            else s
            for s in segments
        )
    epoch, cap = Epoch(draw(st.integers(1, 2**32 - 1))), draw(st.integers(1, 2**16 - 1))
    frame = Frame(epoch, kind, segments, NO_ROWS, cap, 16 * draw(st.integers(0, 255)))
    if kind in WITHOUT_TOKENS or (not frame.num_rows and draw(st.booleans())):
        return frame
    dtype = draw(st.sampled_from(["f32", "bf16", "i8"]))
    payload = Rows(frame.num_rows, draw(st.integers(1, 16)), dtype, draw(st.integers(1, 3)))
    return Frame(epoch, kind, segments, payload, cap, frame.chunk_tokens)


def _frame(kind: FrameKind = FrameKind.HIDDEN, num_segments: int = 2, width: int = 4) -> Frame:
    """Return a Frame; those of kinds with one Segment have one, whatever is asked for."""
    if kind in OF_ONE_SEGMENT:
        num_segments = 1
    if kind is FrameKind.BURST:
        return Frame(Epoch(7), kind, (Segment(SeqId(300), 2, 3),), Rows(3, width), 3)
    if kind in WITHOUT_TOKENS:
        return Frame(Epoch(7), kind, tuple(Segment(SeqId(i), 0, 0) for i in range(num_segments)), NO_ROWS, 3)
    segments = tuple(Segment(SeqId(300 + i), 10 * i, i + 1, wants_logits=i % 2 == 1) for i in range(num_segments))
    num_rows = Frame(Epoch(7), kind, segments).num_rows
    return Frame(Epoch(7), kind, segments, Rows(num_rows, width), 3)


def _forked() -> Frame:
    """Return a Frame of three Segments; the second and the third have parents."""
    segments = (
        Segment(SeqId(300), 0, 1),
        Segment(SeqId(301), 32, 1, wants_logits=True, parent=SeqId(300)),
        Segment(SeqId(302), 64, 2, parent=SeqId(7)),
    )
    return Frame(Epoch(7), FrameKind.HIDDEN, segments, Rows(4, 4), 3)


def _bytes(frame: Frame, key: bytes = KEY) -> list[bytes]:
    return [bytes(part) for part in wire.encode(frame, key)]


def _tagged(fields: bytes, payload: bytes = b"") -> list[bytes]:
    """Return parts with a right tag: what a holder of the key with a bug, or an evil one, could send."""
    header = fields + wire.make_tag(KEY, fields, payload)
    return [header, payload] if payload else [header]


def _patched(frame: Frame, offset: int, layout: str, *values: int) -> list[bytes]:
    """Return the Frame's parts with a field overwritten and the tag made anew."""
    header, *rest = _bytes(frame)
    fields = bytearray(header[: -wire.TAG_BYTES])
    struct.pack_into("<" + layout, fields, offset, *values)
    return _tagged(bytes(fields), *rest)


def _reason(parts: list[bytes], limits: WireLimits = LIMITS) -> str:
    with pytest.raises(BadFrame) as caught:
        wire.decode(parts, KEY, limits)
    assert str(caught.value).startswith("frame: ")
    return caught.value.reason


@settings(deadline=None)
@given(frames())
def test_a_frame_comes_back_as_it_was(frame: Frame) -> None:
    back = wire.decode(wire.encode(frame, KEY), KEY, WireLimits())
    assert (back.epoch, back.kind, back.segments, back.cap) == (frame.epoch, frame.kind, frame.segments, frame.cap)
    assert back.chunk_tokens == frame.chunk_tokens
    assert back.payload.num_rows == back.num_rows == frame.num_rows
    dtype, width, buffers = frame.payload.parts()
    back_dtype, back_width, back_buffers = back.payload.parts()
    assert (back_dtype, back_width) == (dtype, width)
    assert b"".join(map(bytes, back_buffers)) == b"".join(map(bytes, buffers))
    assert _bytes(back) == _bytes(frame)


def test_the_header_of_a_one_segment_frame_is_short() -> None:
    header, _ = _bytes(_frame(num_segments=1))
    assert len(header) == 51


def test_neither_way_copies_a_payload_of_one_buffer() -> None:
    frame = _frame()
    assert isinstance(frame.payload, Rows)
    parts = wire.encode(frame, KEY)
    assert parts[1] is frame.payload.data
    payload = wire.decode(parts, KEY, LIMITS).payload
    rows = payload.rows(1, 3)
    assert isinstance(payload, WirePayload) and isinstance(rows, WirePayload)
    assert payload.data.obj is rows.data.obj is frame.payload.data
    assert rows.num_rows == 2
    assert rows.data == frame.payload.data[16:48]


def test_a_payload_may_be_a_view_of_floats() -> None:
    frame = _frame(num_segments=1)
    header, payload = wire.encode(frame, KEY)
    back = wire.decode([header, memoryview(payload).cast("f")], KEY, LIMITS)  # type: ignore[list-item]
    assert back.payload.num_rows == 1
    assert isinstance(back.payload, WirePayload)
    assert back.payload.data == payload


def test_bytes_of_version_1_stay_what_they_are() -> None:
    lines = GOLDEN.read_text(encoding="ascii").splitlines()
    for kind, line in zip(FrameKind, lines, strict=True):
        parts = [bytes.fromhex(part) for part in line.split()]
        assert _bytes(_frame(kind)) == parts
        assert str(wire.decode(parts, KEY, LIMITS)) == str(_frame(kind))


def test_parents_lie_behind_the_segments_and_their_bytes_stay_what_they_are() -> None:
    parts = [bytes.fromhex(part) for part in GOLDEN_PARENTS.read_text(encoding="ascii").split()]
    assert _bytes(_forked()) == parts
    assert wire.decode(parts, KEY, LIMITS).segments == _forked().segments
    assert len(parts[0]) == len(_bytes(_frame(num_segments=3))[0]) + 2 * 8


@pytest.mark.parametrize("kind", [FrameKind.HIDDEN, FrameKind.HEAD])
def test_a_segment_that_wants_rows_has_all_of_them_in_its_head_and_its_bytes_stay_what_they_are(
    kind: FrameKind,
) -> None:
    segments = (
        Segment(SeqId(300), 0, 3, wants_rows=True),
        Segment(SeqId(301), 5, 2, wants_logits=True, wants_rows=True),
        Segment(SeqId(302), 9, 1, wants_logits=True),
        Segment(SeqId(303), 0, 4),
    )
    num_rows = 3 + 2 + 1 + (4 if kind is FrameKind.HIDDEN else 0)
    frame = Frame(Epoch(7), kind, segments, Rows(num_rows, 1), 3)
    line = GOLDEN_ROWS.read_text(encoding="ascii").splitlines()[kind - FrameKind.HIDDEN]
    parts = [bytes.fromhex(part) for part in line.split()]
    assert _bytes(frame) == parts
    back = wire.decode(parts, KEY, LIMITS)
    assert back.segments == segments and back.num_rows == num_rows


@pytest.mark.parametrize(
    ("offset", "layout", "values", "reason"),
    [
        (34, "B", (2,), "parents"),  # one parent too few
        (51, "B", (0,), "parents"),  # one too many
        (43, "I", (0,), "parents"),  # nothing is taken over
        (69, "Q", (301,), "parents"),  # its own parent
        (77, "Q", (303,), "parents"),  # a younger one
        (69, "Q", (2**64 - 1,), "parents"),
        (3, "B", (FrameKind.RELEASE,), "dtype"),
    ],
)
def test_every_parent_is_checked(offset: int, layout: str, values: tuple[int, ...], reason: str) -> None:
    assert _reason(_patched(_forked(), offset, layout, *values)) == reason


def test_parents_are_for_activations_between_stages_alone() -> None:
    for kind in (FrameKind.HEAD, FrameKind.RELEASE):
        segment = Segment(SeqId(2), 32, 1, parent=SeqId(1)) if kind is FrameKind.HEAD else Segment(SeqId(2), 0, 0)
        frame = Frame(Epoch(1), kind, (replace(segment, parent=SeqId(1)),))
        assert _reason(_bytes(frame)) == ("parents" if kind is FrameKind.HEAD else "segments")


def test_the_size_of_the_parents_is_refused_before_the_tag_is_looked_at() -> None:
    header, payload = _bytes(_frame())
    assert _reason([header + bytes(16), payload]) == "tag"
    assert _reason([header + bytes(12), payload]) == "length"
    assert _reason([header + bytes(24), payload]) == "length"


def test_a_payload_of_another_size_than_its_rows_is_our_own_bug() -> None:
    frame = Frame(Epoch(1), FrameKind.HIDDEN, (Segment(SeqId(1), 0, 3),), Rows(2, 4))
    with pytest.raises(LocalProtocolError, match="is not 3 rows of 4 f32"):
        wire.encode(frame, KEY)


def test_a_field_that_does_not_fit_is_our_own_bug() -> None:
    frame = Frame(Epoch(2**32), FrameKind.RELEASE, (Segment(SeqId(1), 0, 0),))
    with pytest.raises(LocalProtocolError, match="does not fit"):
        wire.encode(frame, KEY)
    with pytest.raises(TypeError):
        wire.encode(Frame(Epoch(1), FrameKind.HIDDEN, (Segment(SeqId(1), 0, 1),), TokenIds((1,))), KEY)


@pytest.mark.parametrize("key", [b"", b"short"])
def test_a_key_that_proves_nothing_is_refused(key: bytes) -> None:
    with pytest.raises(LocalProtocolError, match="too few"):
        wire.encode(_frame(), key)


def test_a_frame_of_another_ring_is_refused_by_its_tag() -> None:
    parts = _bytes(_frame(), key=b"another ring key")
    assert _reason(parts) == "tag"


def test_a_frame_of_another_version_is_refused_with_both_versions_named() -> None:
    header, payload = _bytes(_frame())
    with pytest.raises(BadFrame, match=r"wire version 2 came and this is version 1"):
        wire.decode([b"MQ2" + header[3:], payload], KEY, LIMITS)
    with pytest.raises(BadFrame, match=r"wire version b'\\xff' came"):
        wire.decode([b"MQ\xff"], KEY, LIMITS)


def test_sizes_are_refused_before_the_tag_is_looked_at() -> None:
    header, payload = _bytes(_frame())
    assert _reason([]) == "parts"
    assert _reason([header, payload, b""]) == "parts"
    assert _reason([header, b""]) == "parts"
    assert _reason([b""]) == "magic"
    assert _reason([b"HTTP/1.1 200 OK"]) == "magic"
    assert _reason([b"MQ"]) == "version"
    assert _reason([b"MQ1"]) == "length"
    assert _reason([header[:-1], payload]) == "length"
    assert _reason([header + b"\0", payload]) == "length"
    assert _reason([header, bytes(LIMITS.max_frame_bytes + 1)]) == "length"
    assert _reason([header[:16] + b"\xff\xff" + header[18:], payload]) == "segments"
    assert _reason([header[:16] + b"\0\0" + header[18:], payload]) == "segments"
    assert _reason([header, payload + b"\0"]) == "tag"


@pytest.mark.parametrize(
    ("offset", "layout", "values", "reason"),
    [
        (3, "B", (0,), "kind"),
        (3, "B", (6,), "kind"),
        (3, "B", (FrameKind.BURST,), "segments"),
        (3, "B", (FrameKind.RELEASE,), "dtype"),
        (3, "B", (FrameKind.PROBE,), "dtype"),
        (3, "B", (FrameKind.HEAD,), "payload"),
        (4, "I", (0,), "epoch"),
        (8, "H", (0,), "cap"),
        (10, "B", (0,), "width"),
        (10, "B", (2,), "payload"),
        (10, "B", (99,), "dtype"),
        (12, "I", (0,), "width"),
        (12, "I", (65,), "width"),
        (12, "I", (2**32 - 1,), "width"),
        (12, "I", (5,), "payload"),
        (26, "I", (1_000,), "segments"),
        (26, "II", (2**32 - 1, 2**32 - 1), "segments"),
        (30, "I", (0,), "segments"),
        (30, "I", (101,), "segments"),
        (34, "B", (2,), "parents"),
        (34, "B", (8,), "segments"),
        (35, "Q", (300,), "segments"),  # the other Segment's Sequence
    ],
)
def test_every_field_is_checked_though_the_tag_is_right(
    offset: int, layout: str, values: tuple[int, ...], reason: str
) -> None:
    assert _reason(_patched(_frame(), offset, layout, *values)) == reason


def test_a_segment_may_reach_the_end_of_the_context() -> None:
    assert wire.decode(_patched(_frame(), 26, "I", 999), KEY, LIMITS).segments[0].stop == LIMITS.max_context


@pytest.mark.parametrize(("offset", "layout"), [(26, "I"), (30, "I"), (34, "B")])
def test_a_release_carries_sequence_ids_alone(offset: int, layout: str) -> None:
    assert _reason(_patched(_frame(FrameKind.RELEASE), offset, layout, 1)) == "segments"


def test_a_probe_has_one_segment() -> None:
    segments = (Segment(SeqId(1), 0, 0), Segment(SeqId(2), 0, 0))
    assert _reason(_bytes(Frame(Epoch(1), FrameKind.PROBE, segments))) == "segments"


@pytest.mark.parametrize(
    ("offset", "layout", "values", "reason"),
    [
        (30, "I", (0,), "segments"),  # no rows
        (30, "I", (101,), "segments"),
        (26, "I", (998,), "segments"),
        (34, "B", (1,), "segments"),  # it wants logits
        (34, "B", (2,), "segments"),  # a parent, of which there are no bytes either
        (10, "B", (0,), "width"),
        (12, "I", (5,), "payload"),
        (12, "I", (65,), "width"),
    ],
)
def test_a_burst_is_rows_within_the_limits_and_nothing_more(
    offset: int, layout: str, values: tuple[int, ...], reason: str
) -> None:
    assert _reason(_patched(_frame(FrameKind.BURST), offset, layout, *values)) == reason


def test_a_burst_has_one_segment_and_no_parent() -> None:
    segments = (Segment(SeqId(1), 0, 1), Segment(SeqId(2), 0, 1))
    assert _reason(_bytes(Frame(Epoch(1), FrameKind.BURST, segments, Rows(2, 4)))) == "segments"
    child = Segment(SeqId(2), 32, 1, parent=SeqId(1))
    assert _reason(_bytes(Frame(Epoch(1), FrameKind.BURST, (child,), Rows(1, 4)))) == "segments"


def test_the_size_of_a_frame_is_known_before_it_is_made() -> None:
    for num_segments in (1, 3):
        frame = _frame(num_segments=num_segments)
        assert wire.frame_bytes(num_segments, frame.num_rows * 16) == sum(map(len, _bytes(frame)))


def test_a_release_with_a_payload_is_refused() -> None:
    header, *_ = _bytes(_frame(FrameKind.RELEASE))
    assert _reason(_tagged(header[: -wire.TAG_BYTES], b"rows")) == "payload"


def test_rows_without_a_dtype_are_refused() -> None:
    fields = _bytes(_frame())[0][: -wire.TAG_BYTES]
    without = fields[:10] + b"\0\0" + struct.pack("<I", 0) + fields[16:]
    assert _reason(_tagged(without)) == "payload"


def test_more_segments_or_tokens_than_the_limits_are_refused() -> None:
    assert _reason(_bytes(_frame(FrameKind.RELEASE, num_segments=21))) == "segments"
    assert _reason(_bytes(_frame(num_segments=14))) == "segments"  # 105 tokens


def test_the_limits_bound_every_part_of_a_legal_frame() -> None:
    limits = WireLimits(max_width=8, max_tokens=5)
    segments = (Segment(SeqId(1), 0, 5),)
    parts = _bytes(Frame(Epoch(1), FrameKind.HIDDEN, segments, Rows(5, 8)))
    largest_release = _bytes(_frame(FrameKind.RELEASE, num_segments=MAX_SEGMENTS))
    assert max(map(len, parts + largest_release)) <= limits.max_frame_bytes
    wire.decode(parts, KEY, limits)
    wire.decode(largest_release, KEY, limits)


def test_random_bytes_are_refused_and_nothing_else_happens() -> None:
    rng = random.Random(20)
    for i in range(10_000):
        parts = [rng.randbytes(rng.randrange(90)) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
        if i % 2:  # past the first checks
            parts[0] = b"MQ1" + parts[0]
        with pytest.raises(RemoteProtocolError):
            wire.decode(parts, KEY, LIMITS)


def test_random_fields_with_a_right_tag_are_refused_or_make_a_legal_frame() -> None:
    rng = random.Random(21)
    num_legal = 0
    for _ in range(10_000):
        frame = rng.choice([_forked(), _frame(rng.choice(list(FrameKind)), num_segments=rng.randint(1, 3))])
        header, *rest = _bytes(frame)
        fields = bytearray(header[: -wire.TAG_BYTES])
        for _ in range(rng.randint(1, 3)):
            fields[rng.randrange(3, len(fields))] = rng.choice([0, 1, 2, 3, 255, rng.randrange(256)])
        try:
            frame = wire.decode(_tagged(bytes(fields), *rest), KEY, LIMITS)
        except RemoteProtocolError:
            continue
        num_legal += 1
        assert frame.payload.num_rows == frame.num_rows
        assert all(segment.stop <= LIMITS.max_context for segment in frame.segments)
        assert all(s.parent is None or (s.parent < s.seq_id and s.start) for s in frame.segments)
    assert 0 < num_legal < 9_000


def test_a_frame_that_was_changed_on_the_way_never_decodes() -> None:
    rng = random.Random(22)
    for _ in range(10_000):
        parts = _bytes(_frame(rng.choice(list(FrameKind)), num_segments=rng.randint(1, 4)))
        changed = _mutated(rng, parts)
        if changed != parts:
            with pytest.raises(RemoteProtocolError):
                wire.decode(changed, KEY, LIMITS)


def _mutated(rng: random.Random, parts: list[bytes]) -> list[bytes]:
    changed = [bytearray(part) for part in parts]
    part = rng.choice(changed)
    at = rng.randrange(len(part))
    match rng.randrange(7):
        case 0 | 1 | 2:
            part[at] ^= 1 << rng.randrange(8)
        case 3:
            del part[at:]
        case 4:
            part[at:at] = rng.randbytes(rng.randint(1, 20))
        case 5:
            changed.append(bytearray(rng.randbytes(rng.randrange(3))))
        case _:
            changed.reverse() if rng.random() < 0.5 else changed.pop()
    return [bytes(part) for part in changed]


def test_a_frame_recorded_on_one_hop_is_refused_on_another() -> None:
    ring_key = bytes(range(32))
    frame = Frame(Epoch(1), FrameKind.RELEASE, (Segment(SeqId(1), 0, 0),))
    parts = wire.encode(frame, wire.hop_key(ring_key, "pi1"))
    assert wire.decode(parts, wire.hop_key(ring_key, "pi1"), wire.WireLimits()) == frame
    with pytest.raises(wire.BadFrame) as caught:
        wire.decode(parts, wire.hop_key(ring_key, "pi2"), wire.WireLimits())
    assert caught.value.reason == "tag"
