"""Plans: their figures, what limits them, who is left out, and the way from one to another."""

from dataclasses import replace

import pytest

from mdiq.core.types import LayerRange, NodeId
from mdiq.errors import PlanError
from mdiq.plan.fixed_tables import mdi_split
from mdiq.plan.micro_batches import Curve, plan_micro_batches
from mdiq.plan.partition import Goal, Objective
from mdiq.plan.plan import LeftOut, Limit, LimitKind, Why, make_plan, plan_split
from mdiq.plan.profile import HopProfile, Links, NodeProfile
from mdiq.plan.split import split_layers
from tests.plan.profiles import BARE, MIB, MODEL, node

A, B, C = (NodeId(name) for name in "abc")
LINKS = Links()
USERS = Goal(num_users=8)


def _layers(nodes: list[NodeProfile], goal: Goal = USERS) -> list[str]:
    return [f"{stage.node} {stage.layers}" for stage in make_plan(MODEL, nodes, LINKS, goal).stages]


def test_the_layers_follow_each_other_round_the_ring_and_are_those_of_the_model() -> None:
    assert _layers([node("a"), node("b"), node("c")]) == ["a 0-8", "b 9-20", "c 21-31"]


def test_the_rate_is_that_of_the_micro_batches() -> None:
    plan = plan_split(MODEL, [node("a"), node("b", 2.0)], Links({(A, B): HopProfile(0.003, 2e5)}), USERS, (20, 12))
    decodes = [*(stage.cost.decode for stage in plan.stages), *(hop.send for hop in plan.hops)]
    micro_batches = plan_micro_batches(decodes, plan.hops_s, 8)
    assert plan.rate == pytest.approx(micro_batches.rates[7])
    assert (plan.cap, plan.in_flight) == (micro_batches.caps[7], micro_batches.in_flight[7])
    assert plan.rate_one == pytest.approx(micro_batches.rates[0])
    assert plan.hops_s == pytest.approx(0.003 * 2)  # the way back is taken to be as good


def test_a_prompt_goes_as_fast_as_its_slowest_stage() -> None:
    plan = plan_split(MODEL, [node("a"), node("b")], LINKS, USERS, (12, 20))
    assert plan.prompt_rate == pytest.approx(64 / (20 * 0.026 + 0.0005))


def test_the_memory_of_a_node_is_all_accounted_for() -> None:
    plan = make_plan(MODEL, [node("a", memory_mib=1_500), node("b", memory_mib=1_300)], LINKS, USERS)
    for stage in plan.stages:
        assert stage.weight_bytes + stage.kv_bytes + stage.other_bytes + stage.free_bytes == stage.memory_bytes
        assert stage.free_bytes >= 0
        assert stage.other_bytes == 360 * MIB
        assert len(stage.layers) <= stage.max_layers
    assert plan.kv_tokens >= 2_048
    fullest = min(plan.stages, key=lambda stage: stage.free_bytes / len(stage.layers))
    assert fullest.free_bytes < len(fullest.layers) * MODEL.kv_bytes  # not one token more


def test_no_more_kv_cache_is_taken_than_is_wanted() -> None:
    plan = make_plan(MODEL, [node("a"), node("b")], LINKS, replace(USERS, max_kv_tokens=5_000))
    assert plan.kv_tokens == 5_000


def test_one_node_alone_has_no_hops() -> None:
    plan = make_plan(MODEL, [node("a")], LINKS, USERS)
    assert plan.hops == ()
    assert plan.stages[0].busy == pytest.approx(1)
    assert plan.limit == Limit(LimitKind.COMPUTE, "a")


def test_a_model_that_no_node_holds_alone_runs_over_three() -> None:
    nodes = [node("a", memory_mib=1_100), node("b", memory_mib=1_000), node("c", memory_mib=1_000)]
    plan = make_plan(MODEL, nodes, LINKS, replace(USERS, kv_tokens=1_024))
    assert len(plan.stages) == 3
    assert max(stage.max_layers for stage in plan.stages) < 32
    with pytest.raises(PlanError, match="too many: add one device"):
        make_plan(MODEL, nodes[:2], LINKS, replace(USERS, kv_tokens=1_024))


@pytest.mark.parametrize("num_nodes", [2, 3])
@pytest.mark.parametrize("num_layers", [22, 32, 36, 48])
@pytest.mark.parametrize("num_users", [1, 3, 8, 20])
def test_on_equal_nodes_nothing_is_lost_against_the_fixed_tables(
    num_nodes: int, num_layers: int, num_users: int
) -> None:
    model = replace(MODEL, num_layers=num_layers)
    nodes = [node(name) for name in "abc"[:num_nodes]]
    goal = replace(USERS, num_users=num_users)
    table = mdi_split(num_layers, num_nodes)
    assert table is not None
    fixed = plan_split(model, nodes, LINKS, goal, table)
    assert make_plan(model, nodes, LINKS, goal).rate >= fixed.rate


def test_with_a_node_at_half_speed_the_plan_beats_the_equal_split() -> None:
    nodes = [node("a"), node("b"), node("c", 2.0)]
    equal = plan_split(MODEL, nodes, LINKS, USERS, tuple(map(len, split_layers(32, 3))))
    assert make_plan(MODEL, nodes, LINKS, USERS).rate > 1.25 * equal.rate


