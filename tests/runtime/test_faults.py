"""What befalls a whole service, one thing at a time, and when and in which words it is heard; all in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mdiq.errors import CapacityError, EngineError, NodeDiedError, RingStalledError
from mdiq.runtime.epochs import Epochs
from mdiq.runtime.losses import MAX_LOSSES
from mdiq.runtime.options import Outages
from mdiq.runtime.ring_keeper import RETRY_S
from mdiq.runtime.socket_workers import LEASE_S
from mdiq.service import worker as service_worker
from mdiq.transport.curve import CONTROL
from tests.virtual.clock import VirtualTimeLoop, run_virtual
from tests.virtual.house import House, no_memory
from tests.virtual.network import Plane

HEARD_S = LEASE_S + 2.0
"""A Node that says nothing more on its way into the Ring is gone after its Lease and one look of the watcher."""
SILENCE_S, TOLERANCE_S = Outages().silence_s, Outages().tolerance_s
FORMED_S = 12.0


def live(
    act: Callable[[House], Awaitable[None]],
    *,
    num_nodes: int = 2,
    is_measured: bool = True,
    outages: Outages | None = None,
) -> House:
    """Have a service live through what ``act`` does; see what holds of every one."""

    async def main(loop: VirtualTimeLoop) -> House:
        house = House(loop, num_nodes, is_measured=is_measured, outages=outages)
        with house.installed():
            house.start()
            await act(house)
            await house.close()
        house.check()
        return house

    return run_virtual(main)


async def failed(house: House, within_s: float) -> float:
    """Wait until the Ring does not serve; return how long that took."""
    start_s = house.loop.time()
    while house.is_serving:
        assert house.loop.time() < start_s + within_s, f"not heard within {within_s:g} s"
        await asyncio.sleep(0.25)
    return house.loop.time() - start_s


def test_a_ring_measures_itself_forms_serves_and_ends_without_a_warning() -> None:
    async def act(house: House) -> None:
        await house.serving(2 * FORMED_S)
        for _ in range(5):
            house.ask(max_tokens=20)
        await house.answered(10.0)
        assert all(answer.error is None for answer in house.answers)
        house.ask(max_tokens=20, leaves_after=2)
        await house.answered(10.0)
        house.check_counts()
        assert house.keeper is not None
        nodes = house.keeper.status()["nodes"]
        assert {node["name"]: node["state"] for node in nodes} == dict.fromkeys(("desk", "pi1", "pi2"), "serves")
        assert house.keeper.status()["requests"] == {
            "waiting": 0,
            "running": 0,
            "done": 5,
            "failed": 0,
            "refused": 0,
            "left": 1,
        }

    house = live(act, is_measured=False)
    assert [ring.is_survey for ring in house.rings] == [True, False]
    assert not [line for line in house.log if line["log_level"] in ("warning", "error")]


@pytest.mark.parametrize("name", ["pi1", "pi2"])
@pytest.mark.parametrize("away_s", [4.0, SILENCE_S + 2.0, SILENCE_S + 50.0])
def test_a_node_that_dies_and_comes_back_costs_a_pause_and_no_token(name: str, away_s: float) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answers = [house.ask(max_tokens=60) for _ in range(3)]
        await asyncio.sleep(1.0)
        await house.kill(name)
        num_tokens = [len(answer.tokens) for answer in answers]
        assert all(0 < num < 60 for num in num_tokens), num_tokens
        await asyncio.sleep(away_s)
        assert house.keeper is not None
        if away_s > SILENCE_S + 1.0:
            assert house.keeper.describe() == f"paused: waits for {name}" and not house.keeper.state.is_serving
        house.start_node(name)
        await house.answered(20.0)
        assert [answer.error for answer in answers] == [None] * 3
        await house.serving(1.0)
        nodes = house.keeper.status()["nodes"]
        assert {node["name"]: node["state"] for node in nodes} == dict.fromkeys(("desk", "pi1", "pi2"), "serves")
        house.check_counts()

    house = live(act)
    assert len(house.rings) == 1
    (line,) = [line for line in house.log if line["event"] == "ring_goes_on"]
    assert line["sequences"] == 3 and 0 <= line["back_s"] <= line["loaded_s"] <= line["after_s"]


def test_a_process_that_crashes_is_noticed_within_a_second() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answers = [house.ask(max_tokens=60) for _ in range(3)]
        await asyncio.sleep(1.0)
        await house.crash("pi1")
        await asyncio.sleep(1.0)
        assert house.keeper is not None and house.keeper.describe() == "paused: waits for pi1"
        house.start_node("pi1")
        await house.answered(10.0)
        assert [answer.error for answer in answers] == [None] * 3

    house = live(act)
    (line,) = [line for line in house.log if line["event"] == "ring_paused"]
    assert line["error"] == "pi1: its connection has ended, most likely with its process; see its log"
    (line,) = [line for line in house.log if line["event"] == "ring_goes_on"]
    assert line["back_s"] < 1.0


def test_a_node_whose_link_was_down_goes_on_with_what_it_has() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answers = [house.ask(max_tokens=60) for _ in range(3)]
        await asyncio.sleep(1.0)
        house.network.cut("pi1")
        await asyncio.sleep(20.0)
        assert house.keeper is not None and house.keeper.describe() == "paused: waits for pi1"
        house.network.plug("pi1")
        await house.answered(10.0)
        assert [answer.error for answer in answers] == [None] * 3

    house = live(act)
    assert len(house.rings) == 1
    assert sum(line["event"] == "stage_ready" for line in house.log) == 2, "it has loaded again"


def test_a_second_death_in_the_midst_of_a_recovery_is_one_more_pause() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answers = [house.ask(max_tokens=60) for _ in range(3)]
        await asyncio.sleep(1.0)
        await house.kill("pi1")
        await asyncio.sleep(4.0)
        house.start_node("pi1")
        await asyncio.sleep(1.0)  # it loads
        await house.kill("pi2")
        await asyncio.sleep(4.0)
        house.start_node("pi2")
        await house.answered(30.0)
        assert [answer.error for answer in answers] == [None] * 3

    assert len(live(act).rings) == 1


@pytest.mark.parametrize("second", ["cut", "crash"])
def test_a_node_that_is_lost_and_back_while_another_one_loads_loads_as_well(second: str) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answers = [house.ask(max_tokens=60) for _ in range(3)]
        await asyncio.sleep(1.0)
        await house.crash("pi1")
        house.disks["pi1"].clear()  # it has another card, and a slow one
        house.fetch_s = 30.0
        await asyncio.sleep(2.0)
        house.start_node("pi1")
        await asyncio.sleep(2.0)
        if second == "cut":
            house.network.cut("pi2")
            await asyncio.sleep(8.0)
            house.network.plug("pi2")
        else:
            await house.crash("pi2")
            await asyncio.sleep(2.0)
            house.fetch_s = 1.0
            house.start_node("pi2")
        await house.answered(60.0)
        assert [answer.error for answer in answers] == [None] * 3

    assert len(live(act).rings) == 1


def test_a_request_that_kills_a_node_each_time_ends_and_the_ring_goes_on() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        house.kills.add("pi1")  # whenever it computes
        answer = house.ask(max_tokens=60)
        for _ in range(20):
            if not house.is_up("pi1"):
                await asyncio.sleep(1.5)
                house.start_node("pi1")
            await asyncio.sleep(2.0)
        await house.answered(1.0)
        assert isinstance(answer.error, RingStalledError)
        house.kills.clear()
        await house.serving(10.0)
        again = house.ask()
        await house.answered(10.0)
        assert again.error is None

    assert len(live(act).rings) == 1


def test_a_node_that_is_restarted_while_a_long_answer_runs_stays_in_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for what runs until it has no patience left."""
    monkeypatch.setattr(service_worker, "LEAVE_S", 1.0)

    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answer = house.ask(max_tokens=200)
        await asyncio.sleep(0.5)
        await house.leave("pi1")
        assert answer.error is None and answer.reason is None, "it has ended before"
        await asyncio.sleep(1.0)
        house.start_node("pi1")
        await asyncio.sleep(5.0)
        assert house.is_serving and answer.error is None
        other = house.ask()
        await house.answered(60.0)
        assert answer.error is None and other.error is None

    assert len(live(act).rings) == 1


