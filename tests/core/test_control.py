"""Control messages survive their bytes with the types that their annotations promise, and nothing else does."""

import random
from dataclasses import asdict, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core import control
from mdiq.core.codec import MAX_FLOAT, MAX_TEXT
from mdiq.core.noise import RowNoise
from mdiq.core.types import PLAIN_WEIGHTS
from mdiq.core.wire import TAG_BYTES, make_tag
from mdiq.core.work import Work
from mdiq.errors import LocalProtocolError, RemoteProtocolError

KEY = bytes(range(32))
COUNTS = st.integers(0, 2**64 - 1)
AT_LEAST_ONE = st.integers(1, 2**64 - 1)
FLOATS = st.floats(-MAX_FLOAT, MAX_FLOAT)
CURVES = st.dictionaries(st.integers(1, 2**63), FLOATS, min_size=1).map(lambda points: tuple(sorted(points.items())))
TEXTS = st.text(max_size=30)
ASSIGN = control.Assign(
    epoch=1,
    layer_start=0,
    layer_stop=4,
    is_last=True,
    next_endpoint="tcp://127.0.0.1:5555",
    model="/models/small",
    model_digest="abc",
    weights=PLAIN_WEIGHTS,
    wire="bf16",
    kv_tokens=0,
    memory_share=0.5,
    receive_key=KEY,
    send_key=KEY,
    trace=False,
)
READY = control.Ready(1, 2, 3, 4, 5, ((1, 0.25),), ((64, 0.5),))
MESSAGES: st.SearchStrategy[control.Message] = st.one_of(
    st.builds(control.Hello, TEXTS, TEXTS, COUNTS, TEXTS),
    st.builds(
        lambda start, more, share, key: replace(
            ASSIGN, layer_start=start, layer_stop=start + more, memory_share=share, receive_key=key
        ),
        st.integers(0, 99),
        st.integers(1, 99),
        FLOATS,
        st.binary(min_size=16, max_size=64),
    ),
    st.builds(control.Loading, COUNTS, COUNTS),
    st.builds(control.Ready, COUNTS, AT_LEAST_ONE, COUNTS, COUNTS, COUNTS, CURVES, CURVES),
    st.builds(control.SendBurst, COUNTS, COUNTS, st.integers(1, 64), st.integers(1, 2**20)),
    st.builds(control.BurstSent, COUNTS, COUNTS, FLOATS),
    st.builds(
        lambda number, times, size: control.BurstArrived(1, number, min(times), max(times), size),
        COUNTS,
        st.tuples(FLOATS, FLOATS),
        COUNTS,
    ),
    st.builds(control.Begin, st.integers(1, 2**64 - 1), st.sampled_from(["f32", "bf16", "i8"])),
    st.builds(control.Begun, COUNTS),
    st.builds(
        control.Heartbeat,
        COUNTS,
        COUNTS,
        FLOATS,
        FLOATS,
        COUNTS,
        COUNTS,
        st.dictionaries(TEXTS, COUNTS, max_size=5),
        COUNTS,
        COUNTS,
        st.builds(Work, FLOATS.map(abs), COUNTS, COUNTS, COUNTS, COUNTS),
    ),
    st.builds(control.Fault, COUNTS, st.lists(COUNTS, max_size=9).map(tuple), TEXTS, TEXTS),
    st.builds(control.Failed, TEXTS, TEXTS),
    st.just(control.Drain()),
    st.just(control.Leaving()),
    st.just(control.Goodbye()),
    st.builds(control.TraceChunk, st.lists(st.tuples(TEXTS, TEXTS, FLOATS, FLOATS), max_size=5).map(tuple)),
)


def _tagged(body: bytes) -> bytes:
    return body + make_tag(KEY, body)


def _message(values: object) -> bytes:
    """Return a message of these values with a right tag: what a peer with a bug, or an evil one, could send."""
    return _tagged(bytes([control.VERSION]) + msgpack.packb(values))