def test_a_node_that_only_slows_the_ring_down_is_left_out_with_both_figures() -> None:
    nodes = [node("a"), node("b"), node("old", 60.0)]
    plan = make_plan(MODEL, nodes, LINKS, USERS)
    (left_out,) = plan.left_out
    assert (left_out.node, left_out.why) == ("old", Why.SLOWER)
    assert plan.layers(NodeId("old")) is None
    assert left_out.rate_with is not None
    assert left_out.rate_with < plan.rate
    # The best that can be done with it: one Layer there.
    best = max(plan_split(MODEL, nodes, LINKS, USERS, (n, 31 - n, 1)).rate for n in range(1, 31))
    assert left_out.rate_with == pytest.approx(best)


def test_spare_nodes_and_those_without_room_are_left_out() -> None:
    nodes = [node("a"), node("b", is_spare=True), node("c", memory_mib=400), node("d")]
    plan = make_plan(MODEL, nodes, LINKS, USERS)
    assert plan.left_out == (LeftOut(C, Why.NO_ROOM), LeftOut(B, Why.SPARE))


def test_more_nodes_than_layers_leave_some_without() -> None:
    plan = make_plan(replace(MODEL, num_layers=2), [replace(node(name), **BARE) for name in "abc"], LINKS, USERS)
    assert [left_out.why for left_out in plan.left_out] == [Why.NO_LAYER]


def test_a_spare_starter_is_the_starter_all_the_same() -> None:
    assert make_plan(MODEL, [node("a", is_spare=True)], LINKS, USERS).layers(A) == LayerRange(0, 32)


def test_what_limits_is_the_slowest_stage_of_a_full_ring() -> None:
    plan = plan_split(MODEL, [node("a"), node("b")], LINKS, USERS, (4, 28))
    assert plan.limit == Limit(LimitKind.COMPUTE, "b")


def test_what_limits_is_a_line_that_is_busy_for_longer_than_any_stage() -> None:
    links = Links({(A, B): HopProfile(0.001, 5e4)})
    plan = plan_split(MODEL, [node("a"), node("b")], links, USERS, (12, 20))
    assert plan.limit == Limit(LimitKind.HOP, "a > b")
    assert plan.hops[0].busy > 0.9


def test_what_limits_few_users_is_the_way_round() -> None:
    links = Links({(A, B): HopProfile(0.5), (B, A): HopProfile(0.001)})
    plan = plan_split(MODEL, [node("a"), node("b")], links, replace(USERS, num_users=2), (12, 20))
    assert plan.limit == Limit(LimitKind.HOP, "a > b", is_waiting=True)


@pytest.mark.parametrize(
    ("delay_s", "limit"), [(0.5, Limit(LimitKind.HOP, "a > b")), (0.0, Limit(LimitKind.COMPUTE, "b"))]
)
def test_what_limits_one_user_is_the_longest_part_of_the_lap(delay_s: float, limit: Limit) -> None:
    links = Links({(A, B): HopProfile(delay_s), (B, A): HopProfile(0.001)})
    for goal in (replace(USERS, num_users=1), Goal(Objective.LATENCY, num_users=8)):
        plan = plan_split(MODEL, [node("a"), node("b")], links, goal, (12, 20))
        assert plan.limit == limit
        assert plan.value == plan.rate_one


def test_what_limits_is_the_memory_of_a_node_that_could_run_more() -> None:
    nodes = [node("a"), node("b", memory_mib=360 + 56 * 5), node("c")]
    assert make_plan(MODEL, nodes, LINKS, USERS).limit == Limit(LimitKind.MEMORY, "b")
    # It is full as well, but the others would not be faster without it.
    slow = [node("a"), node("b", 20.0, memory_mib=360 + 56), node("c")]
    assert make_plan(MODEL, slow, LINKS, USERS).limit.kind is LimitKind.COMPUTE


@pytest.mark.parametrize("split", [(16, 15), (16, 16, 0), (0, 32), (33, -1)])
def test_a_split_by_hand_that_does_not_cover_the_model_is_refused(split: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="2 nodes and 32 layers need one number for each node, 32 together"):
        plan_split(MODEL, [node("a"), node("b"), node("c", is_spare=True)], LINKS, USERS, split)


def test_a_split_by_hand_that_exceeds_a_memory_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        plan_split(MODEL, [node("a"), node("b", memory_mib=900)], LINKS, USERS, (16, 16))
    assert str(caught.value) == (
        "b: 16 layers with 2,048 tokens of KV cache need 896 MiB and 540 MiB of its 900 MiB are left for them; "
        "give it at most 9"
    )


def test_a_split_by_hand_may_leave_a_node_out() -> None:
    plan = plan_split(MODEL, [node("a"), node("b", memory_mib=100), node("c")], LINKS, USERS, (10, 0, 22))
    assert [stage.node for stage in plan.stages] == [A, C]
    assert plan.left_out == ()


def test_a_slow_line_makes_prompts_slow() -> None:
    links = Links({(A, B): HopProfile(0.0, 1e5)})
    plan = plan_split(MODEL, [node("a"), node("b")], links, USERS, (12, 20))
    assert plan.prompt_rate == pytest.approx(64 / links.between(A, B).send_s(1, 64, MODEL))


def test_times_that_grow_with_the_context_are_predicted() -> None:
    growing = [replace(node(name), context_s=1e-6) for name in "ab"]
    short, long = (plan_split(MODEL, growing, LINKS, replace(USERS, context_tokens=n), (12, 20)) for n in (0, 1_000))
    assert long.rate < short.rate
    flat = replace(growing[1], layer_decode=Curve(((1, 0.002),)))
    assert plan_split(MODEL, [growing[0], flat], LINKS, USERS, (12, 20)).rate > short.rate
