"""A prompt whose log-probabilities are wanted: its Segments ask for all their rows, once, whatever is lost."""

from mdiq.core.frame import Frame, FrameKind, Segment, TokenIds
from mdiq.core.logprobs import LogprobsWanted, TokenLogprob
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import HeadRow, Inject, PromptRows
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import Epoch, RingSpec, SeqId

EPOCH = Epoch(1)
SPEC = RingSpec(num_stages=2, kv_tokens=256, context_tokens=128, pass_tokens=1e6)
SETTINGS = RingSettings(chunk_tokens=4, prefill_tokens=8, lap_timeout_s=10.0, token_timeout_s=0.0, max_replays=2)
FIRST, SECOND = SeqId(0), SeqId(1)


def _ring(settings: RingSettings = SETTINGS) -> RingProtocol:
    ring = RingProtocol(settings)
    ring.begin_epoch(EPOCH, SPEC)
    return ring


def _sequence(num_prompt: int, index: int = 0, *, of_prompt: bool = True) -> Sequence:
    params = SamplingParams(max_tokens=3)
    return Sequence(index, tuple(range(num_prompt)), params, logprobs=LogprobsWanted(of_prompt=of_prompt))


def _sent(ring: RingProtocol, now: float = 0.0) -> list[Segment]:
    frames = [action.frame for action in ring.poll(now) if isinstance(action, Inject)]
    return [segment for frame in frames if frame.kind is FrameKind.HIDDEN for segment in frame.segments]


def _back(ring: RingProtocol, *segments: Segment, epoch: Epoch = EPOCH) -> list[HeadRow | PromptRows]:
    num_rows = sum(segment.num_head_rows for segment in segments)
    return ring.returned(Frame(epoch, FrameKind.HEAD, segments, TokenIds((0,) * num_rows)))


def _score(ring: RingProtocol, rows: HeadRow | PromptRows, num_rows: int | None = None) -> None:
    assert isinstance(rows, PromptRows)
    tokens = rows.sequence.prompt[rows.start + 1 :][: rows.num_rows if num_rows is None else num_rows]
    ring.scored(rows.seq_id, rows.start, [TokenLogprob(token, -float(token)) for token in tokens])


def test_all_rows_but_the_last_score_the_prompt_and_the_last_one_gives_a_token() -> None:
    ring, sequence = _ring(), _sequence(6)
    ring.submit(sequence, now=0.0)
    first, second = _sent(ring)
    assert [str(segment) for segment in (first, second)] == ["0[0:4]+", "0[4:6]*+"]
    assert _back(ring, first) == [PromptRows(FIRST, 0, 4, 0, sequence)]
    assert _back(ring, second) == [PromptRows(FIRST, 0, 1, 4, sequence), HeadRow(FIRST, 1, sequence)]
    _score(ring, PromptRows(FIRST, 0, 4, 0, sequence))
    _score(ring, PromptRows(FIRST, 0, 1, 4, sequence))
    assert [(each.token, each.logprob) for each in sequence.prompt_logprobs] == [(i, -i) for i in range(1, 6)]
    event = ring.sampled(FIRST, 40, logprob=TokenLogprob(40, -0.5))
    assert event is not None and event.logprob == TokenLogprob(40, -0.5)
    assert [str(segment) for segment in _sent(ring)] == ["0[6:7]*"], "the answer has no rows of a prompt"


def test_in_one_frame_with_others_rows_are_found_at_their_places() -> None:
    ring = _ring()
    scored, other = _sequence(3, 0), _sequence(3, 1, of_prompt=False)
    ring.submit(other, now=0.0)
    ring.submit(scored, now=0.0)
    plain, wanting = _sent(ring)
    assert (str(plain), str(wanting)) == ("0[0:3]*", "1[0:3]*+")
    assert _back(ring, wanting, plain) == [
        PromptRows(SECOND, 0, 2, 0, scored),
        HeadRow(SECOND, 2, scored),
        HeadRow(FIRST, 3, other),
    ]


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    ring = _ring()
    ring.submit(_sequence(1), now=0.0)
    (segment,) = _sent(ring)
    assert str(segment) == "0[0:1]*"


