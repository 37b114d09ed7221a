"""Fault schedules of a whole service in virtual time: keeper, Coordinator, Agents and Nodes as they are.

MDIQ_SEEDS: how many seeds each of the first two tests plays, a multiple of 50.
"""

import os
from collections import Counter

import pytest

from tests.virtual.house import Answer, House
from tests.virtual.schedule import FAILURES, HOP_KINDS, KINDS, MAX_FAULT_S, OUTAGES, Schedule, run, smallest

NUM_SEEDS = int(os.environ.get("MDIQ_SEEDS", "100"))
SEEDS_A_TEST = 50
NUM_HOP_SEEDS = 50


@pytest.mark.timeout(600)
@pytest.mark.parametrize("is_lossy", [False, True], ids=["machines", "messages"])
@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_A_TEST))
def test_whatever_befalls_machines_and_messages_the_ring_serves_again_and_nobody_waits_for_ever(
    first: int, is_lossy: bool
) -> None:
    happened: Counter[str] = Counter()
    for seed in range(first, first + SEEDS_A_TEST):
        schedule = Schedule.drawn(seed, is_lossy=is_lossy)
        try:
            house = run(schedule)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}\nThe smallest that fails: {smallest(schedule)}") from error
        happened.update(event.kind for event in schedule.events)
        happened.update(
            answered=sum(answer.error is None for answer in house.answers),
            asked=len(house.answers),
            lost=house.network.num_lost,
            doubled=house.network.num_doubled,
        )
    # Most are answered: a service that only ever answers with errors would pass the checks of a schedule ...
    assert happened["answered"] > 0.4 * happened["asked"], happened
    # ... and so would one that never met a fault.
    assert set(KINDS) <= happened.keys() and happened["lost"], happened
    assert bool(happened["doubled"]) == is_lossy


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_A_TEST))
def test_outages_that_end_in_time_cost_a_pause_and_no_answer(first: int) -> None:
    """Nodes die, freeze and lose their links, several at once, in every state of a recovery."""
    num_resumed = 0
    for seed in range(first, first + SEEDS_A_TEST):
        schedule = Schedule.drawn(seed, is_lossy=False, kinds=OUTAGES, tolerance_s=4 * MAX_FAULT_S)
        house = run(schedule)
        _assert_none_is_lost(house, seed, schedule)
        num_resumed += sum(line["sequences"] for line in house.log if line["event"] == "ring_goes_on")
    assert num_resumed > SEEDS_A_TEST / 2, "hardly any answer met an outage"


@pytest.mark.timeout(600)
def test_hops_that_carry_nothing_for_a_while_beside_other_outages_cost_no_answer_either() -> None:
    happened: Counter[str] = Counter()
    for seed in range(NUM_HOP_SEEDS):
        kinds = (*HOP_KINDS, *HOP_KINDS, *OUTAGES)
        schedule = Schedule.drawn(seed, is_lossy=False, kinds=kinds, tolerance_s=4 * MAX_FAULT_S)
        house = run(schedule)
        _assert_none_is_lost(house, seed, schedule)
        happened.update(line["event"] for line in house.log)
        happened.update(event.kind for event in schedule.events)
    assert set(HOP_KINDS) <= happened.keys()
    assert happened["hop_is_dead"] > NUM_HOP_SEEDS / 5 and happened["hop_carries_again"] > NUM_HOP_SEEDS / 10, happened


@pytest.mark.timeout(600)
def test_hops_that_carry_nothing_beside_everything_else_end_no_service() -> None:
    happened: Counter[str] = Counter()
    for seed in range(1_000, 1_000 + NUM_HOP_SEEDS):
        house = run(Schedule.drawn(seed, is_lossy=True, kinds=(*HOP_KINDS, *HOP_KINDS, *KINDS)))
        happened.update(line["event"] for line in house.log)
    assert happened["hop_is_dead"], happened


@pytest.mark.timeout(600)
def test_nodes_that_fail_or_cannot_load_again_beside_other_outages_cost_no_answer_either() -> None:
    happened: Counter[str] = Counter()
    for seed in range(NUM_HOP_SEEDS // 2):
        kinds = (*FAILURES, *FAILURES, *OUTAGES)
        schedule = Schedule.drawn(seed, is_lossy=False, kinds=kinds, tolerance_s=4 * MAX_FAULT_S)
        house = run(schedule)
        _assert_none_is_lost(house, seed, schedule)
        happened.update(line["event"] for line in house.log)
        happened.update(event.kind for event in schedule.events)
    assert set(FAILURES) <= happened.keys() and happened["ring_goes_on"] > NUM_HOP_SEEDS / 8, happened


def _assert_none_is_lost(house: House, seed: int, schedule: Schedule) -> None:
    lost = [each for each in house.answers if each.error is not None and not each.has_left and not _is_refused(each)]
    assert not lost, f"seed {seed}: {lost[0].number}: {lost[0].error}\n{schedule}"


def _is_refused(answer: Answer) -> bool:
    return not answer.tokens and "the ring does not serve" in str(answer.error)


def test_the_same_schedule_takes_the_same_course() -> None:
    first, second = (run(Schedule.drawn(3, is_lossy=True)) for _ in range(2))
    assert first.events == second.events
    assert [(one.tokens, one.ended_s) for one in first.answers] == [(one.tokens, one.ended_s) for one in second.answers]
