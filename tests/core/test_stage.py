"""What a Stage believes, runs and sends on."""

import pytest

from mdiq.core.frame import MAX_SEGMENTS, NO_ROWS, Batch, Frame, FrameKind, Segment, TokenIds
from mdiq.core.stage import Receipt, StageProtocol
from mdiq.core.types import Epoch, SeqId
from mdiq.errors import LocalProtocolError, RemoteProtocolError

EPOCH = Epoch(3)


def _stage(*, is_last: bool = False, epoch: Epoch = EPOCH) -> StageProtocol:
    stage = StageProtocol(token_budget=16)
    stage.assign(epoch, is_last=is_last)
    return stage


def _hidden(*segments: tuple[int, int, int], cap: int = 8, epoch: Epoch = EPOCH, wants_logits: bool = False) -> Frame:
    parts = tuple(Segment(SeqId(seq_id), start, length, wants_logits) for seq_id, start, length in segments)
    ids = tuple(100 * s.seq_id + position for s in parts for position in range(s.start, s.stop))
    return Frame(epoch, FrameKind.HIDDEN, parts, TokenIds(ids), cap)


def _release(*seq_ids: int, epoch: Epoch = EPOCH) -> Frame:
    return Frame(epoch, FrameKind.RELEASE, tuple(Segment(SeqId(seq_id), 0, 0) for seq_id in seq_ids))


def _run(stage: StageProtocol) -> tuple[Batch, list[Frame]]:
    batch = stage.take()
    assert batch is not None
    return batch, stage.complete(batch, TokenIds((0,) * batch.num_tokens))


def test_segments_that_wait_are_run_as_one_batch_and_sent_on_as_one_frame() -> None:
    stage = _stage()
    assert not stage.has_work
    assert stage.receive(_hidden((1, 0, 3))) == Receipt(queued=1)
    assert stage.receive(_hidden((2, 0, 2), cap=5)) == Receipt(queued=1)
    assert stage.num_waiting == 2
    batch, frames = _run(stage)
    assert batch.payloads == (TokenIds((100, 101, 102)), TokenIds((200, 201)))
    assert [str(frame) for frame in frames] == ["HIDDEN epoch 3 [1[0:3] 2[0:2]]"]
    assert frames[0].cap == 5
    assert stage.take() is None


def test_one_frame_gives_each_segment_its_own_rows() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 2), (2, 0, 1), (3, 0, 2)))
    batch, _ = _run(stage)
    assert batch.payloads == (TokenIds((100, 101)), TokenIds((200,)), TokenIds((300, 301)))


def test_the_cap_of_the_newest_frame_holds() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 1), (2, 0, 1), (3, 0, 1), cap=8))
    stage.receive(_hidden((4, 0, 1), cap=2))
    batch, _ = _run(stage)
    assert len(batch.segments) == 2


def test_the_last_stage_sends_rows_for_the_head_alone() -> None:
    stage = _stage(is_last=True)
    stage.receive(_hidden((1, 0, 3), wants_logits=True))
    batch = stage.take()
    assert batch is not None
    (frame,) = stage.complete(batch, TokenIds((9,)))
    assert (frame.kind, frame.num_rows) == (FrameKind.HEAD, 1)


def test_a_second_copy_is_a_duplicate_and_a_later_start_is_a_gap() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 3)))
    assert stage.receive(_hidden((1, 0, 3))) == Receipt(duplicates=1)
    assert stage.receive(_hidden((1, 4, 1))) == Receipt(gaps=(SeqId(1),))
    assert stage.receive(_hidden((1, 3, 1))) == Receipt(queued=1)
    assert stage.receive(_hidden((2, 5, 1))) == Receipt(gaps=(SeqId(2),))
    assert stage.counts == {"queued": 2, "duplicates": 1, "gaps": 2}


def test_the_first_segment_of_an_older_sequence_is_late_and_dropped() -> None:
    stage = _stage()
    stage.receive(_hidden((7, 0, 1)))
    assert stage.receive(_hidden((6, 0, 1))) == Receipt(duplicates=1)


def test_a_frame_of_another_epoch_is_dropped_and_counted() -> None:
    stage = _stage()
    for epoch in (Epoch(2), Epoch(4)):
        assert stage.receive(_hidden((1, 0, 1), (2, 0, 1), epoch=epoch)) == Receipt(stale=2)
        assert stage.receive(_release(1, epoch=epoch)) == Receipt(stale=1)
    assert not stage.has_work
    assert stage.counts == {"stale": 6}


def test_rows_for_the_head_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="order of the ring's hops"):
        _stage().receive(Frame(EPOCH, FrameKind.HEAD, ()))


