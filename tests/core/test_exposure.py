"""How many rows of a Sequence have left the Starter, replays and cached prefixes included."""

from dataclasses import replace

from mdiq.core.frame import Frame, FrameKind, TokenIds
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import HeadRow, Inject
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import Epoch, RingSpec

SPEC = RingSpec(num_stages=2, kv_tokens=256, context_tokens=64, caps=(1, 2), kv_block_tokens=4)
SETTINGS = RingSettings(chunk_tokens=4, prefill_tokens=64, lap_timeout_s=10.0, token_timeout_s=0.0)


def _ring() -> RingProtocol:
    ring = RingProtocol(SETTINGS)
    ring.begin_epoch(Epoch(1), SPEC)
    return ring


def _sequence(index: int, num_prompt: int, max_tokens: int = 3) -> Sequence:
    return Sequence(index, tuple(range(num_prompt)), SamplingParams(max_tokens=max_tokens))


def _lap(ring: RingProtocol) -> int:
    """Have all that is sent come round and be sampled; return how many rows were sent."""
    num_rows = 0
    for action in ring.poll(0.0):
        if not isinstance(action, Inject):
            continue
        segments = action.frame.segments
        if action.frame.kind is FrameKind.RELEASE:
            ring.returned(action.frame)
            continue
        num_rows += sum(segment.length for segment in segments)
        wanting = sum(segment.wants_logits for segment in segments)
        for row in ring.returned(Frame(ring.epoch, FrameKind.HEAD, segments, TokenIds((0,) * wanting))):
            assert isinstance(row, HeadRow)
            ring.sampled(row.seq_id, 90 + row.sequence.num_tokens)
    return num_rows


def _finish(ring: RingProtocol, *sequences: Sequence) -> int:
    """Run Sequences to their end; return how many rows were sent."""
    for sequence in sequences:
        ring.submit(sequence, now=0.0)
    num_rows = 0
    while ring.num_unfinished:
        num_rows += _lap(ring)
    return num_rows


def test_every_row_counts_once_and_the_last_token_is_never_sent() -> None:
    ring, sequence = _ring(), _sequence(0, num_prompt=7)
    assert _finish(ring, sequence) == sequence.num_rows_sent == 7 + 3 - 1
    assert (ring.exposure.num_rows, ring.exposure.max_rows) == (9, 9)


def test_a_replay_counts_again_and_a_new_epoch_too() -> None:
    ring, sequence = _ring(), _sequence(0, num_prompt=7)
    ring.submit(sequence, now=0.0)
    assert _lap(ring) == 7
    (inject,) = (action for action in ring.poll(0.0) if isinstance(action, Inject))
    ring.fault([inject.frame.segments[0].seq_id])  # the row of the first token was sent, and is lost
    assert _lap(ring) == 8, "the prompt and the first token"
    assert sequence.num_rows_sent == 7 + 1 + 8
    ring.begin_epoch(Epoch(2), SPEC)
    assert _lap(ring) == 9
    while ring.num_unfinished:
        _lap(ring)
    assert sequence.num_rows_sent == ring.exposure.num_rows == ring.exposure.max_rows == 7 + 1 + 8 + 9


def test_a_cached_prefix_is_inherited_as_often_as_it_was_sent() -> None:
    ring = _ring()
    first = _sequence(0, num_prompt=9)
    ring.submit(first, now=0.0)
    _lap(ring)
    ring.begin_epoch(Epoch(2), SPEC)  # all of it is sent a second time
    while ring.num_unfinished:
        _lap(ring)
    assert first.num_rows_sent == 9 + (9 + 2)
    second = _sequence(1, num_prompt=10)
    num_rows = _finish(ring, second)
    assert second.cached_prompt_tokens == 8 and num_rows == 2 + 2
    assert second.num_rows_sent == 2 * 8 + num_rows, "each of the eight was sent twice"
    third = _sequence(2, num_prompt=10)
    assert _finish(ring, third) == num_rows
    assert third.num_rows_sent == 2 * 8 + num_rows
    assert ring.exposure.max_rows == first.num_rows_sent == 20
    assert ring.exposure.num_rows == 20 + 2 * num_rows, "what is found in the cache is not sent"


def test_the_counts_of_a_rehearsal_are_forgotten_and_ids_that_are_gone_too() -> None:
    ring = _ring()
    _finish(ring, _sequence(0, num_prompt=9), _sequence(1, num_prompt=9))
    ring.reset_counts()
    assert (ring.exposure.num_rows, ring.exposure.max_rows) == (0, 0)
    ring.drop_prefixes()
    _lap(ring)
    assert ring.is_quiet and not ring.exposure._passes


def test_a_starter_alone_sends_nothing() -> None:
    ring, sequence = _ring(), _sequence(0, num_prompt=7)
    ring.submit(sequence, now=0.0)
    assert _lap(ring) == 7
    ring.begin_epoch(Epoch(2), replace(SPEC, num_stages=1))
    while ring.num_unfinished:
        _lap(ring)
    assert _finish(ring, other := _sequence(1, num_prompt=9)) > 0
    assert (sequence.num_rows_sent, other.num_rows_sent) == (7, 0)
    assert (ring.exposure.num_rows, ring.exposure.max_rows) == (7, 7)
