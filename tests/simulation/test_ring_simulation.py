"""Seeded schedules of a whole Ring: whatever network and processes do, the tokens are the single-process ones."""

from collections import Counter

import pytest

from mdiq.core.coalesce import Queued
from mdiq.core.frame import Frame
from mdiq.core.sequence import FinishReason
from mdiq.core.stage import Receipt, StageProtocol
from mdiq.errors import EngineError
from tests.simulation.world import EVERY_FAULT, Faults, World

NUM_SEEDS = 2_400
SEEDS_A_TEST = 200
SEEDS_THAT_ONCE_FAILED: tuple[int, ...] = ()


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_A_TEST))
def test_every_schedule_ends_in_the_single_process_tokens_or_a_typed_error(first: int) -> None:
    exact = total = num_forks = cached = num_scored = 0
    happened: Counter[str] = Counter()
    for seed in range(first, first + SEEDS_A_TEST):
        world = World(seed)
        try:
            world.run()
            world.check()
        except Exception as error:
            raise AssertionError(f"seed {seed} with {world.faults}: {error}") from error
        happened += world.happened
        num_forks += world.num_forks
        num_scored += world.num_scored
        cached += sum(sequence.cached_prompt_tokens for sequence in world.sequences)
        total += len(world.ends)
        exact += sum(reason in (FinishReason.STOP, FinishReason.LENGTH) for reason in world.ends.values())
    # Most requests survive: a protocol that only ever answers with errors would pass the checks above. Those that begin
    # with the cache of another share its losses, and these schedules lose far more than a real ring.
    assert exact > 0.7 * total, f"only {exact} of {total} sequences were answered"
    # ... and so would one that never met a fault.
    assert happened.keys() == EVERY_FAULT, f"never happened: {EVERY_FAULT - happened.keys()}"
    # ... and a cache of prefixes that never found anything.
    assert num_forks > SEEDS_A_TEST and cached > 8 * SEEDS_A_TEST
    assert num_scored > 5 * SEEDS_A_TEST


@pytest.mark.parametrize("seed", SEEDS_THAT_ONCE_FAILED)
def test_a_seed_that_once_failed_passes(seed: int) -> None:
    world = World(seed)
    world.run()
    world.check()


@pytest.mark.parametrize("seed", range(40))
def test_a_ring_without_faults_answers_every_sequence(seed: int) -> None:
    world = World(seed, Faults())
    world.run()
    world.check()
    assert set(world.ends.values()) <= {FinishReason.STOP, FinishReason.LENGTH}
    assert not world.ring.counts
    assert not +world.happened


def test_the_same_seed_gives_the_same_schedule() -> None:
    first, second = World(5), World(5)
    first.run()
    second.run()
    assert (first.now, first.ends, first.happened) == (second.now, second.ends, second.happened)


def test_the_simulation_notices_a_stage_that_runs_a_frame_twice() -> None:
    world = World(7, Faults(duplicate=1.0))
    for node in world.nodes:
        node.stage = _StageWithoutPositionCheck()
    assert len(world.nodes) > 1
    with pytest.raises(EngineError, match="the chain engine holds"):
        world.run()


def test_the_simulation_notices_a_stage_that_believes_frames_of_an_older_epoch() -> None:
    # It takes a first Frame of a Sequence that comes after its Ring has ended, before the first of the next.
    num_noticed = 0
    for seed in range(80):
        for make_stage in (StageProtocol, _StageWithoutEpochFilter):
            world = World(seed, Faults(num_crashes=3, late=0.5, jitter_s=0.3))
            for node in world.nodes:
                node.stage = make_stage()
            world.run()
            try:
                world.check()
            except AssertionError as error:
                assert make_stage is _StageWithoutEpochFilter and "leaks KV cache" in str(error), (
                    f"seed {seed}: {error}"
                )
                num_noticed += 1
    assert num_noticed


class _StageWithoutPositionCheck(StageProtocol):
    def _queue(self, frame: Frame) -> Receipt:
        row = 0
        for segment in frame.segments:
            self._prompts.append(Queued(segment, frame.payload.rows(row, row + segment.length)))
            row += segment.length
        return Receipt(queued=len(frame.segments))


class _StageWithoutEpochFilter(StageProtocol):
    def receive(self, frame: Frame) -> Receipt:
        return super().receive(Frame(self.epoch, frame.kind, frame.segments, frame.payload, frame.cap))
