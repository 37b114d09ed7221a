"""The cap of the Plan keeps live Sequences from clumping into one Batch: near the best fixed cap, far from greedy."""

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from mdiq.core.coalesce import Queued, coalesce
from mdiq.core.frame import NO_ROWS, Segment
from mdiq.core.types import SeqId
from mdiq.plan.micro_batches import StageCost, caps

HOP_S = 0.010
JITTER = 0.2
SIMULATED_S = 60.0
GREEDY = 1_000


@dataclass(frozen=True)
class Case:
    """A Ring and the Sequences that all arrive at once."""

    costs: tuple[StageCost, ...]
    num_live: int

    @property
    def cap(self) -> int:
        return caps(self.num_live, self.costs, [HOP_S] * len(self.costs))[-1]


MEMORY_BOUND = Case((StageCost(0.050, 0.001),) * 4, 32)
ONE_SLOW_STAGE = Case((StageCost(0.050, 0.001),) * 3 + (StageCost(0.100, 0.002),), 32)
MIXED = Case((StageCost(0.030, 0.010),) * 4, 32)
COMPUTE_BOUND = Case((StageCost(0.002, 0.020),) * 3, 12)


def _tokens_per_s(case: Case, cap: int) -> float:
    """Return the rate of a Ring in virtual time; the first Stage's queue holds every Sequence at the start."""
    rng = random.Random(11)
    waiting = [deque[Queued]() for _ in case.costs]
    waiting[0].extend(Queued(Segment(SeqId(i), 0, 1), NO_ROWS) for i in range(case.num_live))
    is_busy = [False] * len(case.costs)
    events: list[tuple[float, int, int, list[Queued]]] = []  # when, a number for order, Stage, what arrives there
    num_events = num_tokens = 0
    now = 0.0

    def push(at: float, stage: int, arriving: Sequence[Queued]) -> None:
        nonlocal num_events
        num_events += 1
        heapq.heappush(events, (at, num_events, stage, list(arriving)))

    def start(stage: int) -> None:
        if is_busy[stage] or not waiting[stage]:
            return
        batch = coalesce(waiting[stage], cap, 10_000)
        is_busy[stage] = True
        cost = case.costs[stage]
        stop = now + (cost.a_s + cost.c_s * len(batch)) * rng.uniform(1 - JITTER, 1 + JITTER)
        push(stop, ~stage, [])
        push(stop + HOP_S, (stage + 1) % len(case.costs), batch)

    start(0)
    while now < SIMULATED_S:
        now, _, stage, arriving = heapq.heappop(events)
        if stage < 0:  # the Stage has done its Batch
            stage = ~stage
            is_busy[stage] = False
        else:
            waiting[stage].extend(arriving)
            num_tokens += len(arriving) if stage == 0 else 0
        start(stage)
    return num_tokens / now


@pytest.mark.parametrize("case", [MEMORY_BOUND, ONE_SLOW_STAGE, MIXED, COMPUTE_BOUND])
def test_the_cap_of_the_plan_is_close_to_the_best_fixed_one(case: Case) -> None:
    best = max(_tokens_per_s(case, cap) for cap in range(1, case.num_live + 1))
    assert _tokens_per_s(case, case.cap) > 0.95 * best


@pytest.mark.parametrize(
    ("case", "gain"), [(MEMORY_BOUND, 1.25), (ONE_SLOW_STAGE, 1.15), (MIXED, 2.0), (COMPUTE_BOUND, 2.0)]
)
def test_the_cap_of_the_plan_is_far_better_than_taking_all_that_waits(case: Case, gain: float) -> None:
    assert _tokens_per_s(case, case.cap) > gain * _tokens_per_s(case, GREEDY)