def test_a_bug_in_a_recovery_ends_what_runs_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(*_: object) -> None:
        raise ValueError("a mistake of ours")

    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answer = house.ask(max_tokens=60)
        await asyncio.sleep(1.0)
        with monkeypatch.context() as patch:
            patch.setattr(Epochs, "begin_again", breaks)
            await house.crash("pi1")
            await asyncio.sleep(2.0)
            house.start_node("pi1")
            await house.answered(5.0)
        assert "recovery: ValueError('a mistake of ours')" in str(answer.error)
        await house.serving(RETRY_S + FORMED_S)

    live(act)


def test_a_node_that_stays_away_and_that_nobody_has_room_to_replace_ends_requests_with_its_name() -> None:
    async def act(house: House) -> None:
        house.free_bytes = 0
        await house.serving(FORMED_S)
        await house.kill("pi2")
        answer = house.ask(max_tokens=20)
        await house.answered(SILENCE_S + 1.0 + TOLERANCE_S)
        assert isinstance(answer.error, NodeDiedError)
        assert str(answer.error) == "pi2: no heartbeat for 5 s; it hangs or its link is down; it is not back after 60 s"
        await asyncio.sleep(RETRY_S + 5.0)
        assert house.keeper is not None and "waiting for pi2" in house.keeper.describe()
        requests = house.keeper.status()["requests"]
        assert (requests["failed"], requests["running"]) == (1, 0)
        house.check_counts()
        house.start_node("pi2")
        await house.serving(FORMED_S)

    live(act)


