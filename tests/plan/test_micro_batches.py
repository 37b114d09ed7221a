"""The closed form of the MicroBatch cap."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.plan.micro_batches import StageCost, caps, rate_tokens_per_s

COSTS = st.builds(StageCost, st.floats(0, 0.2), st.floats(0, 0.05))


@pytest.mark.parametrize(
    ("costs", "num_live", "cap", "rate"),
    [
        # The table that the form was tried on: milliseconds a and c, hops of 10 ms, predicted tokens per second.
        ([(50, 1)] * 4, 32, 8, 118),
        ([(50, 1)] * 3 + [(100, 2)], 32, 11, 88),
        ([(30, 10)] * 4, 32, 7, 68),
        ([(2, 20)] * 3, 12, 3, 48),
    ],
)
def test_the_known_cases(costs: list[tuple[int, int]], num_live: int, cap: int, rate: float) -> None:
    stages = [StageCost(a / 1_000, c / 1_000) for a, c in costs]
    hops_s = [0.010] * len(stages)
    assert caps(num_live, stages, hops_s)[-1] == cap
    predicted = max(rate_tokens_per_s(num_live, g, stages, sum(hops_s)) for g in range(1, num_live + 1))
    assert predicted == pytest.approx(rate, abs=0.5)


def test_one_stage_takes_everything() -> None:
    assert caps(4, [StageCost(0.05, 0.001)], [0.0]) == (1, 2, 3, 4)


def test_no_more_sequences_than_stages_are_never_coalesced() -> None:
    assert caps(5, [StageCost(0.05, 0.0)] * 5, [1.0] * 5) == (1, 1, 1, 1, 1)


def test_long_hops_call_for_more_and_smaller_batches() -> None:
    costs = [StageCost(0.001, 0.010)] * 2
    assert caps(16, costs, [0.5] * 2)[-1] < caps(16, costs, [0.0] * 2)[-1]


def test_costs_that_were_measured_as_nothing_or_less_still_give_caps() -> None:
    assert caps(3, [StageCost(-1e-3, 0.0), StageCost(0.0, -1e-6)], [0.0, 0.0]) == (1, 1, 3)


@settings(deadline=None)
@given(st.integers(1, 24), st.lists(COSTS, min_size=2, max_size=6), st.floats(0, 0.1))
def test_every_cap_has_the_best_rate_that_the_form_knows(max_live: int, costs: list[StageCost], hop_s: float) -> None:
    result = caps(max_live, costs, [hop_s] * len(costs))
    assert len(result) == max_live
    for num_live, cap in enumerate(result, 1):
        assert 1 <= cap <= num_live
        if len(costs) < num_live:
            rates = [rate_tokens_per_s(num_live, g, costs, hop_s * len(costs)) for g in range(1, num_live + 1)]
            batches = [g for g in range(1, num_live + 1) if -(-num_live // g) == cap]
            assert any(math.isclose(rates[g - 1], max(rates)) for g in batches)


def test_the_largest_ring_is_planned_in_no_time() -> None:
    costs = [StageCost(0.05 + i / 1_000, 0.001) for i in range(63)]
    start_s = time.process_time()
    caps(64, costs, [0.01] * 63)
    caps(64, costs[:2], [0.01] * 2)
    assert time.process_time() - start_s < 0.5
