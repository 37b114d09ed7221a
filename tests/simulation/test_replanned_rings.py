"""A service under load whose Nodes do not take what they measured: it changes to a better split, and no stream ends."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from mdiq.core.hop_survey import HopLink
from mdiq.core.types import NodeId, RingSpec
from mdiq.plan import drift
from mdiq.plan.drift import FIRST, STEADY
from mdiq.plan.link_news import AGAIN_S
from mdiq.plan.link_news import STEADY as STEADY_LINKS
from mdiq.plan.measured import Profiles
from mdiq.plan.micro_batches import Curve, MicroBatches
from mdiq.plan.partition import Goal
from mdiq.plan.plan import make_plan, plan_split
from mdiq.plan.profile import HopProfile, Links, ModelShape, NodeProfile
from mdiq.service import replanning
from tests.virtual import house as virtual_house
from tests.virtual.clock import VirtualTimeLoop, run_virtual
from tests.virtual.house import NUM_LAYERS, House, no_memory
from tests.virtual.network import Plane

NAMES = ("desk", "pi1", "pi2")
LAYER_S = 0.5
USERS = 6
NUM_TOKENS = 12
WINDOW_S = 20.0  # and all else of drift.py by as much shorter: 60 s in the product
MODEL = ModelShape(NUM_LAYERS, 1, 0, 1, 16)
LINKS = Links(unknown=HopProfile(0.01))
GOAL = Goal(num_users=USERS, kv_tokens=1)


class Planned:
    """The planner, with figures by which all Nodes are alike."""

    def __init__(self, *, is_seen: bool = True) -> None:
        one, decode, prompt = 1.0 if is_seen else None, Curve(((1, LAYER_S), (2, 2 * LAYER_S))), Curve(((1, LAYER_S),))
        nodes = {
            name: NodeProfile(NodeId(name), 10_000, decode, prompt, Curve(((1, 0.0),)), under_load=one)
            for name in NAMES
        }
        self.measured: Profiles | None = Profiles(MODEL, nodes, LINKS)
        self.split: Mapping[str, int] = self._best(self.measured)
        self.before: Mapping[str, int] = self.split
        self.failed: list[Mapping[str, int]] = []
        self.reasons: list[str] = []
        self.next_split: Mapping[str, int] | None = None  # by what the Ring measures of itself

    def _best(self, profiles: Profiles) -> dict[str, int]:
        nodes = profiles.of(NAMES, {})
        assert nodes is not None
        return {str(stage.node): len(stage.layers) for stage in make_plan(MODEL, nodes, profiles.links, GOAL).stages}

    def best(self, profiles: Profiles) -> Mapping[str, int] | None:
        split = self._best(profiles)
        return None if split in self.failed else split

    def value(self, profiles: Profiles, split: Mapping[str, int]) -> float | None:
        nodes = profiles.of(NAMES, {})
        assert nodes is not None
        layers = tuple(split.get(name, 0) for name in NAMES)
        return plan_split(MODEL, nodes, profiles.links, GOAL, layers).value

    def keep_load(self, profiles: Profiles) -> None:
        self.measured = profiles

    def take_up(self, profiles: Profiles, why: str) -> None:
        self.before, self.split = self.split, self._best(profiles)
        self.keep_load(profiles)
        self.reasons.append(why)

    def note_formed(self) -> None:
        if self.next_split is not None:
            self.before, self.split = self.split, self.next_split

    def note_not_changed(self) -> None:
        self.failed.append(self.split)
        self.go_back()

    def go_back(self) -> None:
        self.split = self.before


def live(
    act: Callable[[House], Awaitable[None]],
    speeds: Mapping[str, Callable[[float], float]],
    *,
    is_seen: bool = True,
    next_split: Mapping[str, int] | None = None,
) -> tuple[House, Planned]:
    """Have a service under load live through what ``act`` does. speeds: times as long as measured, by Node and time."""
    plans = Planned(is_seen=is_seen)
    plans.next_split = next_split

    def layer_s(name: str) -> Callable[[float], float]:
        speed = speeds.get(name)
        return lambda now: LAYER_S * (1.0 if speed is None else speed(now))

    async def main(loop: VirtualTimeLoop) -> House:
        house = House(loop, 2)
        house.plans = plans
        house.layer_s = {name: layer_s(name) for name in NAMES}
        with _shorter(), house.installed():
            house.start()
            await house.serving(30.0)
            asking = [asyncio.create_task(_ask_on(house), name="asks") for _ in range(USERS)]
            await act(house)
            for each in asking:
                each.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            await house.answered(300.0)
            await house.close()
        house.check()
        assert [answer.error for answer in house.answers] == [None] * len(house.answers)
        assert len(house.rings) == 1, "the ring was formed anew"
        return house

    return run_virtual(main), plans


def _paced(spec: RingSpec, *_: object) -> tuple[RingSpec, MicroBatches]:
    """Each Batch has one Segment: larger ones would take as much longer."""
    caps = (1,) * 8
    return replace(spec, caps=caps, max_live=8), MicroBatches(caps, (1,) * 8, (1.0,) * 8, 8)


@contextmanager
def _shorter() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(virtual_house, "_paced", _paced))
        stack.enter_context(mock.patch.object(drift, "WINDOW_S", WINDOW_S))
        stack.enter_context(mock.patch.object(drift, "MIN_CHANGE_S", drift.MIN_CHANGE_S / 3))
        stack.enter_context(mock.patch.object(replanning, "LOOK_S", WINDOW_S / 6))
        yield


async def _ask_on(house: House) -> None:
    """Have a caller ask again and again."""
    while True:
        house.ask(max_tokens=NUM_TOKENS)
        await asyncio.wait({list(house.callers)[-1]})


def split(house: House) -> dict[str, int]:
    options = house.rings[-1].options
    return dict(zip(options.node_names, map(len, options.layers), strict=True))


async def rate(house: House, within_s: float) -> float:
    """Return the tokens per second of all answers in the time that comes."""
    before = sum(len(each.tokens) for each in house.answers)
    await asyncio.sleep(within_s)
    return (sum(len(each.tokens) for each in house.answers) - before) / within_s


def lines(house: House, event: str) -> list[Mapping[str, object]]:
    return [line for line in house.log if line["event"] == event]


SLOW_AT_S = 60.0


@pytest.mark.timeout(60)
def test_a_node_that_slows_down_for_good_costs_one_change_under_load_and_no_stream() -> None:
    rates: list[float] = []

    async def act(house: House) -> None:
        await asyncio.sleep(SLOW_AT_S + 2 * WINDOW_S - house.loop.time())
        rates.append(await rate(house, (STEADY - 3) * WINDOW_S))
        assert split(house) == {"desk": 2, "pi1": 2, "pi2": 2}
        await asyncio.sleep(3 * WINDOW_S)
        assert split(house)["desk"] == 1
        rates.append(await rate(house, 180.0))

    house, plans = live(act, {"desk": lambda now: 2.5 if now >= SLOW_AT_S else 1.0})
    (changed,), (why,) = lines(house, "ring_changed"), plans.reasons
    assert why.startswith("under load desk takes 2.5 times as long as measured alone: a better split: desk 1, pi1 ")
    changed_s = float(str(changed["at_s"]))
    running = [each for each in house.answers if each.asked_s < changed_s < each.ended_s]
    assert len(running) == USERS and all(len(each.tokens) == NUM_TOKENS for each in running)
    assert plans.measured is not None
    before, after = {"desk": 2, "pi1": 2, "pi2": 2}, split(house)
    predicted = [plans.value(plans.measured, each) for each in (before, after)]
    assert rates == [pytest.approx(each, rel=0.15) for each in predicted] and rates[1] > 1.15 * rates[0]


@pytest.mark.timeout(60)
def test_a_node_that_was_measured_wrongly_is_corrected_in_the_first_minutes() -> None:
    async def act(house: House) -> None:
        await asyncio.sleep((FIRST + 2) * WINDOW_S)
        assert split(house)["desk"] == 1
        await asyncio.sleep((STEADY + 4) * WINDOW_S)

    house, _ = live(act, {"desk": lambda _: 2.5}, is_seen=False)
    assert len(lines(house, "ring_changed")) == 1


@pytest.mark.timeout(60)
def test_load_says_more_than_what_a_ring_measured_of_itself_when_it_was_formed() -> None:
    """Nothing runs at last, and the split that waits for that would be taken up then."""

    async def act(house: House) -> None:
        assert house.keeper is not None and house.keeper.wanted != house.rings[-1].options
        await asyncio.sleep((FIRST + 2) * WINDOW_S)
        assert house.keeper.wanted == house.rings[-1].options

    house, _ = live(act, {}, is_seen=False, next_split={"desk": 1, "pi1": 1, "pi2": 4})
    assert not lines(house, "ring_changed") and split(house) == {"desk": 2, "pi1": 2, "pi2": 2}


@pytest.mark.timeout(60)
def test_a_node_that_is_left_out_shows_under_load_that_it_is_well_again_when_it_stands_in() -> None:
    """And after the loss as after the return, the rate is the predicted one."""

    async def has_the_predicted_rate(house: House) -> None:
        seen, plans = await rate(house, 100.0), house.plans
        assert plans is not None and plans.measured is not None
        assert seen == pytest.approx(plans.value(plans.measured, split(house)), rel=0.15)

    async def act(house: House) -> None:
        await asyncio.sleep((STEADY + 3) * WINDOW_S)
        assert split(house) == {"desk": 3, "pi1": 3}
        await house.crash("pi1")
        await asyncio.sleep((STEADY + 3) * WINDOW_S)
        assert split(house) == {"desk": 3, "pi2": 3}
        assert house.plans is not None and house.plans.measured is not None
        assert house.plans.measured.nodes["pi2"].under_load == pytest.approx(1.0)
        await has_the_predicted_rate(house)
        house.start_node("pi1")
        await asyncio.sleep((STEADY + 3) * WINDOW_S)
        assert split(house) == {"desk": 2, "pi1": 2, "pi2": 2}
        await has_the_predicted_rate(house)

    live(act, {"pi2": lambda now: 2.5 if now < (STEADY + 3) * WINDOW_S else 1.0})


@pytest.mark.timeout(60)
def test_a_node_that_swings_changes_nothing() -> None:
    async def act(house: House) -> None:
        await asyncio.sleep(500.0)

    house, _ = live(act, {"desk": lambda now: 2.5 if now % 200 < 100 else 1.0})
    assert not lines(house, "ring_changed")


@pytest.mark.timeout(60)
def test_a_split_to_which_the_ring_could_not_change_is_not_tried_again() -> None:
    async def act(house: House) -> None:
        for name in ("pi1", "pi2"):  # whoever is to have one Layer more
            house.has_no_room[name] = no_memory(name)
        await asyncio.sleep(800.0)
        assert len(house.has_no_room) == 1

    house, plans = live(act, {"desk": lambda _: 2.5})
    assert split(house) == {"desk": 2, "pi1": 2, "pi2": 2}
    assert len(plans.reasons) == len(lines(house, "ring_not_changed")) == 1


def _idle(act: Callable[[House], Awaitable[None]]) -> tuple[House, Planned]:
    """Have a service of which nobody asks anything live through what ``act`` does."""
    plans = Planned()

    async def main(loop: VirtualTimeLoop) -> House:
        house = House(loop, 2)
        house.plans = plans
        house.layer_s = dict.fromkeys(NAMES, lambda _: LAYER_S)
        with _shorter(), house.installed():
            house.start()
            await house.serving(30.0)
            await act(house)
            await house.answered(300.0)
            await house.close()
        house.check()
        assert [answer.error for answer in house.answers] == [None] * len(house.answers)
        assert len(house.rings) == 1, "the ring was formed anew"
        return house

    return run_virtual(main), plans


FAR = Plane(delay_s=4.0)
NEAR = Plane(delay_s=0.01)


def _hops_of_pi2(house: House, plane: Plane) -> None:
    house.network.slow_hop("pi1", "pi2", plane)
    house.network.slow_hop("pi2", "desk", plane)


@pytest.mark.timeout(60)
def test_links_that_become_slow_lead_to_another_split_when_nothing_runs() -> None:
    async def act(house: House) -> None:
        await asyncio.sleep(2 * AGAIN_S)
        assert split(house) == {"desk": 2, "pi1": 2, "pi2": 2}
        _hops_of_pi2(house, FAR)
        await asyncio.sleep(2 * (STEADY_LINKS + 2) * AGAIN_S)  # a survey takes minutes over such links
        assert split(house) == {"desk": 3, "pi1": 3}
        house.ask(max_tokens=NUM_TOKENS)

    house, plans = _idle(act)
    (why,) = plans.reasons
    assert why.startswith("by what the links carry now: a better split: desk 3, pi1 3; ")
    assert len(lines(house, "ring_changed")) == 1
    assert plans.measured is not None
    assert plans.measured.links.hops[NodeId("pi1"), NodeId("pi2")].delay_s == pytest.approx(4.0, abs=0.1)
    assert house.answers[-1].ended_s - house.answers[-1].asked_s < NUM_TOKENS * (NUM_LAYERS * LAYER_S + 1.0)


@pytest.mark.timeout(60)
def test_links_that_swing_change_nothing() -> None:
    async def act(house: House) -> None:
        for i in range(16):
            _hops_of_pi2(house, NEAR if i % 2 else FAR)
            await asyncio.sleep(2 * AGAIN_S)

    house, plans = _idle(act)
    assert not lines(house, "ring_changed") and not plans.reasons


@pytest.mark.timeout(60)
def test_links_are_left_alone_as_soon_as_there_is_something_to_do() -> None:
    """A Frame of a burst takes 4 s here: all of them would take more than a minute."""
    waits_s: list[float] = []

    async def act(house: House) -> None:
        _hops_of_pi2(house, FAR)
        plans = house.plans
        assert plans is not None and plans.measured is not None
        ring = house.rings[-1]
        measured = ring.measure_hops
        asked: list[float] = []

        async def noted() -> tuple[HopLink | None, ...]:
            asked.append(house.loop.time())
            return await measured()

        with mock.patch.object(ring, "measure_hops", noted):
            for i in range(1, 4):
                while len(asked) < i:  # noqa: ASYNC110  (it tells nobody)
                    await asyncio.sleep(0.5)
                house.ask(max_tokens=2)
                await house.answered(300.0)
                waits_s.append(house.answers[-1].ended_s - house.answers[-1].asked_s)
        assert not plans.measured.links.hops, "it was given up each time"

    house, _ = _idle(act)
    alone_s = 2 * (NUM_LAYERS * LAYER_S + 2 * FAR.delay_s)
    assert len(waits_s) == 3 and max(waits_s) < alone_s + 2.0
    assert split(house) == {"desk": 2, "pi1": 2, "pi2": 2}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["drain", "crash"])
@pytest.mark.parametrize("after_s", [0.02, 0.03, 0.3, 0.6])  # a drain fetches layers for a second first
def test_a_ring_may_lose_a_node_while_its_links_are_measured(what: str, after_s: float) -> None:
    """The Ring has fewer Hops then than what is measured began with."""

    async def act(house: House) -> None:
        while not any(line["event"] == "measures" for line in house.log):  # noqa: ASYNC110  (it tells nobody)
            await asyncio.sleep(0.01)
        await asyncio.sleep(after_s)
        if what == "drain":
            house.drain("pi1")
        else:
            await house.crash("pi1")
        await asyncio.sleep(20.0)
        if what == "drain":
            house.drain("pi1", undo=True)
        else:
            house.start_node("pi1")
        await asyncio.sleep(30.0)
        assert split(house).keys() == {"desk", "pi1", "pi2"}
        house.ask(max_tokens=2)

    measured = replanning.Replanning._measured

    async def noted(self: replanning.Replanning, ring: Any) -> tuple[HopLink | None, ...]:
        replanning.log.info("measures")
        return await measured(self, ring)

    with mock.patch.object(replanning.Replanning, "_measured", noted):
        _idle(act)
