"""Messages of a weight transfer: they come back as they were, and others are refused before anybody acts on them."""

import random

import pytest

from mdiq.core import weights
from mdiq.core.types import LayerRange
from mdiq.errors import LocalProtocolError, RemoteProtocolError

DIGEST = "0123456789abcdef" * 4
SHA = bytes(range(32))
FILE = weights.LayerFile(3, 2**30, SHA)


@pytest.mark.parametrize(
    "message",
    [
        weights.AskLayers(DIGEST, 3, 9),
        FILE,
        weights.AskPart(1, 2**33, 3),
        weights.Piece(1, 2**33, b"x" * weights.PIECE_BYTES),
        weights.Waiting(),
        weights.Done(),
        weights.Refused("no", True),
    ],
)
def test_a_message_comes_back_as_it_was(message: weights.Message) -> None:
    assert weights.decode(weights.encode(message)) == message


def test_the_bytes_of_version_2_stay_as_they_are() -> None:
    """A change of these bytes is a change of the version: nodes of both would not understand each other."""
    expected = (
        f"0284a474797065a94c6179657246696c65a56c6179657203a96e756d5f6279746573ce40000000a6736861323536c420{SHA.hex()}"
    )
    assert weights.encode(FILE)[:-16].hex() == expected


def test_a_peer_of_the_version_before_is_told_both_versions() -> None:
    data = weights.encode(weights.Done())
    with pytest.raises(RemoteProtocolError, match="version 1 came and this is version 2; install the same mdiq"):
        weights.decode(b"\1" + data[1:])


def test_a_question_names_its_layers() -> None:
    assert weights.AskLayers(DIGEST, 3, 9).layers == LayerRange(3, 9)


@pytest.mark.parametrize(("digest", "start", "stop"), [(DIGEST, 3, 3), ("x" * 64, 0, 1), (DIGEST + "0", 0, 1)])
def test_a_question_without_layers_or_model_is_refused(digest: str, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="it needs a SHA-256 in hexadecimal, and a layer"):
        weights.AskLayers(digest, start, stop)


@pytest.mark.parametrize(("num_bytes", "sha256"), [(0, SHA), (2**44 + 1, SHA), (5, b"short")])
def test_a_file_that_cannot_be_is_refused(num_bytes: int, sha256: bytes) -> None:
    with pytest.raises(ValueError, match="it needs a SHA-256 and 1 to"):
        weights.LayerFile(0, num_bytes, sha256)


@pytest.mark.parametrize("data", [b"", b"x" * (weights.PIECE_BYTES + 1)])
def test_a_piece_of_nothing_or_of_too_much_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="it needs 1 to"):
        weights.Piece(0, 0, data)


def test_a_piece_that_no_node_would_take_is_our_own_bug() -> None:
    with pytest.raises(LocalProtocolError, match="LayerFile: layer is out of range"):
        weights.encode(weights.LayerFile(-1, 5, SHA))


def test_a_long_refusal_is_cut_rather_than_lost() -> None:
    back = weights.decode(weights.encode(weights.Refused("\udcff" * 9_999, False)))
    assert isinstance(back, weights.Refused) and len(back.text) == 4_096


def test_changed_bytes_are_refused_and_nothing_else_happens() -> None:
    rng = random.Random(5)
    data = weights.encode(FILE)
    for _ in range(3_000):
        changed = bytearray(data)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        with pytest.raises(RemoteProtocolError):
            weights.decode(bytes(changed))


def test_a_folder_is_named_after_model_and_format() -> None:
    assert weights.folder_name(DIGEST, "int4") == f"{DIGEST}-int4"


@pytest.mark.parametrize(
    ("digest", "name"),
    [
        ("", "int4"),
        ("..", "int4"),
        ("../x", "int4"),
        ("/etc", "int4"),
        (DIGEST + "/..", "int4"),
        (DIGEST.upper(), "int4"),
    ]
    + [(DIGEST, name) for name in ("", "..", "../x", "a/b", "a\0b", "INT4", "x" * 9, "int4\n")],
)
def test_a_name_that_leads_elsewhere_is_refused(digest: str, name: str) -> None:
    with pytest.raises(RemoteProtocolError, match="neither can be a name"):
        weights.folder_name(digest, name)
