"""Rings of real services: whatever happens to callers, frames and engines, tokens are the single-process ones."""

import asyncio
import random
from collections.abc import Sequence as AbstractSequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from itertools import count

import pytest

from mdiq.core import wire
from mdiq.core.frame import MAX_SEGMENTS, Batch, Buffer, Frame, FrameKind, Segment
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import FinishReason
from mdiq.core.types import Epoch, LayerRange, RingSpec, SeqId
from mdiq.errors import CapacityError, EngineError, RingError, RingStalledError, SequenceError
from mdiq.runtime import loops
from mdiq.runtime.starter_service import MAX_RETURNED
from tests.fakes import ChainEngine, ChainRows
from tests.runtime.conftest import OpenRing, make_sequence, right_answer
from tests.virtual.clock import VirtualExecutor, VirtualTimeLoop, run_virtual

RINGS = [(size, kind) for size in (1, 2, 3) for kind in ("memory", "sockets")]
FORWARD_S = 0.01
QUICK = RingSettings(chunk_tokens=4, prefill_tokens=16, lap_timeout_s=0.5, token_timeout_s=0.001, max_replays=60)


@pytest.mark.parametrize(("size", "kind"), RINGS)
async def test_sixteen_sequences_at_once_get_their_own_answers(open_ring: OpenRing, size: int, kind: str) -> None:
    async with open_ring(size, kind) as ring:
        await ring.check(*(make_sequence(i, num_prompt=1 + i, max_tokens=4 + i % 5) for i in range(16)))
        await ring.check_quiet()
        assert not ring.protocol.counts
        assert all(not worker.meter.dropped for worker in ring.workers)


