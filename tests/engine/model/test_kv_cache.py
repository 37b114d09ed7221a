"""The KV cache: KvBlocks given as Sequences grow, taken back when they end, shared on a fork alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core.frame import Segment
from mdiq.core.types import SeqId
from mdiq.engine.model import kv_cache
from mdiq.engine.model.kv_cache import BLOCK_TOKENS, KvCache, Slots
from mdiq.errors import CapacityError, EngineError


def _cache(num_blocks: int) -> KvCache:
    return KvCache(1, num_blocks * BLOCK_TOKENS, 1, 2, torch.float32, torch.device("cpu"))


def _slots(cache: KvCache, slots: Slots) -> list[int]:
    return torch.arange(cache.capacity_tokens)[slots].tolist()


def _slots_stop(slots: Slots) -> int:
    return slots.stop if isinstance(slots, slice) else int(slots.max()) + 1


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


@pytest.mark.parametrize("zone", [8, 1 << 20], ids=["small", "the whole pool"])
def test_a_pool_is_touched_no_further_than_what_is_in_use_needs(zone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that was touched once takes memory for good, and a large pool would be touched all over."""
    monkeypatch.setattr(kv_cache, "_ZONE_BLOCKS", zone)
    rng = random.Random(1)
    cache = _cache(20_000)
    live: dict[SeqId, int] = {}
    furthest = most_used = num_gathered = 0
    for step in range(4_000):
        seq_id = SeqId(step)
        live[seq_id] = rng.randint(1, 120)
        if len(live) > 16:
            cache.free(old := rng.choice(list(live)))
            del live[old]
        for start in range(0, live.get(seq_id, 0), 40):
            placement = cache.extend(seq_id, start, min(40, live[seq_id] - start))
            furthest = max(furthest, _slots_stop(placement.read) // BLOCK_TOKENS)
            num_gathered += not isinstance(placement.read, slice)
        most_used = max(most_used, cache.tokens_in_use // BLOCK_TOKENS)
    assert num_gathered < 100, "Sequences seldom grow into each other"
    assert (furthest < 5 * most_used) is (zone == 8)


def test_a_lone_sequence_reads_one_view_of_the_pool() -> None:
    cache = _cache(8)
    for start in range(0, 8 * BLOCK_TOKENS, BLOCK_TOKENS):
        assert isinstance(cache.extend(SeqId(1), start, BLOCK_TOKENS).read, slice)
    with pytest.raises(CapacityError, match="1 blocks are needed and 0 are free"):
        cache.extend(SeqId(1), 8 * BLOCK_TOKENS, 1)


def test_what_does_not_fit_is_told_before_anything_is_done_and_the_others_fit_together() -> None:
    cache = _cache(6)
    cache.extend(SeqId(1), 0, BLOCK_TOKENS)
    cache.extend(SeqId(2), 0, 3)
    segments = [
        Segment(SeqId(1), BLOCK_TOKENS, 1),
        Segment(SeqId(2), 5, 1),  # two tokens are missing
        Segment(SeqId(3), 0, 3 * BLOCK_TOKENS),  # three blocks are left beside the first one's
        Segment(SeqId(4), 0, 1),
        Segment(SeqId(5), BLOCK_TOKENS, 1, parent=SeqId(9)),
        Segment(SeqId(6), 2, 1),
    ]
    wrong = cache.misfits(segments)
    assert wrong == {
        2: "3 tokens are cached, a segment begins at 5",
        4: "KV cache: 1 blocks are needed and 0 are free",
        5: f"it cannot begin with {BLOCK_TOKENS} of 0 tokens",
        6: "0 tokens are cached, a segment begins at 2",
    }
    assert cache.tokens_in_use == 2 * BLOCK_TOKENS
    for segment in segments:
        if segment.seq_id not in wrong:
            cache.extend(segment.seq_id, segment.start, segment.length)
    assert cache.tokens_in_use == 6 * BLOCK_TOKENS


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000))
def test_misfits_are_those_that_fork_and_extend_refuse(seed: int) -> None:
    rng = random.Random(seed)
    cache = _cache(10)
    lengths: dict[SeqId, int] = {}
    for _ in range(30):
        segments = []
        for seq_id in rng.sample(range(8), 3):
            parent = SeqId(rng.randrange(8)) if rng.random() < 0.3 else None
            at = rng.choice([0, BLOCK_TOKENS, lengths.get(SeqId(seq_id), 0), lengths.get(SeqId(seq_id), 0)])
            segments.append(Segment(SeqId(seq_id), at, rng.choice([1, 7, 40]), parent=None if at == 0 else parent))
        wrong = cache.misfits(segments)
        fits = [segment for segment in segments if segment.seq_id not in wrong]
        assert not cache.misfits(fits)
        for segment in fits:
            if segment.parent is not None:
                cache.fork(segment.seq_id, segment.parent, segment.start)
        for segment in fits:
            cache.extend(segment.seq_id, segment.start, segment.length)
            lengths[segment.seq_id] = segment.stop
        if rng.random() < 0.3:
            gone = SeqId(rng.randrange(8))
            cache.free(gone)
            lengths.pop(gone, None)


