"""A Node has another key from a reload on: the Ring goes on without it, or waits, and takes it in with the new one."""

import asyncio
from typing import Any

import pytest

from mdiq.errors import KeyRevokedError, NodeDiedError
from mdiq.runtime.losses import MAX_LOSSES, Losses
from mdiq.runtime.options import Outages
from tests.runtime.test_ring_changes import FORMED_S, TAKEN_S, asked, has_layers, layers, live, states
from tests.virtual.house import House, no_memory

TOLERANCE_S = Outages().tolerance_s
ALL = {"desk": 2, "pi1": 2, "pi2": 2}


async def restarts(house: House, name: str) -> None:
    """Have a Node start again, with the key that its file has now."""
    await house.crash(name)
    house.start_node(name)


async def reloads(house: House, name: str) -> None:
    """Have the Starter, and the Nodes but this one, read the topology with its new key."""
    house.reload()
    for other in house.names:
        if other != name:
            await house.reload_node(other)


async def has_paused(house: House) -> None:
    """Wait until the loss of a Node is noticed."""
    deadline_s = house.loop.time() + 10.0
    while house.is_serving:  # noqa: ASYNC110
        assert house.loop.time() < deadline_s
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("name", ["pi1", "pi2"])
@pytest.mark.parametrize("num_spares", [0, 1])
def test_others_take_over_at_once_and_it_is_taken_in_with_its_new_key(name: str, num_spares: int) -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house)
        house.rotate(name)
        await reloads(house, name)
        await asyncio.sleep(0.5)
        assert states(house)[name] == "missing", "it still has the old key"
        await house.answered(TAKEN_S + 5.0)
        assert name not in layers(house)
        await restarts(house, name)
        await asked(house, max_tokens=200)
        await has_layers(house, ALL, 20.0)
        await house.answered(30.0)

    house = live(act, num_spares=num_spares)
    assert any("its key was revoked" in str(line.get("error")) for line in house.log if line["event"] == "ring_paused")


def test_a_ring_that_cannot_go_on_without_it_waits_for_it_with_its_new_key() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        house.rotate("pi1")
        await reloads(house, "pi1")
        await asyncio.sleep(TOLERANCE_S / 2)
        assert not house.is_serving
        await restarts(house, "pi1")
        await house.answered(TAKEN_S + 5.0)
        assert layers(house) == ALL

    live(act)


def test_a_node_that_already_has_its_new_key_comes_in_with_the_reload() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house, max_tokens=150)
        house.rotate("pi2")
        await restarts(house, "pi2")
        await asyncio.sleep(TAKEN_S)
        assert states(house)["pi2"] == "missing", "the Starter does not know its key"
        await reloads(house, "pi2")
        await has_layers(house, ALL, 20.0)
        await house.answered(30.0)

    live(act)


def test_a_neighbour_that_reads_the_new_key_late_is_connected_anew() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        house.rotate("pi2")
        house.reload()
        await restarts(house, "pi2")
        await asyncio.sleep(2 * TAKEN_S + 10.0)
        await house.reload_node("pi1")
        await has_layers(house, ALL, 90.0)
        await asked(house)
        await house.answered(60.0)

    live(act)


def test_the_key_of_a_spare_and_of_a_node_that_is_away_are_others_without_a_pause() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=100)
        house.rotate("spare1")
        await reloads(house, "spare1")
        await asyncio.sleep(1.0)
        assert house.is_serving and states(house)["spare1"] == "missing"
        await restarts(house, "spare1")
        await asyncio.sleep(3.0)
        assert states(house)["spare1"] == "stands by"
        await house.crash("pi1")
        await has_layers(house, {"desk": 2, "spare1": 2, "pi2": 2}, 1.0 + TAKEN_S)
        house.rotate("pi1")
        await reloads(house, "pi1")
        await asyncio.sleep(1.0)
        assert house.is_serving
        house.start_node("pi1")
        await has_layers(house, ALL, 20.0)
        await house.answered(30.0)

    live(act, num_spares=1)


@pytest.mark.parametrize("name", ["spare1", "pi1"])
def test_a_rotation_that_is_undone_lets_the_process_in_again_that_never_ended(name: str) -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        house.rotate(name)
        await reloads(house, name)
        await asyncio.sleep(8.0)
        assert states(house)[name] == "missing"
        house.num_keys.clear()
        await reloads(house, name)
        await has_layers(house, ALL, 30.0)
        await asyncio.sleep(5.0)
        assert states(house) == dict.fromkeys(ALL, "serves") | {"spare1": "stands by"}
        await house.answered(60.0)

    live(act, num_spares=1)


def test_all_keys_at_once_are_one_pause() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        for name in house.names:
            house.rotate(name)
        house.reload()
        await asyncio.sleep(1.0)
        assert [*states(house).values()][1:] == ["missing"] * 5
        for name in house.names:
            await restarts(house, name)
        await house.answered(2 * TAKEN_S + 10.0)

    house = live(act, num_nodes=5)
    assert len([line for line in house.log if line["event"] == "ring_paused"]) == 1


