"""Who enters the Ring, and which tokens go next."""

from collections import deque

from mdiq.core.kv_ledger import KvLedger
from mdiq.core.scheduler import Entry, Scheduler
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import RingSpec


def _entry(arrival: int, num_prompt: int, max_tokens: int = 4) -> Entry:
    sequence = Sequence(arrival, tuple(range(num_prompt)), SamplingParams(max_tokens=max_tokens))
    return Entry(sequence, arrival, sequence.most_tokens)


def _scheduler(*entries: Entry, chunk: int = 4, prefill: int = 8, live: int = 8, kv: int = 1_000) -> Scheduler:
    scheduler = Scheduler(chunk_tokens=chunk, prefill_tokens=prefill, spec=RingSpec(1, kv, 1_000, max_live=live))
    for entry in entries:
        scheduler.wait(entry)
    scheduler.admit(KvLedger(kv))
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


def test_a_sequence_that_waits_for_kv_cache_holds_back_those_behind_it() -> None:
    scheduler = _scheduler(_entry(0, 6), _entry(1, 9), _entry(2, 1), kv=20)
    assert [e.arrival for e in scheduler.live.values()] == [0]
    assert [e.arrival for e in scheduler.waiting] == [1, 2]


def test_a_replayed_sequence_goes_before_those_that_came_after_it() -> None:
    early = _entry(0, 6)
    scheduler = _scheduler(early, _entry(1, 6), live=1)
    assert early.seq_id is not None
    del scheduler.live[early.seq_id]
    early.in_flight = deque([(6, 1.0)])
    early.leave_ring()
    scheduler.wait(early)
    assert [e.arrival for e in scheduler.waiting] == [0, 1]
    assert not early.in_flight