def test_rows_that_a_lost_frame_carried_come_with_a_replay() -> None:
    ring, sequence = _ring(), _sequence(6)
    ring.submit(sequence, now=0.0)
    _, second = _sent(ring)
    assert _back(ring, second) == [], "what came before it is not vouched for: its rows are needed"
    assert ring.counts["replays"] == 1
    assert [str(segment) for segment in _sent(ring)] == ["1[0:4]+", "1[4:6]*+"]


def test_the_rows_of_the_last_prompt_token_but_one_are_missed_as_well() -> None:
    ring, sequence = _ring(), _sequence(5)
    ring.submit(sequence, now=0.0)
    first, last = _sent(ring)
    assert (str(first), str(last)) == ("0[0:4]+", "0[4:5]*"), "its only row is that of the first token of the answer"
    assert _back(ring, last) == []
    assert ring.counts["replays"] == 1
    del first


def test_a_replay_asks_for_what_is_lacking_and_no_more() -> None:
    ring, sequence = _ring(), _sequence(12)
    ring.submit(sequence, now=0.0)
    first, second = _sent(ring)
    (rows,) = _back(ring, first)
    late = _back(ring, second)[0]
    _score(ring, rows)
    _score(ring, late, num_rows=1)
    ring.fault([FIRST])
    sent = [str(segment) for segment in _sent(ring)]
    assert sent == ["1[0:4]", "1[4:8]+"]
    _score(ring, late)
    assert len(sequence.prompt_logprobs) == 5, "scores of the old id are not taken"
    (lacking,) = _back(ring, *[Segment(SECOND, 0, 4), Segment(SECOND, 4, 4, wants_rows=True)])
    assert lacking == PromptRows(SECOND, 1, 3, 5, sequence)


def test_another_epoch_asks_for_what_is_lacking() -> None:
    ring, sequence = _ring(), _sequence(6)
    ring.submit(sequence, now=0.0)
    first, second = _sent(ring)
    (rows,) = _back(ring, first)
    _score(ring, rows)
    ring.begin_epoch(Epoch(2), SPEC)
    assert _back(ring, second) == []
    assert [str(segment) for segment in _sent(ring)] == ["1[0:4]", "1[4:6]*+"]


def test_a_frame_without_the_rows_that_were_asked_for_does_not_count() -> None:
    ring = _ring()
    ring.submit(_sequence(6), now=0.0)
    _sent(ring)
    assert _back(ring, Segment(FIRST, 0, 4)) == []
    assert ring.counts["duplicates"] == 1


def test_what_waits_to_be_scored_holds_further_chunks_back() -> None:
    ring, sequence = _ring(), _sequence(40)
    ring.submit(sequence, now=0.0)
    sent = _sent(ring)
    assert [segment.length for segment in sent] == [4, 4], "prefill_tokens are in flight"
    waiting = [rows for segment in sent for rows in _back(ring, segment)]
    assert _sent(ring) == [], "their rows take memory until they are scored"
    _score(ring, waiting[0])
    assert [str(segment) for segment in _sent(ring)] == ["0[8:12]+"]


def test_a_scored_prompt_takes_nothing_over_and_gives_to_others() -> None:
    ring = _ring()
    plain, scored = _sequence(12, 0, of_prompt=False), _sequence(12, 1)
    ring.submit(plain, now=0.0)
    while segments := _sent(ring):
        for row in _back(ring, *segments):
            ring.sampled(row.seq_id, 40)
    ring.submit(scored, now=0.0)
    segments = _sent(ring)
    assert str(segments[0]) == "1[0:4]+", "rows of what is cached would not come back"
    while segments:
        for row in _back(ring, *segments):
            if isinstance(row, PromptRows):
                _score(ring, row)
            else:
                ring.sampled(row.seq_id, 40)
        segments = _sent(ring)
    assert (scored.cached_prompt_tokens, len(scored.prompt_logprobs)) == (0, 11)
    third = _sequence(12, 2, of_prompt=False)
    ring.submit(third, now=0.0)
    _sent(ring)
    assert third.cached_prompt_tokens == 11
