"""Rings of chain engines that score prompts: the values are those of one process, and nobody waits for many rows."""

import asyncio
from collections.abc import Sequence as AbstractSequence

import pytest

from mdiq.core.frame import Payload
from mdiq.core.logprobs import Drawn, LogprobsWanted, TokenLogprob
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import FinishReason, Sequence
from mdiq.core.types import Epoch
from mdiq.errors import EngineError
from mdiq.runtime.head import PIECE_ROWS
from mdiq.runtime.starter_service import StreamEvent
from tests.fakes import ChainStarter, chain_prompt_logprobs
from tests.runtime.conftest import NUM_LAYERS, OpenRing, Ring, make_sequence, right_answer

LONG = 3 * PIECE_ROWS + 5
WHOLE = RingSettings(chunk_tokens=256, prefill_tokens=256)
"""A prompt is one chunk: all of its rows come back together."""


def _scored(index: int, num_prompt: int = LONG, max_tokens: int = 4) -> Sequence:
    sequence = make_sequence(index, num_prompt=num_prompt, max_tokens=max_tokens)
    sequence.logprobs = LogprobsWanted(top=1, of_prompt=True)
    return sequence


async def _events(ring: Ring, sequence: Sequence) -> list[StreamEvent]:
    return [event async for event in ring.starter.stream(sequence)]


def _check(sequence: Sequence, events: list[StreamEvent]) -> None:
    first, *later = events
    assert first.prompt_logprobs is not None
    assert list(first.prompt_logprobs) == chain_prompt_logprobs(sequence.prompt, NUM_LAYERS)
    assert all(event.prompt_logprobs is None for event in later)
    assert [event.step.token for event in events] == right_answer(sequence)
    logprobs = [event.step.logprob for event in events]
    assert [each.token for each in logprobs if each] == sequence.generated
    assert all(each is not None and each.top[0][0] == each.token for each in logprobs), "it draws the likeliest"


@pytest.mark.parametrize(("size", "kind"), [(1, "memory"), (3, "memory"), (3, "sockets")])
async def test_a_ring_scores_prompts_of_several_chunks_and_answers_others(
    open_ring: OpenRing, size: int, kind: str
) -> None:
    async with open_ring(size, kind) as ring:
        scored = [_scored(i) for i in range(2)]
        plain = make_sequence(7)
        *found, others = await asyncio.gather(*(_events(ring, each) for each in (*scored, plain)))
        for sequence, events in zip(scored, found, strict=True):
            _check(sequence, events)
        assert [event.step.token for event in others] == right_answer(plain)
        assert all(event.step.logprob is None and not event.prompt_logprobs for event in others)
        await ring.check_quiet()


async def test_the_head_scores_a_few_rows_at_a_time(open_ring: OpenRing) -> None:
    async with open_ring(1, settings=WHOLE) as ring:
        engine = ring.engines[0]
        assert isinstance(engine, ChainStarter)
        sizes: list[int] = []
        score = engine.score

        def counted(rows: Payload, sequence: Sequence, start: int) -> list[TokenLogprob]:
            sizes.append(rows.num_rows)
            return score(rows, sequence, start)

        engine.score = counted  # type: ignore[method-assign]
        sequence = _scored(0)
        _check(sequence, await _events(ring, sequence))
        assert sum(sizes) == LONG - 1 and max(sizes) == PIECE_ROWS


async def test_a_prompt_that_cannot_be_scored_ends_alone(open_ring: OpenRing) -> None:
    async with open_ring(2) as ring:
        engine = ring.engines[0]
        assert isinstance(engine, ChainStarter)

        def fails(rows: Payload, sequence: Sequence, start: int) -> list[TokenLogprob]:
            raise ZeroDivisionError("a bug")

        engine.score = fails  # type: ignore[method-assign]
        sequence, other = _scored(0), make_sequence(1)
        (event,), answer = await asyncio.gather(_events(ring, sequence), ring.stream(other))
        assert event.step.finish_reason is FinishReason.ERROR
        assert isinstance(event.step.error, EngineError) and "a bug" in str(event.step.error)
        assert answer == right_answer(other)
        await ring.check_quiet()


async def test_a_client_that_leaves_while_its_prompt_is_scored_costs_no_more_rows(open_ring: OpenRing) -> None:
    async with open_ring(1, settings=WHOLE) as ring:
        engine = ring.engines[0]
        assert isinstance(engine, ChainStarter)
        loop, score = asyncio.get_running_loop(), engine.score
        sizes: list[int] = []

        def leaves(rows: Payload, sequence: Sequence, start: int) -> list[TokenLogprob]:
            sizes.append(rows.num_rows)
            left = asyncio.run_coroutine_threadsafe(_cancel(ring), loop)
            left.result()
            return score(rows, sequence, start)

        engine.score = leaves  # type: ignore[method-assign]
        sequence = _scored(0)
        events = await _events(ring, sequence)
        assert [event.step.finish_reason for event in events] == [FinishReason.CANCELLED]
        assert sizes == [PIECE_ROWS] and len(sequence.prompt_logprobs) == 0
        await ring.check_quiet()


async def _cancel(ring: Ring) -> None:
    ring.starter.cancel(0)


async def test_tokens_of_others_come_between_the_pieces_of_a_prompt(open_ring: OpenRing) -> None:
    async with open_ring(1, settings=WHOLE) as ring:
        engine = ring.engines[0]
        assert isinstance(engine, ChainStarter)
        done: list[str] = []
        score, sample = engine.score, engine.sample

        def noted(rows: Payload, sequence: Sequence, start: int) -> list[TokenLogprob]:
            done.append("score")
            return score(rows, sequence, start)

        def drawn(rows: AbstractSequence[Payload], sequences: AbstractSequence[Sequence]) -> list[Drawn]:
            done.append("sample")
            return sample(rows, sequences)

        engine.score, engine.sample = noted, drawn  # type: ignore[method-assign]
        decoding = make_sequence(1, num_prompt=3, max_tokens=40)
        running = asyncio.create_task(ring.stream(decoding))
        await ring.protocol.submitted.get()
        sequence = _scored(0)
        _check(sequence, await _events(ring, sequence))
        assert await running == right_answer(decoding)
        text = " ".join(done)
        assert "score score" not in text, text


async def test_the_next_epoch_goes_on_where_the_scores_ended(open_ring: OpenRing) -> None:
    async with open_ring(1) as ring:
        engine = ring.engines[0]
        assert isinstance(engine, ChainStarter)
        loop, score = asyncio.get_running_loop(), engine.score
        starts: list[int] = []

        def interrupted(rows: Payload, sequence: Sequence, start: int) -> list[TokenLogprob]:
            starts.append(start)
            if len(starts) == 2:
                loop.call_soon_threadsafe(ring.starter.pause)
                loop.call_soon_threadsafe(begun.set)
            return score(rows, sequence, start)

        begun = asyncio.Event()
        engine.score = interrupted  # type: ignore[method-assign]
        sequence = _scored(0)
        running = asyncio.create_task(_events(ring, sequence))
        await begun.wait()
        spec = ring.protocol._spec
        assert spec is not None
        await ring.starter.begin_epoch(Epoch(ring.protocol.epoch + 1), spec)
        _check(sequence, await running)
        assert starts[0] == 0 and starts.count(0) == 1, "what was scored is not scored again"
