"""The explanation of a Plan, as values and as a text (tests/golden/plan_*.txt)."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mdiq.core.types import NodeId
from mdiq.errors import PlanError
from mdiq.plan.explain import WhatIf, explain, render
from mdiq.plan.partition import Goal, Objective
from mdiq.plan.plan import plan_split
from mdiq.plan.profile import HopProfile, Links, NodeProfile
from tests.plan.profiles import BARE, MODEL, node

GOLDEN = Path(__file__).parent.parent / "golden"
USERS = Goal(num_users=8)
CASES: dict[str, tuple[list[NodeProfile], Links, Goal]] = {
    # One is far too slow, one has no room, one is spare.
    "unlike": (
        [
            node("desk"),
            node("pi1", 2.0),
            node("pi2", 2.0),
            node("old", 60.0),
            node("watch", 3.0, 380),
            node("jetson", is_spare=True),
        ],
        Links(),
        USERS,
    ),
    # The model exceeds the memory of each.
    "small": ([node("desk", 1.0, 1_100), node("pi1", 1.0, 1_050), node("pi2", 2.0, 1_000)], Links(), Goal(num_users=8)),
    "equal": ([node("desk"), node("box1"), node("box2")], Links(), replace(USERS, max_kv_tokens=8_192)),
    "one_user": ([node("desk", 2.0), node("pi1", 4.0), node("box1")], Links(), Goal(Objective.LATENCY, num_users=1)),
    "far": (
        [node("desk"), node("box1")],
        Links({(NodeId("desk"), NodeId("box1")): HopProfile(0.3), (NodeId("box1"), NodeId("desk")): HopProfile(0.3)}),
        replace(USERS, num_users=4, kv_tokens=20_000),
    ),
    "thin": (
        [node("desk"), node("box1", 0.25), node("box2", 0.25)],
        Links(unknown=HopProfile(0.001, 2e5)),
        replace(USERS, num_users=16),
    ),
    "few_layers": ([replace(node(name), **BARE) for name in ("desk", "box1", "box2")], Links(), USERS),
}


@pytest.mark.parametrize("case", CASES)
def test_the_text_is_the_golden_one(case: str) -> None:
    model = replace(MODEL, num_layers=2, weights="") if case == "few_layers" else MODEL
    text = render(explain(model, *CASES[case]))
    assert text == (GOLDEN / f"plan_{case}.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120


def test_the_table_has_the_plans_figures() -> None:
    explanation = explain(MODEL, *CASES["unlike"])
    _, _, _, *rows = render(explanation).splitlines()
    for row, stage in zip(rows, explanation.plan.stages, strict=False):
        node, layers, max_layers, share, batch_ms, busy, weights, kv, free = row.split()
        assert (node, layers, int(max_layers)) == (stage.node, str(stage.layers), stage.max_layers)
        assert float(batch_ms) == pytest.approx(1_000 * stage.batch_s, abs=0.05)
        assert int(share) == round(100 * len(stage.layers) / MODEL.num_layers) and int(busy) == round(100 * stage.busy)
        for mib, num_bytes in ((weights, stage.weight_bytes), (kv, stage.kv_bytes), (free, stage.free_bytes)):
            assert int(mib) == round(num_bytes / (1 << 20))


def test_what_json_shows_has_the_keys_that_programs_read() -> None:
    """`mdiq plan --explain --json` writes an Explanation as it is: a key that goes breaks somebody's program."""
    explanation = explain(MODEL, *CASES["unlike"])
    shown = asdict(explanation)
    assert list(shown) == ["plan", "rows", "num_needed", "held", "splits", "one_more", "without", "free_rate"]
    figures = ["max_layers", "share", "batch_s", "busy", "weight_bytes", "kv_bytes", "free_bytes"]
    assert all(list(row) == ["node", "layers", *figures] for row in shown["rows"])
    assert [row["free_bytes"] for row in shown["rows"]] == [stage.free_bytes for stage in explanation.plan.stages]
    assert sum(row["share"] for row in shown["rows"]) == pytest.approx(1)


def test_other_splits_are_predicted_as_the_plan_is() -> None:
    nodes, links, goal = CASES["equal"]
    explanation = explain(MODEL, nodes, links, goal)
    assert explanation.splits == (
        WhatIf("equal split 10,11,11", plan_split(MODEL, nodes, links, goal, (10, 11, 11)).rate),
        WhatIf("MDI-LLM's table 8,12,12", plan_split(MODEL, nodes, links, goal, (8, 12, 12)).rate),
    )


def test_a_device_more_and_a_device_less_are_plans_of_their_own() -> None:
    explanation = explain(MODEL, *CASES["equal"])
    (more,) = explanation.one_more  # all three are of one kind
    assert more.rate is not None
    assert more.rate > explanation.plan.rate
    assert [what_if.name for what_if in explanation.without] == ["box1", "box2"]
    assert all(what_if.rate is not None and what_if.rate < explanation.plan.rate for what_if in explanation.without)


def test_a_node_that_cannot_be_spared_says_what_would_not_fit() -> None:
    explanation = explain(MODEL, *CASES["small"])
    assert explanation.num_needed == 3
    assert explanation.without[0] == WhatIf("pi1", None, "10 layers or 560 MiB would not fit")
    assert explanation.splits[0].rate is not None


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="too many"):
        explain(MODEL, [node("desk", memory_mib=600)], Links(), USERS)


def test_what_trusted_layers_cost_is_told_beside_the_free_plan() -> None:
    nodes, links, goal = CASES["unlike"]
    free = explain(MODEL, nodes, links, goal)
    assert free.free_rate is None and "trusted" not in render(free)
    more = len(free.plan.stages[0].layers) + 8
    kept = explain(MODEL, nodes, links, replace(goal, min_starter_layers=more))
    assert kept.free_rate == free.plan.value > kept.plan.value
    assert len(kept.plan.stages[0].layers) >= more
    (line,) = (line for line in render(kept).splitlines() if line.startswith("trusted"))
    cost = 100 * (kept.plan.value / free.plan.value - 1)
    assert line == (
        f"trusted      the first {more} layers stay on desk: {kept.plan.value:.1f} tokens/s with that, "
        f"{free.plan.value:.1f} without, {cost:+.0f} %"
    )
    anyway = render(explain(MODEL, nodes, links, replace(goal, min_starter_layers=2)))
    assert "the first 2 layers stay on desk, which costs nothing: the best plan has " in anyway


def test_a_split_that_takes_trusted_layers_away_has_no_rate() -> None:
    nodes, links, goal = CASES["equal"]
    explanation = explain(MODEL, nodes, links, replace(goal, min_starter_layers=12))
    assert [what_if.rate for what_if in explanation.splits] == [None, None]
    assert explanation.splits[0].why == "less than 12 layers on desk"
    with pytest.raises(PlanError, match=r"10,11,11: the first 12 are to stay on desk .* give it 12 or more"):
        plan_split(MODEL, nodes, links, replace(goal, min_starter_layers=12), (10, 11, 11))
