"""One ring, several, or whole copies: the planner's figures for each division of the devices."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from mdiq.core.types import NodeId
from mdiq.plan.divide import MAX_DEVICES
from mdiq.plan.layouts import as_value, layouts, text
from mdiq.plan.partition import Goal, Objective
from mdiq.plan.plan import make_plan, plan_split
from mdiq.plan.profile import HopProfile, Links
from tests.plan.profiles import BARE, MODEL, node

USERS = Goal(num_users=8)
SLOW = Links(unknown=HopProfile(0.05, 1e6))


def test_two_alike_devices_on_a_slow_link_are_better_as_two_copies_with_half_of_the_users_each() -> None:
    nodes = [node("desk"), node("box")]
    best, *others = layouts(MODEL, nodes, SLOW, USERS)
    assert [(part.nodes, part.num_users) for _, part in best.rings] == [(("desk",), 4), (("box",), 4)]
    alone = plan_split(MODEL, nodes[:1], SLOW, replace(USERS, num_users=4), (MODEL.num_layers,))
    assert best.rate == pytest.approx(2 * alone.rate)
    ring = make_plan(MODEL, nodes, SLOW, USERS)
    assert [layout.rate for layout in others] == [pytest.approx(ring.rate)]
    shown = text([best, *others], ring)
    assert f"copy of desk; copy of box: {best.rate:.1f} tokens/s, {100 * (best.rate / ring.rate - 1):+.0f} %" in shown
    assert shown in (Path(__file__).parents[2] / "docs" / "many-rings.md").read_text(), "the page shows this"
    assert "best: copy of desk; copy of box; each part has fewer hops" in shown
    part = {"nodes": ("desk",), "num_users": 4, "rate": best.rate / 2, "is_estimated": False}
    assert as_value(best) == {
        "parts": [part, {**part, "nodes": ("box",)}],
        "rate": best.rate,
        "is_estimated": False,
    }


def test_a_model_that_fits_no_device_makes_rings_of_those_that_hold_it_together() -> None:
    nodes = [node(name, 1.0, 1_500) for name in ("a", "b", "c", "d")]
    found = layouts(MODEL, nodes, SLOW, USERS)
    assert all(len(part.nodes) > 1 for layout in found for _, part in layout.rings)
    pairs = [layout for layout in found if layout.num_rings == 2]
    assert {tuple(len(part.nodes) for _, part in layout.rings) for layout in pairs} == {(2, 2)}
    assert len(pairs) == 3 and len({round(layout.rate, 6) for layout in pairs}) == 1


def test_the_faster_part_gets_more_users_and_a_head_that_was_not_measured_is_estimated() -> None:
    nodes = [node("desk"), replace(node("box", 2.0), head=None)]
    two = next(layout for layout in layouts(MODEL, nodes, SLOW, USERS) if layout.num_rings == 2)
    (_, fast), (_, slow) = two.rings
    assert fast.num_users > slow.num_users > 0 and fast.num_users + slow.num_users == 8
    plan = make_plan(MODEL, nodes, SLOW, USERS)
    assert (fast.is_estimated, slow.is_estimated) == (False, True) and "estimated" in text([two], plan)
    assert as_value(two)["is_estimated"] is True
    measured = [node("desk"), node("box", 2.0)]
    same = next(layout for layout in layouts(MODEL, measured, SLOW, USERS) if layout.num_rings == 2)
    assert two.rate == pytest.approx(same.rate) and "estimated" not in text([same], plan)


def test_one_user_is_served_by_one_part() -> None:
    for goal in (Goal(Objective.LATENCY, num_users=4), Goal(num_users=1)):
        nodes = [node("desk", 2.0), node("box")]
        found = layouts(MODEL, nodes, SLOW, goal)
        assert [[(part.nodes, part.num_users) for _, part in layout.rings] for layout in found] == [
            [(("box",), 1)],
            [(("desk",), 1)],
        ]
        plan = make_plan(MODEL, nodes, SLOW, goal)
        assert found[1].rate == pytest.approx(plan.rate_one)
        assert "best: copy of box; it does without desk" in text(found, plan)


def test_where_a_ring_is_better_the_text_says_so() -> None:
    near = Links(unknown=HopProfile(0.0, math.inf))
    nodes = [replace(node(name, 1.0, 2_500), forward_s=0.0, **BARE) for name in ("desk", "box", "lap")]
    # Two of the three hold the model: the third would be idle, and in the one ring it is not.
    nodes = [replace(each, memory_bytes=1_800 << 20) for each in nodes]
    plan = make_plan(MODEL, nodes, near, USERS)
    found = layouts(MODEL, nodes, near, USERS)
    assert found[0].num_rings == 1 and found[0].rate == pytest.approx(plan.rate)
    shown = text(found, plan)
    assert "ring of box, lap" in shown and "best: one ring; no other layout is more than 2 % faster" in shown
    alone = [node("desk")]
    assert text(layouts(MODEL, alone, near, USERS), make_plan(MODEL, alone, near, USERS)) == ""


def test_many_devices_are_dealt_to_rings_and_those_that_hold_it_are_copies() -> None:
    nodes = [node(f"n{i}", 1.0, 4_096 if i < 3 else 900) for i in range(MAX_DEVICES + 1)]
    found = layouts(MODEL, nodes, SLOW, USERS)
    assert len(found) <= 4
    copies = next(layout for layout in found if all(len(part.nodes) == 1 for _, part in layout.rings))
    assert [part.nodes for _, part in copies.rings] == [(NodeId(f"n{i}"),) for i in range(3)]


def test_each_dealt_ring_has_fast_and_slow_nodes_in_the_order_of_the_ring() -> None:
    factors = [3.0, 1.0, 1.1, 3.1, 1.2, 3.2, 1.3, 3.3]
    nodes = [replace(node(f"n{i}", each, 1_000), forward_s=0.0, **BARE) for i, each in enumerate(factors)]
    nodes = [replace(each, layer_decode=each.layer_decode.scaled(f)) for each, f in zip(nodes, factors, strict=True)]
    near = Links(unknown=HopProfile(0.0, math.inf))
    two = next(layout for layout in layouts(MODEL, nodes, near, Goal(num_users=32)) if layout.num_rings == 2)
    # From the fastest: n1 n2 n4 n6 n0 n3 n5 n7.
    assert [part.nodes for _, part in two.rings] == [("n0", "n1", "n4", "n5"), ("n2", "n3", "n6", "n7")]


def test_a_model_that_fits_nowhere_has_no_layout() -> None:
    assert layouts(MODEL, [node("a", 1.0, 900)], SLOW, USERS) == []
