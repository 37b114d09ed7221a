"""Forwards are counted by what they ran, so that it can be said how long they should have taken."""

import pytest

from mdiq.core.frame import Batch, Segment, TokenIds
from mdiq.core.types import Epoch, SeqId
from mdiq.core.work import Work


def batch(*lengths: int) -> Batch:
    """Return a Batch of Segments of these lengths."""
    segments = tuple(Segment(SeqId(i), 0, length) for i, length in enumerate(lengths))
    return Batch(Epoch(1), segments, tuple(TokenIds((0,) * length) for length in lengths))


def test_batches_of_single_tokens_and_of_prompts_are_counted_apart() -> None:
    work = Work().plus(batch(1, 1, 1), 0.5).plus(batch(40, 7), 2.0).plus(batch(1), 0.25)
    assert work == Work(2.75, decode_batches=2, decode_segments=4, prompt_batches=1, prompt_tokens=47)


def test_a_batch_that_only_frees_cache_is_no_forward() -> None:
    assert Work().plus(batch(), 0.5) == Work()


def test_what_came_after_is_the_difference_and_none_where_the_count_began_anew() -> None:
    before = Work(1.0, 2, 3, 4, 5)
    assert Work(3.0, 4, 6, 8, 10).since(before) == Work(2.0, 2, 3, 4, 5)
    assert before.since(before) == Work()
    assert Work(3.0, 4, 6, 8, 4).since(before) is None
    assert Work(0.5, 4, 6, 8, 10).since(before) is None
    assert Work(handling_s=0.75).since(Work(handling_s=0.25)) == Work(handling_s=0.5)
    assert Work(handling_s=0.25).since(Work(handling_s=0.75)) is None


def test_figures_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="below 0"):
        Work(decode_batches=-1)
