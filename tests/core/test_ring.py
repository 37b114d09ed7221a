"""The Starter's books: who is in the Ring, what is overdue, and how each Sequence ends."""

from dataclasses import replace

import pytest

from mdiq.core.frame import Frame, FrameKind, Segment, TokenIds
from mdiq.core.ring import Ended, HeadRow, Inject, RingProtocol, RingSettings, Suspect
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.types import Epoch, RingSpec, SeqId
from mdiq.errors import CapacityError, ContextLengthError, LocalProtocolError, MdiqError, RingStalledError

EPOCH = Epoch(1)
SPEC = RingSpec(num_stages=2, kv_tokens=64, context_tokens=32, caps=(1, 2))
SETTINGS = RingSettings(chunk_tokens=4, prefill_tokens=64, lap_timeout_s=10.0, token_timeout_s=0.0, max_replays=2)


def _ring(spec: RingSpec = SPEC) -> RingProtocol:
    ring = RingProtocol(SETTINGS)
    ring.begin_epoch(EPOCH, spec)
    return ring


def _sequence(index: int = 0, num_prompt: int = 3, max_tokens: int = 4, deadline: float | None = None) -> Sequence:
    return Sequence(index, tuple(range(num_prompt)), SamplingParams(max_tokens=max_tokens), deadline=deadline)


def _injected(ring: RingProtocol, now: float = 0.0) -> list[Frame]:
    actions = ring.poll(now)
    assert all(isinstance(action, Inject) for action in actions)
    return [action.frame for action in actions if isinstance(action, Inject)]


def _head(*segments: Segment, epoch: Epoch = EPOCH) -> Frame:
    wanting = sum(segment.wants_logits for segment in segments)
    return Frame(epoch, FrameKind.HEAD, segments, TokenIds((0,) * wanting))


def _lap(ring: RingProtocol, now: float = 0.0) -> list[HeadRow]:
    """Let all that is injected come round."""
    rows: list[HeadRow] = []
    for frame in _injected(ring, now):
        if frame.kind is FrameKind.RELEASE:
            ring.returned(frame)
        else:
            rows += ring.returned(_head(*frame.segments))
    return rows


def test_a_sequence_goes_round_until_its_last_token_and_gives_its_cache_back() -> None:
    ring, sequence = _ring(), _sequence(max_tokens=2)
    ring.submit(sequence, now=0.0)
    assert (ring.num_unfinished, ring.num_live) == (1, 0)
    (row,) = _lap(ring)
    assert ring.num_live == 1
    assert ring.awaits_token(row.seq_id)
    first = ring.sampled(row.seq_id, 40)
    assert first is not None
    assert (first.token, first.position, first.finish_reason) == (40, 3, None)
    (row,) = _lap(ring)
    last = ring.sampled(row.seq_id, 41)
    assert last is not None
    assert (last.position, last.finish_reason) == (4, FinishReason.LENGTH)
    assert sequence.generated == [40, 41]
    assert sequence.finish_reason is FinishReason.LENGTH
    assert not ring.is_quiet
    assert ring.kv_reserved_tokens == 5
    assert _lap(ring) == []
    assert ring.is_quiet
    assert ring.kv_reserved_tokens == 0


def test_injected_frames_carry_the_tokens_and_the_cap_for_the_live_sequences() -> None:
    ring = _ring()
    ring.submit(_sequence(0, num_prompt=6), now=0.0)
    ring.submit(_sequence(1, num_prompt=1), now=0.0)
    frames = _injected(ring)
    assert [str(frame) for frame in frames] == [
        "HIDDEN epoch 1 [0[0:4]]",
        "HIDDEN epoch 1 [0[4:6]*]",
        "HIDDEN epoch 1 [1[0:1]*]",
    ]
    assert frames[1].payload == TokenIds((4, 5))
    assert {frame.cap for frame in frames} == {2}


