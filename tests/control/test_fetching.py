"""Fetching ahead over the control plane: beside what a Node does, and given up for what the Ring waits for."""

import asyncio

import pytest

from mdiq.control import coordinator as coordinator_module
from mdiq.core import control
from mdiq.core.types import NodeId, WeightSettings
from mdiq.errors import NodeDiedError
from tests.control.conftest import Plane, assignment, ready

ONE, SPARE = NodeId("node-1"), NodeId("node-3")


def asked(number: int = 1) -> control.Fetch:
    return control.Fetch(number, 2, 4, "d1" * 32, WeightSettings("int8"))


@pytest.mark.parametrize("node", [ONE, SPARE])
async def test_a_node_says_what_it_has_then_also_one_that_stands_by(plane: Plane, node: NodeId) -> None:
    for name in ("node-1", "node-2", "node-3"):
        plane.agent(name)
    await plane.coordinator.all_joined()
    assert await plane.coordinator.ask(node, asked(), control.Fetched) == control.Fetched(1, (2, 3))


async def test_a_question_that_comes_again_is_not_fetched_again(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "REPEAT_S", 0.01)
    release, told = asyncio.Event(), []

    async def fetch(message: control.Fetch) -> control.Fetched:
        told.append(message)
        await release.wait()
        return control.Fetched(message.number, (2, 3), "no space left")

    plane.agent("node-1", fetch=fetch)
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    asking = asyncio.create_task(plane.coordinator.ask(ONE, asked(), control.Fetched))
    await asyncio.sleep(0.1)
    release.set()
    assert (await asking).error == "no space left"
    assert told == [asked()]


async def test_an_assignment_gives_up_what_is_fetched_and_the_next_question_begins_it_anew(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "REPEAT_S", 0.01)
    events: list[str] = []
    is_fetching, is_loaded = asyncio.Event(), asyncio.Event()

    async def fetch(message: control.Fetch) -> control.Fetched:
        events.append("fetches")
        is_fetching.set()
        try:
            if not is_loaded.is_set():
                await asyncio.get_running_loop().create_future()
        finally:
            events.append("ends")
        return control.Fetched(message.number, (2, 3))

    async def load(_: control.Assign) -> control.Ready:
        events.append("loads")
        is_loaded.set()
        return ready()

    plane.agent("node-1", fetch=fetch, load=load)
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    asking = asyncio.create_task(plane.coordinator.ask(ONE, asked(), control.Fetched))
    await is_fetching.wait()
    await plane.coordinator.assign({ONE: assignment(), NodeId("node-2"): assignment(layer_start=3)})
    assert (await asking).on_disk == (2, 3)
    assert events == ["fetches", "ends", "loads", "fetches", "ends"]


async def test_a_node_that_dies_while_it_fetches_ends_the_question(plane: Plane) -> None:
    async def fetch(_: control.Fetch) -> control.Fetched:
        await asyncio.get_running_loop().create_future()
        raise AssertionError("it is never done")

    plane.agent("node-1", fetch=fetch)
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    asking = asyncio.create_task(plane.coordinator.ask(ONE, asked(), control.Fetched))
    await asyncio.sleep(0)
    plane.coordinator.lose(ONE, NodeDiedError("node-1: it is gone"))
    with pytest.raises(NodeDiedError, match="node-1: it is gone"):
        await asking


def test_a_fetch_of_nothing_is_no_message() -> None:
    with pytest.raises(ValueError, match="needs a layer"):
        control.Fetch(1, 2, 2, "d1", WeightSettings("int8"))


async def test_what_cannot_be_sent_is_sent_as_soon_as_the_connection_is_back(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is revoked cuts all connections of the plane for a moment: that costs no REPEAT_S."""
    monkeypatch.setattr(coordinator_module, "REPEAT_S", 3_600.0)
    monkeypatch.setattr(coordinator_module, "RECONNECT_S", 0.01)
    for name in ("node-1", "node-2"):
        plane.agent(name)
    await plane.coordinator.all_joined()
    _, tries = plane.cuts_off("node-1", 3, monkeypatch)
    async with asyncio.timeout(20):
        await plane.coordinator.begin({node: control.Begin(3, "f32") for node in (ONE, NodeId("node-2"))})
    assert sorted(tries.values()) == [1, 4], "only what was not sent is sent again"
