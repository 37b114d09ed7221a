"""One rule for plan, simulate and report: what is compared, where the users go, and which Layout wins."""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

import mdiq.plan.layouts
from mdiq.plan.divide import MAX_DEVICES, Layout, best_of, divisions, evenly, lay_out, spread
from mdiq.plan.layouts import layouts
from mdiq.plan.partition import Goal, Split, find_split
from mdiq.plan.profile import HopProfile, Links, NodeProfile
from tests.plan.profiles import MODEL, node


@dataclass(frozen=True, slots=True)
class Fake:
    rate: float
    num_used: int = 1


class Rates:
    """Tokens per second of groups, by the parts that each next user gets; it counts what it is asked."""

    def __init__(self, parts: Mapping[str, list[float]]) -> None:
        self._parts = parts
        self.asked: set[tuple[str, int]] = set()

    def __call__(self, group: str, users: int) -> float:
        self.asked.add((group, users))
        return users * self._parts[group][users - 1]


def one_after_the_other(division: Mapping[str, int], users: int, rates: Rates) -> dict[str, list[int]]:
    """Return the users of each single group, the largest number first, after all have chosen where they get most."""
    given = {group: [0] * count for group, count in division.items()}
    for _ in range(users):
        group, i = max(
            ((group, i) for group, numbers in given.items() for i in range(len(numbers))),
            key=lambda at: rates(at[0], given[at[0]][at[1]] + 1) / (given[at[0]][at[1]] + 1),
        )
        given[group][i] += 1
    return given


@pytest.mark.parametrize("seed", range(150))
def test_users_are_spread_as_if_one_after_the_other_chose(seed: int) -> None:
    draw = random.Random(seed)
    users = draw.choice([1, 2, 7, 40, 200])
    division = {f"g{i}": draw.choice([1, 1, 1, 2, 5]) for i in range(draw.randint(1, 6))}
    top = {group: draw.choice([1.0, 1.0, 0.01, 30.0]) for group in division}
    parts = {group: sorted((top[group] * draw.random() for _ in range(users)), reverse=True) for group in division}
    rates = Rates(parts)
    given = dict(zip(division, spread(division, users, rates), strict=True))
    assert given == {group: sum(numbers) for group, numbers in one_after_the_other(division, users, rates).items()}


@pytest.mark.parametrize("num_groups", [2, 4, 6])
def test_a_spread_of_many_users_asks_for_few_rates(num_groups: int) -> None:
    # A lap that each user makes longer, by as much as the group is slow.
    parts = {f"g{i}": [1 / (0.1 * 1.3**i + 0.02 * 1.7**i * n) for n in range(256)] for i in range(num_groups)}
    division = dict.fromkeys(parts, 1)
    slow, fast = Rates(parts), Rates(parts)
    expected = one_after_the_other(division, 256, slow)
    assert spread(division, 256, fast) == [sum(numbers) for numbers in expected.values()]
    assert len(slow.asked) >= 256
    assert len(fast.asked) <= 20 * num_groups


def test_alike_groups_cost_what_one_does() -> None:
    rates = Rates({"a": [1 / (1 + n) for n in range(100_000)]})
    assert spread({"a": 1_000}, 100_000, rates) == [100_000] and not rates.asked


def test_a_spread_ends_where_a_part_grows_with_the_users() -> None:
    draw = random.Random(7)
    for _ in range(100):
        parts = {f"g{i}": [draw.random() for _ in range(64)] for i in range(4)}
        assert sum(spread(dict.fromkeys(parts, 1), 64, Rates(parts))) == 64


def test_groups_without_room_get_nobody() -> None:
    rates = Rates({"full": [1.0, 0.9, 0.0, 0.0, 0.0], "large": [0.5, 0.4, 0.3, 0.2, 0.1], "small": [0.0] * 5})
    assert spread(dict.fromkeys(("full", "large", "small"), 1), 5, rates) == [2, 3, 0]


def test_users_of_alike_rings_differ_by_one_at_most() -> None:
    assert evenly(8, 3) == [(2, 3), (1, 2)]
    assert evenly(6, 3) == [(3, 2)]
    assert evenly(2, 3) == [(2, 1)]  # the third has none


