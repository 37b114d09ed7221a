"""The Starter's books: who is in the Ring, what is overdue, and how each Sequence ends."""

from dataclasses import replace

import pytest

from mdiq.core.frame import Frame, FrameKind, Segment, TokenIds
from mdiq.core.ring import RingProtocol, RingSettings
from mdiq.core.ring_actions import Ended, HeadRow, Inject, Suspect
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.types import Epoch, RingSpec, SeqId
from mdiq.errors import CapacityError, ContextLengthError, LocalProtocolError, MdiqError, RingStalledError

EPOCH = Epoch(1)
SPEC = RingSpec(num_stages=2, kv_tokens=64, context_tokens=32, caps=(1, 2))
SETTINGS = RingSettings(
    chunk_tokens=4, prefill_tokens=64, lap_timeout_s=10.0, token_timeout_s=0.0, max_replays=2, prefix_tokens=0
)


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
    assert ring.kv_reserved_tokens == 4, "no Stage sees the last token"
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
    assert ring.kv_reserved_tokens == 4
    (ended,) = ring.poll(0.0)
    assert isinstance(ended, Ended)


def test_a_sequence_ends_at_its_deadline_wherever_it_is() -> None:
    ring = _ring(RingSpec(2, kv_tokens=6, context_tokens=32))
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
    assert ring.peak_live == 3


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


BLOCKS = RingSpec(num_stages=2, kv_tokens=64, context_tokens=32, caps=(1, 2), kv_block_tokens=4)


def _reusing_ring(
    kv_tokens: int = 64, *, chunk_tokens: int = 4, prefill_tokens: int = 64, prefix_tokens: int | None = None
) -> RingProtocol:
    ring = RingProtocol(
        replace(SETTINGS, chunk_tokens=chunk_tokens, prefill_tokens=prefill_tokens, prefix_tokens=prefix_tokens)
    )
    ring.begin_epoch(EPOCH, replace(BLOCKS, kv_tokens=kv_tokens))
    return ring


def _chat(index: int, *tokens: int, max_tokens: int = 2) -> Sequence:
    return Sequence(index, tokens, SamplingParams(max_tokens=max_tokens))


def _answered(ring: RingProtocol, sequence: Sequence) -> list[str]:
    """Run a Sequence to its end; return the Segments that went round."""
    ring.submit(sequence, 0.0)
    sent: list[str] = []
    while sequence.finish_reason is None:
        for frame in _injected(ring):
            sent += [str(segment) for segment in frame.segments]
            if frame.kind is FrameKind.RELEASE:
                ring.returned(frame)
                continue
            for row in ring.returned(_head(*frame.segments)):
                ring.sampled(row.seq_id, 40 + row.sequence.num_tokens)
    return sent


def test_the_next_turn_of_a_chat_sends_its_new_tokens_alone() -> None:
    ring = _reusing_ring()
    first = _chat(0, *range(7))
    assert _answered(ring, first) == ["0[0:4]", "0[4:7]*", "0[7:8]*"]
    assert (ring.is_quiet, ring.num_retained, ring.kv_reserved_tokens) == (True, 1, 8)
    second = _chat(1, *range(7), *first.generated, 9, 9)
    assert _answered(ring, second) == ["1<0[8:11]*", "1[11:12]*"]
    assert (first.cached_prompt_tokens, second.cached_prompt_tokens) == (0, 8)
    assert ring.prefill == {"prefill_tokens": 10, "prefix_hits": 1, "prefix_tokens": 8}
    assert not ring.counts
    # The first one holds nothing that the second does not: it goes.
    assert [str(frame) for frame in _injected(ring)] == ["RELEASE epoch 1 [0[0:0]]"]
    assert (ring.num_retained, ring.kv_reserved_tokens) == (1, 12)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    ring = _reusing_ring()
    _answered(ring, _chat(0, *range(8)))
    assert _answered(ring, _chat(1, *range(8), max_tokens=1)) == ["1<0[4:8]*"]
    assert _answered(ring, _chat(2, *range(9), max_tokens=1)) == ["0[0:0]", "2<1[8:9]*"]


