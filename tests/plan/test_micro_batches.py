"""The closed form of the MicroBatch cap."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.plan.micro_batches import MAX_LIVE, MIN_LIVE, Curve, plan_micro_batches
from tests.plan.calls import count_calls


def line(a_s: float, c_s: float) -> Curve:
    """Return the cost a + c * b."""
    return Curve(((1, a_s + c_s), (2, a_s + 2 * c_s)))


COSTS = st.builds(line, st.floats(0, 0.2), st.floats(0, 0.05))


@pytest.mark.parametrize(
    ("costs", "num_live", "cap", "rate"),
    [
        # The cases that the form was tried on: milliseconds a and c, hops of 10 ms, simulated tokens per second.
        ([(50, 1)] * 4, 32, 8, 114),
        ([(50, 1)] * 3 + [(100, 2)], 32, 16, 86),
        ([(30, 10)] * 4, 32, 7, 64),
        ([(2, 20)] * 3, 12, 2, 47),
    ],
)
def test_the_known_cases(costs: list[tuple[int, int]], num_live: int, cap: int, rate: float) -> None:
    plan = plan_micro_batches([line(a / 1_000, c / 1_000) for a, c in costs], 0.010 * len(costs))
    assert plan.caps[num_live - 1] == cap
    assert plan.rates[num_live - 1] == pytest.approx(rate, rel=0.05)


def test_one_stage_takes_everything() -> None:
    plan = plan_micro_batches([line(0.05, 0.001)], 0.0, 4)
    assert plan.caps == (1, 2, 3, 4)
    assert plan.in_flight == (1, 1, 1, 1)
    assert plan.rates[3] == pytest.approx(4 / 0.054)


def test_a_curve_that_is_flat_and_then_rises_gives_batches_as_large_as_its_flat_part() -> None:
    # What int8 kernels show: 1 to 8 rows cost the same, and from there each row costs its share.
    flat = Curve(((1, 0.012), (2, 0.012), (4, 0.012), (8, 0.0125), (16, 0.025), (64, 0.1)))
    assert plan_micro_batches([flat] * 4, 0.001).caps[32 - 1] in (7, 8)


def test_long_hops_call_for_more_and_smaller_batches() -> None:
    costs = [line(0.001, 0.010)] * 2
    near, far = plan_micro_batches(costs, 0.0), plan_micro_batches(costs, 1.0)
    assert far.caps[15] < near.caps[15]
    assert far.in_flight[15] > near.in_flight[15]


def test_delay_costs_latency_and_not_throughput() -> None:
    """50 ms a hop and 10 ms a Stage: 3 (1 + 50 / 10) = 18 micro-batches are in flight."""
    costs = [line(0.0, 0.010)] * 3
    plan = plan_micro_batches(costs, 0.150)
    assert plan.in_flight[18 - 1] == 18
    assert plan.rates[MAX_LIVE - 1] > 0.85 * plan_micro_batches(costs, 0.0).rates[MAX_LIVE - 1]


def test_a_long_way_lets_more_sequences_in_and_a_short_one_no_fewer_than_the_least() -> None:
    costs = [line(0.010, 0.001)] * 3
    near, far = plan_micro_batches(costs, 0.0), plan_micro_batches(costs, 0.3)
    assert MIN_LIVE <= near.max_live < far.max_live <= MAX_LIVE
    assert plan_micro_batches([line(0.0, 0.1)] * 2, 0.0).max_live == MIN_LIVE
    assert plan_micro_batches(costs, 0.3, 5).max_live == 5


def test_costs_that_were_measured_as_nothing_still_give_caps() -> None:
    assert len(plan_micro_batches([line(0.0, 0.0)] * 2, 0.0, 3).caps) == 3
    assert plan_micro_batches([line(0.0, 0.0)], 0.0, 3).caps == (1, 2, 3)


def test_a_curve_has_lines_between_its_points_and_its_last_line_goes_on() -> None:
    curve = Curve(((2, 1.0), (4, 2.0), (8, 6.0)))
    assert [curve.seconds(n) for n in (1, 2, 3, 4, 6, 8, 10)] == [1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
    assert Curve(((4, 1.0),)).seconds(99) == 1.0


def test_a_larger_batch_that_was_measured_as_faster_counts_as_equally_fast() -> None:
    assert Curve(((1, 1.3), (2, 1.1), (4, 1.5))).points == ((1, 1.2000000000000002), (2, 1.2000000000000002), (4, 1.5))
    # One that is far too high does not lift all that come behind it.
    assert Curve(((1, 6.0), (2, 1.0), (4, 2.0), (8, 3.0), (16, 9.0))).points == (
        *((size, 3.0) for size in (1, 2, 4, 8)),
        (16, 9.0),
    )
    assert Curve(((1, -1.0),)).points == ((1, 0.0),)


@pytest.mark.parametrize("points", [(), ((0, 1.0),), ((2, 1.0), (1, 1.0)), ((1, 1.0), (1, 2.0))])
def test_a_curve_needs_sizes_that_grow(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="sizes that grow"):
        Curve(points)


@settings(deadline=None)
@given(st.integers(1, 24), st.lists(COSTS, min_size=2, max_size=6), st.floats(0, 0.1))
def test_every_number_of_sequences_has_a_cap(max_live: int, costs: list[Curve], hops_s: float) -> None:
    plan = plan_micro_batches(costs, hops_s, max_live)
    assert len(plan.caps) == len(plan.in_flight) == len(plan.rates) == max_live
    for num_live, (cap, in_flight) in enumerate(zip(plan.caps, plan.in_flight, strict=True), 1):
        assert 1 <= cap <= num_live
        assert in_flight == -(-num_live // cap) or cap == -(-num_live // in_flight)


def test_the_largest_ring_is_planned_with_little_work() -> None:
    costs = [line(0.05 + i / 1_000, 0.001) for i in range(63)]
    num_calls, plan = count_calls(lambda: plan_micro_batches(costs, 0.6))
    assert num_calls < 500_000
    assert len(plan.caps) == MAX_LIVE
