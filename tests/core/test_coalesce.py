"""Batches keep the order of arrival within a Sequence, the cap and the token budget."""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core.coalesce import Queued, coalesce
from mdiq.core.frame import NO_ROWS, Segment
from mdiq.core.types import SeqId


def _queue(*items: tuple[int, int]) -> deque[Queued]:
    """Return Segments (sequence, length), each at the place behind the one before."""
    return deque(Queued(Segment(SeqId(seq_id), i, length), NO_ROWS) for i, (seq_id, length) in enumerate(items))


def _ids(queued: list[Queued]) -> list[int]:
    return [q.segment.seq_id for q in queued]


def test_a_second_segment_of_a_sequence_waits_and_others_pass_it() -> None:
    waiting = _queue((1, 1), (1, 1), (2, 1), (1, 1))
    assert _ids(coalesce(waiting, 8, 99)) == [1, 2]
    assert [q.segment.start for q in waiting] == [1, 3]


def test_the_budget_stops_at_the_first_that_does_not_fit_so_that_none_starves() -> None:
    waiting = _queue((1, 4), (2, 8), (3, 1))
    assert _ids(coalesce(waiting, 8, 10)) == [1]
    assert _ids(coalesce(waiting, 8, 5)) == [2]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=40),
    st.integers(1, 8),
    st.integers(1, 20),
)
def test_every_segment_is_run_once_and_in_the_order_of_its_sequence(
    items: list[tuple[int, int]], cap: int, token_budget: int
) -> None:
    waiting = _queue(*items)
    oldest = [q.segment for q in waiting]
    ran: list[Segment] = []
    while waiting:
        taken = [q.segment for q in coalesce(waiting, cap, token_budget)]
        assert 1 <= len(taken) <= cap
        assert len({s.seq_id for s in taken}) == len(taken)
        assert len(taken) == 1 or sum(s.length for s in taken) <= token_budget
        assert taken[0] == next(s for s in oldest if s not in ran)  # none starves
        ran += taken
    assert sorted(ran, key=lambda s: s.start) == oldest
    for seq_id in {s.seq_id for s in ran}:
        starts = [s.start for s in ran if s.seq_id == seq_id]
        assert starts == sorted(starts)


def test_a_first_segment_that_is_not_ready_holds_back_those_behind_it_and_nothing_else() -> None:
    waiting = deque(
        Queued(segment, NO_ROWS)
        for segment in (
            Segment(SeqId(1), 4, 4),
            Segment(SeqId(1), 8, 4),
            Segment(SeqId(3), 12, 1, parent=SeqId(1)),
            Segment(SeqId(3), 13, 1),
            Segment(SeqId(4), 0, 1),
            Segment(SeqId(2), 7, 1),
        )
    )
    ready = False

    def is_ready(segment: Segment) -> bool:
        return ready or segment.parent is None

    assert _ids(coalesce(waiting, 8, 99, is_ready)) == [1, 2]
    assert [str(q.segment) for q in waiting] == ["1[8:12]", "3<1[12:13]", "3[13:14]", "4[0:1]"]
    assert _ids(coalesce(waiting, 8, 99, is_ready)) == [1]
    assert coalesce(waiting, 8, 99, is_ready) == []
    ready = True
    assert _ids(coalesce(waiting, 8, 99, is_ready)) == [3, 4]
    assert [str(q.segment) for q in waiting] == ["3[13:14]"]