def test_a_segment_that_is_back_vouches_for_those_before_it() -> None:
    ring = _ring()
    ring.submit(_sequence(num_prompt=6), now=0.0)
    _, last = _injected(ring)
    assert len(ring.returned(_head(*last.segments))) == 1
    assert ring.next_deadline() is None


def test_rows_are_counted_over_segments_that_are_not_believed() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    (frame,) = _injected(ring)
    stranger = Segment(SeqId(99), 0, 3, wants_logits=True)
    without_row = Segment(SeqId(98), 0, 3)
    (row,) = ring.returned(_head(stranger, without_row, frame.segments[0]))
    assert (row.seq_id, row.row) == (SeqId(0), 1)
    assert ring.counts == {"unknown": 2}


def test_a_second_copy_of_a_returned_frame_gives_no_second_token() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    (frame,) = _injected(ring)
    head = _head(*frame.segments)
    assert len(ring.returned(head)) == 1
    assert ring.returned(head) == []
    assert ring.counts == {"duplicates": 1}


def test_a_frame_of_an_older_epoch_is_counted_and_ignored() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    (frame,) = _injected(ring)
    ring.begin_epoch(Epoch(2), SPEC)
    assert ring.returned(_head(*frame.segments)) == []
    assert ring.counts == {"stale": 1}


def test_a_new_epoch_replays_every_sequence_with_its_answer_so_far_under_a_new_id() -> None:
    ring = _ring()
    for index in (0, 1):
        ring.submit(_sequence(index), now=0.0)
    for row in _lap(ring):
        ring.sampled(row.seq_id, 40)
    ring.poll(0.0)
    ring.begin_epoch(Epoch(2), SPEC)
    frames = _injected(ring)
    assert [str(frame) for frame in frames] == ["HIDDEN epoch 2 [2[0:4]*]", "HIDDEN epoch 2 [3[0:4]*]"]
    assert frames[0].payload == TokenIds((0, 1, 2, 40))


def test_an_end_that_nobody_was_told_of_is_told_in_the_new_epoch() -> None:
    ring = _ring()
    ring.submit(_sequence(0), now=0.0)
    ring.submit(_sequence(1), now=0.0)
    ring.cancel(0)
    ring.begin_epoch(Epoch(2), SPEC)
    ended, injected = ring.poll(0.0)
    assert isinstance(ended, Ended)
    assert isinstance(injected, Inject)
    assert injected.frame.epoch == 2


def test_a_ring_that_has_become_too_small_ends_the_sequence_with_an_error() -> None:
    ring = _ring()
    ring.submit(_sequence(num_prompt=20), now=0.0)
    ring.poll(0.0)
    ring.begin_epoch(Epoch(2), RingSpec(2, kv_tokens=8, context_tokens=32))
    (ended,) = ring.poll(0.0)
    assert isinstance(ended, Ended)
    assert isinstance(ended.event.error, CapacityError)
    assert ended.event.finish_reason is FinishReason.ERROR
    assert ring.is_quiet


def test_an_overdue_segment_is_replayed_and_the_node_suspected() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    ring.poll(0.0)
    assert ring.next_deadline() == 10.0
    assert ring.poll(9.9) == []
    suspect, release, replay = ring.poll(10.0)
    assert suspect == Suspect(EPOCH)
    assert isinstance(release, Inject) and isinstance(replay, Inject)
    assert str(release.frame) == "RELEASE epoch 1 [0[0:0]]"
    assert str(replay.frame) == "HIDDEN epoch 1 [1[0:3]*]"
    assert ring.counts == {"overdue": 1, "replays": 1}


def test_a_release_that_does_not_come_round_is_sent_again() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    ring.poll(0.0)
    ring.cancel(0)
    ring.poll(0.0)
    assert ring.next_deadline() == 10.0
    (again,) = _injected(ring, 10.0)
    assert again.kind is FrameKind.RELEASE
    ring.returned(again)
    ring.returned(again)
    assert ring.kv_reserved_tokens == 0
    assert ring.is_quiet


