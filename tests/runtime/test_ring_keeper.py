"""A ring that is kept up, with rings that only pretend: lost ones, drained nodes, topologies that change."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

import pytest

from mdiq.api.metrics import metrics_registry
from mdiq.control.standby import StandingBy
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.types import LayerRange
from mdiq.errors import CapacityError, ConfigError, MdiqError, NodeDiedError, PlanError, RingError
from mdiq.runtime import ring_keeper
from mdiq.runtime.options import RemoteNode, RemoteRing, RingOptions
from mdiq.runtime.ring_keeper import Form, KeeperState, OnLoading, RingKeeper
from mdiq.runtime.starter_service import StreamEvent
from mdiq.runtime.takeover import members_of
from tests.fake_ring import FakeRing

NODES = {"desk": "k0", "pi1": "k1", "pi2": "k2"}


class House:
    """A keeper, the rings that it has opened, and the topology that it reads."""

    def __init__(self, *, is_measured: bool = True) -> None:
        self.nodes = dict(NODES)
        self.spares: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.has_better = False  # a plan
        self.rings: list[FakeRing] = []
        self.opened = asyncio.Event()
        self.now = 0.0
        self.is_measured = is_measured
        self.fits = True
        self.kept = asyncio.Event()  # what the newest ring has measured
        self.kept.set()
        self.failures: list[str] = []
        self.changed = asyncio.Event()
        self.on_serving: Callable[[], None] = lambda: None
        self.keeper = RingKeeper(
            self.read,
            self.open,
            clock=lambda: self.now,
            on_state=self.note_state,
            on_formed=self.note_formed,
            on_not_formed=self.note_failure,
            on_not_changed=self.note_not_changed,
        )
        self.running = asyncio.create_task(self.keeper.run(), name="keeper")

    def read(self) -> Form:
        nodes, spares, left_out = dict(self.nodes), dict(self.spares), dict(self.left_out)
        if "broken" in nodes:
            raise ConfigError("topology.yaml:3: it is broken")

        def form(drained: frozenset[str]) -> RingOptions:
            if "desk" in drained:
                raise ConfigError("desk: it is the Starter")
            ring = [RemoteNode(name, f"tcp://{name}", key) for name, key in nodes.items() if name not in drained]
            if not self.fits:
                raise PlanError("the model needs 4 GiB more")
            layers = tuple(LayerRange(i, i + 1) for i in range(len(ring)))
            if self.has_better:
                layers = (*layers[:-1], LayerRange(layers[-1].start, layers[-1].stop + 4))
            idle = (
                *(StandingBy(name, nodes[name], "it is drained") for name in sorted(drained)),
                *(StandingBy(name, key, "it is a spare") for name, key in spares.items()),
                *(StandingBy(name, "k", f"the plan leaves it out: {why}", True) for name, why in left_out.items()),
            )
            remote = RemoteRing(tuple(ring), "tcp://c", "tcp://w", standing_by=idle)
            return RingOptions(Path("model"), layers, remote=remote, is_survey=not self.is_measured)

        return form

    async def note_formed(self, _: object) -> None:
        await self.kept.wait()

    def note_failure(self, options: RingOptions, error: MdiqError) -> None:
        self.failures.append(str(error))

    def note_not_changed(self, options: RingOptions) -> None:
        self.failures.append(f"cannot become {len(options.layers[-1])}")
        self.has_better = False

    def open(self, options: RingOptions, on_loading: OnLoading) -> FakeRing:
        self.rings.append(FakeRing(options, on_loading, is_held=True))
        self.opened.set()
        return self.rings[-1]

    def note_state(self, state: KeeperState) -> None:
        self.changed.set()
        if state.is_serving:
            self.on_serving()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until the keeper is in such a state."""
        async with asyncio.timeout(20):
            while not is_so():
                self.changed.clear()
                await self.changed.wait()

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        assert all(ring.is_closed for ring in self.rings)

    async def ring(self, number: int) -> FakeRing:
        """Wait until the keeper has opened so many rings; return the last one."""
        async with asyncio.timeout(20):
            while len(self.rings) < number:
                self.opened.clear()
                await self.opened.wait()
        return self.rings[number - 1]

    async def serving_ring(self, number: int) -> FakeRing:
        ring = await self.ring(number)
        ring.joined.set()
        await self.until(lambda: self.keeper.state.is_serving)
        return ring


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    yield house
    await house.close()


