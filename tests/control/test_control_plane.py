"""Agents and Coordinator together: joining, loading, reporting, failing, and what hostile peers cannot do."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import NoReturn

import pytest
import zmq.asyncio

from mdiq.control import agent as agent_module
from mdiq.control import answers as answers_module
from mdiq.control import coordinator as coordinator_module
from mdiq.control import node_watch
from mdiq.control.agent import SPANS_PER_CHUNK
from mdiq.control.answers import Patience
from mdiq.control.coordinator import REPEAT_S, Coordinator
from mdiq.core import control
from mdiq.core.frame import Buffer
from mdiq.core.types import PLAIN_WEIGHTS, Epoch, NodeId, SeqId
from mdiq.errors import EngineError, MdiqError, ModelError, NodeDiedError, SequenceError
from mdiq.telemetry.logging import MAX_LINES, configure
from mdiq.telemetry.trace import Span
from mdiq.transport.memory import MemoryControlLink, MemoryControlServer
from mdiq.transport.router_dealer import DealerLink, RouterServer
from tests.control.conftest import (
    KEY,
    LEASE_S,
    VERSION,
    Plane,
    agent_on,
    assignment,
    begin,
    heartbeat,
    ready,
)

ONE, TWO = NodeId("node-1"), NodeId("node-2")


async def test_nodes_join_load_say_ready_and_are_drained(plane: Plane) -> None:
    told: list[control.Assign] = []

    async def load(assign: control.Assign) -> control.Ready:
        told.append(assign)
        one.loading(1, 2)
        return ready(kv_tokens=77)

    one, one_task = plane.agent("node-1", load=load)
    _, two_task = plane.agent("node-2")
    hellos = await plane.coordinator.all_joined()
    assert {node: hello.data_endpoint for node, hello in hellos.items()} == {
        ONE: "tcp://127.0.0.1:6001",
        TWO: "tcp://127.0.0.1:6002",
    }
    assignments = {ONE: assignment(layer_start=2, layer_stop=3, is_last=False), TWO: assignment(layer_start=3)}
    answers = await plane.coordinator.assign(assignments)
    assert {node: answer.kv_tokens for node, answer in answers.items()} == {ONE: 77, TWO: 64}
    assert told == [assignments[ONE]]
    await plane.coordinator.drain(10.0)
    await asyncio.gather(one_task, two_task)
    # The last word before the goodbye are the figures.
    assert plane.coordinator.heartbeats == {ONE: heartbeat(), TWO: heartbeat()}
    assert plane.progress == [(ONE, control.Loading(1, 2))]
    assert plane.lost.empty()


async def test_a_failed_load_is_the_error_of_whoever_waits_and_ends_the_agent(plane: Plane) -> None:
    async def load(_: control.Assign) -> control.Ready:
        raise ModelError("weights.bin: truncated; copy it again")

    plane.agent("node-1")
    _, failing = plane.agent("node-2", load=load)
    await plane.coordinator.all_joined()
    with pytest.raises(ModelError, match="node-2: weights.bin: truncated; copy it again"):
        await plane.coordinator.assign({ONE: assignment(), TWO: assignment()})
    node, error = await plane.lost.get()
    assert (node, type(error), error.node) == (TWO, ModelError, TWO)
    with pytest.raises(ModelError, match="^weights.bin"):
        await failing


async def _never(_: object) -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError("it never ends")


async def _fails(_: object) -> NoReturn:
    raise ModelError("no room")


@pytest.mark.parametrize("fails", ["node-1", "node-2"])
async def test_the_first_failure_is_heard_whoever_has_not_answered_yet(plane: Plane, fails: str) -> None:
    for name in ("node-1", "node-2"):
        plane.agent(name, load=_fails if name == fails else _never)
    await plane.coordinator.all_joined()
    async with asyncio.timeout(20):
        with pytest.raises(ModelError, match=f"{fails}: no room"):
            await plane.coordinator.assign({ONE: assignment(), TWO: assignment()})


@pytest.mark.parametrize("fails", ["node-1", "node-2"])
async def test_the_first_failure_to_begin_is_heard_whoever_has_not_begun_yet(plane: Plane, fails: str) -> None:
    for name in ("node-1", "node-2"):
        plane.agent(name, begin=_fails if name == fails else _never)
    await plane.coordinator.all_joined()
    async with asyncio.timeout(20):
        with pytest.raises(ModelError, match=f"{fails}: no room"):
            await plane.coordinator.begin({ONE: control.Begin(2, "f32"), TWO: control.Begin(2, "f32")})


async def test_a_node_of_another_version_is_heard_of_before_the_others_have_joined(plane: Plane) -> None:
    plane.agent("node-2", version="9.9.9")
    async with asyncio.timeout(20):
        with pytest.raises(EngineError, match=r"node-2: it runs mdiq 9\.9\.9"):
            await plane.coordinator.all_joined()
    assert plane.coordinator.missing == [ONE]


async def test_a_node_that_loads_hears_that_it_is_drained(plane: Plane) -> None:
    is_loading, was_given_up = asyncio.Event(), asyncio.Event()

    async def load(_: control.Assign) -> NoReturn:
        is_loading.set()
        try:
            await asyncio.Event().wait()
        finally:
            was_given_up.set()
        raise AssertionError("it never ends")

    _, one = plane.agent("node-1", load=load)
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    assigning = asyncio.create_task(plane.coordinator.assign({ONE: assignment(), TWO: assignment()}))
    async with asyncio.timeout(20):
        await is_loading.wait()
        await plane.coordinator.drain(10.0)
        await one
    assert was_given_up.is_set()
    assigning.cancel()


async def test_a_newer_assignment_takes_the_place_of_one_that_loads() -> None:
    told: asyncio.Queue[control.Assign] = asyncio.Queue()
    ended: list[int] = []
    release = asyncio.Event()

    async def load(message: control.Assign) -> control.Ready:
        told.put_nowait(message)
        try:
            await release.wait()
        finally:
            ended.append(message.layer_start)
        return ready(kv_tokens=100 + message.layer_start)

    server = MemoryControlServer()
    link = server.connect(b"node-9")
    agent = agent_on(link, "node-9", load=load)
    running = asyncio.create_task(agent.run())
    async with asyncio.timeout(20):
        identity, _ = await server.receive()
        await server.send(identity, control.encode(assignment(layer_start=2), KEY))
        assert (await told.get()).layer_start == 2
        await server.send(identity, control.encode(assignment(layer_start=3), KEY))
        await server.send(identity, control.encode(control.Begin(2, "f32"), KEY))  # after what it was assigned
        assert (await told.get()).layer_start == 3
        assert ended == [2]
        release.set()
        answers: list[control.Message] = []
        while len(answers) < 2:
            answer = control.decode((await server.receive())[1], KEY)
            if not isinstance(answer, control.Heartbeat):
                answers.append(answer)
    assert answers == [ready(kv_tokens=103), control.Begun(2)]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_another_version_is_refused_with_both_named(plane: Plane) -> None:
    plane.agent("node-1", version="9.9.9")
    with pytest.raises(EngineError, match=f"node-1: it runs mdiq 9.9.9 and the starter {VERSION}; install"):
        await plane.coordinator.all_joined()
    assert (await plane.lost.get())[0] == ONE


async def test_a_node_that_nobody_expects_is_ignored(plane: Plane) -> None:
    plane.agent("node-7")
    plane.agent("node-1")
    plane.agent("node-2")
    assert set(await plane.coordinator.all_joined()) == {ONE, TWO}
    assert plane.lost.empty()


async def test_a_node_that_the_ring_goes_without_is_told_why_until_the_ring_ends(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "HEARTBEAT_S", 0.01)
    _, idle = plane.agent("node-3")
    for name in ("node-1", "node-2"):
        plane.agent(name)
    assert set(await plane.coordinator.all_joined()) == {ONE, TWO}
    while len([node for node in (ONE, TWO) if node in plane.heartbeats]) < 2:
        await plane.heartbeats.heard.get()
    assert plane.stand_by == [control.StandBy("it is a spare")]
    assert plane.coordinator.standing_by == ["node-3"] and not idle.done()
    await plane.coordinator.drain(10.0)
    await idle  # the next ring may need it
    assert plane.lost.empty()
    # What it says meanwhile is no business of a ring that ends.
    _, again = plane.agent("node-3", identity=b"node-3 again")
    await asyncio.sleep(0.05)
    assert plane.stand_by == [control.StandBy("it is a spare")] and not again.done()


async def test_a_second_process_of_a_name_does_not_take_the_place_of_the_first(plane: Plane) -> None:
    plane.agent("node-1")
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    plane.agent("node-1", identity=b"an impostor")
    answers = await plane.coordinator.assign({ONE: assignment(), TWO: assignment()})
    assert set(answers) == {ONE, TWO}
    await plane.coordinator.drain(10.0)
    await asyncio.gather(*plane.tasks[:2])
    assert not plane.tasks[2].done()


async def test_a_hop_is_measured_and_an_epoch_begun_over_the_control_channel(plane: Plane) -> None:
    told: list[control.Begin] = []

    async def begin_on_one(message: control.Begin) -> control.Begun:
        told.append(message)
        return control.Begun(message.epoch)

    plane.agent("node-1", begin=begin_on_one)
    two, _ = plane.agent("node-2")
    await plane.coordinator.all_joined()
    await plane.coordinator.assign({ONE: assignment(), TWO: assignment()})
    arriving = plane.coordinator.burst_arrived(TWO, 4)
    sent = await plane.coordinator.ask(ONE, control.SendBurst(1, 4, 16, 128), control.BurstSent)
    assert sent == control.BurstSent(1, 4, 7.5)
    two.burst_arrived(control.BurstArrived(1, 3, 0.0, 1.0, 9))  # of a burst that nobody waits for
    two.burst_arrived(control.BurstArrived(1, 4, 1.0, 2.0, 99))
    assert await arriving == control.BurstArrived(1, 4, 1.0, 2.0, 99)
    await plane.coordinator.begin({ONE: control.Begin(2, "i8"), TWO: control.Begin(2, "bf16")})
    assert told == [control.Begin(2, "i8")]


async def test_whoever_waits_for_a_node_that_is_lost_gets_the_error(plane: Plane) -> None:
    async def fails(_: control.Begin) -> control.Begun:
        raise EngineError("no such epoch")

    plane.agent("node-1", begin=fails)
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    waiting = plane.coordinator.burst_arrived(ONE, 1)
    with pytest.raises(EngineError, match="node-1: no such epoch"):
        await plane.coordinator.begin({TWO: control.Begin(2, "bf16"), ONE: control.Begin(2, "bf16")})
    with pytest.raises(EngineError, match="node-1: no such epoch"):
        await waiting
    with pytest.raises(EngineError, match="node-1: no such epoch"):
        await plane.coordinator.ask(ONE, control.SendBurst(1, 4, 16, 128), control.BurstSent)


async def test_faults_and_failures_reach_the_starter_as_they_were(plane: Plane) -> None:
    agent, _ = plane.agent("node-1")
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    agent.gaps(Epoch(3), (SeqId(5), SeqId(6)))
    agent.failure(Epoch(3), (SeqId(7),), EngineError("not a number in layer 3"))
    await plane.coordinator.drain(10.0)
    await asyncio.gather(*plane.tasks)
    assert plane.faults == [
        (ONE, control.Fault(3, (5, 6), "gap", "")),
        (ONE, control.Fault(3, (7,), "EngineError", "not a number in layer 3")),
    ]


async def test_a_trace_comes_in_chunks_and_is_whole(plane: Plane) -> None:
    plane.spans = [Span("compute", "1 segments", float(i), i + 0.5) for i in range(2 * SPANS_PER_CHUNK + 1)]
    plane.agent("node-1")
    _, other = plane.agent("node-2")
    await plane.coordinator.all_joined()
    await plane.coordinator.drain(10.0)
    assert {node: plane.coordinator.spans[node] for node in (ONE, TWO)} == dict.fromkeys((ONE, TWO), plane.spans)


async def test_of_a_trace_that_is_too_long_the_rest_is_ignored(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "MAX_SPANS", SPANS_PER_CHUNK + 10)
    plane.spans = [Span("compute", "1 segments", float(i), i + 0.5) for i in range(3 * SPANS_PER_CHUNK)]
    plane.agent("node-1")
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    await plane.coordinator.drain(10.0)
    for node in (ONE, TWO):
        assert plane.coordinator.spans[node] == plane.spans[: SPANS_PER_CHUNK + 10]


async def test_heartbeats_carry_the_newest_figures(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "HEARTBEAT_S", 0.0)
    plane.agent("node-1")
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    heard: set[NodeId] = set()
    while heard != {ONE, TWO}:
        heard.add(await plane.heartbeats.heard.get())
    assert plane.coordinator.heartbeats[TWO].frames_dropped == {"tag": 1}


async def test_a_lease_ends_when_no_heartbeat_renews_it(plane: Plane) -> None:
    for name in ("node-1", "node-2"):
        plane.agent(name)
    await plane.coordinator.all_joined()
    plane.now = LEASE_S * 0.9
    await plane.server.connect(b"node-1").send(control.encode(heartbeat(), KEY))
    assert await plane.heartbeats.heard.get() == ONE
    plane.now = LEASE_S * 1.5
    node, error = await plane.lost.get()
    assert node == TWO  # node-1 has until 1.9 leases
    assert isinstance(error, NodeDiedError)
    assert f"no heartbeat for {LEASE_S:g} s" in str(error)
    plane.now = LEASE_S * 2.0
    assert (await plane.lost.get())[0] == ONE
    with pytest.raises(NodeDiedError, match="node-2: no heartbeat"):
        await plane.coordinator.assign({TWO: assignment()})


async def test_a_starter_that_was_stopped_itself_does_not_take_its_nodes_for_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = MemoryControlServer()
    lost: list[NodeId] = []
    loop, ahead_s = asyncio.get_running_loop(), 0.0
    time_of = loop.time
    monkeypatch.setattr(loop, "time", lambda: time_of() + ahead_s)

    async def pass_s(seconds: float) -> None:
        nonlocal ahead_s
        ahead_s += seconds
        for _ in range(5):
            await asyncio.sleep(0)

    coordinator = Coordinator(
        server,
        KEY,
        VERSION,
        [ONE],
        clock=loop.time,
        lease_s=60.0,
        silence_s=60.0,
        on_fault=lambda *_: None,
        on_loading=lambda *_: None,
        on_lost=lambda node, _: lost.append(node),
    )
    running = asyncio.create_task(coordinator.run())
    await server.connect(b"node-1").send(control.encode(control.Hello("node-1", "tcp://127.0.0.1:1", 1, VERSION), KEY))
    await coordinator.all_joined()
    await pass_s(1.5)
    await pass_s(600.0)  # the whole process stands still
    assert not lost
    assert 0.0 < coordinator.silent(0.0)[ONE] < 30.0
    for _ in range(200):  # and now it is the node that is silent
        await pass_s(1.0)
        if lost:
            break
    assert lost == [ONE] and coordinator.silent(0.0) == {}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_node_that_dies_while_others_load_ends_the_wait(plane: Plane) -> None:
    begun = asyncio.Event()

    async def load(_: control.Assign) -> control.Ready:
        begun.set()
        return await asyncio.Future[control.Ready]()

    plane.agent("node-1", load=load)
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    assigning = asyncio.create_task(plane.coordinator.assign({ONE: assignment(), TWO: assignment()}))
    await begun.wait()
    plane.coordinator.fail(ONE, NodeDiedError("node-1: its process ended with exit code 1"))
    with pytest.raises(NodeDiedError, match="exit code 1"):
        await assigning


async def _by_hand(plane: Plane, name: str) -> MemoryControlLink:
    """Have a Node join that says only what the test does."""
    link = plane.server.connect(name.encode())
    await link.send(control.encode(control.Hello(name, f"tcp://127.0.0.1:600{name[-1]}", 1, VERSION), KEY))
    return link


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  (nobody tells)
            await asyncio.sleep(0.001)


async def _says(plane: Plane, link: MemoryControlLink, message: control.Message) -> None:
    """Have a Node say something, and wait until it is heard."""
    await link.send(control.encode(message, KEY))
    await link.send(control.encode(heartbeat(), KEY))
    async with asyncio.timeout(20):
        await plane.heartbeats.heard.get()


async def test_a_node_that_has_loaded_and_dies_while_another_loads_ends_the_wait_with_its_error(plane: Plane) -> None:
    one = await _by_hand(plane, "node-1")
    await _by_hand(plane, "node-2")
    await plane.coordinator.all_joined()
    assigning = asyncio.create_task(plane.coordinator.assign({ONE: assignment(), TWO: assignment()}))
    await one.receive()
    await _says(plane, one, ready())
    plane.coordinator.fail(ONE, NodeDiedError("node-1: its process ended with exit code 1"))
    async with asyncio.timeout(20):
        with pytest.raises(NodeDiedError, match="exit code 1"):
            await assigning


async def test_an_answer_to_an_earlier_assignment_is_not_taken_for_one_to_this(plane: Plane) -> None:
    one = await _by_hand(plane, "node-1")
    await _by_hand(plane, "node-2")
    await plane.coordinator.all_joined()
    first = asyncio.create_task(plane.coordinator.assign({ONE: assignment()}))
    await one.receive()
    await _says(plane, one, ready(kv_tokens=64))
    assert (await first)[ONE].kv_tokens == 64
    second = asyncio.create_task(plane.coordinator.assign({ONE: assignment(epoch=2)}))
    await one.receive()
    await _says(plane, one, control.Loading(1, 2))
    assert not second.done()
    await _says(plane, one, replace(ready(kv_tokens=99), epoch=2))
    async with asyncio.timeout(20):
        assert (await second)[ONE].kv_tokens == 99


async def _second_of_loaded(plane: Plane) -> MemoryControlLink:
    """Have two Nodes join and load; return the second."""
    one, two = [await _by_hand(plane, name) for name in ("node-1", "node-2")]
    await plane.coordinator.all_joined()
    await _loads(plane, one, two)
    return two


async def _asked_in_vain(kind: type[MdiqError], what: Awaitable[object], monkeypatch: pytest.MonkeyPatch) -> MdiqError:
    """Return the error of whoever asks a node that stands still."""
    monkeypatch.setattr(coordinator_module, "REPEAT_S", 0.001)
    monkeypatch.setattr(answers_module, "STALL_S", 0.05)
    async with asyncio.timeout(20):
        with pytest.raises(kind) as raised:
            await what
    return raised.value


@pytest.mark.parametrize("asked", ["SendBurst", "Fetch"])
async def test_a_node_that_stands_still_with_something_else_than_its_part_stays(
    plane: Plane, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that had its nodes fetch first would have waited for ever."""
    two = await _second_of_loaded(plane)
    requests: dict[str, Callable[[], Awaitable[object]]] = {
        "SendBurst": lambda: plane.coordinator.ask(TWO, control.SendBurst(1, 1, 2, 100), control.BurstSent),
        "Fetch": lambda: plane.coordinator.ask(TWO, control.Fetch(1, 0, 1, "digest", PLAIN_WEIGHTS), control.Fetched),
    }
    error = await _asked_in_vain(EngineError, requests[asked](), monkeypatch)
    assert "node-2: it lives, and has not got on with " + asked in str(error)
    assert plane.coordinator.missing == [] and plane.lost.empty()
    beginning = asyncio.create_task(plane.coordinator.begin({TWO: control.Begin(1, "f32")}))
    await two.send(control.encode(control.Begun(1), KEY))
    await beginning
    num_told = len(plane.progress)
    await _says(plane, two, control.Loading(1, 2))  # of what it fetches for later
    assert len(plane.progress) == num_told


