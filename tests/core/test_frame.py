"""Frames count their rows and hide their payload."""

import pytest

from mdiq.core.frame import NO_ROWS, Batch, Frame, FrameKind, Segment, TokenIds
from mdiq.core.types import Epoch, SeqId

SEGMENTS = (Segment(SeqId(1), 0, 3), Segment(SeqId(2), 4, 2, wants_logits=True))


@pytest.mark.parametrize(("kind", "rows"), [(FrameKind.HIDDEN, 5), (FrameKind.HEAD, 1), (FrameKind.RELEASE, 0)])
def test_the_kind_says_how_many_rows_the_segments_have(kind: FrameKind, rows: int) -> None:
    frame = Frame(Epoch(1), kind, SEGMENTS)
    assert (frame.num_rows, frame.num_tokens) == (rows, 5)


def test_a_frame_in_a_log_shows_no_payload() -> None:
    frame = Frame(Epoch(3), FrameKind.HIDDEN, SEGMENTS, TokenIds((77_777,) * 5))
    assert str(frame) == "HIDDEN epoch 3 [1[0:3] 2[4:6]*]"


def test_token_ids_can_be_sliced_and_have_no_wire_form() -> None:
    ids = TokenIds((5, 6, 7))
    assert (ids.num_rows, ids.rows(1, 3)) == (3, TokenIds((6, 7)))
    with pytest.raises(TypeError, match="no wire form"):
        ids.parts()


def test_no_rows_is_empty_however_it_is_cut() -> None:
    assert (NO_ROWS.num_rows, NO_ROWS.rows(0, 9), NO_ROWS.parts()) == (0, NO_ROWS, ("none", 0, ()))


def test_a_batch_counts_its_tokens() -> None:
    assert Batch(Epoch(1), SEGMENTS, (NO_ROWS, NO_ROWS)).num_tokens == 5