def _sequence(index: int = 0) -> Sequence:
    return Sequence(index, (1,), SamplingParams(max_tokens=2))


async def _to_the_end(events: AsyncGenerator[StreamEvent, None]) -> StreamEvent:
    return [event async for event in events][-1]


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_nothing_is_taken_before_the_ring_is_formed_and_the_state_says_why(house: House) -> None:
    ring = await house.ring(1)
    with pytest.raises(RingError, match="waiting for pi1, pi2"):
        await anext(house.keeper.stream(_sequence()))
    ring.on_loading("pi1", 1, 4)
    assert house.keeper.describe() == "loading: pi1 25 %; waiting for pi1, pi2"
    states = {node["name"]: node["state"] for node in house.keeper.status()["nodes"]}
    assert states == {"desk": "joined", "pi1": "missing", "pi2": "missing"}


async def test_a_ring_that_serves_shows_its_figures(house: House) -> None:
    ring = await house.serving_ring(1)
    house.now = 8.0
    ring.goes_on.set()
    assert (await _to_the_end(house.keeper.stream(_sequence()))).step.finish_reason is FinishReason.LENGTH
    status = house.keeper.status()
    assert status["is_serving"] and status["state"] == "serves on desk, pi1, pi2"
    assert status["requests"] == {"waiting": 0, "running": 0, "done": 1, "failed": 0, "refused": 0, "left": 0}
    assert status["nodes"][1]["busy_share"] == 0.25
    assert status["nodes"][1]["busy_s"] == 0.25 * status["serving_s"]
    assert len(status["hops"]) == 3


async def test_a_ring_with_a_node_that_is_silent_does_not_serve_until_it_speaks(house: House) -> None:
    ring = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    ring.silence = {"pi1": 2.0}  # a machine that is busy
    assert house.keeper.state.is_serving
    ring.silence = {"pi1": 7.0}
    assert house.keeper.describe() == "degraded: waits for pi1 (silent for 7 s)"
    status = house.keeper.status()
    assert not status["is_serving"] and [node["state"] for node in status["nodes"]] == ["serves", "silent", "serves"]
    late = house.keeper.stream(_sequence(1))
    await anext(late)  # is taken: it waits for the Node as what runs does
    ring.silence = {}
    assert house.keeper.state.is_serving
    ring.goes_on.set()
    assert (await _to_the_end(events)).step.error is None
    assert (await _to_the_end(late)).step.error is None


async def test_a_ring_with_a_hop_that_carries_nothing_does_not_serve_and_says_which(house: House) -> None:
    ring = await house.serving_ring(1)
    ring.trouble = "nothing goes from pi1 to pi2"
    assert house.keeper.describe() == "degraded: nothing goes from pi1 to pi2" and house.keeper.takes_requests
    assert not house.keeper.status()["is_serving"]
    ring.gone = ["pi2"]
    assert house.keeper.describe() == "paused: waits for pi2; nothing goes from pi1 to pi2"
    ring.gone, ring.trouble = [], ""
    assert house.keeper.state.is_serving


async def test_news_of_loading_that_come_late_change_nothing(house: House) -> None:
    ring = await house.serving_ring(1)
    ring.on_loading("pi1", 4, 4)
    assert house.keeper.state.is_serving and house.keeper.state.text == "serves on desk, pi1, pi2"


async def test_a_ring_that_is_lost_while_a_node_drains_takes_nothing_new(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_keeper, "RETRY_S", 0.0)
    first = await house.serving_ring(1)
    running = [house.keeper.stream(_sequence(i)) for i in range(2)]
    for events in running:
        await anext(events)
    draining = asyncio.create_task(house.keeper.drain_node("pi1"))
    await _settle()
    first.lose(NodeDiedError("pi2: it is gone"))
    await _to_the_end(running[0])  # the other caller has not read its end yet
    (await house.ring(2)).joined.set()
    await _settle()
    assert not house.keeper.state.is_serving
    await _to_the_end(running[1])
    await draining
    assert (await house.serving_ring(3)).options.node_names == ("desk", "pi2")