def test_a_ring_that_is_not_to_wait_ends_what_runs_at_once() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answer = house.ask(max_tokens=60)
        await asyncio.sleep(1.0)
        await house.crash("pi1")
        await house.answered(1.0)
        assert "pi1: its connection has ended" in str(answer.error)
        house.start_node("pi1")
        await house.serving(RETRY_S + FORMED_S)

    live(act, outages=Outages(tolerance_s=0.0))


def test_a_node_that_dies_each_time_that_it_loads_does_not_hold_up_requests_for_ever() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answer = house.ask(max_tokens=60)
        await asyncio.sleep(1.0)
        for _ in range(MAX_LOSSES + 1):
            await house.kill("pi1")
            await asyncio.sleep(4.0)
            house.start_node("pi1")
            await asyncio.sleep(1.0)  # it loads
        await house.answered(1.0)
        assert "pi1: it was started anew; it is loss number 6 in one recovery" in str(answer.error)
        await house.serving(RETRY_S + FORMED_S)

    live(act)


def test_a_node_that_comes_back_and_cannot_load_ends_requests_at_once_with_its_reason_if_no_other_can() -> None:
    async def act(house: House) -> None:
        house.free_bytes = 0
        await house.serving(FORMED_S)
        answer = house.ask(max_tokens=60)
        await asyncio.sleep(1.0)
        await house.kill("pi1")
        house.cannot_load["pi1"] = no_memory("pi1")
        await asyncio.sleep(4.0)
        house.start_node("pi1")
        await house.answered(5.0)
        assert isinstance(answer.error, CapacityError)
        await house.serving(RETRY_S + FORMED_S)

    live(act)


def test_who_comes_during_a_pause_is_answered_after_it_and_who_leaves_is_gone() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        leaving, staying = house.ask(max_tokens=60, leaves_after=50), house.ask(max_tokens=60)
        await asyncio.sleep(1.0)
        await house.kill("pi1")
        await asyncio.sleep(SILENCE_S + 1.0)
        late = house.ask()
        await asyncio.sleep(0.1)
        assert late.error is None and not late.tokens and not house.is_serving
        (task,) = [task for task in house.callers if task.get_name() == f"caller {leaving.number}"]
        task.cancel()
        await asyncio.sleep(0.1)
        house.start_node("pi1")
        await house.answered(20.0)
        assert staying.error is late.error is None and late.tokens
        assert len(leaving.tokens) < 60

    live(act)


@pytest.mark.parametrize("at_s", [0.5, 1.8, 3.5, 5.5], ids=["fetching", "loading", "surveyed", "formed"])
@pytest.mark.parametrize("dying", [("pi1",), ("pi1", "pi2")], ids=["one", "both"])
def test_deaths_on_the_way_into_the_ring_cost_a_lease_and_a_forming(at_s: float, dying: tuple[str, ...]) -> None:
    async def act(house: House) -> None:
        await asyncio.sleep(at_s)
        for name in dying:
            await house.kill(name)
        await asyncio.sleep(1.0)
        for name in dying:
            house.start_node(name)
        await house.serving(HEARD_S + RETRY_S + FORMED_S)

    house = live(act)
    assert len(house.rings) <= 3