def _ready(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {name: getattr(READY, name) for name in READY.__slots__}
    return {"type": "Ready", **values, **changes}


@settings(deadline=None)
@given(MESSAGES)
def test_a_message_comes_back_as_it_was(message: control.Message) -> None:
    assert control.decode(control.encode(message, KEY), KEY) == message


def test_a_whole_number_will_do_for_a_float() -> None:
    back = control.decode(_message(_ready(prompt_s=((64, 2),))), KEY)
    assert isinstance(back, control.Ready)
    assert type(back.prompt_s[0][1]) is float


def test_fields_of_a_later_version_are_ignored() -> None:
    assert control.decode(_message(_ready(colour="blue")), KEY) == READY


@pytest.mark.parametrize("value", [None, "2", 2.0, True, -1, 2**64 - 1 + 0.5, b"2", [2]])
def test_what_is_not_a_count_is_refused_by_name(value: object) -> None:
    with pytest.raises(RemoteProtocolError, match="Ready: kv_tokens"):
        control.decode(_message(_ready(kv_tokens=value)), KEY)


@pytest.mark.parametrize("value", [None, "0.5", True, float("nan"), float("inf"), 1e19, -1e308, [0.5]])
def test_what_is_not_a_number_within_bounds_is_refused_by_name(value: object) -> None:
    with pytest.raises(RemoteProtocolError, match="Ready: decode_s"):
        control.decode(_message(_ready(decode_s=((1, value),))), KEY)


def test_a_missing_field_is_refused_by_name() -> None:
    values = _ready()
    del values["rss_bytes"]
    with pytest.raises(RemoteProtocolError, match="Ready: rss_bytes"):
        control.decode(_message(values), KEY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", b"path"),
        ("model", "x" * 4_097),
        ("receive_key", "text"),
        ("receive_key", b"short"),
        ("is_last", 1),
        ("weights", "plain"),
        ("weights", {"format": "plain"}),
        ("weights", {**asdict(PLAIN_WEIGHTS), "exact": 1}),
        ("layer_stop", 0),
        ("epoch", 0),
    ],
)
def test_an_assignment_that_nobody_can_obey_is_refused(name: str, value: object) -> None:
    values = {"type": "Assign", **asdict(ASSIGN)}
    assert control.decode(_message(values), KEY) == ASSIGN
    values[name] = value
    with pytest.raises(RemoteProtocolError, match="Assign: "):
        control.decode(_message(values), KEY)


@pytest.mark.parametrize(
    "values",
    [
        {"type": "Fault", "epoch": 1, "seq_ids": {"a": 1}, "reason": "", "text": ""},
        {"type": "Fault", "epoch": 1, "seq_ids": [1, "2"], "reason": "", "text": ""},
        {"type": "TraceChunk", "spans": [["compute", "1 segments", 0.5]]},
        {"type": "TraceChunk", "spans": ["compute"]},
        {"type": "Goodbyes"},
        {"type": ["Goodbye"]},
        {},
        [],
        7,
        {1: 2},
    ],
)
def test_other_shapes_are_refused(values: object) -> None:
    with pytest.raises(RemoteProtocolError):
        control.decode(_message(values), KEY)


