"""A service that goes on as another Ring: spares and survivors take over, Nodes return, are drained and leave."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from mdiq.core.sequence import FinishReason
from mdiq.core.types import RingSpec
from mdiq.errors import ConfigError, EngineError, MdiqError, RingError
from mdiq.runtime.epochs import Epochs
from mdiq.runtime.options import Outages
from mdiq.runtime.recovery import RETURN_S, STEADY_S
from tests.virtual.clock import VirtualTimeLoop, run_virtual
from tests.virtual.house import House, _ChainStage, no_memory

SILENCE_S, TOLERANCE_S = Outages().silence_s, Outages().tolerance_s
FORMED_S = 12.0
TAKEN_S = 5.0
"""In which others take over when it is known that a Node is gone: fetching and loading take some seconds here."""


def live(
    act: Callable[[House], Awaitable[None]], *, num_nodes: int = 2, num_spares: int = 0, is_kept: bool = True
) -> House:
    """Have a service live through what ``act`` does; see what holds of every one.

    is_kept: one Ring did it all, and nobody had an error.
    """

    async def main(loop: VirtualTimeLoop) -> House:
        house = House(loop, num_nodes, num_spares=num_spares)
        with house.installed():
            house.start()
            await act(house)
            await house.close()
        house.check()
        if not is_kept:
            return house
        assert len(house.rings) == 1, "the ring was formed anew"
        assert [answer.error for answer in house.answers] == [None] * len(house.answers)
        return house

    return run_virtual(main)


def states(house: House) -> dict[str, str]:
    """Return what the status says of each Node."""
    assert house.keeper is not None
    return {node["name"]: node["state"] for node in house.keeper.status()["nodes"]}


def layers(house: House) -> dict[str, int]:
    """Return how many Layers each Node of the Ring has."""
    options = house.rings[-1].options
    return dict(zip(options.node_names, map(len, options.layers), strict=True))


async def has_layers(house: House, wanted: dict[str, int], within_s: float) -> None:
    """Wait until the Nodes have so many Layers each, and the Ring serves."""
    deadline_s = house.loop.time() + within_s
    while layers(house) != wanted or not house.is_serving:
        assert house.loop.time() < deadline_s, f"{layers(house)} after {within_s:g} s"
        await asyncio.sleep(0.25)


async def asked(house: House, num: int = 3, max_tokens: int = 60) -> None:
    """Have callers ask, and wait until they have some tokens."""
    answers = [house.ask(max_tokens=max_tokens) for _ in range(num)]
    await asyncio.sleep(1.0)
    assert all(0 < len(answer.tokens) < max_tokens for answer in answers)


@pytest.mark.parametrize("name", ["pi1", "pi2"])
@pytest.mark.parametrize("is_power", [False, True])
def test_a_spare_takes_over_at_once(name: str, is_power: bool) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        assert states(house)["spare1"] == "stands by"
        await asked(house)
        await (house.kill if is_power else house.crash)(name)
        await house.answered((SILENCE_S if is_power else 1.0) + TAKEN_S + 5.0)
        assert states(house) == {"desk": "serves", "pi1": "serves", "pi2": "serves", "spare1": "serves"} | {
            name: "missing"
        }
        assert set(layers(house)) == {"desk", "pi1", "pi2", "spare1"} - {name}

    house = live(act, num_spares=1)
    (line,) = [line for line in house.log if line["event"] == "ring_goes_on"]
    assert "spare1 2" in line["layers"] and name not in line["layers"]


@pytest.mark.parametrize("name", ["pi1", "pi2"])
def test_survivors_that_have_the_layers_take_over_when_a_process_has_died(name: str) -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house)
        await house.crash(name)
        await house.answered(1.0 + TAKEN_S + 5.0)
        assert name not in layers(house) and sum(layers(house).values()) == 6

        assert states(house)[name] == "missing"

    live(act)


def test_survivors_without_the_layers_wait_for_the_node_first() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        await house.crash("pi1")
        await asyncio.sleep(TOLERANCE_S - 5.0)
        assert house.keeper is not None and house.keeper.describe() == "paused: waits for pi1"
        await house.answered(5.0 + TAKEN_S + 10.0)
        assert layers(house) == {"desk": 3, "pi2": 3}

    live(act)


def test_a_node_that_is_only_silent_is_waited_for_though_survivors_could() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house)
        house.network.cut("pi1")
        await asyncio.sleep(SILENCE_S + 15.0)
        assert house.keeper is not None and house.keeper.describe() == "paused: waits for pi1"
        house.network.plug("pi1")
        await house.answered(15.0)
        assert layers(house) == {"desk": 2, "pi1": 2, "pi2": 2}

    live(act)


def test_the_starter_goes_on_alone_and_takes_both_in_again() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house)
        await house.crash("pi2")
        await house.crash("pi1")
        await house.answered(2.0 + 2 * TAKEN_S + 10.0)
        assert layers(house) == {"desk": 6}
        await asked(house, max_tokens=200)
        for name in ("pi1", "pi2"):
            house.start_node(name)
        await has_layers(house, {"desk": 2, "pi1": 2, "pi2": 2}, 20.0)
        await house.answered(60.0)
        await asked(house)
        await house.answered(20.0)

    live(act)


def test_a_node_that_comes_back_and_goes_again_is_taken_in_more_slowly_each_time() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        waits = []
        for _ in range(3):
            await house.crash("pi1")
            await asyncio.sleep(8.0)
            assert "pi1" not in layers(house)
            house.start_node("pi1")
            start_s = house.loop.time()
            await has_layers(house, {"desk": 2, "pi1": 2, "pi2": 2}, 60.0)
            waits.append(house.loop.time() - start_s)
            await asked(house, 2)
            await house.answered(20.0)
        assert waits[0] < waits[1] < waits[2], waits

    live(act)


def test_a_ring_that_has_lost_nothing_for_long_takes_a_node_in_as_soon_as_the_first_time() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        waits = []
        for rest_s in (0.0, 10.0, STEADY_S):
            await asyncio.sleep(rest_s)
            await house.crash("pi1")
            await asyncio.sleep(8.0)
            house.start_node("pi1")
            start_s = house.loop.time()
            await has_layers(house, {"desk": 2, "pi1": 2, "pi2": 2}, 60.0)
            waits.append(house.loop.time() - start_s)
        assert waits[1] > 1.5 * waits[0], waits
        assert abs(waits[2] - waits[0]) <= RETURN_S, waits

    live(act)


def test_a_spare_without_room_is_passed_over() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        house.cannot_load["spare1"] = no_memory("spare1")
        await house.crash("pi1")
        await asyncio.sleep(15.0)
        house.start_node("pi1")
        await house.answered(20.0)
        assert layers(house) == {"desk": 2, "pi1": 2, "pi2": 2}

    live(act, num_spares=1)


def test_a_survivor_without_room_is_passed_over_too() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house)
        house.has_no_room["pi2"] = no_memory("pi2")
        await house.crash("pi1")
        await asyncio.sleep(20.0)
        await house.answered(20.0)
        assert layers(house) == {"desk": 6}
        house.start_node("pi1")
        await has_layers(house, {"desk": 2, "pi1": 2, "pi2": 2}, 20.0)

    live(act)


def test_a_second_loss_while_a_spare_takes_over() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        await house.crash("pi1")
        await asyncio.sleep(1.2)
        await house.crash("pi2")
        await house.answered(3 * TAKEN_S + 10.0)
        assert set(layers(house)) == {"desk", "spare1", "spare2"}

    live(act, num_spares=2)


def test_the_spare_dies_while_it_takes_over() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        await house.crash("pi1")
        await asyncio.sleep(1.2)
        await house.crash("spare1")
        await asyncio.sleep(5.0)
        house.start_node("pi1")
        await house.answered(30.0)
        assert layers(house) == {"desk": 2, "pi1": 2, "pi2": 2}

    live(act, num_spares=1)


def test_requests_of_a_pause_are_answered_after_it() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await house.crash("pi1")
        await asyncio.sleep(2.0)
        assert not house.is_serving
        answers = [house.ask() for _ in range(3)]
        await asyncio.sleep(2.0)
        assert not any(answer.tokens for answer in answers)
        house.start_node("pi1")
        await house.answered(15.0)

    live(act)


def test_draining_nodes_one_by_one_costs_a_pause_each_and_no_request() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        for name in ("pi1", "pi2"):
            await asked(house, max_tokens=120)
            house.drain(name)
            await asyncio.sleep(6.0)
            assert name not in layers(house) and states(house)[name] == "stands by"
            await house.answered(40.0)
            await asked(house, max_tokens=120)
            house.drain(name, undo=True)
            await asyncio.sleep(6.0)
            assert layers(house) == {"desk": 2, "pi1": 2, "pi2": 2}
            await house.answered(40.0)

    house = live(act)
    assert len([line for line in house.log if line["event"] == "ring_changed"]) == 4


@pytest.mark.parametrize("num_spares", [0, 1])
def test_a_node_that_its_service_manager_restarts_costs_no_request(num_spares: int) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        await house.leave("pi1")
        await asyncio.sleep(TAKEN_S)
        assert "pi1" not in layers(house)
        house.start_node("pi1")
        await asyncio.sleep(20.0)
        assert layers(house) == {"desk": 2, "pi1": 2, "pi2": 2}
        await house.answered(60.0)

    live(act, num_spares=num_spares)


def test_nodes_that_are_stopped_at_the_same_time_leave_one_after_the_other() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        begin_s = house.loop.time()
        await asyncio.gather(*(asyncio.create_task(house.leave(name)) for name in ("pi1", "pi2", "pi3")))
        assert house.loop.time() - begin_s < 15.0, "each waited for what ran, which the others had taken over"
        assert layers(house) == {"desk": 6}
        await house.answered(60.0)

    house = live(act, num_nodes=3)
    assert not [line for line in house.log if line["event"] == "ring_paused"], "nobody was lost"


def test_a_drain_that_waits_for_a_node_which_is_away_says_so() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await house.crash("pi1")
        await has_layers(house, {"desk": 2, "spare1": 2, "pi2": 2}, TAKEN_S)
        house.drain("pi2")
        await asyncio.sleep(1.0)
        assert layers(house) == {"desk": 2, "spare1": 2, "pi2": 2}
        _, told = house.events[-1]
        assert told == "pi2: not drained yet; the ring goes on with desk, spare1, pi2 until all of desk, pi1 are here"
        house.start_node("pi1")
        await has_layers(house, {"desk": 3, "pi1": 3}, 20.0)

    live(act, num_spares=1)


def test_a_node_out_of_the_topology_is_cut_off_and_the_others_go_on() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=100)
        house.revoked.add("pi1")
        house.reload()
        await house.answered(40.0)
        assert layers(house) == {"desk": 3, "pi2": 3}
        await asked(house)
        await house.answered(20.0)

    live(act)


def test_a_starter_that_was_formed_alone_takes_in_the_node_that_was_drained() -> None:
    async def act(house: House) -> None:
        await asyncio.sleep(0.5)
        house.drain("pi1")  # before there is a Ring
        await asyncio.sleep(1.0)
        await house.serving(2 * FORMED_S)
        await asked(house, max_tokens=200)
        assert layers(house) == {"desk": 6}
        house.drain("pi1", undo=True)
        await has_layers(house, {"desk": 3, "pi1": 3}, 20.0)
        await asked(house)
        await house.answered(20.0)
        del house.rings[:-1]

    live(act, num_nodes=1)


@pytest.mark.parametrize("error", [ConfigError("no node of this topology; copy it"), EngineError("no kernel")])
def test_a_spare_that_cannot_for_whatever_reason_is_no_end_of_what_runs(error: MdiqError) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        house.cannot_load["spare1"] = error
        await house.crash("pi1")
        await asyncio.sleep(10.0)
        house.start_node("pi1")
        await house.answered(20.0)
        assert layers(house) == {"desk": 2, "pi1": 2, "pi2": 2}

    live(act, num_spares=1)


def test_a_reload_of_spares_during_a_pause_waits_for_nothing() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        house.revoked.add("spare1")  # not in the topology yet
        house.reload()
        await asyncio.sleep(1.0)
        house.network.cut("pi1")
        await asyncio.sleep(SILENCE_S + 2.0)
        assert not house.is_serving
        house.revoked.clear()
        house.reload()
        await house.answered(20.0)
        assert set(layers(house)) == {"desk", "spare1", "pi2"}, "the new spare takes over"

    live(act, num_spares=1)


def test_a_reload_and_a_drain_during_a_recovery_come_after_it() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=150)
        await house.crash("pi1")
        await asyncio.sleep(1.0)
        house.drain("pi2")
        house.reload()
        await house.answered(60.0)
        house.start_node("pi1")
        await has_layers(house, {"desk": 3, "pi1": 3}, 60.0)

    live(act, num_spares=1)


def test_a_change_that_goes_wrong_for_a_reason_of_ours_ends_the_ring_and_does_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def breaks(*_: object) -> None:
        raise ValueError("a mistake of ours")

    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=120)
        with monkeypatch.context() as patch:
            patch.setattr(Epochs, "begin_again", breaks)
            house.drain("pi1")
            await house.answered(15.0)
        assert all("a mistake of ours" in str(answer.error) for answer in house.answers)
        await house.serving(30.0)

    live(act, is_kept=False)


@pytest.mark.parametrize("loop", ["starter", "coordinator"])
def test_a_loop_of_the_starter_that_fails_in_a_change_ends_the_ring_and_does_not_pass_for_a_full_node(
    loop: str,
) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        house.drain("pi1")
        while not house.rings[-1].is_paused:  # noqa: ASYNC110  (virtual time)
            await asyncio.sleep(0.1)
        (task,) = [task for task in asyncio.all_tasks() if task.get_name() == loop and not task.done()]
        task.cancel()
        await house.answered(5.0)
        assert all(isinstance(answer.error, RingError) for answer in house.answers)
        await house.serving(30.0)
        await asked(house)
        await house.answered(20.0)
        assert len(house.rings) == 2 and [answer.error for answer in house.answers[3:]] == [None] * 3

    live(act, is_kept=False)


def test_a_drain_that_a_survivor_has_no_room_for_is_refused_and_not_tried_again() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        house.has_no_room["pi2"] = no_memory("pi2")
        house.drain("pi1")
        await house.answered(60.0)
        assert layers(house) == {"desk": 2, "pi1": 2, "pi2": 2}
        assert any("refused" in what and "goes on with desk 2, pi1 2, pi2 2" in what for _, what in house.events)
        await asyncio.sleep(60.0)
        assert layers(house) == {"desk": 2, "pi1": 2, "pi2": 2}

    live(act)


def test_a_node_that_was_cut_off_is_not_let_in_again_because_the_others_have_no_room() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        house.has_no_room["pi2"] = no_memory("pi2")
        house.revoked.add("pi1")
        house.reload()
        await house.answered(30.0)
        await house.serving(60.0)
        assert "pi1" not in layers(house)
        assert len(house.rings) == 2

    live(act, is_kept=False)


def test_a_node_that_asks_to_leave_in_a_pause_does_not_stop_requests_for_long() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=150)
        await house.crash("pi1")
        await asyncio.sleep(1.0)
        await house.leave("pi2")
        await house.answered(90.0)
        for name in ("pi1", "pi2"):
            house.start_node(name)
        await has_layers(house, {"desk": 2, "pi1": 2, "pi2": 2}, 60.0)
        await asked(house)
        await house.answered(20.0)

    live(act, num_spares=1)


def test_what_runs_needs_its_kv_cache_in_the_ring_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house, max_tokens=200)
        monkeypatch.setattr(_ChainStage, "spec", _small)
        await house.crash("pi1")
        await asyncio.sleep(20.0)
        assert house.keeper is not None and house.keeper.describe() == "paused: waits for pi1"
        house.start_node("pi1")
        await house.answered(30.0)
        assert layers(house) == {"desk": 2, "pi1": 2, "pi2": 2}

    live(act)


def _small(stage: _ChainStage, others: Any, spec: Callable[..., RingSpec] = _ChainStage.spec) -> RingSpec:
    """A Ring that has less KV cache when it has lost a Node."""
    whole = spec(stage, others)
    return whole if whole.num_stages == 3 else replace(whole, kv_tokens=100)


@pytest.mark.parametrize("num_spares", [0, 1])
def test_a_cache_that_is_small_is_better_than_none_when_the_node_is_not_back_in_time(
    monkeypatch: pytest.MonkeyPatch, num_spares: int
) -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        long, short = house.ask(max_tokens=200), house.ask(max_tokens=70)
        await asyncio.sleep(1.0)
        monkeypatch.setattr(_ChainStage, "spec", _smaller)
        await house.crash("pi1")
        await asyncio.sleep(TOLERANCE_S - 1.0)
        assert not house.is_serving
        await house.answered(30.0)
        assert short.error is None and len(short.tokens) == 70
        assert long.error is None and 1 < len(long.tokens) < 200 and long.reason is FinishReason.LENGTH
        assert len(house.rings) == 1 and house.is_serving
        house.answers.remove(long)  # it has got what there is room for

    def _smaller(stage: _ChainStage, others: Any) -> RingSpec:
        return _small(stage, others) if not num_spares else replace(_small(stage, others), kv_tokens=100)

    live(act, num_spares=num_spares)


def test_a_loss_while_there_is_nothing_to_change_is_not_forgotten() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house, max_tokens=150)
        house.revoked.add("spare1")
        house.reload()
        await house.crash("pi1")
        await asyncio.sleep(0.45)  # its loss is noticed about now
        for _ in range(6):
            house.reload()
            await asyncio.sleep(0.05)
        house.start_node("pi1")
        await house.answered(30.0)

    live(act, num_spares=1)


def test_the_status_of_a_ring_that_has_become_smaller_can_be_read() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house, 8, max_tokens=40)
        await house.crash("pi1")
        await house.answered(30.0)
        assert house.keeper is not None
        status = house.keeper.status()
        assert status["pace"]["most_live"] == 8 and len(status["hops"]) == 2
        assert 0 <= status["kv_live_tokens"] <= status["kv_reserved_tokens"] <= status["kv_capacity_tokens"]
        assert status["state"] == "serves on desk, pi2"

    live(act)
