"""What goes wrong while the Ring changes: old Batches, other versions of mdiq, keys that go, caches that shrink."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from mdiq.errors import EngineError
from mdiq.runtime.epochs import Epochs
from mdiq.runtime.options import HopFigures, Outages
from mdiq.runtime.socket_workers import LEASE_S
from tests.runtime.test_ring_changes import FORMED_S, TAKEN_S, asked, has_layers, layers, live, states
from tests.virtual import house as virtual_house
from tests.virtual.house import HOP, STARTER, House, no_memory

TOLERANCE_S = Outages().tolerance_s
WHOLE = {"desk": 2, "pi1": 2, "pi2": 2}


async def until_work_waits(house: House) -> None:
    """Wait until the Starter computes Segments, and others wait there: over long Hops, all come back at once."""
    stage = house.rings[-1].service._stage
    house.network.planes["data"] = replace(HOP, delay_s=0.1)
    for step in range(5_000):
        if stage._running is not None and len(stage._running.segments) > 1 and stage._decoding:
            return
        if step % 1_000 == 0:
            house.network.freeze(STARTER, 0.25)
        await asyncio.sleep(0.001)
    raise AssertionError("the starter never has so much to do")


async def until_it_takes_over(house: House, name: str) -> None:
    """Wait until a Node is of the Ring, and loads."""
    deadline_s = house.loop.time() + 10.0
    while name not in layers(house):
        assert house.loop.time() < deadline_s, f"{name} does not take over"
        await asyncio.sleep(0.1)
    assert not house.is_serving


def let_in(house: House, name: str, since_s: float) -> list[float]:
    """Return when the Starter let a Node in after a time; what others do is up to their own copies of the topology."""
    return [at_s for at_s, machine, who in house.network.let_in if (machine, who) == (STARTER, name) and at_s > since_s]


def may_connect(house: House, name: str) -> bool:
    """Return whether the Starter lets a Node in now, on any plane."""
    ports = [one for one in house.network._listeners.values() if one.process.machine == STARTER]
    gates: list[Any] = [port._security.gate for port in ports if port._security is not None]
    return any(name in listed.values() for gate in gates for listed in gate.lists.values())


# Old Batches of the Starter.


def test_batches_that_wait_at_the_starter_in_a_pause_do_not_meet_its_other_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(virtual_house, "LONG_JOB_S", 0.0)  # they are there before the next Batch could run

    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, 8)
        await until_work_waits(house)
        house.drain("pi1")
        await house.answered(40.0)
        assert layers(house) == {"desk": 3, "pi2": 3}

    live(act)


def test_a_batch_that_runs_when_a_pause_begins_is_not_run_again_on_other_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a Batch that the engine refuses in part, the rest is run again: not here, where others have come between."""
    monkeypatch.setattr(virtual_house, "LONG_JOB_S", 0.0)

    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, 8)
        await until_work_waits(house)
        house.refuses.add(STARTER)
        house.drain("pi1")
        await house.answered(40.0)
        assert layers(house) == {"desk": 3, "pi2": 3} and not house.refuses
        errors = [answer.error for answer in house.answers if answer.error is not None]
        assert len(house.rings) == 1 and len(errors) == 1 and isinstance(errors[0], EngineError), errors

    live(act, is_kept=False)


# Other versions of mdiq.


def test_a_spare_with_another_version_is_not_used_and_ends_nothing() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        await house.crash("spare1")
        await asyncio.sleep(4.0)
        house.versions["spare1"] = "0.0.1"
        house.start_node("spare1")
        await asyncio.sleep(2.0)
        assert states(house)["spare1"] == "missing" and house.is_serving
        await house.crash("pi1")
        await asyncio.sleep(5.0)
        await house.crash("spare1")
        await asyncio.sleep(4.0)
        house.start_node("spare1")  # in a recovery, too
        await asyncio.sleep(10.0)
        assert house.keeper is not None and house.keeper.describe() == "paused: waits for pi1"
        house.start_node("pi1")
        await house.answered(30.0)
        assert layers(house) == WHOLE

        await house.crash("spare1")
        await asyncio.sleep(4.0)
        house.versions.clear()
        house.start_node("spare1")
        await asyncio.sleep(2.0)
        assert states(house)["spare1"] == "stands by"
        await asked(house)
        await house.crash("pi1")
        await house.answered(1.0 + TAKEN_S + 5.0)
        assert set(layers(house)) == {"desk", "spare1", "pi2"}

    live(act, num_spares=1)


