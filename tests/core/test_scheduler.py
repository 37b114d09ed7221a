"""Who enters the Ring, and which tokens go next."""

from collections import deque

from mdiq.core.kv_ledger import KvLedger
from mdiq.core.lap_timer import Flight
from mdiq.core.scheduler import Entry, Scheduler
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import RingSpec


def _entry(arrival: int, num_prompt: int, max_tokens: int = 4) -> Entry:
    sequence = Sequence(arrival, tuple(range(num_prompt)), SamplingParams(max_tokens=max_tokens))
    return Entry(sequence, arrival, sequence.max_total_tokens)


def _scheduler(
    *entries: Entry, chunk: int = 4, prefill: int = 8, live: int = 8, kv: int = 1_000, spec: RingSpec | None = None
) -> Scheduler:
    spec = spec or RingSpec(1, kv, 1_000, max_live=live)
    scheduler = Scheduler(chunk_tokens=chunk, prefill_tokens=prefill, spec=spec)
    for entry in entries:
        scheduler.wait(entry)
    scheduler.admit(KvLedger(kv))
    for entry in scheduler.live.values():
        entry.num_granted = entry.max_tokens  # the ring protocol has them grow
    return scheduler


def _taken(scheduler: Scheduler) -> list[str]:
    return [str(segment) for _, segment in scheduler.take_segments()]


def test_a_prompt_is_cut_into_chunks_and_only_the_last_wants_logits() -> None:
    scheduler = _scheduler(_entry(0, 10), prefill=100)
    assert _taken(scheduler) == ["0[0:4]", "0[4:8]", "0[8:10]*"]
    assert _taken(scheduler) == []


def test_prompt_tokens_in_flight_stay_within_the_budget() -> None:
    first = _entry(0, 7)
    scheduler = _scheduler(first, _entry(1, 6))
    assert _taken(scheduler) == ["0[0:4]", "0[4:7]*"]
    first.num_back = 4
    assert _taken(scheduler) == ["1[0:4]"]


def test_a_chunk_over_the_budget_goes_alone() -> None:
    assert _taken(_scheduler(_entry(0, 30), _entry(1, 1), chunk=20)) == ["0[0:20]"]


def test_decoding_sequences_go_before_prompts() -> None:
    early, late = _entry(0, 2), _entry(1, 3)
    scheduler = _scheduler(early, late, prefill=3)
    assert _taken(scheduler) == ["0[0:2]*"]
    early.num_back, early.is_sampling = 2, True
    late.num_sent = 1  # as if its first chunk had been this short
    late.num_back = 1
    early.sequence.append(7)
    assert _taken(scheduler) == ["1[1:3]*"]
    early.is_sampling = False
    late.num_sent = 1
    assert _taken(scheduler) == ["0[2:3]*", "1[1:3]*"]
    assert _taken(scheduler) == []


def test_a_sequence_that_waits_for_kv_cache_holds_back_those_after_it_that_do_not_fit_whole() -> None:
    scheduler = _scheduler(_entry(0, 6), _entry(1, 9), _entry(2, 1), kv=11)
    assert [e.arrival for e in scheduler.live.values()] == [0]
    assert [e.arrival for e in scheduler.waiting] == [1, 2]
    scheduler = _scheduler(_entry(0, 6), _entry(1, 9), _entry(2, 1), kv=12)
    assert [e.arrival for e in scheduler.live.values()] == [0, 2]
    assert [e.num_passed for e in scheduler.waiting] == [1]


def test_one_that_was_put_back_needs_more_room_ahead_each_time_and_then_the_end_of_all_older_ones() -> None:
    scheduler, entry, ledger = _scheduler(_entry(0, 6, 4)), _entry(1, 6, 50), KvLedger(1_000, block_tokens=4)
    assert scheduler.needed(entry, ledger) == 10
    entry.num_preemptions = 2
    assert scheduler.needed(entry, ledger) == 22
    entry.num_preemptions = 9
    assert scheduler.needed(entry, ledger) == 56, "never more than it may grow to"
    assert not scheduler.is_oldest(entry)
    scheduler.live.clear()
    assert scheduler.is_oldest(entry)