def test_a_prompt_that_differs_early_shares_what_comes_before() -> None:
    ring = _reusing_ring()
    _answered(ring, _chat(0, *range(12)))
    assert _answered(ring, _chat(1, *range(5), 30, 31, 32, 33, max_tokens=1)) == ["1<0[4:8]", "1[8:9]*"]
    assert _answered(ring, _chat(2, 9, *range(11), max_tokens=1))[0] == "2[0:4]"


def test_sequences_that_arrive_together_share_the_prompt_of_the_first_while_it_is_under_way() -> None:
    ring = _reusing_ring(kv_tokens=48)
    for index in (0, 1, 2):
        ring.submit(_chat(index, *range(8), 20 + index, max_tokens=4), 0.0)
    assert [str(frame.segments[0]) for frame in _injected(ring)] == [
        "0[0:4]",
        "0[4:8]",
        "0[8:9]*",
        "1<0[8:9]*",
        "2<0[8:9]*",
    ]
    assert ring.kv_reserved_tokens == 12 + 4 + 4


def test_what_is_sent_between_admission_and_entry_is_shared_too() -> None:
    ring = _reusing_ring(prefill_tokens=4)
    ring.submit(_chat(0, *range(8), 20), 0.0)
    ring.submit(_chat(1, *range(8), 21), 0.0)
    sent = []
    for _ in range(4):
        frames = _injected(ring)
        sent += [str(frame.segments[0]) for frame in frames]
        for frame in frames:
            ring.returned(_head(*frame.segments))
    assert sent == ["0[0:4]", "0[4:8]", "0[8:9]*", "1<0[8:9]*"]


def test_no_reuse_is_no_reuse() -> None:
    ring = _reusing_ring(prefix_tokens=0)
    _answered(ring, _chat(0, *range(8)))
    assert _answered(ring, _chat(1, *range(9), max_tokens=1)) == ["0[0:0]", "1[0:4]", "1[4:8]", "1[8:9]*"]
    assert ring.prefill == {"prefill_tokens": 17}


def test_retained_prefixes_keep_within_their_limit_and_the_least_recently_used_goes() -> None:
    ring = _reusing_ring(prefix_tokens=8)
    for index, first in enumerate((10, 20)):
        _answered(ring, _chat(index, *range(first, first + 5), max_tokens=1))
    _answered(ring, _chat(2, *range(10, 15), max_tokens=1))  # used again; takes the place of its double
    _answered(ring, _chat(3, *range(30, 35), max_tokens=1))
    assert ring.num_retained == 2
    assert _answered(ring, _chat(4, *range(10, 15), max_tokens=1))[-1] == "4<2[4:5]*"
    assert _answered(ring, _chat(5, *range(20, 25), max_tokens=1))[-2:] == ["5[0:4]", "5[4:5]*"]


def test_retained_prefixes_make_room_for_a_sequence_that_waits_but_not_for_nothing() -> None:
    ring = _reusing_ring(kv_tokens=32)
    for index, first in enumerate((10, 20)):
        _answered(ring, _chat(index, *range(first, first + 8), max_tokens=1))
    ring.submit(_chat(2, *range(13), max_tokens=3), 0.0)  # all that is free
    *_, frame = _injected(ring)
    ring.submit(_chat(3, *range(20, 45), max_tokens=7), 0.0)
    assert _injected(ring) == []
    assert ring.num_retained == 2, "their room would not do"
    (row,) = ring.returned(_head(*frame.segments))
    ring.sampled(row.seq_id, 1)
    ring.cancel(2)
    kinds = [str(action.frame) for action in ring.poll(0.0) if isinstance(action, Inject)]
    assert kinds == ["RELEASE epoch 1 [2[0:0] 0[0:0]]"]
    ring.returned(Frame(EPOCH, FrameKind.RELEASE, (Segment(SeqId(2), 0, 0), Segment(SeqId(0), 0, 0))))
    assert str(_injected(ring)[0].segments[0]) == "3<1[8:12]"
    assert ring.kv_reserved_tokens == 28


