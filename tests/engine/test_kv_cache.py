"""The KV cache: KvBlocks given as Sequences grow, taken back when they end, never shared, gathered when scattered."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core.types import SeqId
from mdiq.engine.kv_cache import BLOCK_TOKENS, KvCache, Slots
from mdiq.errors import CapacityError, EngineError


def _cache(num_blocks: int) -> KvCache:
    return KvCache(1, num_blocks * BLOCK_TOKENS, 1, 2, torch.float32, torch.device("cpu"))


def _slots(cache: KvCache, slots: Slots) -> list[int]:
    return torch.arange(cache.capacity_tokens)[slots].tolist()


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000))
def test_no_slot_belongs_to_two_sequences_and_none_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    cache = _cache(12)
    held: dict[SeqId, list[int]] = {}
    for step in range(120):
        seq_id = SeqId(rng.randrange(5) + 100 * (step // 40))
        if rng.random() < 0.2:
            cache.free(seq_id)
            held.pop(seq_id, None)
            continue
        length = rng.choice([1, 1, 1, 7, BLOCK_TOKENS, 50])
        known = held.get(seq_id, [])
        try:
            placement = cache.extend(seq_id, len(known), length)
        except CapacityError:
            needed = _blocks(len(known) + length) - _blocks(len(known))
            assert needed > 12 - sum(_blocks(len(slots)) for slots in held.values())
            continue
        slots = _slots(cache, placement.read)
        assert slots[: len(known)] == known and _slots(cache, placement.write) == slots[len(known) :]
        assert len(slots) == len(known) + length
        held[seq_id] = slots
        every = [slot for slots in held.values() for slot in slots]
        assert len(every) == len(set(every))
        assert cache.tokens_in_use == sum(_blocks(len(slots)) for slots in held.values()) * BLOCK_TOKENS
    cache.reset()
    assert cache.tokens_in_use == 0


def test_a_lone_sequence_reads_one_view_of_the_pool() -> None:
    cache = _cache(8)
    for start in range(0, 8 * BLOCK_TOKENS, BLOCK_TOKENS):
        assert isinstance(cache.extend(SeqId(1), start, BLOCK_TOKENS).read, slice)
    with pytest.raises(CapacityError, match="1 blocks are needed and 0 are free"):
        cache.extend(SeqId(1), 8 * BLOCK_TOKENS, 1)


def test_a_segment_out_of_order_is_an_error() -> None:
    cache = _cache(2)
    cache.extend(SeqId(1), 0, 3)
    with pytest.raises(EngineError, match="3 tokens are cached"):
        cache.extend(SeqId(1), 5, 1)
    with pytest.raises(EngineError, match="0 tokens are cached"):
        cache.extend(SeqId(2), 3, 1)
    assert cache.tokens_in_use == BLOCK_TOKENS


def test_memory_that_cannot_be_had_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match="cannot be allocated; lower --kv-tokens"):
        KvCache(1, 1 << 45, 8, 128, torch.float32, torch.device("cpu"))
