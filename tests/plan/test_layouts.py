"""One ring, several, or whole copies: the planner's figures for each division of the devices."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from mdiq.core.types import NodeId
from mdiq.plan.layouts import MAX_NODES, layouts, text
from mdiq.plan.partition import Goal, Objective
from mdiq.plan.plan import make_plan, plan_split
from mdiq.plan.profile import HopProfile, Links
from tests.plan.profiles import MODEL, node

USERS = Goal(num_users=8)
SLOW = Links(unknown=HopProfile(0.05, 1e6))


def test_two_alike_devices_on_a_slow_link_are_better_as_two_copies_with_half_of_the_users_each() -> None:
    nodes = [node("desk"), node("box")]
    best, *others = layouts(MODEL, nodes, SLOW, USERS)
    assert [(part.nodes, part.num_users) for part in best.parts] == [(("desk",), 4), (("box",), 4)]
    alone = plan_split(MODEL, nodes[:1], SLOW, replace(USERS, num_users=4), (MODEL.num_layers,))
    assert best.rate == pytest.approx(2 * alone.rate)
    ring = make_plan(MODEL, nodes, SLOW, USERS)
    assert max(layout.rate for layout in others if len(layout.parts) == 1) == pytest.approx(ring.rate)
    shown = text([best, *others], ring.rate)
    assert f"copy of desk; copy of box: {best.rate:.1f} tokens/s, {100 * (best.rate / ring.rate - 1):+.0f} %" in shown
    assert shown in (Path(__file__).parents[2] / "docs" / "many-rings.md").read_text(), "the page shows this"
    assert "best: copy of desk; copy of box; each part has fewer hops" in shown


def test_a_model_that_fits_no_device_makes_rings_of_those_that_hold_it_together() -> None:
    nodes = [node(name, 1.0, 1_500) for name in ("a", "b", "c", "d")]
    found = layouts(MODEL, nodes, SLOW, USERS)
    assert all(len(part.nodes) > 1 for layout in found for part in layout.parts)
    pairs = [layout for layout in found if len(layout.parts) == 2]
    assert {tuple(sorted(map(len, (part.nodes for part in layout.parts)))) for layout in pairs} == {(2, 2)}
    assert len(pairs) == 3 and len({round(layout.rate, 6) for layout in pairs}) == 1


def test_the_faster_part_gets_more_users_and_a_head_that_was_not_measured_is_estimated() -> None:
    nodes = [node("desk"), replace(node("box", 2.0), head=None)]
    two = next(layout for layout in layouts(MODEL, nodes, SLOW, USERS) if len(layout.parts) == 2)
    fast, slow = two.parts
    assert fast.num_users > slow.num_users > 0 and fast.num_users + slow.num_users == 8
    assert two.is_estimated and "estimated" in text([two], 1.0)
    same = next(
        layout for layout in layouts(MODEL, [node("desk"), node("box", 2.0)], SLOW, USERS) if len(layout.parts) == 2
    )
    assert two.rate == pytest.approx(same.rate) and not same.is_estimated


def test_one_user_is_served_by_one_part() -> None:
    found = layouts(MODEL, [node("desk"), node("box")], SLOW, Goal(Objective.LATENCY, num_users=1))
    two = next(layout for layout in found if len(layout.parts) == 2)
    assert sorted(part.num_users for part in two.parts) == [0, 1]
    assert two.rate == max(part.rate for part in two.parts)


def test_where_a_ring_is_better_the_text_says_so() -> None:
    near = Links(unknown=HopProfile(0.0, math.inf))
    nodes = [node("desk"), node("box")]
    found = layouts(MODEL, nodes, near, Goal(num_users=1))
    ring = next(layout for layout in found if len(layout.parts) == 1)
    assert "best: one ring" in text(found, ring.rate * 1.5)
    assert text(layouts(MODEL, nodes[:1], near, USERS), 1.0) == ""


def test_many_devices_are_compared_as_one_ring_two_and_copies_of_those_that_can() -> None:
    nodes = [node(f"n{i}", 1.0, 4_096 if i < 3 else 900) for i in range(MAX_NODES + 1)]
    found = layouts(MODEL, nodes, SLOW, USERS)
    assert len(found) <= 3
    copies = next(layout for layout in found if all(len(part.nodes) == 1 for part in layout.parts))
    assert [part.nodes for part in copies.parts] == [(NodeId(f"n{i}"),) for i in range(3)]


def test_a_model_that_fits_nowhere_has_no_layout() -> None:
    assert layouts(MODEL, [node("a", 1.0, 900)], SLOW, USERS) == []
