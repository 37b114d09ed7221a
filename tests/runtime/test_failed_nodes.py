"""A Node that says that it failed, or cannot do again what it did: others take over, and what runs goes on."""

import asyncio

import pytest

from mdiq.control.answers import STALL_S
from mdiq.errors import EngineError, MdiqError, TransportError
from tests.runtime.test_ring_changes import FORMED_S, TAKEN_S, asked, has_layers, layers, live
from tests.virtual.house import RESTART_S, House, no_memory

WHOLE = {"desk": 2, "pi1": 2, "pi2": 2}


@pytest.mark.parametrize("error", [EngineError("a bug in mdiq"), TransportError("a frame is too large")])
@pytest.mark.parametrize("num_spares", [0, 1])
def test_a_node_whose_loop_fails_is_lost_like_one_that_dies(error: MdiqError, num_spares: int) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        house.fails("pi1", error)
        await house.answered(RESTART_S + TAKEN_S + 5.0)
        assert ("spare1" in layers(house)) == bool(num_spares)
        await has_layers(house, WHOLE, 60.0)

    house = live(act, num_spares=num_spares)
    lost = [line["error"] for line in house.log if line["event"] == "ring_paused"]
    assert lost == [f"pi1: {error}"]


@pytest.mark.parametrize("num_spares", [0, 1])
def test_others_take_over_from_a_node_that_is_back_and_cannot_load_what_it_had(num_spares: int) -> None:
    """Its disk is full, or its memory is smaller. The spare comes after it."""

    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        if num_spares:
            await house.crash("spare1")
        await asked(house)
        await house.kill("pi1")
        house.cannot_load["pi1"] = no_memory("pi1")
        await asyncio.sleep(4.0)
        house.start_node("pi1")
        if num_spares:
            house.start_node("spare1")
        await house.answered(TAKEN_S + 10.0)
        now = layers(house)
        assert now == ({"desk": 2, "spare1": 2, "pi2": 2} if num_spares else {"desk": 3, "pi2": 3})
        await has_layers(house, WHOLE, 60.0)  # now it can

    live(act, num_spares=num_spares)


@pytest.mark.parametrize("num_spares", [0, 1])
def test_a_node_that_stands_still_while_it_loads_is_given_up_and_told_to_join_anew(num_spares: int) -> None:
    """It is heard all the while. After ten minutes the ring ended with all that ran."""

    async def act(house: House) -> None:
        if not num_spares:
            house.free_bytes = 0  # nobody else has room
        await house.serving(FORMED_S)
        if num_spares:
            await house.crash("spare1")
        await asked(house)
        await house.kill("pi1")
        house.stands_still.add("pi1")
        await asyncio.sleep(4.0)
        house.start_node("pi1")
        if num_spares:
            await asyncio.sleep(20.0)
            house.start_node("spare1")
        await house.answered(STALL_S + TAKEN_S + 40.0)
        await has_layers(house, WHOLE, 120.0)

    house = live(act, num_spares=num_spares)
    assert any("pi1 stands still" in what for _, what in house.story())
    assert len(house.rings) == 1


def test_a_node_with_a_full_disk_is_tried_again_and_never_in_a_pause() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        await house.kill("pi1")
        house.disks["pi1"].clear()
        house.full_disks.add("pi1")
        await asyncio.sleep(4.0)
        house.start_node("pi1")
        await house.answered(TAKEN_S + 10.0)
        await asyncio.sleep(60.0)
        assert layers(house) == {"desk": 3, "pi2": 3}
        house.full_disks.clear()
        await has_layers(house, WHOLE, 300.0)

    house = live(act)
    assert len([line for line in house.log if line["event"] == "ring_paused"]) == 1


@pytest.mark.parametrize("name", ["pi1", "pi2"])
def test_a_starter_without_room_keeps_what_it_has_and_the_other_takes_all(name: str) -> None:
    other = "pi2" if name == "pi1" else "pi1"

    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house)
        house.has_no_room["desk"] = no_memory("desk")
        await house.crash(name)
        await house.answered(2 * TAKEN_S + 5.0)
        assert layers(house) == {"desk": 2, other: 4}

    live(act)


def test_two_nodes_whose_loops_fail_one_after_the_other_are_both_waited_for() -> None:
    """The second one fails while the first is waited for: it could load again, and nobody has said otherwise."""

    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        house.fails("pi2", EngineError("a bug in mdiq"))
        await asyncio.sleep(0.3)
        house.fails("pi1", EngineError("a bug in mdiq"))
        await house.answered(TAKEN_S + 5.0)
        assert layers(house) == WHOLE

    live(act)