@pytest.mark.parametrize("is_quick", [False, True])
def test_a_node_that_comes_back_with_another_version_is_waited_for_until_it_has_the_right_one(is_quick: bool) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        await house.crash("pi1")
        await asyncio.sleep(0.0 if is_quick else 4.0)
        house.versions["pi1"] = "0.0.1"
        house.start_node("pi1")
        await asyncio.sleep(10.0)
        assert house.keeper is not None and house.keeper.describe() == "paused: waits for pi1"
        await house.crash("pi1")
        house.versions.clear()
        await asyncio.sleep(4.0)
        house.start_node("pi1")
        await house.answered(40.0)
        assert layers(house) == WHOLE

    house = live(act)
    (line,) = [line for line in house.log if line["event"] == "node_not_let_in"]
    assert "pi1: it runs mdiq 0.0.1" in line["error"]


def test_a_node_with_another_version_stays_out_after_its_link_was_down_too() -> None:
    """It was of the Ring before it got that version, and is heard again without joining anew."""

    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await house.crash("pi1")
        await has_layers(house, {"desk": 3, "pi2": 3}, 10.0)
        house.versions["pi1"] = "0.0.1"
        house.start_node("pi1")
        await asyncio.sleep(5.0)
        house.network.cut("pi1")
        await asyncio.sleep(LEASE_S + 5.0)
        house.network.plug("pi1")
        await asyncio.sleep(30.0)
        assert states(house)["pi1"] == "missing" and layers(house) == {"desk": 3, "pi2": 3}

    live(act)


# Formats of the Hops.


def test_each_hop_keeps_the_format_of_its_sender_when_survivors_take_over() -> None:
    async def act(house: House) -> None:
        house.wires = ("f32", "f32", "bf16", "f32")
        await house.serving(FORMED_S)
        await asked(house)
        await house.crash("pi1")
        await house.crash("pi3")
        await house.answered(TOLERANCE_S + TAKEN_S + 10.0)  # where hops round, survivors come last
        assert set(layers(house)) == {"desk", "pi2"}
        assert house.rings[-1].hops() == [HopFigures("f32", None, None), HopFigures("bf16", None, None)]

    house = live(act, num_nodes=3)
    begun = [(line["machine"], line["wire"]) for line in house.log if line["event"] == "epoch_began" and "wire" in line]
    assert begun[-1] == ("pi2", "bf16")


def test_a_hop_that_is_left_keeps_the_format_that_was_chosen_for_it_and_new_ones_begin_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def chosen(*_: object) -> tuple[str, ...]:
        return "bf16", "f32", "i8"

    monkeypatch.setattr(Epochs, "_choose_wires", chosen)  # measuring needs torch

    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        await house.crash("pi1")
        await house.answered(1.0 + TAKEN_S + 5.0)
        assert set(layers(house)) == {"desk", "spare1", "pi2"}
        assert [hop.wire for hop in house.rings[-1].hops()] == ["f32", "f32", "i8"]
        house.start_node("pi1")
        await has_layers(house, WHOLE, 60.0)  # as it was planned: so are its Hops
        assert [hop.wire for hop in house.rings[-1].hops()] == ["bf16", "f32", "i8"]
        assert None not in [hop.delay_s for hop in house.rings[-1].hops()]

    live(act, num_spares=1)


# Keys that are revoked in a recovery.


def test_a_spare_whose_key_is_revoked_in_a_recovery_is_not_let_in() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        await house.crash("spare1")
        await asyncio.sleep(4.0)
        await house.crash("pi1")
        await asyncio.sleep(3.0)
        house.revoked.add("spare1")
        house.reload()
        revoked_s = house.loop.time()
        await asyncio.sleep(1.0)
        assert not may_connect(house, "spare1")
        house.start_node("spare1")
        await asyncio.sleep(15.0)
        assert house.keeper is not None and house.keeper.describe() == "paused: waits for pi1"
        house.start_node("pi1")
        await house.answered(30.0)
        assert layers(house) == WHOLE and not let_in(house, "spare1", revoked_s)

    live(act, num_spares=1)


