"""Beginnings of token streams are found by their hash, longest first, and forgotten with their holders."""

from mdiq.core.prefix_index import PrefixIndex
from mdiq.core.sequence import Sequence
from mdiq.core.types import SeqId

ONE, TWO, THREE = map(SeqId, (1, 2, 3))


def _sequence(*tokens: int) -> Sequence:
    return Sequence(0, tokens)


def test_the_longest_beginning_in_whole_blocks_is_found() -> None:
    index = PrefixIndex(4)
    index.extend(ONE, _sequence(*range(12)), 11)
    index.extend(TWO, _sequence(*range(4), 9, 9, 9, 9), 8)
    assert index.longest(_sequence(*range(20))) == (ONE, 8)
    assert index.longest(_sequence(*range(4), 9, 9, 9, 9, 1)) == (TWO, 8)
    assert index.longest(_sequence(*range(4), 9, 9, 9, 9)) == (ONE, 4), "its last token is to be computed"
    assert index.longest(_sequence(1, *range(12))) is None
    assert index.longest(_sequence(7)) is None


def test_a_block_is_another_one_behind_other_tokens() -> None:
    index = PrefixIndex(2)
    index.extend(ONE, _sequence(1, 2, 3, 4), 4)
    assert index.longest(_sequence(3, 4, 5)) is None
    assert index.longest(_sequence(12, 3, 4, 5)) is None


def test_generated_tokens_are_found_as_a_prompt() -> None:
    index, spoken = PrefixIndex(2), _sequence(1, 2, 3)
    index.extend(ONE, spoken, 3)
    spoken.generated += [4, 5]
    index.extend(ONE, spoken, 4)
    assert index.longest(_sequence(1, 2, 3, 4, 6)) == (ONE, 4)


def test_what_the_last_holder_held_is_forgotten_with_it() -> None:
    index = PrefixIndex(2)
    for seq_id in (ONE, TWO):
        index.extend(seq_id, _sequence(1, 2, 3), 3)
    index.remove(ONE)
    index.remove(ONE)
    assert index.longest(_sequence(1, 2, 3)) == (TWO, 2)
    index.remove(TWO)
    assert index.longest(_sequence(1, 2, 3)) is None


def test_the_least_recently_used_goes_first_and_what_is_pinned_stays() -> None:
    index = PrefixIndex(2, max_tokens=4)
    for seq_id in (ONE, TWO, THREE):
        index.extend(seq_id, _sequence(seq_id, 0, 0), 3)
        assert not index.is_over
        assert index.retain(seq_id)
    assert index.is_over
    index.touch(ONE)
    index.touch(SeqId(50))
    assert index.to_give_up({THREE}) == [TWO, ONE]
    index.remove(TWO)
    assert index.retained == [THREE, ONE]
    assert not index.is_over


def test_less_than_a_block_is_not_retained_and_nothing_is_if_the_index_is_off() -> None:
    index, off = PrefixIndex(4), PrefixIndex(1, max_tokens=0)
    index.extend(ONE, _sequence(1, 2, 3), 3)
    off.extend(ONE, _sequence(1, 2, 3), 3)
    assert not index.retain(ONE)
    assert not off.retain(ONE)
    assert off.longest(_sequence(1, 2, 3)) is None


def test_an_id_that_holds_no_more_than_another_is_covered_by_it() -> None:
    index = PrefixIndex(2)
    index.extend(ONE, _sequence(1, 2, 3, 4), 4)
    index.extend(TWO, _sequence(1, 2, 5, 6), 4)
    index.extend(THREE, _sequence(1, 2, 3, 4, 7, 8), 6)
    index.retain(ONE)
    index.retain(TWO)
    assert index.covered(THREE) == [ONE]
    index.retain(THREE)
    assert index.covered(ONE) == []
