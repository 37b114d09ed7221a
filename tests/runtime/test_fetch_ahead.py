"""Layers are brought to Nodes' disks while the Ring serves, so that a pause is short of their transfer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mdiq.transport.curve import WEIGHTS
from tests.runtime.test_ring_changes import FORMED_S, asked, has_layers, layers, states
from tests.runtime.test_ring_changes import live as live_cold
from tests.virtual.house import NUM_LAYERS, STARTER, House

FETCH_S = 12.0
"""Of any Layers: a slow link."""
SHORT_S = 3.0
"""A pause in which nothing is fetched: noticing, and loading from a disk."""


def live(act: Callable[[House], Awaitable[None]], *, num_spares: int = 0) -> House:
    """Have a service live through what ``act`` does when the Ring has formed, over slow links from then on."""

    async def slowly(house: House) -> None:
        house.keeps_standby_layers = True
        await house.serving(FORMED_S)
        house.fetch_s = FETCH_S
        await act(house)

    return live_cold(slowly, num_spares=num_spares)


async def until_on_disk(house: House, name: str, wanted: range, within_s: float = 4 * FETCH_S) -> None:
    """Wait until a Node has these Layers, and the Starter knows it: a spare has tried to load them by then."""
    deadline_s = house.loop.time() + within_s
    while house.rings[-1].at_hand.get(name) != frozenset(wanted):
        assert house.loop.time() < deadline_s, f"{name}: {house.disks[name]}"
        await asyncio.sleep(0.25)
    assert house.disks[name] == {*wanted}


def pauses_s(house: House, event: str) -> list[float]:
    return [line["after_s"] for line in house.log if line["event"] == event]


def test_a_spare_gets_the_layers_of_all_workers_and_takes_over_without_a_transfer() -> None:
    async def act(house: House) -> None:
        await until_on_disk(house, "spare1", range(2, NUM_LAYERS))
        assert house.keeper is not None
        status = {node["name"]: node for node in house.keeper.status()["nodes"]}
        assert status["spare1"]["on_disk"] == [2, 3, 4, 5] and status["spare1"]["state"] == "stands by"
        await asked(house)
        await house.crash("pi2")
        await house.answered(20.0)
        assert layers(house) == {"desk": 2, "pi1": 2, "spare1": 2}

    assert max(pauses_s(live(act, num_spares=1), "ring_goes_on")) < SHORT_S


def test_of_two_spares_the_one_that_has_the_layers_takes_over() -> None:
    async def act(house: House) -> None:
        house.full_disks.add("spare1")
        await until_on_disk(house, "spare2", range(2, NUM_LAYERS))
        await asked(house)
        await house.crash("pi1")
        await house.answered(20.0)
        assert layers(house) == {"desk": 2, "spare2": 2, "pi2": 2}

    assert max(pauses_s(live(act, num_spares=2), "ring_goes_on")) < SHORT_S


def test_neighbours_get_each_others_layers_and_take_over_at_once() -> None:
    async def act(house: House) -> None:
        for name in ("pi1", "pi2"):
            await until_on_disk(house, name, range(2, NUM_LAYERS))
        await asyncio.sleep(1.0)
        await asked(house)
        await house.crash("pi1")
        await house.answered(20.0)
        assert layers(house) == {"desk": 3, "pi2": 3}

    assert max(pauses_s(live(act), "ring_goes_on")) < SHORT_S


def test_a_node_without_room_for_more_fetches_none() -> None:
    async def act(house: House) -> None:
        await asyncio.sleep(3 * FETCH_S)
        assert house.disks == {"pi1": {2, 3}, "pi2": {4, 5}}

    async def without_room(house: House) -> None:
        house.keeps_standby_layers, house.free_bytes = True, 0
        await house.serving(FORMED_S)
        await act(house)

    live_cold(without_room)
    live_cold(act_after_forming(act))  # nor does one that keeps none


def act_after_forming(act: Callable[[House], Awaitable[None]]) -> Callable[[House], Awaitable[None]]:
    async def formed(house: House) -> None:
        await house.serving(FORMED_S)
        await act(house)

    return formed


@pytest.mark.parametrize("by", ["drain", "leave"])
def test_a_drain_pauses_when_the_others_have_fetched_and_tokens_flow_till_then(by: str) -> None:
    async def act(house: House) -> None:
        await asked(house, max_tokens=240)
        if by == "drain":
            house.drain("pi1")
        else:
            leaving = asyncio.create_task(house.leave("pi1"))
        before = [len(answer.tokens) for answer in house.answers]
        await asyncio.sleep(FETCH_S / 4)
        assert house.is_serving and "pi1" in layers(house)
        assert all(len(answer.tokens) > num for answer, num in zip(house.answers, before, strict=True))
        await has_layers(house, {"desk": 3, "pi2": 3}, 2 * FETCH_S)
        if by == "leave":
            await leaving
        await house.answered(300.0)

    house = live(act)
    assert max(pauses_s(house, "ring_changed")) < SHORT_S


def test_a_node_that_is_back_with_an_empty_disk_fetches_before_the_ring_takes_it_in() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await asyncio.sleep(12.0)  # until the Starter knows it
        await asked(house, max_tokens=240)
        await house.crash("pi1")
        await has_layers(house, {"desk": 3, "pi2": 3}, 10.0)
        house.disks["pi1"].clear()
        house.start_node("pi1")
        await has_layers(house, {"desk": 2, "pi1": 2, "pi2": 2}, 4 * FETCH_S)
        await house.answered(600.0)

    house = live(act)
    assert max(pauses_s(house, "ring_changed")) < SHORT_S


def test_a_full_disk_keeps_the_ring_as_it_is_and_the_operator_is_told() -> None:
    async def act(house: House) -> None:
        house.full_disks.add("pi2")
        await asked(house, max_tokens=240)
        house.drain("pi1")
        await house.answered(120.0)
        assert layers(house) == {"desk": 2, "pi1": 2, "pi2": 2} and states(house)["pi1"] == "serves"
        (refusal,) = [what for _, what in house.events if what.startswith("refused")]
        assert "the ring goes on with desk 2, pi1 2, pi2 2" in refusal and "no space left" in refusal
        await asyncio.sleep(120.0)

    house = live(act)
    assert not pauses_s(house, "ring_changed") and not pauses_s(house, "ring_goes_on")
    lines = [line for line in house.log if line["event"] == "standby_layers_lacking"]
    assert 1 <= len(lines) <= 2 and lines[0]["node"] == "pi2"  # it is not tried again and again


def test_a_node_is_lost_while_another_one_fetches_and_the_pause_does_not_wait_for_that() -> None:
    async def act(house: House) -> None:
        await asyncio.sleep(FETCH_S / 4)
        assert len(house.disks["spare1"]) < 4
        await asked(house)
        await house.crash("pi1")
        house.start_node("pi1")
        await house.answered(30.0)
        await until_on_disk(house, "spare1", range(2, NUM_LAYERS))

    house = live(act, num_spares=1)
    assert len(pauses_s(house, "ring_goes_on")) >= 1


def test_a_spare_that_dies_while_it_fetches_is_asked_again_when_it_is_back() -> None:
    async def act(house: House) -> None:
        await asyncio.sleep(FETCH_S / 4)
        await house.crash("spare1")
        await asyncio.sleep(5.0)
        house.start_node("spare1")
        await until_on_disk(house, "spare1", range(2, NUM_LAYERS))

    live(act, num_spares=1)


def test_a_spare_that_is_taken_out_of_the_topology_while_it_fetches_ends_nothing() -> None:
    async def act(house: House) -> None:
        await asked(house, max_tokens=200)
        await asyncio.sleep(FETCH_S / 2)
        assert 0 < len(house.disks["spare1"]) < 4
        house.revoked.add("spare1")
        house.reload()
        await house.answered(90.0)
        assert "spare1" not in states(house)

    live(act, num_spares=1)


def test_a_node_that_is_drained_may_fetch_what_it_needs_to_be_let_in_again() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await asyncio.sleep(12.0)
        house.drain("pi1")
        await has_layers(house, {"desk": 3, "pi2": 3}, 20.0)
        ports: list[Any] = [port for port in house.network._listeners.values() if port.process.machine == STARTER]
        gates = [port._security.gate for port in ports if port._security]
        assert gates and all("pi1" in gate.lists[WEIGHTS].values() for gate in gates)
        await house.crash("pi1")
        house.disks["pi1"].clear()
        await asyncio.sleep(2.0)
        house.start_node("pi1")
        await asyncio.sleep(2.0)
        house.drain("pi1", undo=True)
        await has_layers(house, {"desk": 2, "pi1": 2, "pi2": 2}, 4 * FETCH_S)

    assert max(pauses_s(live(act), "ring_changed")) < SHORT_S


def test_an_operators_change_does_not_wait_for_one_that_still_fetches() -> None:
    async def act(house: House) -> None:
        house.fetch_s = 600.0
        house.drain("pi1")
        await asyncio.sleep(3.0)
        house.revoked.add("pi2")
        house.reload()
        await has_layers(house, {"desk": 3, "pi1": 3}, 2 * 600.0)
        (refusal,) = [what for _, what in house.events if what.startswith("refused")]
        assert "given up for another change" in refusal

    live(act)


def test_a_change_that_cannot_fetch_leaves_the_ring_on_its_way_back() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await asyncio.sleep(12.0)
        await house.crash("pi1")
        await has_layers(house, {"desk": 2, "spare1": 2, "pi2": 2}, 20.0)
        house.disks["pi2"] = {4, 5}
        await house.crash("pi2")
        house.start_node("pi2")
        house.full_disks.add("pi2")
        await asyncio.sleep(10.0)
        house.drain("spare1")
        await asyncio.sleep(30.0)
        house.full_disks.clear()
        house.start_node("pi1")
        await has_layers(house, {"desk": 2, "pi1": 2, "pi2": 2}, 6 * FETCH_S)

    live(act, num_spares=1)
