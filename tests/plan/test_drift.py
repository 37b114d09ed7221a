"""Rings whose Nodes slow down, recover, swing, and were measured wrongly. Time is a number, the planner is ours."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from mdiq.core.work import Work
from mdiq.plan.drift import (
    FIRST,
    GAIN,
    MAX_AGE_S,
    MIN_CHANGE_S,
    SHOWN,
    STEADY,
    WINDOW_S,
    BetterPlan,
    Drift,
    Factors,
    NamedSplit,
    load_text,
)
from mdiq.plan.measured import Profiles
from mdiq.plan.partition import Goal, best_split
from mdiq.plan.plan import plan_split
from mdiq.plan.profile import Links, NodeProfile
from tests.plan.profiles import MODEL, node

LOOK_S = 10.0
MINUTE, HOUR, DAY = 60.0, 3_600.0, 86_400.0
USERS = 24
MODEL_16 = replace(MODEL, num_layers=16)

Speed = Callable[[float], float]
"""How many times as long a Node takes as it measured, by time."""


class Planner:
    """The Plans of some Nodes."""

    def __init__(self, nodes: list[NodeProfile]) -> None:
        self.profiles = Profiles(MODEL_16, {each.name: each for each in nodes}, Links())
        self.names = [each.name for each in nodes]
        self.goal = Goal(num_users=USERS)
        self.failed: list[NamedSplit] = []
        self._found: dict[tuple[float, ...], dict[str, int]] = {}  # a search takes 10 ms, and there are many
        self._values: dict[tuple[tuple[int, ...], tuple[float, ...]], float] = {}

    def _nodes(self, factors: Factors) -> list[NodeProfile]:
        found = self.profiles.under_load(factors).of(self.names, {})
        assert found is not None
        return found

    def best(self, factors: Factors) -> NamedSplit | None:
        nodes = self._nodes(factors)
        key = self._key(nodes)
        if key not in self._found:
            found = best_split(MODEL_16, nodes, self.profiles.links, self.goal)
            assert found is not None
            self._found[key] = {name: n for name, n in zip(self.names, found, strict=True) if n}
        split = self._found[key]
        return None if split in self.failed else split

    def value(self, split: NamedSplit, factors: Factors) -> float | None:
        nodes, layers = self._nodes(factors), tuple(split.get(name, 0) for name in self.names)
        key = layers, self._key(nodes)
        if key not in self._values:
            self._values[key] = plan_split(MODEL_16, nodes, self.profiles.links, self.goal, layers).value
        return self._values[key]

    def _key(self, nodes: list[NodeProfile]) -> tuple[float, ...]:
        return tuple(round(each.layer_decode.seconds(1), 9) for each in nodes)


@dataclass
class World:
    """A Ring under load, planned by what its Nodes measured. seen: its Nodes have been seen under load."""

    planner: Planner
    speeds: Mapping[str, Speed]
    noise: Callable[[], float] = lambda: 1.0
    seen: bool = True
    now: float = 0.0
    drift: Drift = field(default_factory=Drift)
    changes: list[tuple[float, BetterPlan]] = field(default_factory=list)

    def __post_init__(self) -> None:
        split = self.planner.best({})
        assert split is not None
        self.split = dict(split)
        self.works = dict.fromkeys(self.split, Work())
        self.epoch = 0

    def rate(self) -> float:
        """Return the rate of the Ring as its Nodes are now."""
        value = self.planner.value(self.split, {name: speed(self.now) for name, speed in self.speeds.items()})
        assert value is not None
        return value

    def run(self, until_s: float, *, load: float = 1.0) -> "World":
        """Serve until then. load: the share of the time in which there are requests."""
        while self.now < until_s:
            self.now += LOOK_S
            self._compute(load)
            self._look()
        return self

    def _compute(self, load: float) -> None:
        """Have all Nodes run the same Batches, as many as the slowest can."""
        batches_s: dict[str, float] = {}
        for name, num_layers in self.split.items():
            one = Work(0.0, 1, 4)
            profile = self.planner.profiles.nodes[name]
            layers_s = profile.work_s(one, num_layers) * self.speeds.get(name, lambda _: 1.0)(self.now)
            batches_s[name] = layers_s + profile.forward_s  # the event loop runs beside the forward
        num = round(load * LOOK_S / max(batches_s.values()))
        for name, batch_s in batches_s.items():
            work = self.works[name]
            self.works[name] = Work(
                work.forward_s + num * batch_s * self.noise(),
                work.decode_batches + num,
                work.decode_segments + 4 * num,
            )

    def _look(self) -> None:
        def work_s(name: str, work: Work) -> float:
            return self.planner.profiles.nodes[name].work_s(work, self.split[name])

        if not self.drift.observe(self.now, self.epoch, dict(self.works), work_s):
            return
        better = self.drift.better(self.now, self.split, self.planner, is_doubted=not self.seen)
        if (factors := self.drift.factors(self.now, is_doubted=not self.seen)) is not None:
            self.seen = True
            self.planner.profiles = self.planner.profiles.under_load(factors)
        if better is not None:
            self.changes.append((self.now, better))
            self.drift.changed(self.now)
            self.split = dict(better.split)
            self.works = dict.fromkeys(self.split, Work())
            self.epoch += 1


def swings(slow: float, half_s: float) -> Speed:
    """Return a speed that is ``slow`` and 1 by turns."""
    return lambda now: slow if int(now / half_s) % 2 else 1.0


def slows_at(at_s: float, slow: float) -> Speed:
    return lambda now: slow if now >= at_s else 1.0


def three() -> Planner:
    return Planner([node("a"), node("b"), node("c")])


def test_a_node_that_slows_down_for_good_costs_one_change_and_then_the_rate_is_the_predicted_one() -> None:
    world = World(three(), {"c": slows_at(HOUR + 1, 2.0)}).run(HOUR)
    assert not world.changes
    whole = world.rate()
    world.run(6 * HOUR)
    ((at_s, better),) = world.changes
    assert HOUR + STEADY * WINDOW_S <= at_s <= HOUR + (STEADY + 2) * WINDOW_S
    assert better.factors == pytest.approx({"a": 1.0, "b": 1.0, "c": 2.0}, rel=0.01)
    assert world.split["c"] < world.split["b"]
    assert better.present_value < whole and better.value > GAIN * better.present_value
    assert world.rate() == pytest.approx(better.value, rel=0.01)


def test_a_node_that_was_measured_wrongly_is_corrected_after_the_first_minutes_of_load() -> None:
    world = World(three(), {"a": lambda _: 1.9}, seen=False).run(6 * HOUR)
    ((at_s, better),) = world.changes
    assert at_s <= (FIRST + 1) * WINDOW_S
    assert better.factors["a"] == pytest.approx(1.9, rel=0.01)
    world = World(three(), {"a": lambda _: 0.5}, seen=False).run(6 * HOUR)  # it was busy when it measured
    ((at_s, better),) = world.changes
    assert at_s <= (FIRST + 1) * WINDOW_S
    assert world.split["a"] > world.split["b"]


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(("half_s", "max_changes"), [(30.0, 1), (5 * MINUTE, 1), (0.5 * HOUR, 8)])
def test_a_node_that_swings_does_not_make_the_ring_change_again_and_again(
    half_s: float, max_changes: int, seen: bool
) -> None:
    """By the half hour both ways are steady for long enough, so only the growing pause stops it."""
    world = World(three(), {"c": swings(3.0, half_s)}, seen=seen).run(12 * HOUR)
    assert len(world.changes) <= max_changes
    waits = [b - a for (a, _), (b, _) in zip(world.changes, world.changes[1:], strict=False)]
    assert all(wait >= MIN_CHANGE_S * 2**i for i, wait in enumerate(waits))
    assert half_s < 0.5 * HOUR or len(world.changes) > 2, "nothing would have stopped it"


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_figures_that_vary_by_a_fifth_change_nothing(seed: int, seen: bool) -> None:
    rng = random.Random(seed)
    world = World(three(), {}, noise=lambda: rng.uniform(0.8, 1.2), seen=seen).run(2 * HOUR)
    assert not world.changes


@pytest.mark.parametrize("seed", range(3))
def test_whole_minutes_that_vary_by_a_fifth_change_nothing_either(seed: int) -> None:
    def of_node(number: int) -> Speed:
        return lambda now: random.Random(f"{seed} {number} {now // WINDOW_S}").uniform(0.8, 1.2)

    speeds = {name: of_node(number) for number, name in enumerate("abc")}
    assert not World(three(), speeds).run(2 * HOUR).changes


def test_what_all_nodes_have_in_common_is_the_loads_and_no_nodes() -> None:
    world = World(three(), dict.fromkeys("abc", lambda _: 3.0), seen=False).run(HOUR)
    assert world.drift.factors(world.now, is_doubted=False) == pytest.approx({"a": 1.0, "b": 1.0, "c": 1.0})
    world = World(three(), {"a": lambda _: 3.0, "b": lambda _: 3.3, "c": lambda _: 3.6}).run(HOUR)
    assert world.drift.factors(world.now, is_doubted=False) == pytest.approx({"a": 1.0, "b": 1.1, "c": 1.2})
    unhandled = Planner([replace(node(name), forward_s=0.0) for name in "abc"])  # else it hides that one is faster
    world = World(unhandled, {"a": lambda _: 0.9}).run(HOUR)
    assert world.drift.factors(world.now, is_doubted=False) == pytest.approx({"a": 0.9, "b": 1.0, "c": 1.0})


def test_a_gain_that_is_too_small_or_of_a_split_that_failed_changes_nothing() -> None:
    assert not World(three(), {"c": lambda _: 1.1}).run(6 * HOUR).changes
    planner = three()
    world = World(planner, {"c": slows_at(0.0, 2.0)})
    better = planner.best({"c": 2.0})
    assert better is not None
    planner.failed.append(better)
    assert not world.run(6 * HOUR).changes


def test_a_node_that_slows_the_others_down_is_left_out_and_comes_in_again_only_by_new_figures() -> None:
    planner = Planner([node("a"), node("b", 1.2), node("c")])
    world = World(planner, {"c": lambda _: 20.0}, seen=False).run(HOUR)
    assert set(world.split) == {"a", "b"}
    world.speeds = {}  # it is well again, and nobody sees it
    world.run(6 * HOUR)
    assert len(world.changes) == 1
    # The others slow down: with it, even as slow as it was, it is better again.
    planner.profiles = planner.profiles.under_load({"c": 2.0})
    world.speeds = {"b": lambda _: 9.0}
    world.run(DAY)
    assert "c" in world.split


def test_without_load_nothing_is_seen_and_what_is_old_does_not_count() -> None:
    world = World(three(), {"c": lambda _: 2.0}).run(DAY, load=0.001)
    assert world.drift.factors(world.now, is_doubted=True) is None and not world.changes
    world = World(three(), {"c": lambda _: 2.0}).run((STEADY - 2) * WINDOW_S)
    world.run(world.now + 2 * MAX_AGE_S, load=0.0)
    world.run(world.now + (STEADY - 2) * WINDOW_S)
    assert not world.changes
    world.run(world.now + 5 * WINDOW_S)
    assert len(world.changes) == 1


def test_nodes_that_count_anew_or_are_others_begin_a_new_window() -> None:
    drift = Drift()

    def is_window(now: float, works: Mapping[str, Work], counted: int = 1) -> bool:
        return drift.observe(now, counted, works, lambda _, work: work.decode_batches / 10)

    def works(num: int, names: str = "ab") -> dict[str, Work]:
        return {name: Work(num / 10, num, num) for name in names}

    assert not is_window(0.0, works(0)) and is_window(60.0, works(100))
    assert not is_window(120.0, works(200), counted=2), "another Epoch"
    assert not is_window(180.0, works(100), counted=2), "it was started anew"
    assert is_window(240.0, works(200), counted=2)
    assert not is_window(300.0, works(300, "abc"), counted=2) and is_window(360.0, works(400, "abc"), counted=2)
    drift.forget()
    assert not is_window(420.0, works(0, "a")) and not is_window(480.0, works(100, "a")), "one alone has no factor"


def test_what_load_shows_is_said_of_nodes_that_are_off() -> None:
    assert load_text({"pi1": 1.05, "pi2": 1.94, "pi3": 0.5}, SHOWN) == (
        "pi2 takes 1.9 times as long, pi3 takes 0.5 times as long"
    )
    assert load_text({"pi1": 1.05}, SHOWN) == ""