def test_revoked_keys_are_no_nodes_that_die_again_and_again() -> None:
    losses = Losses()
    assert [losses.add(KeyRevokedError("its key was revoked")) for _ in range(2 * MAX_LOSSES)] == [
        None
    ] * 2 * MAX_LOSSES
    assert [losses.add(NodeDiedError("it died")) for _ in range(MAX_LOSSES)] == [None] * MAX_LOSSES
    assert losses.add(NodeDiedError("it died")) is not None


def test_two_nodes_that_swap_their_keys_are_both_cut_off() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        house.swaps = {"pi1": "pi2", "pi2": "pi1"}
        house.reload()
        await asyncio.sleep(0.5)
        assert (states(house)["pi1"], states(house)["pi2"]) == ("missing", "missing")
        for name in house.names:
            await restarts(house, name)
        await house.answered(2 * TAKEN_S + 10.0)
        await has_layers(house, ALL, 30.0)

    live(act)


def test_a_rotation_with_another_change_in_a_pause_keeps_the_new_key() -> None:
    async def act(house: House) -> None:
        house.revoked.add("pi3")
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house, max_tokens=150)
        await house.crash("pi2")
        await asyncio.sleep(2.0)
        house.rotate("pi1")
        house.revoked.clear()
        await reloads(house, "pi1")
        await asyncio.sleep(1.0)
        assert states(house)["pi1"] == "missing"
        await restarts(house, "pi1")
        house.start_node("pi2")
        await has_layers(house, {"desk": 1, "pi1": 2, "pi2": 1, "pi3": 2}, 90.0)
        await house.answered(60.0)

    live(act, num_nodes=3)


def test_nodes_that_a_reload_drops_in_a_pause_get_nothing_more() -> None:
    """pi1 is away, and pi2 is here: the ring would go on with it as soon as pi1 is back."""

    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=100)
        await house.crash("pi1")
        await has_paused(house)
        house.revoked |= {"pi1", "pi2"}
        house.reload()
        dropped_s = house.loop.time()
        await asyncio.sleep(1.0)
        house.start_node("pi1")
        await house.serving(90.0)
        assert layers(house) == {"desk": 3, "pi3": 3}
        let_in = [each for each in house.network.let_in if each[1] == "desk" and each[2] in house.revoked]
        assert let_in and max(at_s for at_s, _, _ in let_in) < dropped_s + 1.0
        gates: list[Any] = [port._security.gate for port in house.network._listeners.values() if port._security]
        starters = [gate for gate in gates if "control" in gate.lists]
        names = {name for gate in starters for listed in gate.lists.values() for name in listed.values()}
        assert names == {"pi3"}

    live(act, num_nodes=3, is_kept=False)


def test_a_node_that_a_reload_drops_in_a_pause_does_not_come_back_though_the_planned_ring_cannot_serve() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house, max_tokens=100)
        house.network.cut("pi1")
        await has_paused(house)
        house.has_no_room["pi2"] = no_memory("pi2")  # for more than it has
        house.revoked.add("pi1")
        house.reload()
        dropped_s = house.loop.time()
        await asyncio.sleep(5.0)
        house.network.plug("pi1")
        await house.serving(120.0)
        assert "pi1" not in layers(house)
        let_in = [each for each in house.network.let_in if each[1:] == ("desk", "pi1")]
        assert let_in and max(at_s for at_s, _, _ in let_in) < dropped_s + 1.0

    live(act, is_kept=False)


# Where Hops round activations, other Layers would give other tokens.


@pytest.mark.parametrize("num_spares", [0, 1])
def test_a_ring_that_rounds_waits_for_it_with_the_same_layers(num_spares: int) -> None:
    async def act(house: House) -> None:
        house.wires = ("bf16",)
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house, max_tokens=150)
        before = [*layers(house).values()]
        house.rotate("pi1")
        await reloads(house, "pi1")
        await asyncio.sleep(TAKEN_S)
        assert house.is_serving == bool(num_spares)
        await restarts(house, "pi1")
        await house.answered(TAKEN_S + 20.0)
        assert [*layers(house).values()] == before

    live(act, num_spares=num_spares)


@pytest.mark.parametrize("num_spares", [0, 1])
@pytest.mark.parametrize("rotated", ["pi1", "pi2"])
def test_a_ring_that_rounds_and_in_which_others_stand_in_goes_on_with_new_keys(rotated: str, num_spares: int) -> None:
    async def act(house: House) -> None:
        house.wires = ("bf16",)
        house.fill_disks()
        await house.serving(FORMED_S)
        await house.crash("pi1")
        now = {"desk": 2, "spare1": 2, "pi2": 2} if num_spares else {"desk": 3, "pi2": 3}
        await has_layers(house, now, TOLERANCE_S + TAKEN_S + 10.0)
        await asked(house, max_tokens=200)
        house.rotate(rotated)
        await reloads(house, rotated)
        await asyncio.sleep(1.0)
        assert house.is_serving == (rotated == "pi1")
        if rotated == "pi2":
            await restarts(house, "pi2")
        await house.answered(60.0)
        assert layers(house) == now
        house.start_node("pi1")
        await has_layers(house, ALL, 60.0)
        await asked(house)
        await house.answered(20.0)

    live(act, num_spares=num_spares)