def test_a_layout_has_the_rings_with_users_and_is_none_where_they_have_no_room() -> None:
    def ring(group: str, users: int) -> Fake | None:
        return Fake(float(users)) if users <= (3 if group == "large" else 1) else None

    layout = lay_out({"large": 1, "small": 2}, 5, ring)
    assert layout == Layout(((1, Fake(3.0)), (2, Fake(1.0))))
    assert (layout.num_rings, layout.rate, layout.num_used) == (3, 5.0, 3)
    assert lay_out({"large": 1, "small": 2}, 6, ring) is None
    assert lay_out({"large": 1}, 4, ring) is None


def test_of_nearly_equal_layouts_that_with_fewest_devices_is_best_and_then_that_with_most_rings() -> None:
    large, small, two, slow = (
        Layout(((1, Fake(100.0, 4)),)),
        Layout(((1, Fake(98.5, 2)),)),
        Layout(((2, Fake(49.3, 1)),)),
        Layout(((1, Fake(97.0, 1)),)),
    )
    assert best_of([large, small, slow]) is small
    assert best_of([large, small, two, slow]) is two
    assert best_of([large, slow]) is large


def test_few_devices_are_divided_in_all_ways_and_alike_ones_count_once() -> None:
    assert len(list(divisions(range(MAX_DEVICES), 1))) == 203
    found = list(divisions("aaaa", 4))
    assert len(found) == 5  # 4, 3 + 1, 2 + 2, 2 + 1 + 1, 1 + 1 + 1 + 1
    assert {("a", "a"): 2} in found and {("a", "a"): 1, ("a",): 2} in found
    assert list(divisions("aab", 4, 2)) == [{("a", "b"): 1, ("a",): 1}, {("a", "a"): 1, ("b",): 1}]


def test_many_devices_are_dealt_in_order_of_speed() -> None:
    found = list(divisions("abcdefg", 3))
    assert found == [
        {tuple("abcdefg"): 1},
        {tuple("aceg"): 1, tuple("bdf"): 1},
        {tuple("adg"): 1, tuple("be"): 1, tuple("cf"): 1},
    ]
    assert [sum(division.values()) for division in divisions("abcdefg", 100)] == [1, 2, 3, 7]
    assert list(divisions("a" * 8, 1, 4)) == [{("a", "a"): 4}]
    thousand = [sum(division.values()) for division in divisions(["a"] * 1_000, 1_000)]
    assert len(thousand) == 24 and (thousand[0], thousand[-1]) == (1, 1_000)


def _unlike(draw: random.Random, number: int) -> list[NodeProfile]:
    return [node(f"n{i}", draw.uniform(0.5, 3.0), draw.choice([1_500, 2_500])) for i in range(number)]


@pytest.mark.parametrize("seed", range(6))
def test_the_planners_rates_are_spread_as_if_one_after_the_other_chose(seed: int) -> None:
    draw = random.Random(seed)
    nodes = _unlike(draw, 4)
    links = Links(unknown=HopProfile(draw.choice([0.0005, 0.02]), draw.choice([1e6, 12.5e6])))
    best = layouts(MODEL, nodes, links, Goal(num_users=12))[0]
    known: dict[tuple[str, int], float] = {}

    def rate(names: str, users: int) -> float:
        if (names, users) not in known:
            ring = [each for each in nodes if each.name in names.split()]
            found = find_split(MODEL, ring, links, Goal(num_users=users))
            known[names, users] = 0.0 if found is None else found[1]
        return known[names, users]

    division = Counter(" ".join(part.nodes) for _, part in best.rings)
    given = dict.fromkeys(division, 0)
    for _ in range(12):
        given[max(given, key=lambda names: rate(names, given[names] + 1) / (given[names] + 1))] += 1
    assert {" ".join(part.nodes): part.num_users for _, part in best.rings} == given
    assert best.rate == pytest.approx(sum(rate(names, users) for names, users in given.items()))


def test_unlike_nodes_with_256_users_are_compared_by_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    num_plans = 0

    def counted(*args: Any, **kwargs: Any) -> tuple[Split, float] | None:
        nonlocal num_plans
        num_plans += 1
        return find_split(*args, **kwargs)

    monkeypatch.setattr(mdiq.plan.layouts, "find_split", counted)
    nodes = [node(f"n{i}", 1 + 0.3 * i, 1_500 if i % 2 else 2_500) for i in range(4)]
    links = Links(unknown=HopProfile(0.002, 12.5e6))
    found = layouts(MODEL, nodes, links, Goal(num_users=256))
    assert sum(part.num_users for _, part in found[0].rings) == 256
    # There are 15 groups. One user after the other would take some hundred plans for each of them.
    assert num_plans < 15 * 15