def test_a_node_that_cannot_load_is_named_at_once_and_the_next_ring_is_tried() -> None:
    async def act(house: House) -> None:
        house.cannot_load["pi2"] = no_memory("pi2")
        await asyncio.sleep(3.0)
        assert house.keeper is not None and "pi2" in str(house.keeper.last_error)
        await house.serving(RETRY_S + FORMED_S)
        assert house.keeper.last_error is None

    house = live(act)
    assert [line["error"] for line in house.log if line["event"] == "node_lost"] == [f"pi2: {no_memory('pi2')}"]
    assert isinstance(no_memory("pi2"), CapacityError)


def test_a_forward_that_fails_ends_its_request_with_the_nodes_name_and_the_ring_serves_on() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        house.breaks.add("pi1")
        answer = house.ask()
        await house.answered(5.0)
        assert isinstance(answer.error, EngineError) and str(answer.error) == "pi1: a sum is not a number"
        again = house.ask()
        await house.answered(5.0)
        assert again.error is None

    assert len(live(act).rings) == 1


def test_a_starter_that_dies_finds_its_nodes_again() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await house.kill_starter()
        await asyncio.sleep(30.0)
        house.start_starter()
        await house.serving(2 * FORMED_S)

    house = live(act)
    assert sum(line["event"] == "stranger_drained" for line in house.log) == 2


@pytest.mark.parametrize("cut_s", [3.0, SILENCE_S + 1.0, 20.0])
def test_a_pulled_cable_costs_as_long_as_it_is_out_and_a_few_seconds(cut_s: float) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answers = [house.ask(max_tokens=40) for _ in range(3)]
        await asyncio.sleep(0.6)
        house.network.cut("pi1")
        await asyncio.sleep(cut_s)
        house.network.plug("pi1")
        await house.answered(10.0)
        assert all(answer.error is None for answer in answers)

    assert len(live(act).rings) == 1


def test_a_ring_that_waits_longer_for_a_silent_node_says_so_after_five_seconds() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        house.network.cut("pi1")
        await asyncio.sleep(6.0)
        assert house.keeper is not None and "degraded: waits for pi1" in house.keeper.state.text
        house.network.plug("pi1")
        await house.serving(2.0)

    assert not [line for line in live(act, outages=Outages(silence_s=30.0)).log if line["event"] == "ring_paused"]


def test_a_revoked_node_is_cut_off_at_once_and_comes_back_when_it_is_listed() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answer = house.ask(max_tokens=120)
        await asyncio.sleep(0.5)
        house.revoked.add("pi1")
        house.reload()
        await asyncio.sleep(0.1)
        workers: Any = house.rings[0]._workers
        assert "pi1" not in workers._gate.lists[CONTROL].values()
        await house.answered(15.0)
        assert answer.error is None and house.keeper is not None
        assert [node["name"] for node in house.keeper.status()["nodes"]] == ["desk", "pi2"]
        house.revoked.clear()
        house.reload()
        await asyncio.sleep(30.0)
        await house.serving(1.0)
        assert house.keeper.state.text == "serves on desk, pi1, pi2" and len(house.rings) == 1

    live(act)


def test_a_node_that_is_stopped_lets_running_requests_end_first() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answer = house.ask(max_tokens=40)
        await asyncio.sleep(0.5)
        await house.leave("pi1")
        assert answer.error is None
        house.start_node("pi1")
        await house.serving(RETRY_S + FORMED_S)

    live(act)


def test_a_node_that_is_stopped_at_once_and_started_again_costs_a_pause() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answer = house.ask(max_tokens=60)
        await asyncio.sleep(0.5)
        await house.stop("pi1")
        await asyncio.sleep(0.5)
        assert house.keeper is not None and house.keeper.describe() == "paused: waits for pi1"
        house.start_node("pi1")
        await house.answered(10.0)
        assert answer.error is None and len(answer.tokens) == 60

    house = live(act)
    (line,) = [line for line in house.log if line["event"] == "ring_paused"]
    assert line["error"] == "pi1: it was stopped on its device"


def test_a_control_channel_that_loses_and_doubles_messages_still_forms_the_ring() -> None:
    async def act(house: House) -> None:
        house.network.planes["control"] = Plane(drop=0.03, double=0.1)
        await house.serving(2 * HEARD_S)
        house.ask()
        await house.answered(10.0)

    live(act, num_nodes=3)
