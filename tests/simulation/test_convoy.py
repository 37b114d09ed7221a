"""The cap of the Plan keeps live Sequences from clumping into one Batch: never far from the better of one and all."""

import heapq
import random
from collections import Counter, deque
from dataclasses import dataclass

import pytest

from mdiq.plan.micro_batches import Curve, plan_micro_batches

HOP_S = 0.010
JITTER = 0.2
GREEDY = 1_000
LAPS = 60


def line(a_s: float, c_s: float) -> Curve:
    return Curve(((1, a_s + c_s), (2, a_s + 2 * c_s)))


def times(curve: Curve, factor: float) -> Curve:
    return Curve(tuple((size, factor * time_s) for size, time_s in curve.points))


MEMORY_BOUND = line(0.050, 0.001)
MIXED = line(0.030, 0.010)
COMPUTE_BOUND = line(0.002, 0.020)
STEP = Curve(((1, 0.024), (2, 0.024), (4, 0.024), (8, 0.027), (16, 0.051), (64, 0.220)))
"""Measured with int8 kernels: flat up to 8 rows, then each row costs its share."""


@dataclass(frozen=True)
class Case:
    """A Ring and the Sequences that all arrive at once."""

    costs: tuple[Curve, ...]
    num_live: int
    hop_s: float = HOP_S

    @property
    def cap(self) -> int:
        return plan_micro_batches(self.costs, self.hop_s * len(self.costs), self.num_live).caps[-1]


FOUR_MEMORY_BOUND = Case((MEMORY_BOUND,) * 4, 32)
ONE_SLOW_STAGE = Case((MEMORY_BOUND,) * 3 + (times(MEMORY_BOUND, 2),), 32)
FOUR_MIXED = Case((MIXED,) * 4, 32)
THREE_COMPUTE_BOUND = Case((COMPUTE_BOUND,) * 3, 12)


def _tokens_per_s(case: Case, cap: int, *, in_groups: bool = False, spread_s: float = 0.0, laps: int = LAPS) -> float:
    """Return the rate of a Ring in virtual time, from the times of all tokens but the first third.

    in_groups: no more than ceil(Sequences / cap) groups are on their Lap, as the Scheduler has it.
    spread_s: the Sequences come one after the other in this time; otherwise all together.
    """
    rng = random.Random(11)
    costs, num_stages = case.costs, len(case.costs)
    most_groups = -(-case.num_live // cap) if in_groups else case.num_live
    num_out: Counter[int] = Counter()  # group -> Sequences of it that are on their Lap
    waiting: list[deque[int]] = [deque() for _ in costs]  # the group of each Sequence that waits there
    is_busy = [False] * num_stages
    events: list[tuple[float, int, int, list[int]]] = []  # when, a number for order, Stage, groups that arrive there
    num_events = num_ready = num_groups = num_tokens = 0
    now = begun_at = 0.0

    def push(at: float, stage: int, arriving: list[int]) -> None:
        nonlocal num_events
        num_events += 1
        heapq.heappush(events, (at, num_events, stage, arriving))

    def send() -> None:
        nonlocal num_ready, num_groups
        while num_ready and len(num_out) < most_groups:
            num_groups += 1
            num_out[num_groups] = size = min(num_ready, cap)
            num_ready -= size
            waiting[0].extend([num_groups] * size)

    if spread_s:
        for _ in range(case.num_live):
            push(rng.random() * spread_s, 0, [0])
    else:
        push(0.0, 0, [0] * case.num_live)
    target = case.num_live * laps
    while num_tokens < target:
        now, _, stage, arriving = heapq.heappop(events)
        if stage < 0:  # the Stage has done its Batch
            stage = ~stage
            is_busy[stage] = False
        elif stage:
            waiting[stage].extend(arriving)
        else:
            num_tokens += len(arriving)
            num_ready += len(arriving)
            if num_tokens <= target // 3:
                begun_at = now
            num_out.subtract(arriving)
            for group in set(arriving):
                if num_out[group] <= 0:
                    del num_out[group]
            send()
        if waiting[stage] and not is_busy[stage]:
            batch = [waiting[stage].popleft() for _ in range(min(len(waiting[stage]), cap))]
            is_busy[stage] = True
            stop = now + costs[stage].seconds(len(batch)) * rng.uniform(1 - JITTER, 1 + JITTER)
            push(stop, ~stage, [])
            push(stop + case.hop_s, (stage + 1) % num_stages, batch)
    return (target - target // 3) / (now - begun_at)


@pytest.mark.parametrize("case", [FOUR_MEMORY_BOUND, ONE_SLOW_STAGE, FOUR_MIXED, THREE_COMPUTE_BOUND])
def test_the_cap_of_the_plan_is_close_to_the_best_fixed_one(case: Case) -> None:
    best = max(_tokens_per_s(case, cap) for cap in range(1, case.num_live + 1))
    assert _tokens_per_s(case, case.cap, in_groups=True) > 0.95 * best


@pytest.mark.parametrize(
    ("case", "gain"), [(FOUR_MEMORY_BOUND, 1.25), (ONE_SLOW_STAGE, 1.15), (FOUR_MIXED, 2.0), (THREE_COMPUTE_BOUND, 2.0)]
)
def test_the_cap_of_the_plan_is_far_better_than_taking_all_that_waits(case: Case, gain: float) -> None:
    assert _tokens_per_s(case, case.cap, in_groups=True) > gain * _tokens_per_s(case, GREEDY)


@pytest.mark.parametrize("hop_s", [2e-4, 5e-3, 5e-2])
@pytest.mark.parametrize("cost", [MEMORY_BOUND, MIXED, COMPUTE_BOUND, STEP], ids=["memory", "mixed", "compute", "step"])
def test_over_a_grid_of_rings_the_plan_is_never_much_slower_than_taking_one_or_taking_all(
    cost: Curve, hop_s: float
) -> None:
    slower = []
    for num_stages in range(1, 7):
        for slowest in (1.0, 2.0) if num_stages > 1 else (1.0,):
            costs = (cost,) * (num_stages - 1) + (times(cost, slowest),)
            for num_live in (1, 2, 3, 5, 8, 12, 24, 64):
                # One Stage has no Hops.
                case = Case(costs, num_live, hop_s if num_stages > 1 else 0.0)
                rate = _tokens_per_s(case, case.cap, in_groups=True, laps=36)
                one, everything = (_tokens_per_s(case, cap, laps=36) for cap in (1, GREEDY))
                if rate < 0.95 * max(one, everything):
                    slower.append((num_stages, slowest, num_live, case.cap, rate, one, everything))
    assert not slower


def test_the_plan_holds_when_the_sequences_come_one_after_the_other() -> None:
    for case in (FOUR_MEMORY_BOUND, ONE_SLOW_STAGE, FOUR_MIXED, THREE_COMPUTE_BOUND):
        one, everything = (_tokens_per_s(case, cap, spread_s=0.5) for cap in (1, GREEDY))
        assert _tokens_per_s(case, case.cap, in_groups=True, spread_s=0.5) > 0.95 * max(one, everything)