async def test_rows_that_come_back_faster_than_they_are_sampled_are_bounded_and_the_ring_goes_on(
    open_ring: OpenRing,
) -> None:
    async with open_ring(2, "memory") as ring:
        unknown = tuple(Segment(SeqId(10_000 + i), 0, 0) for i in range(MAX_SEGMENTS))
        flood = Frame(Epoch(1), FrameKind.RELEASE, unknown)
        for _ in range(MAX_RETURNED // MAX_SEGMENTS):
            ring.starter._accept(flood)
        for _ in range(3):
            with pytest.raises(wire.BadFrame) as refused:
                ring.starter._accept(flood)
            assert refused.value.reason == "full"
        await ring.check(*(make_sequence(i) for i in range(4)))
        await ring.check_quiet()


@pytest.mark.parametrize(("size", "kind"), RINGS)
async def test_one_that_comes_late_joins_those_that_run(open_ring: OpenRing, size: int, kind: str) -> None:
    async with open_ring(size, kind) as ring:
        early, late = make_sequence(0, max_tokens=200), make_sequence(1)
        has_begun = asyncio.Event()
        running = asyncio.create_task(ring.stream(early, lambda _: has_begun.set()))
        await has_begun.wait()
        await ring.check(late)
        assert early.finish_reason is None, "the early one should still have been running"
        assert await running == right_answer(early)
        await ring.check_quiet()


@pytest.mark.parametrize(("size", "kind"), RINGS)
async def test_one_that_is_cancelled_leaves_the_others_alone(open_ring: OpenRing, size: int, kind: str) -> None:
    async with open_ring(size, kind) as ring:
        doomed = make_sequence(0, max_tokens=200)
        others = [make_sequence(i, max_tokens=20) for i in range(1, 6)]
        running = asyncio.create_task(
            ring.stream(doomed, lambda event: ring.starter.cancel(0) if event.step.position >= 8 else None)
        )
        await ring.check(*others)
        tokens = await running
        assert doomed.finish_reason is FinishReason.CANCELLED
        assert 4 <= len(tokens) < 200
        assert tokens == right_answer(doomed)[: len(tokens)]
        await ring.check_quiet()


@pytest.mark.parametrize(("size", "kind"), RINGS)
async def test_one_that_waits_behind_a_cancelled_one_gets_its_room(open_ring: OpenRing, size: int, kind: str) -> None:
    async with open_ring(size, kind, kv_tokens=210) as ring:
        doomed, behind = make_sequence(0, max_tokens=200), make_sequence(1, num_prompt=205, max_tokens=4)
        has_begun = asyncio.Event()
        running = asyncio.create_task(ring.stream(doomed, lambda _: has_begun.set()))
        await has_begun.wait()
        waiting = asyncio.create_task(ring.check(behind))
        assert [await ring.protocol.submitted.get() for _ in range(2)] == [0, 1]
        assert ring.protocol.num_live == 1, "there is no room for two"
        ring.starter.cancel(0)
        await waiting
        await running
        assert doomed.finish_reason is FinishReason.CANCELLED
        await ring.check_quiet()


@pytest.mark.parametrize(("size", "kind"), RINGS)
async def test_leaving_a_stream_early_cancels_it(open_ring: OpenRing, size: int, kind: str) -> None:
    async with open_ring(size, kind) as ring:
        left = make_sequence(0, max_tokens=200)
        async with aclosing(ring.starter.stream(left)) as events:
            async for _ in events:
                break
        assert left.finish_reason is FinishReason.CANCELLED
        await ring.check_quiet()
        await ring.check(make_sequence(1))


async def test_a_task_that_is_cancelled_in_a_stream_cancels_its_sequence(open_ring: OpenRing) -> None:
    async with open_ring(2) as ring:
        left = make_sequence(0, max_tokens=200)
        has_begun = asyncio.Event()
        running = asyncio.create_task(ring.stream(left, lambda _: has_begun.set()))
        await has_begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert left.finish_reason is FinishReason.CANCELLED
        await ring.check_quiet()


class FailingEngine(ChainEngine):
    """Cannot compute one Sequence from its third token on."""

    poisoned = SeqId(2)

    def forward(self, batch: Batch) -> ChainRows:
        if any(segment.seq_id == self.poisoned and segment.stop > 3 for segment in batch.segments):
            super().forward(Batch(batch.epoch, (), (), batch.releases))
            raise EngineError("not a number in layer 3")
        return super().forward(batch)


@pytest.mark.parametrize("kind", ["memory", "sockets"])
async def test_an_engine_that_fails_ends_only_the_sequences_of_its_batch(open_ring: OpenRing, kind: str) -> None:
    def make(layers: LayerRange, is_last: bool) -> ChainEngine:
        return FailingEngine(layers, is_last=is_last) if not is_last else ChainEngine(layers, is_last=is_last)

    async with open_ring(3, kind, caps=(1,), make_engine=make) as ring:
        sequences = [make_sequence(i) for i in range(6)]
        answers = await asyncio.gather(*(ring.stream(sequence) for sequence in sequences))
        for sequence, tokens in zip(sequences, answers, strict=True):
            if sequence.index == FailingEngine.poisoned:
                assert sequence.finish_reason is FinishReason.ERROR
                assert "not a number" in str(sequence.error)
                assert tokens == []
            else:
                assert tokens == right_answer(sequence)
        await ring.check_quiet()
        await ring.check(make_sequence(7))


async def test_an_engine_of_the_starter_that_fails_ends_only_its_sequence(open_ring: OpenRing) -> None:
    async with open_ring(2, caps=(1,)) as ring:
        forward = ring.engines[0].forward

        def fails(batch: Batch) -> ChainRows:
            if any(segment.seq_id == 1 for segment in batch.segments):
                raise EngineError("out of memory")
            return forward(batch)

        ring.engines[0].forward = fails  # type: ignore[method-assign]
        good, bad = make_sequence(0), make_sequence(1)
        await asyncio.gather(ring.stream(good), ring.stream(bad))
        assert good.generated == right_answer(good)
        assert bad.finish_reason is FinishReason.ERROR
        await ring.check_quiet()


async def test_a_sequence_that_cannot_be_computed_ends_alone_and_not_with_its_batch(open_ring: OpenRing) -> None:
    async with open_ring(2, caps=(4,)) as ring:
        forward = ring.engines[0].forward
        met: list[int] = []

        def fails(batch: Batch) -> ChainRows:
            if wrong := [s.seq_id for s in batch.segments if s.seq_id in (1, 2)]:
                met.append(len(batch.segments))
                raise SequenceError("token id 99 is not one of the model's 97", wrong)
            return forward(batch)

        ring.engines[0].forward = fails  # type: ignore[method-assign]
        sequences = [make_sequence(i) for i in range(6)]
        await asyncio.gather(*(ring.stream(sequence) for sequence in sequences))
        for sequence in sequences:
            if sequence.index in (1, 2):
                assert sequence.finish_reason is FinishReason.ERROR and "token id 99" in str(sequence.error)
            else:
                assert sequence.generated == right_answer(sequence)
        assert max(met) > 1, "none had company"
        await ring.check_quiet()
        await ring.check(make_sequence(7))


@pytest.mark.parametrize("error", [EngineError("a row is not a number"), IndexError("a mistake of ours")])
async def test_a_sampler_that_fails_on_one_row_ends_only_that_sequence(open_ring: OpenRing, error: Exception) -> None:
    async with open_ring(2) as ring:
        sample = ring.engines[0].sample

        def fails(rows, sequences):  # type: ignore[no-untyped-def]
            if any(sequence.index == 1 and len(sequence.generated) >= 3 for sequence in sequences):
                raise error
            return sample(rows, sequences)

        ring.engines[0].sample = fails  # type: ignore[method-assign]
        sequences = [make_sequence(i) for i in range(4)]
        await asyncio.gather(*(ring.stream(sequence) for sequence in sequences))
        for sequence in sequences:
            if sequence.index == 1:
                assert sequence.finish_reason is FinishReason.ERROR
                assert sequence.generated == right_answer(sequence)[:3]
            else:
                assert sequence.generated == right_answer(sequence)
        await ring.check_quiet()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [2, 3])