async def test_a_lost_node_ends_what_runs_and_the_ring_is_formed_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_keeper, "RETRY_S", 0.0)
    first = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    first.lose(NodeDiedError("pi1: it was started anew"))
    assert (await _to_the_end(events)).step.error is first.loss.result()
    second = await house.ring(2)
    assert first.is_closed and not house.keeper.state.is_serving
    assert house.keeper.status()["last_error"] == "pi1: it was started anew"
    await house.serving_ring(2)
    assert house.keeper.status()["last_error"] is None
    second.goes_on.set()
    await _to_the_end(house.keeper.stream(_sequence(1)))
    assert house.keeper.status()["requests"] == {
        "waiting": 0,
        "running": 0,
        "done": 1,
        "failed": 1,
        "refused": 0,
        "left": 0,
    }


@pytest.mark.parametrize("error", [RingError("a change went wrong"), KeyError("a bug")], ids=["failed", "bug"])
async def test_what_goes_wrong_beside_a_ring_that_serves_is_not_lost(
    house: House, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def go_without(_: str) -> bool:
        raise error

    first = await house.serving_ring(1)
    monkeypatch.setattr(first, "go_without", go_without)
    first.leaving.set_result("pi1")
    if isinstance(error, MdiqError):
        await house.until(lambda: house.keeper.status()["last_error"] == "a change went wrong")
        assert not house.running.done()
    else:
        await asyncio.wait({house.running})
        assert house.running.exception() is error
    assert first.is_closed


@pytest.mark.parametrize(
    "error",
    [NodeDiedError("pi2: no memory"), ConfigError("pi1: tcp://pi2: no node of this topology is there")],
    ids=["died", "pi1_has_another_topology"],
)
async def test_a_ring_that_cannot_be_formed_is_tried_again(
    house: House, monkeypatch: pytest.MonkeyPatch, error: MdiqError
) -> None:
    monkeypatch.setattr(ring_keeper, "RETRY_S", 0.0)
    ring = await house.ring(1)
    ring.refused = error
    ring.joined.set()
    await house.serving_ring(2)
    assert ring.is_closed


async def test_a_plan_that_failed_is_asked_for_again_and_not_tried_again_where_there_is_none(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_keeper, "RETRY_S", 0.0)
    monkeypatch.setattr(ring_keeper, "NO_ROOM_RETRY_S", 0.0)
    ring = await house.ring(1)
    house.has_better = True  # when it is asked again
    ring.refused = CapacityError("pi2: no memory")
    ring.joined.set()
    second = await house.ring(2)
    assert house.failures == ["pi2: no memory"] and len(second.options.layers[-1]) == 5
    house.fits = False
    second.refused = CapacityError("pi2: no memory")
    second.joined.set()
    await house.until(lambda: house.keeper.last_error == "the model needs 4 GiB more")
    assert len(house.rings) == 2
    house.fits = True
    await house.serving_ring(3)


async def test_a_drained_node_leaves_when_nothing_runs_and_may_come_back(house: House) -> None:
    first = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    draining = asyncio.create_task(house.keeper.drain_node("pi1"))
    await _settle()
    assert not draining.done() and not first.is_closed
    with pytest.raises(RingError, match="drains pi1"):
        await anext(house.keeper.stream(_sequence(1)))
    first.goes_on.set()
    assert (await _to_the_end(events)).step.error is None
    assert "formed with desk, pi2" in await draining
    second = await house.serving_ring(2)
    assert second.options.node_names == ("desk", "pi2")
    assert house.keeper.status()["nodes"][-1] == {"name": "pi1", "state": "stands by", "reason": "it is drained"}
    assert "already" in await house.keeper.drain_node("pi1")
    assert "back" in await house.keeper.drain_node("pi1", undo=True)
    assert (await house.serving_ring(3)).options.node_names == ("desk", "pi1", "pi2")


async def test_a_ring_that_can_change_is_not_formed_anew_and_what_runs_goes_on(house: House) -> None:
    ring = await house.serving_ring(1)
    ring.can_change = True
    events = house.keeper.stream(_sequence())
    await anext(events)
    assert "formed with desk, pi2" in await house.keeper.drain_node("pi1")
    assert house.keeper.state == KeeperState(True, "serves on desk, pi2")
    assert "back" in await house.keeper.drain_node("pi1", undo=True)
    house.nodes["pi3"] = "k3"
    assert "formed with desk, pi1, pi2, pi3" in await house.keeper.reload()
    ring.leaving.set_result("pi2")
    await house.until(lambda: house.keeper.state.text == "serves on desk, pi1, pi3")
    assert "nothing" in await house.keeper.reload(), "pi2 is taken in again when it is back"
    ring.goes_on.set()
    assert (await _to_the_end(events)).step.error is None
    assert not ring.is_closed and len(house.rings) == 1


async def test_what_runs_ends_before_a_node_that_is_stopped_leaves(house: House) -> None:
    first = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    first.leaving.set_result("pi1")
    await _settle()
    assert not first.is_closed and not house.keeper.state.is_serving
    with pytest.raises(RingError, match="pi1 leaves when what runs is done"):
        await anext(house.keeper.stream(_sequence(1)))
    first.goes_on.set()
    assert (await _to_the_end(events)).step.error is None
    await house.serving_ring(2)
    assert first.is_closed


async def test_a_drain_that_leaves_no_ring_is_refused_and_changes_nothing(house: House) -> None:
    ring = await house.serving_ring(1)
    with pytest.raises(ConfigError, match="Starter"):
        await house.keeper.drain_node("desk")
    assert house.keeper.state.is_serving and not ring.is_closed


async def test_a_node_that_nobody_can_reach_can_be_drained_before_the_ring_is_formed(house: House) -> None:
    await house.ring(1)
    await house.keeper.drain_node("pi2")
    assert (await house.serving_ring(2)).options.node_names == ("desk", "pi1")


async def test_a_revoked_key_cuts_its_node_off_at_once(house: House) -> None:
    first = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    del house.nodes["pi1"]
    assert "formed with" in await house.keeper.reload()
    assert first.is_closed
    assert (await _to_the_end(events)).step.error is not None
    assert await house.serving_ring(2) is not first


async def test_a_node_with_another_key_is_no_reason_to_form_the_ring_anew(house: House) -> None:
    ring = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    house.nodes["pi1"] = "another key"
    assert "the ring goes on" in await house.keeper.reload()
    assert members_of(ring.options) >= {("pi1", "another key")}
    assert house.keeper.wanted == ring.options and not ring.is_closed
    ring.goes_on.set()
    assert (await _to_the_end(events)).step.error is None


async def test_a_new_node_is_taken_in_when_nothing_runs(house: House) -> None:
    first = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    house.nodes["pi3"] = "k3"
    reloading = asyncio.create_task(house.keeper.reload())
    await _settle()
    assert not first.is_closed
    first.goes_on.set()
    await _to_the_end(events)
    await reloading
    assert (await house.serving_ring(2)).options.node_names[-1] == "pi3"


async def test_a_reload_of_the_same_or_of_a_broken_file_changes_nothing(house: House) -> None:
    ring = await house.serving_ring(1)
    assert "nothing" in await house.keeper.reload()
    house.nodes["broken"] = ""
    with pytest.raises(ConfigError, match="broken"):
        await house.keeper.reload()
    assert house.keeper.state.is_serving and not ring.is_closed


async def test_work_that_never_ends_cannot_hold_up_a_reload_for_ever(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_keeper, "DRAIN_S", 0.01)
    await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    await house.keeper.drain_node("pi1")
    assert isinstance((await _to_the_end(events)).step.error, RingError)


async def test_the_end_waits_for_what_runs_and_takes_nothing_new(house: House) -> None:
    ring = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    finishing = asyncio.create_task(house.keeper.finish())
    await _settle()
    assert not finishing.done()
    with pytest.raises(RingError, match="ends"):
        await anext(house.keeper.stream(_sequence(1)))
    ring.goes_on.set()
    await _to_the_end(events)
    await finishing


async def test_a_caller_that_leaves_is_counted_out(house: House) -> None:
    await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    assert house.keeper.num_running == 1
    await events.aclose()
    assert house.keeper.num_running == 0


async def test_nodes_measure_before_the_first_ring_and_it_is_asked_for_again_behind_that() -> None:
    house = House(is_measured=False)
    try:
        survey = await house.ring(1)
        assert survey.options.is_survey
        assert house.keeper.describe() == "nodes measure themselves; waiting for pi1, pi2"
        house.is_measured = True
        survey.joined.set()
        ring = await house.serving_ring(2)
        assert survey.is_closed and not ring.options.is_survey
        assert house.keeper.status()["rings_formed"] == 1
    finally:
        await house.close()


async def test_while_nodes_measure_themselves_status_and_metrics_say_so_and_leave_the_pace_out() -> None:
    house = House(is_measured=False)
    try:
        survey = await house.ring(1)
        house.kept.clear()
        survey.on_loading("pi1", 4, 4)
        survey.joined.set()
        await _settle()
        status = house.keeper.status()
        assert status["state"] == house.keeper.describe() == "nodes measure themselves; measures the ring"
        assert not status["is_serving"] and "pace" not in status and "hops" not in status
        assert metrics_registry(house.keeper.status).get_sample_value("mdiq_serving") == 0
        assert house.keeper.context_tokens is None, "what the ring will hold is not known yet"
        house.is_measured = True
        house.kept.set()
        await house.serving_ring(2)
        assert "pace" in house.keeper.status()
    finally:
        await house.close()


async def test_a_model_that_does_not_fit_by_what_was_measured_is_told_and_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ring_keeper, "NO_ROOM_RETRY_S", 0.0)
    house = House(is_measured=False)
    try:
        survey = await house.ring(1)
        house.is_measured, house.fits = True, False
        survey.joined.set()
        again = await house.ring(2)
        assert again.options.is_survey and house.keeper.last_error == "the model needs 4 GiB more"
        house.fits = True
        again.joined.set()
        await house.serving_ring(3)
    finally:
        await house.close()