def test_a_new_epoch_owes_nothing_to_the_sequences_that_ended_in_the_old_one() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    ring.poll(0.0)
    ring.cancel(0)
    ring.poll(0.0)
    ring.begin_epoch(Epoch(2), SPEC)
    assert ring.is_quiet
    assert ring.kv_reserved_tokens == 0
    assert ring.poll(99.0) == []


def test_a_row_in_the_middle_of_a_prompt_is_not_sampled_whatever_the_frame_says() -> None:
    ring = _ring()
    ring.submit(_sequence(num_prompt=6), now=0.0)
    ring.poll(0.0)
    assert ring.returned(_head(Segment(SeqId(0), 0, 4, wants_logits=True))) == []
    assert len(ring.returned(_head(Segment(SeqId(0), 4, 2, wants_logits=True)))) == 1


def test_a_gap_is_mended_by_a_replay_and_reported_twice_is_mended_once() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    ring.poll(0.0)
    ring.fault([SeqId(0), SeqId(0), SeqId(77)])
    assert ring.counts == {"replays": 1}
    assert [frame.kind for frame in _injected(ring)] == [FrameKind.RELEASE, FrameKind.HIDDEN]


def test_replays_without_a_token_end_in_an_error_and_a_token_starts_the_count_again() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    for seq_id in (0, 1):
        ring.poll(0.0)
        ring.fault([SeqId(seq_id)])
    (row,) = _lap(ring)
    ring.sampled(row.seq_id, 40)
    for seq_id in (2, 3, 4):
        ring.poll(0.0)
        ring.fault([SeqId(seq_id)])
    ended = ring.poll(0.0)[0]
    assert isinstance(ended, Ended)
    assert isinstance(ended.event.error, RingStalledError)
    assert ended.event.token is None


def test_a_token_for_a_sequence_that_left_meanwhile_is_no_history() -> None:
    ring, sequence = _ring(), _sequence()
    ring.submit(sequence, now=0.0)
    (row,) = _lap(ring)
    ring.cancel(0)
    assert not ring.awaits_token(row.seq_id)
    assert ring.sampled(row.seq_id, 40) is None
    assert sequence.generated == []
    ring.cancel(0)


def test_a_token_that_was_not_awaited_is_ignored() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    ring.poll(0.0)
    assert ring.sampled(SeqId(0), 40) is None


def test_a_sequence_cancelled_before_any_token_of_it_was_sent_needs_no_release() -> None:
    ring = RingProtocol(RingSettings(chunk_tokens=4, prefill_tokens=4))
    ring.begin_epoch(EPOCH, SPEC)
    ring.submit(_sequence(0, num_prompt=4), now=0.0)
    ring.submit(_sequence(1, num_prompt=4), now=0.0)
    assert len(_injected(ring)) == 1
    assert ring.num_live == 2
    ring.cancel(1)
    assert ring.kv_reserved_tokens == 8
    (ended,) = ring.poll(0.0)
    assert isinstance(ended, Ended)


def test_a_sequence_ends_at_its_deadline_wherever_it_is() -> None:
    ring = _ring(RingSpec(2, kv_tokens=8, context_tokens=32))
    ring.submit(_sequence(0, deadline=3.0), now=0.0)
    ring.submit(_sequence(1, deadline=2.0), now=0.0)
    ring.poll(0.0)
    assert (ring.num_live, ring.next_deadline()) == (1, 2.0)
    (waiting_one,) = ring.poll(2.0)
    live_one, release = ring.poll(3.0)
    assert isinstance(waiting_one, Ended) and isinstance(live_one, Ended) and isinstance(release, Inject)
    assert (waiting_one.event.index, live_one.event.index) == (1, 0)
    assert live_one.event.finish_reason is FinishReason.DEADLINE