def test_a_burst_that_measures_a_hop_is_nothing_to_compute() -> None:
    with pytest.raises(RemoteProtocolError, match="measures a hop"):
        _stage().receive(Frame(EPOCH, FrameKind.BURST, (Segment(SeqId(1), 0, 1),)))


def test_a_release_drops_what_waits_frees_the_cache_and_goes_on() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 3), (2, 0, 1)))
    assert stage.receive(_release(1)) == Receipt()
    batch, frames = _run(stage)
    assert (batch.releases, [s.seq_id for s in batch.segments]) == ((SeqId(1),), [SeqId(2)])
    assert [frame.kind for frame in frames] == [FrameKind.RELEASE, FrameKind.HIDDEN]
    assert stage.receive(_hidden((1, 0, 3))) == Receipt(duplicates=1)


def test_a_release_alone_makes_a_batch_and_bars_a_sequence_that_was_never_seen() -> None:
    stage = _stage()
    stage.receive(_release(4))
    batch, frames = _run(stage)
    assert (batch.segments, [str(frame) for frame in frames]) == ((), ["RELEASE epoch 3 [4[0:0]]"])
    assert stage.receive(_hidden((4, 0, 1))) == Receipt(duplicates=1)


def test_more_releases_than_a_frame_holds_go_in_several() -> None:
    stage = _stage()
    stage.receive(_release(*range(MAX_SEGMENTS)))
    stage.receive(_release(MAX_SEGMENTS))
    _, frames = _run(stage)
    assert [len(frame.segments) for frame in frames] == [MAX_SEGMENTS, 1]


def test_no_batch_exceeds_a_frame_whatever_the_cap() -> None:
    stage = StageProtocol(token_budget=10_000)
    stage.assign(EPOCH, is_last=False)
    stage.receive(_hidden(*((i, 0, 1) for i in range(MAX_SEGMENTS + 1)), cap=60_000))
    batch, _ = _run(stage)
    assert len(batch.segments) == MAX_SEGMENTS


def test_nothing_is_taken_while_a_batch_runs() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 1)))
    batch = stage.take()
    stage.receive(_hidden((2, 0, 1)))
    assert not stage.has_work
    assert stage.take() is None
    assert batch is not None
    stage.complete(batch, TokenIds((0,)))
    assert stage.has_work


def test_a_batch_that_outlives_its_epoch_sends_nothing() -> None:
    for finish in ("complete", "fail"):
        stage = _stage()
        stage.receive(_hidden((1, 0, 1)))
        batch = stage.take()
        assert batch is not None
        stage.assign(Epoch(4), is_last=False)
        if finish == "complete":
            assert stage.complete(batch, TokenIds((0,))) == []
        else:
            assert stage.fail(batch) == ((), [])
        assert not stage.has_work


def test_a_failed_batch_gives_up_its_sequences_and_still_sends_releases_on() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 1), (2, 0, 1)))
    _run(stage)
    stage.receive(_release(2))
    stage.receive(_hidden((1, 1, 1)))
    batch = stage.take()
    stage.receive(_hidden((1, 2, 1)))
    assert batch is not None
    seq_ids, frames = stage.fail(batch)
    assert seq_ids == (SeqId(1),)
    assert [str(frame) for frame in frames] == ["RELEASE epoch 3 [2[0:0]]"]
    assert stage.num_waiting == 0
    assert stage.receive(_hidden((1, 3, 1))) == Receipt(gaps=(SeqId(1),))


def test_some_sequences_of_a_batch_are_given_up_and_the_others_run() -> None:
    stage = _stage()
    stage.receive(_release(0))
    stage.receive(_hidden((1, 0, 2), (2, 0, 1), (3, 0, 1)))
    batch = stage.take()
    assert batch is not None
    rest = stage.drop(batch, [SeqId(2)])
    assert [segment.seq_id for segment in rest.segments] == [1, 3]
    assert [payload.num_rows for payload in rest.payloads] == [2, 1]
    assert rest.releases == batch.releases == (SeqId(0),)
    with pytest.raises(LocalProtocolError):
        stage.complete(batch, TokenIds((0, 0, 0, 0)))
    assert [str(frame) for frame in stage.complete(rest, TokenIds((0, 0, 0)))] == [
        "RELEASE epoch 3 [0[0:0]]",
        "HIDDEN epoch 3 [1[0:2] 3[0:1]]",
    ]
    assert stage.receive(_hidden((1, 2, 1), (2, 1, 1))) == Receipt(queued=1, gaps=(SeqId(2),))
    batch = stage.take()
    assert batch is not None
    stage.assign(Epoch(9), is_last=False)
    assert stage.complete(stage.drop(batch, [SeqId(1)]), TokenIds(())) == []