async def test_requests_that_are_left_or_refused_have_not_failed(house: House) -> None:
    ring = await house.serving_ring(1)
    left = house.keeper.stream(_sequence())
    await anext(left)
    await left.aclose()
    ring.failure = CapacityError("it can never fit")
    ring.goes_on.set()
    await _to_the_end(house.keeper.stream(_sequence(1)))
    requests = house.keeper.status()["requests"]
    assert requests == {"waiting": 0, "running": 0, "done": 0, "failed": 0, "refused": 1, "left": 1}


async def test_what_still_runs_when_the_service_ends_is_told_so(house: House) -> None:
    ring = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    finishing = asyncio.create_task(house.keeper.finish())
    await _settle()
    assert not finishing.done()
    ring.failure = RingError("starter: its loops have ended: CancelledError()")
    ring.goes_on.set()
    with pytest.raises(RingError, match="the service ends; ask again"):
        await _to_the_end(events)
    await finishing


async def test_a_revoked_key_of_a_node_that_stands_by_is_cut_at_once_and_what_runs_goes_on(house: House) -> None:
    await house.ring(1)
    house.spares = {"pi3": "k3", "pi4": "k4"}
    await house.keeper.reload()
    ring = await house.serving_ring(2)
    events = house.keeper.stream(_sequence())
    await anext(events)
    del house.spares["pi3"]
    house.spares["pi4"] = "another key"
    assert "the ring goes on" in await house.keeper.reload()
    assert [(node.name, node.public_key) for node in ring.standing_by] == [("pi4", "another key")]
    assert [node["name"] for node in house.keeper.status()["nodes"] if node["state"] == "stands by"] == ["pi4"]
    assert house.keeper.state.is_serving and not ring.is_closed
    del house.spares["pi4"]
    house.nodes["pi5"] = "k5"  # and the ring is to change as well, when nothing runs
    reloading = asyncio.create_task(house.keeper.reload())
    await _settle()
    assert ring.standing_by == () and not ring.is_closed
    ring.goes_on.set()
    assert (await _to_the_end(events)).step.error is None
    await reloading


