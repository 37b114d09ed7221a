"""Rings as the planner splits them, in virtual time: the predicted rate is that of the protocols."""

import itertools
from collections.abc import Sequence

import pytest

from mdiq.core.types import NodeId
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost
from mdiq.plan.partition import Goal, Split
from mdiq.plan.plan import Plan, make_plan, plan_split
from mdiq.plan.profile import HopProfile, Links, NodeProfile
from mdiq.plan.split import split_layers
from tests.plan.profiles import MODEL, node
from tests.simulation.timed_ring import TimedRing

FAST, HALF = [node("a"), node("b"), node("c")], [node("a"), node("b"), node("c", 2.0)]
LAN = Links()
THIN = Links(unknown=HopProfile(0.002, 3e5))
FAR = Links({(NodeId("b"), NodeId("c")): HopProfile(0.04), (NodeId("a"), NodeId("b")): HopProfile(0.001)})


def measured_rate(plan: Plan, nodes: Sequence[NodeProfile]) -> float:
    """Return the tokens per second that the goal's users get from this Ring, whose times vary by a tenth."""
    starter = nodes[0]
    assert starter.head is not None
    # The Ring runs the head by itself, so that the Starter's Stage is without it.
    own = starter.stage_cost(len(plan.stages[0].layers), plan.goal.context_tokens, is_starter=False)
    ring = TimedRing(
        [own, *(stage.cost for stage in plan.stages[1:])],
        head=starter.head,
        hop_s=[hop.delay_s for hop in plan.hops] or 0.0,
        sends=[hop.send for hop in plan.hops],
        jitter=0.1,
    )
    for _ in range(plan.goal.num_users):
        ring.submit(1, 150)
    ring.run()
    times = sorted(itertools.chain.from_iterable(ring.token_times.values()))
    quarter = len(times) // 4
    return 2 * quarter / (times[3 * quarter] - times[quarter])


@pytest.mark.parametrize("num_users", [1, 3, 8, 24])
@pytest.mark.parametrize("links", [LAN, THIN, FAR], ids=["lan", "thin", "far"])
@pytest.mark.parametrize("nodes", [FAST, HALF, FAST[:2], FAST[:1]], ids=["equal", "half", "two", "one"])
def test_the_predicted_rate_is_the_rings(nodes: list[NodeProfile], links: Links, num_users: int) -> None:
    plan = make_plan(MODEL, nodes, links, Goal(num_users=num_users))
    assert measured_rate(plan, nodes) == pytest.approx(plan.rate, rel=0.15)


@pytest.mark.parametrize("num_users", [3, 8, 24])
@pytest.mark.parametrize("split", [(10, 11, 11), (8, 12, 12), (30, 1, 1), (1, 1, 30)])
def test_the_predicted_rate_of_any_split_is_the_rings(split: Split, num_users: int) -> None:
    plan = plan_split(MODEL, HALF, THIN, Goal(num_users=num_users), split)
    assert measured_rate(plan, HALF) == pytest.approx(plan.rate, rel=0.15)


@pytest.mark.parametrize("num_users", [3, 8, 24])
def test_with_a_node_at_half_speed_the_plan_beats_the_equal_split_by_the_predicted_factor(num_users: int) -> None:
    goal = Goal(num_users=num_users)
    best = make_plan(MODEL, HALF, LAN, goal)
    equal = plan_split(MODEL, HALF, LAN, goal, tuple(map(len, split_layers(32, 3))))
    predicted = best.rate / equal.rate
    assert predicted > 1.15
    assert measured_rate(best, HALF) / measured_rate(equal, HALF) == pytest.approx(predicted, rel=0.1)


def test_a_node_that_is_left_out_would_have_slowed_the_ring_down() -> None:
    nodes = [*FAST[:2], node("old", 30.0)]
    plan = make_plan(MODEL, nodes, LAN, Goal(num_users=8))
    (left_out,) = plan.left_out
    with_it = max(
        (plan_split(MODEL, nodes, LAN, Goal(num_users=8), (n, 31 - n, 1)) for n in range(1, 31)),
        key=lambda other: other.rate,
    )
    assert left_out.rate_with == pytest.approx(with_it.rate)
    assert measured_rate(with_it, nodes) == pytest.approx(with_it.rate, rel=0.15)
    assert measured_rate(with_it, nodes) < measured_rate(plan, nodes)


def test_a_line_that_is_busy_holds_the_next_frame_back() -> None:
    """2 Sequences, each in a Frame of its own, on a line that needs 20 ms for one."""
    cost = StageCost.of(((1, 0.001), (2, 0.002)), ((16, 0.001),))
    ring = TimedRing([cost] * 2, hop_s=0.0, sends=[Curve(((1, 0.02), (2, 0.04))), Curve(((1, 0.0),))])
    for _ in range(2):
        ring.submit(1, 100)
    ring.run()
    assert ring.num_tokens / ring.now == pytest.approx(1 / 0.02, rel=0.05)