async def test_frames_that_are_dropped_and_doubled_are_mended(open_ring: OpenRing, size: int, seed: int) -> None:
    rng, messages = random.Random(seed), count()

    def copies(_: AbstractSequence[Buffer]) -> int:
        # One in the middle of the prompts is lost for certain, so that every schedule has something to mend.
        return 0 if next(messages) == 5 else rng.choices([0, 1, 2], [3, 87, 10])[0]

    async with open_ring(size, settings=QUICK, copies=copies) as ring:
        await ring.check(*(make_sequence(i, max_tokens=10) for i in range(8)))
        assert ring.protocol.counts["replays"] > 0
        await ring.check_quiet()


async def test_frames_that_are_all_doubled_need_no_replay(open_ring: OpenRing) -> None:
    async with open_ring(3, copies=lambda _: 2) as ring:
        await ring.check(*(make_sequence(i) for i in range(8)))
        await ring.check_quiet()
        assert ring.protocol.counts["replays"] == 0
        assert ring.stages[1].counts["duplicates"] > 0


async def test_a_ring_that_answers_nothing_ends_its_sequences_with_an_error(open_ring: OpenRing) -> None:
    settings = RingSettings(lap_timeout_s=0.02, token_timeout_s=0.0, max_replays=3)
    async with open_ring(2, settings=settings, copies=lambda _: 0) as ring:
        sequence = make_sequence(0)
        assert await ring.stream(sequence) == []
        assert sequence.finish_reason is FinishReason.ERROR
        assert isinstance(sequence.error, RingStalledError)


async def test_a_sequence_that_can_never_fit_is_refused_at_once(open_ring: OpenRing) -> None:
    async with open_ring(2, kv_tokens=64) as ring:
        with pytest.raises(CapacityError):
            await ring.stream(make_sequence(0, num_prompt=64))
        await ring.check(make_sequence(1, num_prompt=63, max_tokens=1))


