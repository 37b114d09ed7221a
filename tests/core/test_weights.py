"""What Layers take of a model's files, and messages that are refused before anybody acts on them."""

import random
from typing import Any

import pytest

from mdiq.core import weights
from mdiq.core.types import LayerRange
from mdiq.core.weights import Manifest, WeightMap
from mdiq.errors import LocalProtocolError, PlanError, RemoteProtocolError

DIGEST = "0123456789abcdef" * 4
SHA = bytes(range(32))
K = 4_096
MAP = WeightMap(
    digest=DIGEST,
    is_directory=True,
    files=(("config.json", 100, 5), ("a.safetensors", 10 * K + 1, 6), ("b.safetensors", 3 * K, 7)),
    fingerprints=SHA * 2,
    shared=((0, 0, 100), (1, 0, 90), (2, 0, 90)),
    layers=(((1, 90, K + 1),), ((1, 3 * K, 4 * K),), ((1, 10 * K, 10 * K + 1), (2, 2 * K - 1, 2 * K + 1))),
    ends=((1, 5 * K, 6 * K),),
    chunk_bytes=K,
)
MANIFEST = MAP.manifest(LayerRange(0, 3), with_ends=False)


def _manifest(**changes: object) -> Manifest:
    values: dict[str, Any] = {name: getattr(MANIFEST, name) for name in MANIFEST.__slots__}
    return Manifest(**{**values, **changes})


def test_layers_take_the_chunks_that_hold_their_bytes_and_what_everybody_reads() -> None:
    assert MAP.manifest(LayerRange(1, 2), with_ends=False).ranges == ((0, 0, 1), (1, 0, 1), (1, 3, 4), (2, 0, 1))
    assert MANIFEST.ranges == ((0, 0, 1), (1, 0, 2), (1, 3, 4), (1, 10, 11), (2, 0, 3))


def test_the_ends_are_the_starters_alone() -> None:
    without, with_ends = (MAP.manifest(LayerRange(1, 2), with_ends=ends).chunks() for ends in (False, True))
    assert sorted(set(with_ends) - set(without)) == [(1, 5)]


def test_layers_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(PlanError, match="layers 2-3: the model has layers 0-2"):
        MAP.manifest(LayerRange(2, 4), with_ends=False)


def test_the_last_chunk_of_a_file_is_as_long_as_the_file() -> None:
    assert [MANIFEST.num_chunks(file) for file in range(3)] == [1, 11, 3]
    assert [MANIFEST.chunk_size(1, chunk) for chunk in (0, 9, 10)] == [K, K, 1]


@pytest.mark.parametrize(
    "message",
    [
        weights.AskManifest(3, 9, True),
        MANIFEST,
        weights.AskChunk(1, 2, 3, b""),
        weights.Piece(1, 2, 3, SHA, b"x" * weights.PIECE_BYTES),
        weights.Waiting(),
        weights.Done(),
        weights.Refused("no", True),
    ],
)
def test_a_message_comes_back_as_it_was(message: weights.Message) -> None:
    assert weights.decode(weights.encode(message)) == message


def test_a_manifest_asks_for_its_layers() -> None:
    assert weights.AskManifest(3, 9, True).layers == LayerRange(3, 9)
    with pytest.raises(ValueError, match="needs a layer"):
        weights.AskManifest(3, 3, False)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", ".hidden", "a\0b", "a\nb", "x" * 201, "-rf", "ü"]
)
def test_a_file_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        _manifest(files=((name, 1, 1),), ranges=())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"files": (), "ranges": ()}, "1 to 4096 files"),
        ({"files": (("a", 1, 1),) * 2, "ranges": ()}, "different names"),
        ({"files": tuple((f"f{i}", 1, 1) for i in range(4_097)), "ranges": ()}, "1 to 4096 files"),
        ({"is_directory": False}, "one file"),
        ({"files": (("a", 0, 1),), "ranges": ()}, "a: 0 bytes"),
        ({"files": (("a", 2**44 + 1, 1),), "ranges": ()}, "bytes; it needs"),
        ({"chunk_bytes": 2_048}, "chunk_bytes 2048"),
        ({"chunk_bytes": 2**21}, "chunk_bytes"),
        ({"chunk_bytes": K + 1}, "chunk_bytes"),
        ({"ranges": ((3, 0, 1),)}, "do not exist"),
        ({"ranges": ((0, 0, 2),)}, "do not exist"),
        ({"ranges": ((1, 2, 2),)}, "do not exist"),
        ({"ranges": ((1, 0, 3), (1, 2, 4))}, "not in order"),
        ({"ranges": ((1, 0, 3), (0, 0, 1))}, "not in order"),
        ({"digest": "x" * 64}, "SHA-256"),
        ({"digest": DIGEST + "0"}, "SHA-256"),
        ({"fingerprints": b"x" * 33}, "SHA-256"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _manifest(**changes)


@pytest.mark.parametrize(("sha256", "data"), [(b"short", b""), (SHA, b"x" * (weights.PIECE_BYTES + 1))])
def test_a_piece_without_hash_or_with_too_much_is_refused(sha256: bytes, data: bytes) -> None:
    with pytest.raises(ValueError, match="SHA-256 and at most"):
        weights.Piece(0, 0, 0, sha256, data)


def test_a_long_refusal_is_cut_rather_than_lost() -> None:
    back = weights.decode(weights.encode(weights.Refused("\udcff" * 9_999, False)))
    assert isinstance(back, weights.Refused) and len(back.text) == 4_096


def test_a_manifest_has_room_for_ninety_layers_of_experts_wherever_their_tensors_lie() -> None:
    num_tensors = 90 * (3 * 128 + 12)
    manifest = _manifest(
        files=tuple((f"model-{i:05}-of-00200.safetensors", 2**33, 2**60) for i in range(200)),
        ranges=tuple((i // 200, 2 * (i % 200), 2 * (i % 200) + 1) for i in range(num_tensors)),
        fingerprints=bytes(32) * num_tensors,
    )
    assert weights.decode(weights.encode(manifest)) == manifest


def test_a_manifest_that_no_node_would_take_is_our_own_bug() -> None:
    with pytest.raises(LocalProtocolError, match="Manifest: fingerprints"):
        weights.encode(_manifest(fingerprints=bytes(3 * 2**19 + 32)))


def test_changed_bytes_are_refused_and_nothing_else_happens() -> None:
    rng = random.Random(5)
    data = weights.encode(MANIFEST)
    for _ in range(3_000):
        changed = bytearray(data)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        with pytest.raises(RemoteProtocolError):
            weights.decode(bytes(changed))


@pytest.mark.parametrize("name", ["model.gguf", "model-00001-of-00002.safetensors", "config.json", "_x+y.1"])
def test_names_that_models_have_are_file_names(name: str) -> None:
    assert weights.is_file_name(name)
