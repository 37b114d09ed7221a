"""What the stories of the ring protocol (test_stories.py) do not tell."""

from dataclasses import replace

import pytest

from mdiq.core.frame import Frame, FrameKind, Segment, TokenIds
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import Ended, HeadRow, Inject
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.types import Epoch, RingSpec, SeqId
from mdiq.errors import ContextLengthError, LocalProtocolError

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
            rows += [row for row in ring.returned(_head(*frame.segments)) if isinstance(row, HeadRow)]
    return rows


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


def test_the_cache_of_ended_sequences_is_not_live() -> None:
    ring = RingProtocol(replace(SETTINGS, prefix_tokens=None))
    ring.begin_epoch(EPOCH, SPEC)
    ring.submit(_sequence(num_prompt=3, max_tokens=1), now=0.0)
    (row,) = _lap(ring)
    assert (ring.kv_reserved_tokens, ring.kv_live_tokens) == (3, 3)
    ring.sampled(row.seq_id, 40)
    assert (ring.kv_reserved_tokens, ring.kv_live_tokens) == (3, 0)
    ring.submit(_sequence(1, num_prompt=5), now=0.0)
    _lap(ring)
    assert ring.kv_live_tokens == 5 <= ring.kv_reserved_tokens


def test_a_token_that_was_not_awaited_is_ignored() -> None:
    ring = _ring()
    ring.submit(_sequence(), now=0.0)
    ring.poll(0.0)
    assert ring.sampled(SeqId(0), 40) is None


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


def _going_on(*tokens: int, num_prompt: int = 3, max_tokens: int = 4) -> Sequence:
    sequence = _sequence(0, num_prompt, max_tokens)
    sequence.generated += tokens
    return sequence


def test_a_sequence_that_brings_tokens_enters_with_them_as_a_prompt_and_goes_on_after_them() -> None:
    ring = _ring()
    ring.submit(sequence := _going_on(40, 41), now=0.0)
    [row] = _lap(ring)
    event = ring.sampled(row.seq_id, 42)
    assert event is not None and (event.token, event.position, event.finish_reason) == (42, 5, None)
    assert ring.prefill["prefill_tokens"] == 5 and sequence.cached_prompt_tokens == 0
    [row] = _lap(ring)
    event = ring.sampled(row.seq_id, 43)
    assert event is not None and event.finish_reason is FinishReason.LENGTH
    assert sequence.generated == [40, 41, 42, 43]


@pytest.mark.parametrize("max_tokens", [2, 60], ids=["its own limit", "the ring's room"])
def test_a_sequence_that_brings_all_tokens_that_it_may_have_ends_before_it_enters(max_tokens: int) -> None:
    ring = _ring()
    ring.submit(_going_on(*range(2 if max_tokens == 2 else 29), max_tokens=max_tokens), now=0.0)
    [ended] = ring.poll(0.0)
    assert isinstance(ended, Ended) and ended.event.finish_reason is FinishReason.LENGTH
    assert ring.is_quiet


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ContextLengthError, match="prompt: it has no tokens; give at least one"):
        _ring().submit(_sequence(num_prompt=0), now=0.0)