async def test_a_ring_that_is_gone_ends_every_stream_and_takes_no_more(open_ring: OpenRing) -> None:
    async with open_ring(2) as ring:
        sequences = [make_sequence(i, max_tokens=200) for i in range(3)]
        has_begun = asyncio.Event()
        running = [asyncio.create_task(ring.stream(sequence, lambda _: has_begun.set())) for sequence in sequences]
        await has_begun.wait()
        ring.starter.fail_all(RingError("node-1: its process ended"))
        await asyncio.gather(*running)
        assert [sequence.finish_reason for sequence in sequences] == [FinishReason.ERROR] * 3
        with pytest.raises(RingError, match="node-1"):
            await ring.stream(make_sequence(9))


async def test_meters_count_compute_time_and_bytes(open_ring: OpenRing) -> None:
    async with open_ring(3, "sockets") as ring:
        await ring.check(*(make_sequence(i) for i in range(4)))
        await ring.check_quiet()
        assert all(worker.meter.busy_s > 0 for worker in ring.workers)
        for i in range(3):
            assert ring.sources[(i + 1) % 3].bytes_in == ring.sinks[i].bytes_out > 0


def test_no_work_waits_while_its_stage_does_not_compute(open_ring: OpenRing, monkeypatch: pytest.MonkeyPatch) -> None:
    """In virtual time, which passes only for what computes, and for whoever sleeps."""

    async def main(loop: VirtualTimeLoop) -> None:
        monkeypatch.setattr(loops, "ThreadPoolExecutor", lambda *_, **__: VirtualExecutor(loop, 0.0))
        num_forwards, num_empty = [0, 0, 0], [0, 0, 0]

        def clock(i: int) -> float:
            return loop.time() + FORWARD_S * num_forwards[i]

        def forward(i: int, engine: ChainEngine, batch: Batch) -> ChainRows:
            num_forwards[i] += 1
            num_empty[i] += not batch.segments
            return type(engine).forward(engine, batch)

        async with open_ring(3) as ring:
            for i, (worker, engine) in enumerate(zip(ring.workers, ring.engines, strict=True)):
                worker.clock = partial(clock, i)
                monkeypatch.setattr(engine, "forward", partial(forward, i, engine))
            await ring.check(*(make_sequence(i) for i in range(6)))
            await ring.check_quiet()
            for worker, count in zip(ring.workers, num_forwards, strict=True):
                assert worker.meter.busy_s == pytest.approx(FORWARD_S * count) and count >= 12
                work = worker.meter.work
                assert work.decode_batches + work.prompt_batches == count - num_empty[i]
                assert work.forward_s == pytest.approx(FORWARD_S * (count - num_empty[i]))
                assert work.prompt_tokens > work.prompt_batches > 0 and work.decode_segments >= work.decode_batches > 0
                assert worker.meter.waiting_s == 0.0

    run_virtual(main)


@pytest.mark.parametrize("kind", ["memory", "sockets"])
async def test_the_starter_measures_the_hops_and_goes_on_at_the_pace_that_follows(
    open_ring: OpenRing, kind: str
) -> None:
    spec = RingSpec(3, 4_096, 256)
    told: list[float] = []
    was_told = asyncio.Event()

    async def plan_pace(hops_s: float) -> RingSpec:
        told.append(hops_s)
        was_told.set()
        return replace(spec, caps=(9,), shared_chunks=(32,))

    async with open_ring(3, kind, plan_pace=plan_pace) as ring:
        async with asyncio.timeout(10.0):
            await was_told.wait()
        assert told[0] > 0
        assert ring.starter.hops_s is not None
        await ring.check(*(make_sequence(i) for i in range(4)))
        caps = {stage._cap for stage in ring.stages}
        assert caps == {9}


async def test_a_starter_takes_the_new_epoch_before_its_engine_is_emptied(
    open_ring: OpenRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_ring(2) as ring:
        engine, stage, seen = ring.engines[0], ring.stages[0], []

        def reset() -> None:
            seen.append(stage.epoch)
            type(engine).reset(engine)

        monkeypatch.setattr(engine, "reset", reset)
        await ring.starter.begin_epoch(Epoch(2), RingSpec(2, 4_096, context_tokens=256, caps=(1, 1)))
    assert seen == [Epoch(2)]
