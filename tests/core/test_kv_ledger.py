"""Reservations never exceed what the Ring has."""

import pytest

from mdiq.core.kv_ledger import KvLedger
from mdiq.core.types import SeqId
from mdiq.errors import LocalProtocolError


def test_reservations_are_whole_blocks_and_come_back() -> None:
    ledger = KvLedger(35, block_tokens=16)
    assert ledger.capacity_tokens == 32
    ledger.reserve(SeqId(1), 17)
    assert ledger.reserved_tokens == 32
    assert not ledger.fits(1)
    ledger.release(SeqId(1))
    ledger.release(SeqId(1))
    assert ledger.reserved_tokens == 0


def test_a_reservation_grows_by_whole_blocks_while_there_are_any() -> None:
    ledger = KvLedger(48, block_tokens=16)
    ledger.reserve(SeqId(1), 1)
    ledger.grow(SeqId(1), 16)
    assert (ledger.granted_tokens(SeqId(1)), ledger.reserved_tokens) == (16, 16)
    ledger.grow(SeqId(1), 17)
    ledger.reserve(SeqId(2), 3)
    assert (ledger.granted_tokens(SeqId(1)), ledger.reserved_tokens) == (32, 48)
    ledger.leave(SeqId(2))
    for seq_id, num_tokens in ((1, 33), (2, 4), (3, 1)):
        with pytest.raises(LocalProtocolError, match="cannot grow"):
            ledger.grow(SeqId(seq_id), num_tokens)
    ledger.release(SeqId(2))
    ledger.grow(SeqId(1), 48)
    ledger.release(SeqId(1))
    assert ledger.reserved_tokens == 0


def test_a_second_or_an_excessive_reservation_is_our_own_bug() -> None:
    ledger = KvLedger(32)
    ledger.reserve(SeqId(1), 2)
    for seq_id, num_tokens in ((1, 1), (2, 31)):
        with pytest.raises(LocalProtocolError):
            ledger.reserve(SeqId(seq_id), num_tokens)


def test_a_shared_block_is_counted_once_and_comes_back_with_its_last_holder() -> None:
    ledger = KvLedger(48, block_tokens=16)
    ledger.reserve(SeqId(1), 40)
    assert not ledger.fits(33, shared_tokens=32)
    ledger.shrink(SeqId(1), 32)
    assert ledger.reserved_tokens == 32
    assert ledger.fits(33, shared_tokens=32)
    ledger.reserve(SeqId(2), 33, SeqId(1), 32)
    assert ledger.reserved_tokens == 48
    ledger.release(SeqId(1))
    assert ledger.reserved_tokens == 48
    ledger.release(SeqId(2))
    assert ledger.reserved_tokens == 0


def test_what_some_hold_alone_is_told_apart_from_what_others_hold_too() -> None:
    ledger = KvLedger(96, block_tokens=16)
    ledger.reserve(SeqId(1), 32)
    ledger.reserve(SeqId(2), 33, SeqId(1), 16)
    ledger.reserve(SeqId(3), 1)
    assert ledger.reserved_tokens == ledger.tokens_without([]) == 80
    assert ledger.tokens_without([SeqId(1)]) == 64
    assert ledger.tokens_without([SeqId(1), SeqId(2)]) == 16
    ledger.leave(SeqId(3))
    assert ledger.tokens_without([SeqId(1), SeqId(2)]) == 16, "its RELEASE has not made its lap"


def test_blocks_that_are_shared_later_are_given_back() -> None:
    ledger = KvLedger(64, block_tokens=16)
    ledger.reserve(SeqId(1), 32)
    ledger.reserve(SeqId(2), 32)
    ledger.share(SeqId(2), SeqId(1), 16)
    assert ledger.reserved_tokens == 48
    ledger.release(SeqId(1))
    assert ledger.reserved_tokens == 32
    ledger.release(SeqId(2))
    assert ledger.reserved_tokens == 0


def test_only_what_makes_room_is_to_be_given_up_and_room_on_its_way_counts() -> None:
    ledger = KvLedger(64, block_tokens=16)
    one, two, three, live = map(SeqId, range(4))
    ledger.reserve(one, 16)
    ledger.reserve(two, 32, one, 16)
    ledger.reserve(three, 16)
    ledger.reserve(live, 16)
    assert ledger.to_give_up(16, [one, two, three]) == [one, two]
    assert ledger.to_give_up(48, [one, two, three]) == [one, two, three]
    assert ledger.to_give_up(64, [one, two, three]) is None
    assert ledger.to_give_up(17, [two, three], shared_tokens=16) == [two]
    ledger.leave(three)
    ledger.leave(three)
    ledger.leave(SeqId(99))
    assert ledger.to_give_up(16, [one, two]) == []
    assert not ledger.fits(16)
    ledger.release(three)
    assert ledger.fits(16)