def test_an_assignment_forgets_every_sequence() -> None:
    stage = _stage()
    stage.receive(_hidden((5, 0, 2)))
    stage.receive(_release(4))
    stage.assign(Epoch(9), is_last=True)
    assert not stage.has_work
    assert stage.receive(_hidden((5, 2, 1), epoch=Epoch(9))) == Receipt(gaps=(SeqId(5),))
    assert stage.receive(_hidden((6, 0, 1), epoch=Epoch(9))) == Receipt(queued=1)


def test_our_own_mistakes_are_named() -> None:
    stage = _stage()
    with pytest.raises(LocalProtocolError, match="does not grow"):
        stage.assign(EPOCH, is_last=False)
    stage.receive(_hidden((1, 0, 2)))
    batch = stage.take()
    assert batch is not None
    with pytest.raises(LocalProtocolError, match="not the one"):
        stage.complete(Batch(EPOCH, (), ()), NO_ROWS)
    with pytest.raises(LocalProtocolError, match="gave 1 rows, not 2"):
        stage.complete(batch, TokenIds((0,)))


def test_decode_segments_and_prompts_take_turns_and_are_never_mixed() -> None:
    stage = _stage()
    for seq_id in (1, 2, 3):
        stage.receive(_hidden((seq_id, 0, 2)))
        _run(stage)
    stage.receive(_hidden((4, 0, 9)))
    stage.receive(_hidden((5, 0, 9), (1, 2, 1), (2, 2, 1)))
    stage.receive(_hidden((3, 2, 1), cap=1))
    # All decode Segments at once, whatever the cap: none of them waits for a second chunk.
    assert [[s.seq_id for s in _run(stage)[0].segments] for _ in range(3)] == [[1, 2, 3], [4], [5]]


def test_prompts_are_not_kept_waiting_by_decode_segments_that_come_again_and_again() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 2)))
    _run(stage)
    ran: list[list[int]] = []
    for seq_id in (2, 3):
        stage.receive(_hidden((seq_id, 0, 9)))
    for position in range(2, 6):
        stage.receive(_hidden((1, position, 1)))
        ran.append([s.seq_id for s in _run(stage)[0].segments])
    assert ran == [[1], [2], [1], [3]]


def test_without_prompts_decode_segments_are_taken_up_to_the_cap() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 1), (2, 0, 1), (3, 0, 1)))
    _run(stage)
    stage.receive(_hidden((1, 1, 1), (2, 1, 1), (3, 1, 1), cap=2))
    assert [len(_run(stage)[0].segments) for _ in range(2)] == [2, 1]


def test_a_batch_of_prompts_holds_no_more_tokens_than_the_frames_say() -> None:
    stage = _stage()
    stage.receive(Frame(EPOCH, FrameKind.HIDDEN, (Segment(SeqId(1), 0, 5),), TokenIds((0,) * 5), 8, 6))
    stage.receive(Frame(EPOCH, FrameKind.HIDDEN, (Segment(SeqId(2), 0, 5),), TokenIds((0,) * 5), 8, 6))
    batch, frames = _run(stage)
    assert batch.num_tokens == 5
    assert frames[0].chunk_tokens == 6, "it tells the next Stage"


def test_a_prompt_that_ends_with_a_chunk_of_one_token_keeps_its_order() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 9)))
    stage.receive(_hidden((1, 9, 1)))
    assert [_run(stage)[0].segments[0].start for _ in range(2)] == [0, 9]
    stage.receive(_hidden((1, 10, 1)))
    stage.receive(_hidden((2, 0, 9)))
    stage.receive(_hidden((1, 11, 4)))
    assert [str(_run(stage)[0].segments[0]) for _ in range(3)] == ["1[10:11]", "2[0:9]", "1[11:15]"]


def test_no_release_passes_a_first_segment_of_a_lower_id() -> None:
    """At the next Stage it would bar that Sequence, whose first Segment would be taken for a late one."""
    stage, following = _stage(), _stage()
    stage.receive(_hidden((1, 0, 2), (2, 0, 2), (3, 0, 2), cap=1))
    stage.receive(_release(3))
    kinds: list[FrameKind] = []
    while stage.has_work:
        _, frames = _run(stage)
        for frame in frames:
            kinds.append(frame.kind)
            assert following.receive(frame).duplicates == 0
    assert kinds == [FrameKind.HIDDEN, FrameKind.HIDDEN, FrameKind.RELEASE]