def test_a_prefix_is_given_up_by_the_sequence_that_would_use_it_if_there_is_no_room_for_both() -> None:
    ring = _reusing_ring(kv_tokens=32)
    _answered(ring, _chat(0, *range(20), max_tokens=1))
    ring.submit(_chat(1, *range(4), *range(20, 44), max_tokens=23), 0.0)
    (release,) = _injected(ring)
    assert release.kind is FrameKind.RELEASE
    ring.returned(release)
    assert str(_injected(ring)[0].segments[0]) == "1[0:4]"


def test_a_parent_is_not_given_up_before_the_first_segment_behind_it_is_back() -> None:
    ring = _reusing_ring()
    _answered(ring, _chat(0, *range(8)))
    ring.submit(_chat(1, *range(9)), 0.0)
    (frame,) = _injected(ring)
    ring.drop_prefixes()
    assert _injected(ring) == []
    ring.returned(_head(*frame.segments))
    ring.drop_prefixes()
    assert [str(release) for release in _injected(ring)] == ["RELEASE epoch 1 [0[0:0]]"]


def test_a_gap_behind_a_retained_parent_gives_it_up_and_the_replay_computes_all() -> None:
    ring = _reusing_ring()
    _answered(ring, _chat(0, *range(8)))
    ring.submit(_chat(1, *range(9)), 0.0)
    ring.poll(0.0)
    ring.fault([SeqId(1)])
    release, *replay = _injected(ring)
    assert str(release) == "RELEASE epoch 1 [1[0:0] 0[0:0]]"
    assert [str(frame.segments[0]) for frame in replay] == ["2[0:4]", "2[4:8]", "2[8:9]*"]
    assert ring.counts == {"replays": 1}


@pytest.mark.parametrize("how", ["cancelled", "failed", "gap"])
def test_a_parent_that_leaves_the_ring_has_those_that_were_to_begin_with_its_cache_begin_again(how: str) -> None:
    ring = _reusing_ring(prefill_tokens=10)
    for index in (0, 1, 2):
        ring.submit(_chat(index, *range(8), 20 + index), 0.0)
    ring.poll(0.0)  # the third one is let in behind the same prefix, and not sent yet
    assert ring.num_live == 3
    if how == "cancelled":
        ring.cancel(0)
    elif how == "failed":
        ring.fail([SeqId(0)], MdiqError("out of memory"))
    else:
        ring.fault([SeqId(0)])
    frames = [action.frame for action in ring.poll(0.0) if isinstance(action, Inject)]
    assert str(frames[0]) == "RELEASE epoch 1 [0[0:0] 1[0:0]]"
    assert {str(frame.segments[0]).partition("[")[0] for frame in frames[1:]} == {"3", "4<3"}
    assert ring.counts["restarts"] == 2
    assert ring.counts["replays"] == (how == "gap")


def test_a_parent_that_ends_is_kept_for_those_that_begin_with_its_cache() -> None:
    ring = _reusing_ring()
    ring.submit(_chat(0, *range(9), max_tokens=1), 0.0)
    ring.submit(_chat(1, *range(10), max_tokens=1), 0.0)
    *frames, behind = _injected(ring)
    (row,) = ring.returned(_head(*(segment for frame in frames for segment in frame.segments)))
    ring.sampled(row.seq_id, 40)
    ring.drop_prefixes()
    assert (_injected(ring), ring.num_retained, ring.counts) == ([], 1, {})
    assert len(ring.returned(_head(*behind.segments))) == 1


def test_a_new_epoch_knows_no_prefixes() -> None:
    ring = _reusing_ring()
    _answered(ring, _chat(0, *range(8)))
    ring.begin_epoch(Epoch(2), BLOCKS)
    assert (ring.num_retained, ring.kv_reserved_tokens) == (0, 0)
    ring.submit(_chat(1, *range(9)), 0.0)
    assert str(_injected(ring)[0].segments[0]) == "1[0:4]"