def test_a_segment_out_of_order_is_an_error() -> None:
    cache = _cache(2)
    cache.extend(SeqId(1), 0, 3)
    with pytest.raises(EngineError, match="3 tokens are cached"):
        cache.extend(SeqId(1), 5, 1)
    with pytest.raises(EngineError, match="0 tokens are cached"):
        cache.extend(SeqId(2), 3, 1)
    assert cache.tokens_in_use == BLOCK_TOKENS


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000))
def test_a_fork_reads_its_parents_slots_and_writes_to_its_own(seed: int) -> None:
    rng = random.Random(seed)
    cache = _cache(16)
    held: dict[SeqId, list[int]] = {}
    for step in range(60):
        seq_id = SeqId(step)
        if held and rng.random() < 0.3:
            ended = rng.choice(list(held))
            cache.free(ended)
            del held[ended]
        known: list[int] = []
        if held and rng.random() < 0.7:
            parent = rng.choice(list(held))
            shared = rng.randint(0, len(held[parent]) // BLOCK_TOKENS) * BLOCK_TOKENS
            before = cache.keys[0][held[parent]].clone()
            cache.fork(seq_id, parent, shared)
            held[parent] = _slots(cache, cache.extend(parent, len(held[parent]), 0).read)  # it may have moved
            assert torch.equal(cache.keys[0][held[parent]], before)
            known = held[parent][:shared]
        for length in (rng.choice([1, 7, 50]), 1):
            try:
                placement = cache.extend(seq_id, len(known), length)
            except CapacityError:
                cache.free(seq_id)
                break
            slots, written = _slots(cache, placement.read), _slots(cache, placement.write)
            assert slots == [*known, *written]
            others = {slot for other, slots in held.items() if other != seq_id for slot in slots}
            assert not others & set(written)
            cache.keys[0][placement.write] = float(step)
            held[seq_id] = known = slots
        else:
            assert cache.tokens_in_use == BLOCK_TOKENS * len(
                {slot // BLOCK_TOKENS for slots in held.values() for slot in slots}
            )
            continue
        held.pop(seq_id, None)
    for seq_id in held:
        cache.free(seq_id)
    assert cache.tokens_in_use == 0


def test_a_fork_that_the_parent_does_not_reach_further_than_reads_one_view() -> None:
    cache = _cache(6)
    cache.extend(SeqId(1), 0, 2 * BLOCK_TOKENS)
    cache.fork(SeqId(2), SeqId(1), 2 * BLOCK_TOKENS)
    assert isinstance(cache.extend(SeqId(2), 2 * BLOCK_TOKENS, 1).read, slice)
    cache.fork(SeqId(3), SeqId(1), 2 * BLOCK_TOKENS)
    assert isinstance(cache.extend(SeqId(3), 2 * BLOCK_TOKENS, 1).read, torch.Tensor)


def test_the_next_turn_of_a_chat_reads_one_view_though_the_last_one_ended_within_a_block() -> None:
    cache = _cache(6)
    first = cache.extend(SeqId(1), 0, 2 * BLOCK_TOKENS + 5)
    assert isinstance(first.read, slice)
    cache.keys[0][:] = torch.arange(cache.capacity_tokens)[:, None, None]
    cache.fork(SeqId(2), SeqId(1), 2 * BLOCK_TOKENS)
    assert cache.tokens_in_use == 3 * BLOCK_TOKENS
    assert isinstance(cache.extend(SeqId(2), 2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS).read, slice)
    moved = cache.extend(SeqId(1), 2 * BLOCK_TOKENS + 5, 1)
    assert cache.keys[0][moved.read][:-1, 0, 0].tolist() == list(range(2 * BLOCK_TOKENS + 5))
    cache.free(SeqId(1))
    cache.free(SeqId(2))
    assert cache.tokens_in_use == 0


def test_a_fork_of_what_is_not_there_is_an_error() -> None:
    cache = _cache(4)
    cache.extend(SeqId(1), 0, BLOCK_TOKENS + 1)
    cache.extend(SeqId(2), 0, 1)
    for seq_id, parent, num_tokens in (
        (3, 9, BLOCK_TOKENS),
        (3, 1, 2 * BLOCK_TOKENS),
        (3, 1, BLOCK_TOKENS + 1),
        (2, 1, BLOCK_TOKENS),
    ):
        with pytest.raises(EngineError, match=f"cannot begin with {num_tokens} of"):
            cache.fork(SeqId(seq_id), SeqId(parent), num_tokens)
    assert cache.tokens_in_use == 3 * BLOCK_TOKENS


def test_memory_that_cannot_be_had_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match="cannot be allocated; lower --kv-tokens"):
        KvCache(1, 1 << 45, 8, 128, torch.float32, torch.device("cpu"))
