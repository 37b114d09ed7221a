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


def test_what_would_fit_an_empty_ring_is_known_while_it_is_full() -> None:
    ledger = KvLedger(32, block_tokens=16)
    ledger.reserve(SeqId(1), 32)
    assert ledger.fits_ever(32)
    assert not ledger.fits_ever(33)


def test_a_second_or_an_excessive_reservation_is_our_own_bug() -> None:
    ledger = KvLedger(32)
    ledger.reserve(SeqId(1), 2)
    for seq_id, num_tokens in ((1, 1), (2, 31)):
        with pytest.raises(LocalProtocolError):
            ledger.reserve(SeqId(seq_id), num_tokens)
