"""The best split, compared with all splits there are."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core.types import NodeId
from mdiq.plan.micro_batches import Curve, best_grouping
from mdiq.plan.partition import Goal, Objective, Split, best_split
from mdiq.plan.profile import HopProfile, Links, ModelShape, NodeProfile
from tests.plan.calls import count_calls
from tests.plan.profiles import MODEL, node

Case = tuple[ModelShape, list[NodeProfile], Links]


def make_case(rng: random.Random, num_nodes: int, num_layers: int, memories: Sequence[int]) -> Case:
    """Return a model and Nodes that have little in common: costs that bend, few free bytes, slow lines."""
    nodes = []
    for i in range(num_nodes):
        decode = [(1, rng.choice([0.0, rng.uniform(0.001, 0.02)]))]
        for size in (2, 4, 8):
            decode.append((size, decode[-1][1] * rng.uniform(1, 1.9)))
        nodes.append(
            NodeProfile(
                NodeId(f"n{i}"),
                memory_bytes=rng.choice(memories),
                layer_decode=Curve(tuple(decode)),
                layer_prompt=Curve(((16, 0.01),)),
                head=Curve(((1, rng.uniform(0, 0.05)), (8, rng.uniform(0, 0.05)))),
                forward_s=rng.choice([0.0, 0.001]),
                context_s=rng.choice([0.0, 1e-6]),
                process_bytes=5,
            )
        )
    hops = {
        (a.name, b.name): HopProfile(
            rng.choice([0.0, 1e-3, rng.uniform(0, 0.03)]), rng.choice([math.inf, 1e6, 3e5, 1e4])
        )
        for a, b in itertools.permutations(nodes, 2)
        if rng.random() < 0.7
    }
    return ModelShape(num_layers, 8, rng.choice([0, 30]), 1, 500, 3), nodes, Links(hops)


def all_splits(model: ModelShape, nodes: Sequence[NodeProfile], goal: Goal) -> Iterator[Split]:
    """Yield every split that the memory permits."""
    most = [n.max_layers(model, goal.kv_tokens, is_starter=not i) for i, n in enumerate(nodes)]
    for split in itertools.product(*(range(cap + 1) for cap in most)):
        if split[0] >= goal.min_starter_layers and sum(split) == model.num_layers:
            yield split


def rate(split: Split, model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal) -> float:
    """Return the rate by the goal, from the closed form of the micro-batches."""
    used = [i for i, n in enumerate(split) if n]
    costs = [nodes[i].stage_cost(split[i], goal.context_tokens, is_starter=not i).decode for i in used]
    hops = [
        links.between(nodes[a].name, nodes[b].name) for a, b in itertools.pairwise([*used, used[0]]) if len(used) > 1
    ]
    num_users = 1 if goal.objective is Objective.LATENCY else goal.num_users
    sends = [hop.send_curve(model) for hop in hops]
    return best_grouping([*costs, *sends], sum(hop.delay_s for hop in hops), num_users)[1]


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10**9),
    num_nodes=st.integers(1, 4),
    num_layers=st.integers(1, 9),
    objective=st.sampled_from(Objective),
    num_users=st.sampled_from([1, 2, 3, 5, 7, 8]),
    kv_tokens=st.sampled_from([1, 4]),
    all_nodes=st.booleans(),
    min_starter_layers=st.sampled_from([1, 1, 2, 3, 5, 9]),
)
def test_no_split_that_the_memory_permits_is_better(
    seed: int,
    num_nodes: int,
    num_layers: int,
    objective: Objective,
    num_users: int,
    kv_tokens: int,
    all_nodes: bool,
    min_starter_layers: int,
) -> None:
    model, nodes, links = make_case(random.Random(seed), num_nodes, num_layers, (50, 200, 1_000))
    goal = Goal(objective, num_users, kv_tokens, context_tokens=seed % 200, min_starter_layers=min_starter_layers)
    allowed = [split for split in all_splits(model, nodes, goal) if all(split) or not all_nodes]
    best = best_split(model, nodes, links, goal, all_nodes=all_nodes)
    if not allowed:
        assert best is None
        return
    assert best in allowed  # so it covers the model and no memory is exceeded
    rates = [rate(split, model, nodes, links, goal) for split in allowed]
    assert rate(best, model, nodes, links, goal) == pytest.approx(max(rates), rel=1e-9)


def test_a_node_at_half_speed_gets_about_half_the_layers() -> None:
    split = best_split(MODEL, [node("a"), node("b"), node("c", 2.0)], Links(), Goal(num_users=12))
    assert split is not None
    assert split[1] == pytest.approx(2 * split[2], abs=2)


def test_for_one_user_the_fastest_nodes_take_all_that_they_hold() -> None:
    nodes = [node("a", 2.0), node("b", 3.0), node("c", 1.0, memory_mib=360 + 56 * 20), node("d", 1.5)]
    assert best_split(MODEL, nodes, Links(), Goal(Objective.LATENCY)) == (1, 0, 20, 11)


def test_the_starter_has_fewer_layers_because_of_its_head() -> None:
    split = best_split(MODEL, [node("a"), node("b")], Links(), Goal(num_users=8))
    assert split is not None
    assert 0 < split[0] < split[1]


def test_a_node_behind_a_slow_line_is_left_out() -> None:
    nodes = [node("a"), node("b"), node("c")]
    far = HopProfile(0.002, 2e4)
    links = Links({(NodeId("a"), NodeId("b")): HopProfile(0.001), (NodeId("b"), NodeId("c")): far})
    split = best_split(MODEL, nodes, links, Goal(num_users=8))
    assert split is not None
    assert split[2] == 0 < split[1]


def test_a_model_that_does_not_fit_has_no_split() -> None:
    assert best_split(MODEL, [node("a", memory_mib=600)], Links(), Goal()) is None
    small = [node("a", memory_mib=600), node("b", memory_mib=600)]
    assert best_split(MODEL, small, Links(), Goal()) is None
    assert best_split(MODEL, [node("a", memory_mib=400), node("b")], Links(), Goal()) is None


def test_costs_that_were_measured_as_nothing_still_give_a_split() -> None:
    nothing = Curve(((1, 0.0),))
    nodes = [replace(node(name), layer_decode=nothing, head=nothing, forward_s=0.0) for name in "ab"]
    for objective in Objective:
        split = best_split(MODEL, nodes, Links({}, HopProfile(0.0)), Goal(objective))
        assert split is not None
        assert sum(split) == 32


@pytest.mark.parametrize("wishes", [{"num_users": 0}, {"num_users": 999}, {"kv_tokens": 0}, {"context_tokens": -1}])
def test_a_goal_that_cannot_be_is_refused(wishes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 layer"):
        Goal(min_starter_layers=0)
    with pytest.raises(ValueError, match="1 to 256 users"):
        Goal(**wishes)  # type: ignore[arg-type]


def _largest(kind: str) -> Case:
    """Return 64 Nodes and 126 Layers."""
    rng = random.Random(3)
    if kind == "thin lines":
        model, nodes, links = make_case(rng, 64, 126, range(40_000, 200_000))
        return replace(model, layer_bytes=8_000), [replace(nodes[0], memory_bytes=400_000), *nodes[1:]], links
    nodes = [node(f"n{i}", rng.uniform(1, 4), rng.randint(600, 2_000)) for i in range(64)]
    return replace(MODEL, num_layers=126), nodes, Links()


@pytest.mark.parametrize("kind", ["thin lines", "fast lines"])
@pytest.mark.parametrize("goal", [Goal(Objective.LATENCY), Goal(num_users=2), Goal(num_users=8)])
def test_the_largest_ring_is_split_with_little_work(kind: str, goal: Goal) -> None:
    model, nodes, links = _largest(kind)
    num_calls, split = count_calls(lambda: best_split(model, nodes, links, goal))
    assert num_calls < 1_000_000
    assert split is not None
    assert sum(split) == 126
    assert all(
        n <= profile.max_layers(model, goal.kv_tokens, is_starter=not i)
        for i, (n, profile) in enumerate(zip(split, nodes, strict=True))
    )


def test_a_starter_whose_event_loop_takes_its_time_gets_fewer_layers() -> None:
    nodes = [node("desk"), node("pi1")]
    goal = Goal(num_users=8, kv_tokens=1)
    before = best_split(MODEL, nodes, Links(), goal)
    after = best_split(MODEL, [replace(nodes[0], forward_s=0.02), nodes[1]], Links(), goal)
    assert before is not None and after is not None
    assert 0 < after[0] < before[0]