@pytest.mark.parametrize("asked", ["Assign", "Begin"])
async def test_a_node_that_lives_and_never_answers_is_lost_and_may_join_anew(
    plane: Plane, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was waited for for ten minutes, and then all requests of the ring ended."""
    await _second_of_loaded(plane)
    requests: dict[str, Callable[[], Awaitable[object]]] = {
        "Assign": lambda: plane.coordinator.assign({TWO: assignment(epoch=2, measures=False)}),
        "Begin": lambda: plane.coordinator.begin({TWO: control.Begin(2, "f32")}),
    }
    error = await _asked_in_vain(NodeDiedError, requests[asked](), monkeypatch)
    assert "node-2: it lives, and has not got on with " + asked in str(error) and error.node == TWO
    assert isinstance(error, NodeDiedError) and not error.is_silent, "so that others take over at once"
    assert (await plane.lost.get())[0] == TWO and plane.coordinator.missing == [TWO] and plane.lost.empty()
    await _by_hand(plane, "node-2")
    await _until(lambda: plane.coordinator.missing == [])


async def test_a_node_that_gets_on_with_a_long_load_is_waited_for(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = await _second_of_loaded(plane)
    monkeypatch.setattr(coordinator_module, "REPEAT_S", 0.001)
    monkeypatch.setattr(answers_module, "STALL_S", 0.004)  # four looks
    looks = 0
    begun = Patience.ended

    def ended(self: Patience, waited_s: float, waiting: Iterable[NodeId]) -> dict[NodeId, str]:
        nonlocal looks
        looks += 1
        plane.coordinator._answers.steps[TWO] += looks % 3 == 0  # as a Loading does, see below
        return begun(self, waited_s, waiting)

    monkeypatch.setattr(Patience, "ended", ended)
    loading = asyncio.create_task(plane.coordinator.assign({TWO: assignment(epoch=2, measures=False)}))
    await _until(lambda: looks > 40)
    assert not loading.done() and plane.lost.empty()
    await two.send(control.encode(replace(ready(), epoch=2), KEY))
    await loading
    steps = plane.coordinator._answers.steps[TWO]
    await _says(plane, two, control.Loading(1, 2))
    assert plane.coordinator._answers.steps[TWO] == steps + 1


def test_who_measures_what_it_has_loaded_may_say_nothing_for_longer() -> None:
    requests: dict[NodeId, control.Message] = {
        NodeId("fetches"): control.Fetch(1, 0, 1, "digest", PLAIN_WEIGHTS),
        NodeId("measures"): assignment(measures=True),
        NodeId("loads"): assignment(measures=False),
    }
    patience = Patience(requests, {})
    ended = [[*patience.ended(60.0, requests)] for _ in range(10)]
    assert ended[0] == [] and ended[1] == ended[8] == ["fetches", "loads"] and len(ended[9]) == 3


async def test_where_a_node_is_gone_nobody_is_assigned_layers_and_its_own_error_is_told(plane: Plane) -> None:
    two = await _by_hand(plane, "node-2")
    await _by_hand(plane, "node-1")
    await plane.coordinator.all_joined()
    plane.coordinator.fail(ONE, NodeDiedError("node-1: its process ended with exit code 1"))
    with pytest.raises(NodeDiedError, match="exit code 1"):
        await plane.coordinator.assign({TWO: assignment(), ONE: assignment()})
    await plane.coordinator.drain(0.0)
    assert isinstance(control.decode(await two.receive(), KEY), control.Drain)


async def test_a_drain_does_not_wait_for_a_node_that_hangs(plane: Plane) -> None:
    async def load(_: control.Assign) -> control.Ready:
        return await asyncio.Future[control.Ready]()

    plane.agent("node-1", load=load)
    _, two = plane.agent("node-2")
    await plane.coordinator.all_joined()
    assigning = asyncio.create_task(plane.coordinator.assign({ONE: assignment()}))
    await plane.coordinator.drain(0.05)
    await two
    assigning.cancel()
    await asyncio.gather(assigning, return_exceptions=True)


async def test_junk_wrong_keys_and_wrong_directions_are_dropped_at_both_ends(plane: Plane) -> None:
    rng = random.Random(5)
    hostile = plane.server.connect(b"hostile")
    good = control.encode(control.Hello("node-1", "tcp://127.0.0.1:1", 1, VERSION), KEY)
    for _ in range(300):
        damaged = bytearray(good)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        for junk in (rng.randbytes(rng.randrange(200)), bytes(damaged), good[: rng.randrange(len(good))]):
            await hostile.send(junk)
    await hostile.send(
        control.encode(control.Hello("node-1", "tcp://evil:1", 1, VERSION), b"another control key, of 32")
    )
    await hostile.send(control.encode(heartbeat(), KEY))  # the right key, but it has not joined
    plane.agent("node-1", key=b"yet another control key, of 32 b", identity=b"wrong key")
    plane.agent("node-1")
    _, two = plane.agent("node-2")
    hellos = await plane.coordinator.all_joined()
    assert hellos[ONE].data_endpoint == "tcp://127.0.0.1:6001"
    await plane.server.send(b"node-2", b"junk")
    await plane.server.send(b"node-2", control.encode(control.Drain(), b"another control key, of 32"))
    await plane.server.send(b"node-2", control.encode(ready(), KEY))  # not for an agent
    answers = await plane.coordinator.assign({ONE: assignment(), TWO: assignment()})
    assert set(answers) == {ONE, TWO}
    # An agent's message that only the starter may send, and a Ready that nobody asked for.
    await plane.server.connect(b"node-1").send(control.encode(assignment(), KEY))
    await plane.server.connect(b"node-1").send(control.encode(ready(), KEY))
    await plane.coordinator.drain(10.0)
    await two
    assert plane.lost.empty()


async def test_a_flood_of_junk_costs_few_log_lines_and_nodes_join_beside_it(
    plane: Plane, capsys: pytest.CaptureFixture[str]
) -> None:
    configure()
    hostile = plane.server.connect(b"hostile")
    beat = control.encode(heartbeat(), KEY)  # well made, from a peer that has not joined

    async def flood() -> None:
        for i in range(3_000):
            await hostile.send(beat if i % 2 else b"junk %d" % i)

    flooding = asyncio.create_task(flood())
    plane.agent("node-1")
    plane.agent("node-2")
    async with asyncio.timeout(30):
        assert set(await plane.coordinator.all_joined()) == {ONE, TWO}
        await flooding
    # A busy machine is slow to call back, of which asyncio's debug mode tells.
    lines = [line for line in capsys.readouterr().err.splitlines() if "[asyncio]" not in line]
    assert 1 <= len(lines) <= 2 * MAX_LINES
    assert "control_message_dropped" in lines[0]


async def test_with_security_a_node_speaks_for_itself_alone(plane: Plane) -> None:
    """node-2 has a key of the ring, and tries to join, and then to speak, as node-1."""
    hello = control.encode(control.Hello("node-1", "tcp://127.0.0.1:6666", 1, VERSION), KEY)
    goodbye = control.encode(control.Goodbye(), KEY)
    beat = control.encode(heartbeat(busy_s=66.0), KEY)
    other = plane.server.connect(b"node-1.else", sender="node-2")
    await other.send(hello)
    honest = plane.server.connect(b"node-1", sender="node-1")
    await honest.send(control.encode(control.Hello("node-1", "tcp://127.0.0.1:6001", 1, VERSION), KEY))
    # Under the identity that node-1 has joined with, as if it had got hold of that.
    taken = MemoryControlLink(plane.server, b"node-1", 10, "node-2")
    for message in (hello, beat, goodbye):
        await taken.send(message)
    # And with its own name on a connection that is node-1's already.
    await honest.send(control.encode(control.Hello("node-2", "tcp://127.0.0.1:6666", 1, VERSION), KEY))
    # Nor does it stand by for another, or fall silent so.
    idle = control.encode(control.Hello("node-3", "tcp://127.0.0.1:6666", 1, VERSION), KEY)
    await other.send(idle)
    await honest.send(idle)
    mine = plane.server.connect(b"node-2", sender="node-2")
    await mine.send(control.encode(control.Hello("node-2", "tcp://127.0.0.1:6002", 1, VERSION), KEY))
    hellos = await plane.coordinator.all_joined()
    assert [hello.data_endpoint for hello in hellos.values()] == ["tcp://127.0.0.1:6001", "tcp://127.0.0.1:6002"]
    await honest.send(control.encode(heartbeat(busy_s=1.0), KEY))
    assert await plane.heartbeats.heard.get() == ONE
    assert plane.heartbeats[ONE].busy_s == 1.0


async def test_a_lost_node_that_joins_again_is_heard_from_its_new_connection_alone(plane: Plane) -> None:
    hello = control.encode(control.Hello("node-1", "tcp://127.0.0.1:6001", 1, VERSION), KEY)
    old, new = (plane.server.connect(identity, sender="node-1") for identity in (b"node-1.a", b"node-1.b"))
    await old.send(hello)
    await old.send(control.encode(heartbeat(), KEY))
    assert await plane.heartbeats.heard.get() == ONE
    plane.now = 2 * LEASE_S
    assert (await plane.lost.get())[0] == ONE
    await new.send(hello)
    await old.send(control.encode(heartbeat(busy_s=1.0), KEY))  # late, of the process before
    await new.send(control.encode(heartbeat(busy_s=2.0), KEY))
    assert await plane.heartbeats.heard.get() == ONE
    assert plane.heartbeats[ONE].busy_s == 2.0


async def test_doubled_messages_do_no_harm() -> None:
    plane = Plane(MemoryControlServer(copies=lambda _: 2))

    async def load(_: control.Assign) -> control.Ready:
        return ready()

    plane.agent("node-1", load=load)
    plane.agent("node-2", load=load)
    await plane.coordinator.all_joined()
    assert set(await plane.coordinator.assign({ONE: assignment(), TWO: assignment()})) == {ONE, TWO}
    await plane.coordinator.drain(10.0)
    await asyncio.gather(*plane.tasks)
    assert plane.lost.empty()
    assert not plane.coordinating.done()
    plane.coordinating.cancel()
    await asyncio.gather(plane.coordinating, return_exceptions=True)


async def test_an_agent_that_cannot_report_ends_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "HEARTBEAT_S", 0.0)
    server = MemoryControlServer()
    link = server.connect(b"node-1")

    def breaks() -> control.Heartbeat:
        raise EngineError("no figures")

    agent = agent_on(link, load=lambda _: asyncio.get_running_loop().create_future(), heartbeat=breaks)
    with pytest.raises(EngineError, match="no figures"):
        async with asyncio.timeout(20):
            await agent.run()


def test_a_reported_error_has_the_class_that_it_names_if_it_is_one_of_ours() -> None:
    for kind, expected in [
        ("ModelError", ModelError),
        ("SequenceError", SequenceError),
        ("SystemExit", EngineError),
        ("Counter", EngineError),
    ]:
        error = control.Failed(kind, "text").as_error(ONE)
        assert type(error) is expected
        assert str(error) == "node-1: text"


async def test_the_same_over_real_sockets() -> None:
    context = zmq.asyncio.Context()
    server = await RouterServer.bind(context, "tcp://127.0.0.1:0")
    lost: list[MdiqError] = []
    coordinator = Coordinator(
        server,
        KEY,
        VERSION,
        [ONE],
        clock=asyncio.get_running_loop().time,
        lease_s=30.0,
        silence_s=30.0,
        on_fault=lambda *_: None,
        on_loading=lambda *_: None,
        on_lost=lambda _, error: lost.append(error),
    )
    coordinating = asyncio.create_task(coordinator.run())
    link = await DealerLink.connect(context, server.endpoint, identity="node-1")

    agent = asyncio.create_task(agent_on(link).run())
    assert set(await coordinator.all_joined()) == {ONE}
    assert (await coordinator.assign({ONE: assignment()}))[ONE] == ready()
    await coordinator.drain(10.0)
    await agent
    assert lost == []
    coordinating.cancel()
    await asyncio.gather(coordinating, return_exceptions=True)
    await link.aclose()
    await server.aclose()
    context.term()


def _drains_strangers(server: MemoryControlServer, clock: Callable[[], float]) -> Coordinator:
    return Coordinator(
        server,
        KEY,
        VERSION,
        [ONE],
        clock=clock,
        lease_s=60.0,
        silence_s=60.0,
        on_fault=lambda *_: None,
        on_loading=lambda *_: None,
        on_lost=lambda *_: None,
        drains_strangers=True,
    )


async def test_a_node_of_an_earlier_ring_is_told_once_to_end_and_can_join() -> None:
    server = MemoryControlServer()
    coordinator = _drains_strangers(server, lambda: 0.0)
    running = asyncio.create_task(coordinator.run())
    link = server.connect(b"an earlier link")
    for _ in range(3):
        await link.send(control.encode(heartbeat(), KEY))
    assert isinstance(control.decode(await link.receive(), KEY), control.Drain)
    assert coordinator.missing == [ONE]
    new = server.connect(b"a new link")
    await new.send(control.encode(control.Hello("node-1", "tcp://127.0.0.1:1", 1, VERSION), KEY))
    await coordinator.all_joined()
    assert coordinator.missing == []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await link.receive()  # it was told once
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_node_of_an_earlier_ring_that_has_not_heard_that_it_is_to_end_is_told_again() -> None:
    # A connection that broke has lost it: the Node would beat for an earlier Ring for ever.
    times = [0.0]
    server = MemoryControlServer()
    coordinator = _drains_strangers(server, lambda: times[-1])
    running = asyncio.create_task(coordinator.run())
    link = server.connect(b"an earlier link")
    for now in (0.0, REPEAT_S):
        times.append(now)
        await link.send(control.encode(heartbeat(), KEY))
        assert isinstance(control.decode(await link.receive(), KEY), control.Drain)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("lost", [control.Assign, control.Ready, control.Begin, control.Begun, control.SendBurst])
async def test_a_request_or_an_answer_that_is_lost_is_sent_again_and_done_once(
    lost: type[control.Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "REPEAT_S", 0.01)
    num_lost, done = 0, []

    def copies(parts: Sequence[Buffer]) -> int:
        nonlocal num_lost
        if num_lost == 2 or not isinstance(control.decode(bytes(parts[0]), KEY), lost):
            return 1
        num_lost += 1
        return 0

    async def load(assign: control.Assign) -> control.Ready:
        done.append("load")
        return ready()

    async def begins(message: control.Begin) -> control.Begun:
        done.append("begin")
        return await begin(message)

    plane = Plane(MemoryControlServer(copies=copies))
    try:
        plane.agent("node-1", load=load, begin=begins)
        plane.agent("node-2")
        await plane.coordinator.all_joined()
        await plane.coordinator.assign({ONE: assignment()})
        assert (await plane.coordinator.ask(ONE, control.SendBurst(1, 7, 1, 64), control.BurstSent)).sent_s == 7.5
        await plane.coordinator.begin({ONE: control.Begin(2, "bf16")})
        assert (num_lost, done) == (2, ["load", "begin"])
    finally:
        for task in (plane.coordinating, *plane.tasks):
            task.cancel()
        await asyncio.gather(plane.coordinating, *plane.tasks, return_exceptions=True)


async def _lacks(plane: Plane, node: NodeId) -> None:
    """Wait until all but this Node have joined."""
    async with asyncio.timeout(20):
        while plane.coordinator.missing != [node]:  # noqa: ASYNC110 - nothing tells of a Hello
            await asyncio.sleep(0.001)


async def test_who_gives_up_waiting_learns_who_is_missing(plane: Plane) -> None:
    plane.agent("node-1")
    await _lacks(plane, TWO)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await plane.coordinator.all_joined()
    assert plane.coordinator.missing == [TWO]
    plane.agent("node-2")
    await plane.coordinator.all_joined()


async def test_a_node_that_leaves_by_itself_is_lost_with_its_reason(plane: Plane) -> None:
    agent, _ = plane.agent("node-1")
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    await agent.leave(NodeDiedError("it was stopped on its device"))
    node, error = await plane.lost.get()
    assert (node, str(error)) == (ONE, "node-1: it was stopped on its device")


async def test_a_node_that_is_stopped_asks_to_be_drained(plane: Plane) -> None:
    agent, task = plane.agent("node-1")
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    assert await agent.leaving()
    assert await plane.coordinator.leavers.first == ONE
    assert plane.lost.empty()
    await plane.coordinator.drain(10.0)
    await task


async def test_a_process_in_place_of_a_silent_one_ends_the_ring_at_once(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdiq.control.coordinator.SILENT_S", LEASE_S / 2)
    first, second = (plane.server.connect(identity, sender="node-1") for identity in (b"node-1.a", b"node-1.b"))
    hello = control.encode(control.Hello("node-1", "tcp://127.0.0.1:6001", 1, VERSION), KEY)
    plane.agent("node-2")
    await first.send(hello)
    await plane.coordinator.all_joined()
    assigning = asyncio.create_task(plane.coordinator.assign({ONE: assignment(), TWO: assignment()}))
    await first.receive()
    await second.send(hello)  # beside one that was heard a moment ago: refused
    plane.now = LEASE_S / 2
    await second.send(hello)
    node, error = await plane.lost.get()
    assert node == ONE and "started anew" in str(error)
    with pytest.raises(NodeDiedError, match="started anew"):
        await assigning
    # It is there again, without work; the Ring decides whether that is of use.
    assert plane.coordinator.missing == [] and plane.coordinator.without_work == [ONE]
    plane.agent("node-1", identity=b"node-1.c")
    await _until(lambda: plane.coordinator.missing == [])


async def _asked(link: MemoryControlLink) -> control.Message:
    """Return what a Node is asked to do next."""
    async with asyncio.timeout(20):
        while (message := control.decode(await link.receive(), KEY)) == control.Ping():
            pass
    return message


async def _loads(plane: Plane, *links: MemoryControlLink, epoch: int = 1) -> None:
    """Have Nodes, the first of which is node-1, load in an Epoch."""
    assignments = {node: assignment(epoch=epoch) for node, _ in zip((ONE, TWO), links, strict=False)}
    assigning = asyncio.create_task(plane.coordinator.assign(assignments))
    for link in links:
        assert await _asked(link) == assignment(epoch=epoch)
        await link.send(control.encode(replace(ready(), epoch=epoch), KEY))
    await assigning


async def _begins(plane: Plane, node: NodeId, link: MemoryControlLink, epoch: int) -> None:
    beginning = asyncio.create_task(plane.coordinator.begin({node: control.Begin(epoch, "f32")}))
    assert await _asked(link) == control.Begin(epoch, "f32")
    await link.send(control.encode(control.Begun(epoch), KEY))
    await beginning


async def test_a_node_that_is_heard_again_after_its_lease_is_back_and_without_work(plane: Plane) -> None:
    nodes = [await _by_hand(plane, name) for name in ("node-1", "node-2")]
    await plane.coordinator.all_joined()
    plane.now = LEASE_S * 2.0
    assert {(await plane.lost.get())[0] for _ in nodes} == {ONE, TWO}
    assert plane.coordinator.missing == [ONE, TWO]
    await _says(plane, nodes[0], control.Begun(1))  # of the Ring as it was
    assert plane.coordinator.missing == [TWO]
    waiting = asyncio.create_task(plane.coordinator.until_joined())
    await nodes[1].send(control.encode(heartbeat(), KEY))
    await waiting
    assert plane.coordinator.missing == []
    assert plane.coordinator.without_work == [ONE, TWO]
    await _loads(plane, *nodes)
    assert plane.coordinator.without_work == [] and plane.lost.empty()


@pytest.mark.parametrize("has_served", [True, False])
async def test_a_node_without_a_connection_is_gone_at_once_or_while_the_ring_forms_a_little_later(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, has_served: bool
) -> None:
    """Also one that loads while the ring changes: node-2 has loaded, and has not begun."""
    monkeypatch.setattr(node_watch, "UNREACHED_S", LEASE_S * 0.3)
    monkeypatch.setattr(node_watch, "CHANGING_S", LEASE_S * 0.4)
    monkeypatch.setattr(node_watch, "SILENT_S", LEASE_S * 0.6)
    links = [await _by_hand(plane, name) for name in ("node-1", "node-2")]
    await plane.coordinator.all_joined()
    await _loads(plane, *links)
    if has_served:
        await _begins(plane, ONE, links[0], 2)
    for link in links:
        await link.aclose()
    await _until(lambda: plane.coordinator._watch._unreached.keys() == {ONE, TWO})
    if not has_served:
        plane.now = LEASE_S * 0.5
        await asyncio.sleep(LEASE_S)  # several looks
        assert plane.lost.empty() and plane.coordinator.missing == []
    lost = []
    if has_served:
        plane.now = LEASE_S * 0.3
        lost = [await plane.lost.get()]
        await asyncio.sleep(LEASE_S)  # several looks
        assert plane.lost.empty()
    plane.now = LEASE_S * (0.4 if has_served else 0.6)
    lost += [await plane.lost.get() for _ in range(2 - len(lost))]
    assert {node for node, _ in lost} == {ONE, TWO}
    assert all(str(error).startswith(f"{node}: its connection has ended") for node, error in lost)
    await _by_hand(plane, "node-1")  # its next process
    await _until(lambda: plane.coordinator.missing == [TWO])


async def test_a_connection_that_is_made_anew_is_no_loss(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_watch, "SILENT_S", LEASE_S * 0.6)
    links = [await _by_hand(plane, name) for name in ("node-1", "node-2")]
    await plane.coordinator.all_joined()
    await _loads(plane, *links)
    await links[0].aclose()
    await _until(lambda: bool(plane.coordinator._watch._unreached))
    again = plane.server.connect(b"node-1")
    await _until(lambda: not plane.coordinator._watch._unreached)
    plane.now = LEASE_S * 0.9
    await _says(plane, again, heartbeat())
    assert plane.lost.empty() and plane.coordinator.missing == []


async def test_a_node_without_work_may_be_started_again_while_others_are_waited_for(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_watch, "SILENT_S", LEASE_S * 0.3)
    await (await _by_hand(plane, "node-1")).aclose()
    await asyncio.sleep(LEASE_S)  # several looks
    plane.now = LEASE_S * 0.6
    await asyncio.sleep(LEASE_S)
    assert plane.lost.empty()
    plane.agent("node-1", identity=b"node-1.b")
    plane.agent("node-2")
    await plane.coordinator.all_joined()


async def test_an_answer_of_an_attempt_that_was_given_up_is_not_taken_for_the_next_ones(plane: Plane) -> None:
    """node-2 was lost while node-1 loaded; what node-1 says of that comes when it is asked again."""
    links = [await _by_hand(plane, name) for name in ("node-1", "node-2")]
    await plane.coordinator.all_joined()
    given_up = asyncio.create_task(plane.coordinator.assign({ONE: assignment(epoch=3)}))
    assert await _asked(links[0]) == assignment(epoch=3)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    assert plane.coordinator.without_work == [ONE, TWO]
    assigning = asyncio.create_task(plane.coordinator.assign({ONE: assignment(epoch=5)}))
    assert await _asked(links[0]) == assignment(epoch=5)
    await _says(plane, links[0], replace(ready(), epoch=3))
    assert plane.coordinator.without_work == [ONE, TWO] and not assigning.done()
    await _says(plane, links[0], replace(ready(), epoch=5))
    assert (await assigning)[ONE].epoch == 5 and plane.coordinator.ready[ONE].epoch == 5
    await _says(plane, links[0], control.Begun(4))
    await _begins(plane, ONE, links[0], 6)


async def test_a_node_that_says_goodbye_unasked_is_lost(plane: Plane) -> None:
    links = [await _by_hand(plane, name) for name in ("node-1", "node-2")]
    await plane.coordinator.all_joined()
    await links[0].send(control.encode(control.Goodbye(), KEY))
    node, error = await plane.lost.get()
    assert (node, str(error)) == (ONE, "node-1: it has left; see its log")
    assert plane.coordinator.missing == [ONE]


async def test_a_node_that_was_to_measure_and_has_no_costs_is_refused(plane: Plane) -> None:
    node = await _by_hand(plane, "node-1")
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    for measures in (False, True):
        assign = assignment(epoch=2 + measures, measures=measures)
        assigning = asyncio.create_task(plane.coordinator.assign({ONE: assign}))
        assert await _asked(node) == assign
        await node.send(control.encode(replace(ready(), epoch=assign.epoch, decode_s=(), prompt_s=()), KEY))
        if measures:
            with pytest.raises(EngineError, match="node-1: it does not say what a forward costs"):
                await assigning
        else:
            assert (await assigning)[ONE].decode_s == ()


async def test_a_node_that_asked_to_leave_and_is_started_again_stays(plane: Plane) -> None:
    first = await _by_hand(plane, "node-1")
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    await _loads(plane, first)
    await _says(plane, first, control.Leaving())
    assert await plane.coordinator.leavers.first == ONE
    staying = asyncio.create_task(plane.coordinator.leavers.until_over())
    failed = control.Failed("NodeDiedError", "it was stopped on its device")
    await first.send(control.encode(failed, KEY))
    assert (await plane.lost.get())[0] == ONE
    await first.aclose()
    plane.agent("node-1", identity=b"node-1.b")
    async with asyncio.timeout(20):
        await staying
    assert not plane.coordinator.leavers.first.done()


async def test_before_the_ring_is_formed_a_process_takes_the_place_of_a_silent_one(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdiq.control.coordinator.SILENT_S", LEASE_S / 2)
    hello = control.encode(control.Hello("node-1", "tcp://127.0.0.1:6001", 1, VERSION), KEY)
    await plane.server.connect(b"node-1.a", sender="node-1").send(hello)
    await _lacks(plane, TWO)
    plane.now = LEASE_S / 2
    plane.agent("node-1", identity=b"node-1.b")
    plane.agent("node-2")
    await plane.coordinator.all_joined()
    assert set(await plane.coordinator.assign({ONE: assignment(), TWO: assignment()})) == {ONE, TWO}
    assert plane.lost.empty()