async def test_a_ring_that_serves_says_whom_the_plan_leaves_out_and_how_to_use_them(house: House) -> None:
    house.nodes = {"desk": "k0"}
    house.left_out = dict.fromkeys(("pi1", "pi2"), "3 % slower with it")
    house.spares = {"pi3": "k3"}
    await house.ring(1)
    await house.keeper.reload()
    await house.serving_ring(2)
    assert house.keeper.state.text == (
        "serves on desk alone; stand by: pi1 (3 % slower with it), pi2 (3 % slower with it); "
        "layers by hand or --even-split use all"
    )


async def test_a_node_that_becomes_a_spare_leaves_when_nothing_runs(house: House) -> None:
    ring = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    house.spares["pi2"] = house.nodes.pop("pi2")
    reloading = asyncio.create_task(house.keeper.reload())
    await _settle()
    assert not ring.is_closed
    ring.goes_on.set()
    await _to_the_end(events)
    await reloading


async def test_a_better_plan_is_taken_up_when_the_ring_is_idle_and_not_by_a_reload(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_keeper, "IDLE_S", 0.02)
    first = await house.ring(1)
    house.has_better = True  # known when the ring has measured itself
    events = house.keeper.stream(_sequence())
    begun: list[asyncio.Future[StreamEvent]] = []

    def ask_once() -> None:  # before the ring can have been idle
        if not begun:
            begun.append(asyncio.ensure_future(anext(events)))

    house.on_serving = ask_once
    first.joined.set()
    await house.serving_ring(1)
    await begun[0]
    assert "a better plan is taken up when nothing runs" in await house.keeper.reload()
    await asyncio.sleep(0.05)
    assert not first.is_closed
    first.goes_on.set()
    await _to_the_end(events)
    second = await house.serving_ring(2)
    assert first.is_closed and len(second.options.layers[-1]) == 5
    assert "nothing" in await house.keeper.reload()
    await asyncio.sleep(0.05)
    assert not second.is_closed