def test_a_spare_whose_key_is_revoked_while_it_takes_over_is_cut_off_at_once() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        await house.crash("pi1")
        await until_it_takes_over(house, "spare1")
        house.revoked.add("spare1")
        house.reload()
        revoked_s = house.loop.time()
        await asyncio.sleep(0.5)
        assert not may_connect(house, "spare1")
        house.start_node("pi1")
        await house.answered(30.0)
        await house.serving(60.0)
        await asked(house)
        await house.answered(30.0)
        assert layers(house) == WHOLE and not let_in(house, "spare1", revoked_s)

    live(act, num_spares=1, is_kept=False)


def test_a_lost_node_whose_key_is_revoked_is_not_let_in_because_the_spare_cannot() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        house.cannot_load["spare1"] = no_memory("spare1")
        await house.crash("pi1")
        await until_it_takes_over(house, "spare1")
        house.revoked.add("pi1")
        house.reload()
        revoked_s = house.loop.time()
        await asyncio.sleep(0.5)
        house.start_node("pi1")
        await house.answered(TOLERANCE_S + 30.0)
        await house.serving(60.0)
        await asked(house)
        await house.answered(30.0)
        assert layers(house) == {"desk": 3, "pi2": 3} and not let_in(house, "pi1", revoked_s)

    live(act, num_spares=1, is_kept=False)


# The Starter's KV cache after a change that failed.


@pytest.mark.parametrize("is_loaded", [False, True], ids=["a node cannot load", "what was loaded is too small"])
def test_the_starters_cache_holds_what_runs_again_after_a_change_that_failed(is_loaded: bool) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, 8, max_tokens=200)
        house.kv_tokens = 100  # another program has taken the room
        if not is_loaded:
            house.has_no_room["pi2"] = no_memory("pi2")
        house.drain("pi1")
        await asyncio.sleep(10.0)
        assert layers(house) == WHOLE and house.is_serving
        assert any("refused" in what for _, what in house.events)
        house.ask(max_tokens=200)
        await house.answered(60.0)

    live(act)


# Reloads while a Node is away.


def test_a_reload_that_names_a_node_which_is_away_waits_for_it_while_the_ring_serves() -> None:
    async def act(house: House) -> None:
        house.revoked.add("pi3")  # not in the topology yet
        await house.serving(FORMED_S)
        await house.crash("pi3")
        await asked(house, max_tokens=200)
        house.revoked.clear()
        house.reload()
        await asyncio.sleep(5.0)
        assert layers(house) == WHOLE and house.is_serving
        house.start_node("pi3")
        await has_layers(house, {"desk": 1, "pi1": 2, "pi2": 1, "pi3": 2}, 30.0)
        await house.answered(60.0)

    live(act, num_nodes=3)


def test_a_node_that_a_reload_names_first_stands_in_for_the_one_that_is_away() -> None:
    async def act(house: House) -> None:
        house.revoked.add("pi3")
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        await house.crash("pi1")
        await asyncio.sleep(3.0)
        assert not house.is_serving
        house.revoked.clear()
        house.reload()
        await has_layers(house, {"desk": 2, "pi3": 2, "pi2": 2}, 10.0)
        house.start_node("pi1")
        await has_layers(house, {"desk": 1, "pi1": 2, "pi2": 1, "pi3": 2}, 40.0)
        await house.answered(60.0)

    live(act, num_nodes=3)


def test_a_node_that_is_away_when_a_reload_drops_it_is_cut_off_for_good() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=100)
        await house.crash("pi1")
        await asyncio.sleep(3.0)
        assert not house.is_serving
        house.revoked.add("pi1")
        house.reload()
        revoked_s = house.loop.time()
        await asyncio.sleep(0.5)
        assert not may_connect(house, "pi1")
        house.start_node("pi1")
        await house.answered(TOLERANCE_S + 30.0)
        await house.serving(60.0)
        await asked(house)
        await house.answered(30.0)
        assert layers(house) == {"desk": 3, "pi2": 3} and not let_in(house, "pi1", revoked_s)

    live(act)