def test_a_replayed_sequence_goes_before_those_that_came_after_it() -> None:
    early = _entry(0, 6)
    scheduler = _scheduler(early, _entry(1, 6), live=1)
    assert early.seq_id is not None
    del scheduler.live[early.seq_id]
    early.in_flight = deque([Flight(6, 0.0, 1, 0, 1.0, 1.0)])
    early.leave_ring()
    scheduler.wait(early)
    assert [e.arrival for e in scheduler.waiting] == [0, 1]
    assert not early.in_flight


def _long(spec: RingSpec, num_prompt: int, *others: Entry) -> list[int]:
    """Return the lengths of the chunks of a prompt."""
    scheduler = _scheduler(_entry(0, num_prompt), *others, chunk=256, prefill=9_999, kv=9_999, spec=spec)
    return [segment.length for entry, segment in scheduler.take_segments() if entry.arrival == 0]


def test_a_prompt_alone_is_cut_so_that_all_stages_work_on_it_soon() -> None:
    # sqrt(16 * 1024 / (5 - 1)) = 64
    assert _long(RingSpec(5, 9_999, 2_000, pass_tokens=16.0), 1_024) == [64] * 16
    assert _long(RingSpec(2, 9_999, 2_000, pass_tokens=16.0), 1_000) == [128] * 7 + [104]
    assert _long(RingSpec(1, 9_999, 2_000, pass_tokens=16.0), 500) == [256, 244]
    assert _long(RingSpec(2, 9_999, 2_000, pass_tokens=0.0), 48) == [16, 16, 16]
    assert _long(RingSpec(2, 9_999, 2_000, pass_tokens=16.0), 5) == [5]


def test_a_prompt_beside_others_is_cut_as_short_as_they_may_have_to_wait() -> None:
    spec = RingSpec(2, 9_999, 2_000, shared_chunks=(256, 32, 16))
    assert _long(spec, 100) == [64, 36]
    assert _long(spec, 100, _entry(1, 1)) == [32, 32, 32, 4]
    assert _long(spec, 100, _entry(1, 1), _entry(2, 1)) == [16] * 6 + [4]


def test_no_more_chunks_are_in_flight_than_keep_the_stages_at_work() -> None:
    assert _long(RingSpec(2, 9_999, 2_000, shared_chunks=(16,), num_chunks=3), 200, _entry(1, 1)) == [16] * 3


def _decoding(num_live: int, cap: int) -> tuple[Scheduler, list[Entry]]:
    """Return a Scheduler whose Sequences all have a token to send."""
    entries = [_entry(i, 1, 99) for i in range(num_live)]
    scheduler = _scheduler(*entries, prefill=99, spec=RingSpec(3, 9_999, 200, caps=(cap,)))
    scheduler.take_segments()
    for entry in entries:
        _back(entry)
    return scheduler, entries


def _back(entry: Entry) -> None:
    entry.num_back = entry.num_sent
    entry.sequence.append(7)


def _ids(scheduler: Scheduler) -> list[int]:
    return [segment.seq_id for _, segment in scheduler.take_segments()]


def test_decoding_sequences_go_in_as_many_groups_as_are_to_be_in_flight() -> None:
    scheduler, entries = _decoding(5, 2)
    assert _ids(scheduler) == [0, 1, 2, 3, 4]
    _back(entries[0])
    assert _ids(scheduler) == [], "its group is still on its Lap, and so are the other two"
    _back(entries[4])
    assert _ids(scheduler) == [0, 4], "a group has come home, and what was held back goes with it"
    for i in (1, 2, 3):
        _back(entries[i])
    assert _ids(scheduler) == [1, 2, 3]


def test_those_that_were_sent_longest_ago_go_first() -> None:
    scheduler, entries = _decoding(4, 2)
    assert _ids(scheduler) == [0, 1, 2, 3]
    for i in (2, 3):
        _back(entries[i])
    assert _ids(scheduler) == [2, 3]
    for entry in entries:
        _back(entry)
    assert _ids(scheduler) == [0, 1, 2, 3]
    scheduler.spec = RingSpec(3, 9_999, 200, caps=(1,))
    for i in (0, 2):
        _back(entries[i])
    assert _ids(scheduler) == [0, 2]


def test_while_a_prompt_is_in_the_ring_no_decoding_sequence_is_held_back() -> None:
    scheduler, entries = _decoding(2, 2)
    assert _ids(scheduler) == [0, 1]
    scheduler.wait(_entry(9, 3))
    scheduler.admit(KvLedger(1_000))
    assert _ids(scheduler) == [2]
    _back(entries[0])
    assert _ids(scheduler) == [0]