def test_a_probe_passes_at_once_and_changes_nothing() -> None:
    stage = _stage()
    probe = Frame(EPOCH, FrameKind.PROBE, (Segment(SeqId(7), 0, 0),))
    assert stage.receive(probe) == Receipt(passes=True)
    assert not stage.has_work
    assert stage.receive(_hidden((1, 0, 1))) == Receipt(queued=1)
    assert stage.receive(Frame(Epoch(2), FrameKind.PROBE, probe.segments)).passes is False


def test_a_stage_knows_the_newest_probe_of_its_epoch() -> None:
    stage = _stage()
    for epoch, number, newest in ((3, 4, 4), (3, 9, 9), (3, 8, 9), (2, 30, 9)):
        stage.receive(Frame(Epoch(epoch), FrameKind.PROBE, (Segment(SeqId(number), 0, 0),)))
        assert stage.newest_probe == newest
    stage.assign(Epoch(4), is_last=False)
    assert stage.newest_probe == 0


def _fork(seq_id: int, parent: int, start: int, length: int = 1, wants_logits: bool = False) -> Frame:
    segment = Segment(SeqId(seq_id), start, length, wants_logits, SeqId(parent))
    return Frame(EPOCH, FrameKind.HIDDEN, (segment,), TokenIds(tuple(range(length))), cap=8)


def test_a_sequence_begins_with_the_cache_of_another_once_that_has_run() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 4)))
    stage.receive(_hidden((1, 4, 4)))
    assert stage.receive(_fork(2, parent=1, start=8)) == Receipt(queued=1)
    assert stage.receive(_hidden((2, 9, 1))) == Receipt(queued=1)
    ran = [[str(segment) for segment in _run(stage)[0].segments] for _ in range(4)]
    assert ran == [["1[0:4]"], ["1[4:8]"], ["2<1[8:9]"], ["2[9:10]"]]
    assert stage.receive(_fork(3, parent=2, start=4)) == Receipt(queued=1)
    assert str(_run(stage)[1][0]) == "HIDDEN epoch 3 [3<2[4:5]]"


def test_the_head_is_told_nothing_of_parents() -> None:
    stage = _stage(is_last=True)
    stage.receive(_hidden((1, 0, 4)))
    batch = stage.take()
    assert batch is not None
    stage.complete(batch, NO_ROWS)
    stage.receive(_fork(2, parent=1, start=4, wants_logits=True))
    assert str(_run(stage)[1][0]) == "HEAD epoch 3 [2[4:5]*]"


def test_a_parent_that_is_unknown_or_too_short_is_a_gap() -> None:
    stage = _stage()
    assert stage.receive(_fork(2, parent=1, start=4)) == Receipt(gaps=(SeqId(2),))
    stage.receive(_hidden((3, 0, 3)))
    assert stage.receive(_fork(4, parent=3, start=4)) == Receipt(gaps=(SeqId(4),))
    assert stage.receive(_fork(3, parent=2, start=3)) == Receipt(gaps=(SeqId(3),)), "it has begun without a parent"


def test_a_second_or_late_first_segment_behind_a_parent_is_a_duplicate() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 4)))
    stage.receive(_fork(3, parent=1, start=4))
    assert stage.receive(_fork(3, parent=1, start=4)) == Receipt(duplicates=1)
    assert stage.receive(_fork(2, parent=1, start=4)) == Receipt(duplicates=1)


def test_a_release_drops_what_waits_to_begin_with_that_cache_as_a_gap() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 4)))
    stage.receive(_fork(2, parent=1, start=4))
    stage.receive(_fork(3, parent=2, start=4))
    stage.receive(_hidden((3, 5, 1), (4, 0, 1)))
    assert stage.receive(_release(1)) == Receipt(gaps=(SeqId(2), SeqId(3)))
    assert [str(segment) for segment in _run(stage)[0].segments] == ["4[0:1]"]
    assert stage.receive(_hidden((3, 6, 1))) == Receipt(gaps=(SeqId(3),))
    assert stage.counts["gaps"] == 3


def test_a_parent_released_while_it_runs_leaves_nothing_behind() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 4)))
    batch = stage.take()
    stage.receive(_release(1))
    assert batch is not None
    stage.complete(batch, TokenIds((0,) * 4))
    assert stage.receive(_fork(2, parent=1, start=4)) == Receipt(gaps=(SeqId(2),))


def test_a_failed_batch_gives_up_what_waits_to_begin_with_its_cache() -> None:
    stage = _stage()
    stage.receive(_hidden((1, 0, 4)))
    stage.receive(_fork(2, parent=1, start=4))
    batch = stage.take()
    assert batch is not None
    assert stage.fail(batch) == ((SeqId(1),), [])
    assert stage.num_waiting == 0
    assert stage.receive(_hidden((2, 5, 1))) == Receipt(gaps=(SeqId(2),))