def test_a_map_of_the_wrong_kind_is_refused() -> None:
    beat = control.Heartbeat(1, 2, 0.5, 0.5, 3, 4, {"tag": 2}, 5, 6, Work(0.5, 1, 2, 3, 4))
    values: dict[str, object] = {name: getattr(beat, name) for name in beat.__slots__} | {"work": asdict(beat.work)}
    assert control.decode(_message({"type": "Heartbeat", **values}), KEY) == beat
    with pytest.raises(RemoteProtocolError, match="Heartbeat: it has figures below 0"):
        control.decode(_message({"type": "Heartbeat", **values, "work": {**asdict(beat.work), "forward_s": -1.0}}), KEY)
    wrong: list[object] = [[1], {"tag": "2"}, {"tag": -1}]
    for frames_dropped in wrong:
        with pytest.raises(RemoteProtocolError, match="Heartbeat: frames_dropped"):
            control.decode(_message({"type": "Heartbeat", **values, "frames_dropped": frames_dropped}), KEY)


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",  # never used in msgpack
        b"\x81\xa4type",  # cut off
        b"\x80\x80",  # something behind the end
        b"\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\xdf\xff\xff\xff\xff",  # a map of four billion
        b"\xdb\xff\xff\xff\xff",  # a text of four gigabytes
        b"\xc7\x08\x05" + bytes(8),  # an extension type
        b"\xd6\xff" + bytes(4),  # a timestamp
        b"\xa2\xff\xfe",  # not UTF-8
        b"\x91" * 5_000,  # lists in lists
    ],
)
def test_what_is_not_plain_msgpack_is_refused_though_the_tag_is_right(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        control.decode(_tagged(bytes([control.VERSION]) + body), KEY)


def test_bytes_of_another_version_are_refused_with_both_versions_named() -> None:
    data = control.encode(control.Drain(), KEY)
    with pytest.raises(RemoteProtocolError, match="version 9 came and this is version 3"):
        control.decode(b"\x09" + data[1:], KEY)


@pytest.mark.parametrize("size", [0, 1, 17, control.MAX_BYTES + 1])
def test_bytes_that_are_too_few_or_too_many_are_refused(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"{size} bytes"):
        control.decode(bytes([control.VERSION]) * size, KEY)


def test_a_message_under_another_key_is_refused() -> None:
    data = control.encode(control.Goodbye(), b"another key, long")
    with pytest.raises(RemoteProtocolError, match="tag"):
        control.decode(data, KEY)


def test_random_and_changed_bytes_are_refused_and_nothing_else_happens() -> None:
    rng = random.Random(30)
    data = control.encode(ASSIGN, KEY)
    for i in range(10_000):
        changed = bytearray(data) if i % 2 else bytearray(b"\x01" + rng.randbytes(rng.randrange(60)))
        at = rng.randrange(len(changed))
        if i % 4 == 1:
            changed[at] ^= 1 << rng.randrange(8)
        else:
            del changed[at : at + 1]
        with pytest.raises(RemoteProtocolError):
            control.decode(bytes(changed), KEY)


def test_random_msgpack_with_a_right_tag_is_refused_or_makes_a_message() -> None:
    rng = random.Random(31)
    bodies = [control.encode(message, KEY)[:-TAG_BYTES] for message in (ASSIGN, READY, control.Fault(1, (2,), "", ""))]
    for _ in range(10_000):
        body = bytearray(rng.choice(bodies))
        for _ in range(rng.randint(1, 3)):
            body[rng.randrange(1, len(body))] = rng.randrange(256)
        try:
            message = control.decode(_tagged(bytes(body)), KEY)
        except RemoteProtocolError:
            continue
        assert control.decode(control.encode(message, KEY), KEY) == message


def test_a_long_error_text_is_cut_rather_than_lost() -> None:
    for message in (control.Failed("EngineError", "x" * 9_999), control.Fault(1, (), "gap", "\udcff" * 9_999)):
        back = control.decode(control.encode(message, KEY), KEY)
        assert back == message
        assert isinstance(back, control.Failed | control.Fault)
        assert len(back.text) == MAX_TEXT


@pytest.mark.parametrize(
    "make",
    [
        lambda: control.Loading(-1, 2),
        lambda: control.Hello("x" * 4_097, "", 1, ""),
        lambda: control.Hello("\udcff", "", 1, ""),
        lambda: control.Fault(1, tuple(range(control.MAX_ITEMS + 1)), "gap", ""),
        lambda: control.TraceChunk((("compute", "x" * 4_000, 0.0, 1.0),) * 400),
    ],
)
def test_a_message_that_no_peer_would_take_is_our_own_bug(make: Any) -> None:
    with pytest.raises(LocalProtocolError):
        control.encode(make(), KEY)


def test_a_node_without_a_kv_cache_is_not_ready() -> None:
    with pytest.raises(RemoteProtocolError, match="Ready: it has no KV cache"):
        control.decode(_message(_ready(kv_tokens=0)), KEY)


@pytest.mark.parametrize("points", [(), ((0, 1.0),), ((2, 1.0), (1, 1.0)), ((1, 1.0), (1, 1.0))])
def test_costs_that_are_no_curve_are_refused(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(RemoteProtocolError, match="Ready: its costs need sizes that grow"):
        control.decode(_message(_ready(prompt_s=points)), KEY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "SendBurst", "epoch": 1, "number": 1, "num_frames": 0, "frame_bytes": 1}, "1 to 64 frames"),
        ({"type": "SendBurst", "epoch": 1, "number": 1, "num_frames": 65, "frame_bytes": 1}, "1 to 64 frames"),
        ({"type": "SendBurst", "epoch": 1, "number": 1, "num_frames": 1, "frame_bytes": 2**20 + 1}, "at most 1048576"),
        ({"type": "BurstArrived", "epoch": 1, "number": 1, "first_s": 2.0, "last_s": 1.0, "later_bytes": 0}, "before"),
        ({"type": "Begin", "epoch": 0, "wire": "bf16", "reconnects": False}, "epoch of at least 1"),
        ({"type": "Begin", "epoch": 1, "wire": "auto", "reconnects": False}, "f32, bf16, i8"),
        ({"type": "Begin", "epoch": 1, "wire": "none", "reconnects": True}, "f32, bf16, i8"),
    ],
)
def test_what_would_flood_a_hop_or_make_no_sense_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"{values['type']}: .*{message}"):
        control.decode(_message(values), KEY)


def test_noise_travels_with_an_assignment_and_noise_that_cannot_be_is_refused() -> None:
    noisy = replace(ASSIGN, noise_clip=2.0, noise_sigma=0.5)
    decoded = control.decode(control.encode(noisy, KEY), KEY)
    assert isinstance(decoded, control.Assign) and decoded.noise == RowNoise(2.0, 0.5)
    assert ASSIGN.noise is None
    for clip, sigma in ((1.0, 0.0), (0.0, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="must be above 0"):
            replace(ASSIGN, noise_clip=clip, noise_sigma=sigma)