async def test_a_plan_that_load_shows_to_be_better_is_taken_up_at_once_where_what_runs_goes_on(house: House) -> None:
    ring = await house.serving_ring(1)
    ring.can_change = True
    events = house.keeper.stream(_sequence())
    await anext(events)
    assert house.keeper.formed is ring and house.keeper.wanted == ring.options
    house.has_better = True
    house.keeper.plan_again()
    assert house.keeper.wanted != ring.options
    await _settle()
    assert len(ring.options.layers[-1]) == 5 and house.keeper.wanted == ring.options
    house.keeper.plan_again()  # the same
    await _settle()
    assert ring.num_tries == 1
    ring.goes_on.set()
    assert (await _to_the_end(events)).step.error is None
    assert len(house.rings) == 1


async def test_such_a_plan_waits_until_nothing_runs_where_others_tokens_would_come(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_keeper, "IDLE_S", 0.02)
    ring = await house.serving_ring(1)
    events = house.keeper.stream(_sequence())
    await anext(events)
    house.has_better = True
    house.keeper.plan_again()
    await asyncio.sleep(0.05)
    assert not ring.is_closed and not ring.num_tries
    ring.goes_on.set()
    await _to_the_end(events)
    second = await house.serving_ring(2)
    assert ring.is_closed and len(second.options.layers[-1]) == 5


async def test_a_better_plan_that_failed_is_not_made_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_keeper, "IDLE_S", 0.0)
    monkeypatch.setattr(ring_keeper, "RETRY_S", 0.0)
    ring = await house.serving_ring(1)
    ring.can_change = True
    ring.cannot = ConfigError("the ring goes on with desk 1, pi1 1, pi2 1; see the log for what it lacks")
    house.has_better = True
    house.keeper.plan_again()
    await _settle()
    assert ring.num_tries == 1 and house.failures == ["cannot become 5"]
    assert house.keeper.state.is_serving and house.keeper.wanted == ring.options
    await asyncio.sleep(0.05)  # it is idle
    assert "nothing that the ring depends on has changed" == await house.keeper.reload()
    assert ring.num_tries == 1
    ring.lose(NodeDiedError("pi1: it was started anew"))
    assert len((await house.serving_ring(2)).options.layers[-1]) == 1, "nor is a ring formed so"


async def test_where_nobody_learns_from_it_a_plan_that_failed_is_tried_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_keeper, "IDLE_S", 0.0)
    house.keeper._on_not_changed = lambda _: None
    ring = await house.ring(1)
    ring.can_change, ring.cannot = True, ConfigError("it goes on as it was")
    house.has_better = True  # known when the ring has measured itself
    await house.serving_ring(1)
    await asyncio.sleep(0.05)
    assert ring.num_tries == 1 and not ring.is_closed


async def test_a_topology_that_gives_no_plan_any_more_leaves_the_ring_alone(house: House) -> None:
    ring = await house.serving_ring(1)
    ring.can_change = True
    house.fits = False
    house.keeper.plan_again()
    await _settle()
    assert house.keeper.state.is_serving and not ring.num_tries and not ring.is_closed


async def test_a_keeper_that_is_to_stop_while_it_closes_a_ring_closes_all_of_it(house: House) -> None:
    ring = await house.serving_ring(1)
    ring.closes.clear()
    ring.lose(NodeDiedError("pi1: no heartbeat"))
    await ring.closing.wait()
    house.running.cancel()
    await asyncio.sleep(0)
    ring.closes.set()
    with pytest.raises(asyncio.CancelledError):
        await house.running
    assert ring.is_closed and len(house.rings) == 1