def test_a_full_context_ends_the_answer() -> None:
    ring = _ring(RingSpec(1, kv_tokens=64, context_tokens=4))
    ring.submit(_sequence(num_prompt=3, max_tokens=9), now=0.0)
    (row,) = _lap(ring)
    event = ring.sampled(row.seq_id, 40)
    assert event is not None
    assert event.finish_reason is FinishReason.LENGTH


def test_a_failed_forward_ends_its_sequences_alone() -> None:
    ring = _ring()
    ring.submit(_sequence(0), now=0.0)
    ring.submit(_sequence(1), now=0.0)
    ring.poll(0.0)
    error = MdiqError("out of memory")
    ring.fail([SeqId(0), SeqId(50)], error)
    assert ring.num_live == 1
    ring.fail_all(error)
    ends = [action for action in ring.poll(0.0) if isinstance(action, Ended)]
    assert [end.event.error for end in ends] == [error, error]
    assert ring.num_unfinished == 0


def test_what_cannot_be_served_is_refused_at_submission() -> None:
    ring = _ring()
    with pytest.raises(ContextLengthError, match="no tokens"):
        ring.submit(_sequence(num_prompt=0), now=0.0)
    with pytest.raises(ContextLengthError, match="context of 32"):
        ring.submit(_sequence(num_prompt=32), now=0.0)
    small = _ring(RingSpec(2, kv_tokens=8, context_tokens=32))
    with pytest.raises(CapacityError, match="has room for 8"):
        small.submit(_sequence(num_prompt=8), now=0.0)


def test_our_own_mistakes_are_named() -> None:
    ring = RingProtocol()
    assert ring.poll(0.0) == []
    with pytest.raises(LocalProtocolError, match="before an epoch"):
        ring.submit(_sequence(), now=0.0)
    ring.begin_epoch(EPOCH, SPEC)
    ring.submit(_sequence(), now=0.0)
    with pytest.raises(LocalProtocolError, match="a second time"):
        ring.submit(_sequence(), now=0.0)
    with pytest.raises(LocalProtocolError, match="does not grow"):
        ring.begin_epoch(EPOCH, SPEC)


def test_a_new_pace_holds_for_the_next_frames_of_the_same_ring() -> None:
    ring = _ring()
    ring.submit(_sequence(0), now=0.0)
    ring.submit(_sequence(1), now=0.0)
    assert {(frame.cap, frame.chunk_tokens) for frame in _injected(ring)} == {(2, 256)}
    ring.pace(replace(SPEC, caps=(1, 7), shared_chunks=(32,)))
    ring.submit(_sequence(2), now=0.0)
    assert {(frame.cap, frame.chunk_tokens) for frame in _injected(ring)} == {(7, 32)}
    assert ring.most_live == 3


def test_a_sequence_alone_leaves_the_chunk_to_the_stages() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    assert [frame.chunk_tokens for frame in _injected(ring)] == [0]


def test_a_gap_between_tokens_counts_when_a_prompt_was_in_the_ring_meanwhile() -> None:
    ring = _ring()
    ring.submit(_sequence(0, max_tokens=9), now=0.0)
    (row,) = _lap(ring, now=0.0)
    ring.sampled(row.seq_id, 40, now=1.0)
    assert _lap(ring, now=1.0) == [row]
    ring.sampled(row.seq_id, 41, now=5.0)
    assert ring.decode_gap_s == 0.0, "nobody else was there"
    (frame,) = _injected(ring, now=5.0)
    ring.submit(_sequence(1), now=5.5)
    (prompt,) = _injected(ring, now=5.5)
    ring.returned(_head(*prompt.segments))
    ring.returned(_head(*frame.segments))
    ring.sampled(row.seq_id, 42, now=7.0)
    assert ring.decode_gap_s == 2.0
    ring.sampled(SeqId(1), 50, now=7.0)
    assert ring.decode_gap_s == 2.0, "a first token has no gap before it"