def test_a_lost_decode_segment_does_not_hold_back_a_healthy_sequence() -> None:
    """Those that wait for a group under way wait for a few Laps, and not until it is overdue."""
    ring = RingProtocol(SETTINGS)
    ring.begin_epoch(EPOCH, replace(SPEC, caps=(1, 2)))
    for index in (0, 1):
        ring.submit(_sequence(index, max_tokens=9), now=0.0)
    first, second = _lap(ring, now=0.0)
    ring.sampled(first.seq_id, 40, now=0.1)
    assert len(_injected(ring, now=0.1)) == 1  # and it never returns
    ring.sampled(second.seq_id, 50, now=0.2)
    assert _injected(ring, now=0.2) == [], "one group is under way, and one is all that the Plan wants"
    again_at = ring.next_deadline()
    assert again_at is not None and 0.2 < again_at < 1.0
    assert [frame.segments[0].seq_id for frame in _injected(ring, now=again_at)] == [second.seq_id]


def test_a_returned_segment_that_denies_its_row_is_left_to_the_deadline() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    (frame,) = _injected(ring)
    wrong = tuple(replace(segment, wants_logits=False) for segment in frame.segments)
    assert ring.returned(Frame(EPOCH, FrameKind.HEAD, wrong)) == []
    assert ring.counts["duplicates"] == 1
    assert ring.next_deadline() is not None, "it is still under way"


def test_figures_begin_anew_behind_a_rehearsal() -> None:
    ring = _ring()
    ring.submit(_sequence(max_tokens=1), now=0.0)
    (row,) = _lap(ring)
    ring.sampled(row.seq_id, 4, now=0.1)
    ring.fault([SeqId(99)])
    ring.returned(_head(Segment(SeqId(99), 0, 1)))
    assert (ring.peak_live, ring.prefill["prefill_tokens"], ring.counts["unknown"]) == (1, 3, 1)
    ring.reset_counts()
    assert (ring.peak_live, ring.decode_gap_s, dict(ring.prefill), dict(ring.counts)) == (0, 0.0, {}, {})


def _measured_ring() -> tuple[RingProtocol, Sequence]:
    """Return a Ring with a Sequence whose second token is on its Lap since 1.1 s, after a Lap of 0.1 s."""
    ring = RingProtocol(replace(SETTINGS, lap_timeout_s=60.0))
    ring.begin_epoch(EPOCH, SPEC)
    sequence = _sequence(max_tokens=9)
    ring.submit(sequence, now=0.0)
    for now in (0.0, 1.0):
        for frame in _injected(ring, now):
            (row,) = ring.returned(_head(*frame.segments), now + 0.1)
            ring.sampled(row.seq_id, 40, now=now + 0.1)
    assert len(_injected(ring, 1.1)) == 1
    return ring, sequence


def test_a_lost_frame_costs_as_long_as_the_measured_lap_says_and_not_a_minute() -> None:
    ring, _ = _measured_ring()
    for now in (2.0, 3.0):
        ring.heard(now)
        assert ring.poll(now) == []
    suspect, *frames = ring.poll(3.2)
    assert suspect == Suspect(EPOCH) and len(frames) == 3
    assert ring.counts["replays"] == 1


def test_a_cut_of_twenty_seconds_costs_no_replays_and_the_stream_goes_on_within_seconds_of_the_mend() -> None:
    ring, _ = _measured_ring()
    while (due := ring.next_deadline()) is not None and due < 21.0:
        assert ring.poll(due) == []
    assert not ring.counts
    ring.heard(21.0)
    due = ring.next_deadline()
    assert due is not None and due < 24.0
    ring.heard(22.0)
    ring.heard(due)
    assert len(ring.poll(due)) == 4
    assert ring.counts == {"overdue": 1, "replays": 1}


def test_a_segment_that_comes_after_it_was_given_up_teaches_patience() -> None:
    ring, _ = _measured_ring()
    (old,) = [entry for entry in ring._scheduler.live.values()]
    stop = old.sequence.num_tokens
    for now in (2.0, 3.0, 3.2):
        ring.heard(now)
    ring.poll(3.2)
    assert ring.returned(_head(Segment(SeqId(0), stop - 1, 1, wants_logits=True)), 9.1) == []
    assert ring.counts == {"overdue": 1, "replays": 1, "unknown": 1}
    ring.submit(_sequence(5), now=10.0)
    ring.poll(10.0)
    entry = next(entry for entry in ring._scheduler.live.values() if entry.sequence.index == 5)
    assert entry.in_flight[0].due > 15.0
