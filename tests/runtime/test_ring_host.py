"""A Ring of this one process, on a model of random weights."""

import asyncio
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import zmq

from mdiq import __version__
from mdiq.bench.shapes import shape_file
from mdiq.core import control
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import PLAIN_WEIGHTS, LayerRange, NodeId, WeightSettings
from mdiq.engine import runner
from mdiq.engine.formats.checkpoint import Checkpoint, open_checkpoint
from mdiq.errors import EngineError, MdiqError, ModelError, NodeDiedError, RingError
from mdiq.plan.pace import paced
from mdiq.runtime import epochs, ring_host, stage_host, starter_stage
from mdiq.runtime.loops import Worker
from mdiq.runtime.node import NodeOptions, NodeProcess
from mdiq.runtime.options import HopFigures, RemoteNode, RemoteRing, RingOptions
from mdiq.runtime.processes import ProcessWorkers
from mdiq.runtime.remote import RemoteWorkers
from mdiq.runtime.ring_host import RingHost
from mdiq.runtime.stage_service import StageService
from mdiq.runtime.starter_stage import StarterStage
from mdiq.runtime.workers import RingEvents


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path))
    return shape_file("tiny", 8, lambda _: None)


@pytest.mark.parametrize(("wires", "used"), [(("auto",), ["f32", "f32"]), (("i8", "auto"), ["i8", "f32"])])
async def test_hops_inside_a_process_are_not_measured_and_carry_what_the_stages_have(
    tiny: Path, wires: tuple[str, ...], used: list[str]
) -> None:
    layers = (LayerRange(0, 2), LayerRange(2, 4))
    options = RingOptions(tiny, layers, wires=wires, in_process=True, kv_tokens=128)
    async with RingHost(options) as ring:
        assert ring.hops() == [HopFigures(wire, None, None) for wire in used]
        assert ring.wire_check_nats is None
        tokens = [e.step.token async for e in ring.stream(Sequence(0, (1, 2, 3), SamplingParams(max_tokens=3)))]
        assert len(tokens) == 3
        assert [figures.bytes_out > 0 for figures in ring.figures()] == [True, True]


@pytest.mark.parametrize(("cpu", "is_exact", "num_lines"), [("", True, 0), ("another", True, 1), ("another", False, 0)])
def test_nodes_of_another_kind_of_cpu_are_named_in_exact_mode(
    tiny: Path, cpu: str, is_exact: bool, num_lines: int
) -> None:
    settings = WeightSettings("int8", exact=is_exact)
    stage = StarterStage(RingOptions(tiny, (LayerRange(0, 2), LayerRange(2, 4)), weights=settings))
    with structlog.testing.capture_logs() as logs:
        stage.check_kinds([control.Ready(1, 2, 3, 4, 5, ((1, 0.25),), ((64, 0.5),), cpu=cpu or stage.cpu)])
    stage.close()
    kinds = [line["kinds"] for line in logs if line["event"] == "kinds_of_cpu_differ"]
    assert len(kinds) == num_lines
    assert all(line == f"another: node-1; {stage.cpu}: node-0" for line in kinds)


async def test_a_ring_of_one_has_no_hops(tiny: Path) -> None:
    async with RingHost(RingOptions(tiny, (LayerRange(0, 4),), wires=("auto",), kv_tokens=128)) as ring:
        assert ring.hops() == []


@pytest.mark.parametrize("weights", ["plain", "int8"])
async def test_a_starter_that_loads_and_measures_notes_its_progress_for_the_watchdog(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    num_notes = 0
    note_progress = Worker.note_progress

    def note(worker: Worker) -> None:
        nonlocal num_notes
        num_notes += 1
        note_progress(worker)

    monkeypatch.setattr(Worker, "note_progress", note)
    num_loaded: list[int] = []

    def on_loading(node: str, done: int, total: int) -> None:
        num_loaded.append(done)

    options = RingOptions(tiny, (LayerRange(0, 4),), kv_tokens=128, weights=WeightSettings(weights))
    async with RingHost(options, on_loading=on_loading):
        # Each layer and the two ends, each of the 24 forwards that are measured, and with packed weights each matrix.
        assert num_notes >= 5 + 24 + (4 * 4 if weights == "int8" else 0)
        assert num_loaded[-1] == 5
        num_notes = 0
    async with RingHost(options) as ring:
        num_notes = 0
        await ring.measured()
        assert num_notes > 5, "the head is measured by several sizes"


async def test_the_pace_is_planned_beside_the_event_loop(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned_on: list[threading.Thread] = []

    def noted(*arguments: Any) -> Any:
        planned_on.append(threading.current_thread())
        return paced(*arguments)

    monkeypatch.setattr(epochs, "paced", noted)
    options = RingOptions(tiny, (LayerRange(0, 2), LayerRange(2, 4)), in_process=True, kv_tokens=128)
    async with RingHost(options) as ring, asyncio.timeout(30):
        while len(planned_on) < 2 or ring.service.hops_s is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert threading.main_thread() not in planned_on


class LosingWorkers:
    """Stages of which one is lost while the Ring waits for another."""

    source = sink = None

    def __init__(self, options: RingOptions, ring_key: bytes, events: RingEvents) -> None:
        self._on_lost = events.on_lost

    async def open(self) -> None:
        pass

    async def start(self, model_digest: str, weights: str) -> None:
        self._on_lost(NodeDiedError("node-2: no heartbeat"))
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        pass


async def test_a_node_that_is_lost_ends_the_start_whatever_is_waited_for(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_host, "kind_of_workers", lambda _: LosingWorkers)
    options = RingOptions(tiny, (LayerRange(0, 2), LayerRange(2, 4)), kv_tokens=128)
    async with asyncio.timeout(30):
        with pytest.raises(NodeDiedError, match="node-2: no heartbeat"):
            await RingHost(options).__aenter__()


@pytest.mark.parametrize("is_remote", [False, True])
async def test_nodes_of_this_machine_start_before_torch_and_the_model_are_loaded_here(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, is_remote: bool
) -> None:
    nodes = tuple(RemoteNode(name, "tcp://127.0.0.1:0", None) for name in ("desk", "pi1"))
    remote = RemoteRing(nodes, "tcp://c:1", "tcp://w:1") if is_remote else None
    events: list[str] = []

    class StartingWorkers(LosingWorkers):
        async def open(self) -> None:
            events.append("nodes start")
            if is_remote:
                raise ModelError("none of ours")

    def open_model(options: RingOptions, _: object) -> None:
        events.append("model is opened")
        if not is_remote:
            raise ModelError("none of ours")

    monkeypatch.setattr(ring_host, "kind_of_workers", lambda _: StartingWorkers)
    monkeypatch.setattr(ring_host, "_open_model", open_model)
    with pytest.raises(ModelError, match="none of ours"):
        await RingHost(RingOptions(tiny, (LayerRange(0, 2), LayerRange(2, 4)), remote=remote)).__aenter__()
    assert events == (["model is opened", "nodes start"] if is_remote else ["nodes start", "model is opened"])


def _processes(model: Path, events: RingEvents) -> ProcessWorkers:
    """Return the Nodes of a ring of two."""
    options = RingOptions(model, (LayerRange(0, 2), LayerRange(2, 4)))
    return ProcessWorkers(options, b"the ring's key, of thirty bytes", events)


async def test_a_ring_watches_its_nodes_only_when_torch_is_imported(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watching() -> bool:
        return "coordinator" in {task.get_name() for task in asyncio.all_tasks()}

    async def join_and_load(stages: ProcessWorkers) -> dict[NodeId, control.Ready]:
        await asyncio.sleep(0)
        assert watching()
        return {NodeId("node-1"): control.Ready(1, 64, 1, 1, 1, ((1, 0.1),), ((1, 0.1),))}

    async def spawn(stages: ProcessWorkers, node: NodeId, i: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "cat", stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )

    monkeypatch.setattr(ProcessWorkers, "_spawn", spawn)
    monkeypatch.setattr(ProcessWorkers, "_join_and_load", join_and_load)
    stages = _processes(tiny, RingEvents())
    await stages.open()
    assert not watching()
    await stages.start("", PLAIN_WEIGHTS)
    await stages.aclose()


async def test_a_child_that_ends_is_the_loss_of_its_node(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: asyncio.Queue[MdiqError] = asyncio.Queue()

    async def spawn(stages: ProcessWorkers, node: NodeId, i: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *("sh", "-c", "read line; echo 'mdiq: no room for the model' >&2; exit 1"),
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    monkeypatch.setattr(ProcessWorkers, "_spawn", spawn)
    stages = _processes(tiny, RingEvents(on_lost=lost.put_nowait))
    await stages.open()
    starting = asyncio.create_task(stages.start("", PLAIN_WEIGHTS))
    await asyncio.sleep(0)
    with structlog.testing.capture_logs() as logs:
        for child in stages._children.values():
            assert child.stdin is not None
            child.stdin.write(b"go\n")
        async with asyncio.timeout(20):
            error = await lost.get()
            with pytest.raises(RingError, match="^node-1: no room for the model$"):
                await starting
    assert str(error) == "node-1: no room for the model"
    assert [line["node"] for line in logs if line["event"] == "node_lost"] == ["node-1"]
    await stages.aclose()
    assert lost.empty()


@pytest.mark.parametrize(
    ("error", "is_killed", "num_losses"),
    [
        (NodeDiedError("node-1: it lives, and has not got on with Begin"), True, 1),
        (EngineError("node-1: a bug in mdiq"), False, 1),  # it ends by itself
        (NodeDiedError("node-1: no heartbeat", is_silent=True), False, 2),  # it may have come back before it died
    ],
    ids=["stands still", "failed", "silent"],
)
async def test_a_child_of_no_use_is_one_loss_and_another_takes_its_place(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, error: MdiqError, is_killed: bool, num_losses: int
) -> None:
    lost: asyncio.Queue[MdiqError] = asyncio.Queue()
    children: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()
    node = NodeId("node-1")

    async def spawn(stages: ProcessWorkers, node: NodeId, i: int) -> asyncio.subprocess.Process:
        child = await asyncio.create_subprocess_exec(
            "cat", stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        stages._children[node] = child
        children.put_nowait(child)
        return child

    monkeypatch.setattr(ProcessWorkers, "_spawn", spawn)
    stages = _processes(tiny, RingEvents(on_lost=lost.put_nowait))
    await stages.open()
    stages._ready = {node: control.Ready(1, 64, 1, 1, 1, ((1, 0.1),), ((1, 0.1),))}  # it has served
    coordinator = stages._opened_coordinator
    async with asyncio.timeout(20):
        first = await children.get()
        coordinator._join(b"node-1", None, control.Hello(node, "tcp://127.0.0.1:1", first.pid, __version__))
        coordinator.lose(node, error)
        assert await lost.get() is error
        if not is_killed:
            assert first.returncode is None and first.stdin is not None
            first.stdin.close()
        await first.wait()
        await children.get()
    await stages.aclose()
    assert 1 + lost.qsize() == num_losses


def test_a_ring_that_is_never_entered_and_a_node_that_never_runs_hold_nothing_open(tiny: Path) -> None:
    def contexts() -> int:
        return sum(issubclass(type(it), zmq.Context) and not it.closed for it in gc.get_objects())

    layers = (LayerRange(0, 2), LayerRange(2, 4))
    nodes = (RemoteNode("desk", "tcp://10.0.0.1:5001", None), RemoteNode("pi1", "tcp://10.0.0.2:5002", None))
    before = contexts()
    made: list[object] = [
        RingHost(RingOptions(tiny, layers)),
        RingHost(RingOptions(tiny, layers, remote=RemoteRing(nodes, "tcp://c:1", "tcp://w:1"))),
        NodeProcess(NodeOptions("pi1", "tcp://127.0.0.1:1", "tcp://127.0.0.1:0", b"key")),
    ]
    assert len(made) == 3 and contexts() == before


async def test_the_starter_opens_its_model_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def noted(path: Path) -> Checkpoint:
        opened.append(path)
        return open_checkpoint(path)

    monkeypatch.setattr(starter_stage, "open_checkpoint", noted)
    monkeypatch.setattr(runner, "open_checkpoint", noted)
    async with RingHost(RingOptions(tiny, (LayerRange(0, 4),), kv_tokens=128)):
        assert opened == [tiny]


async def test_a_ring_that_loads_says_that_it_holds_nothing_yet(tiny: Path) -> None:
    held: list[int] = []
    ring = RingHost(
        RingOptions(tiny, (LayerRange(0, 4),), kv_tokens=128),
        on_loading=lambda *_: held.extend(figures.weight_bytes for figures in ring.figures()),
    )
    async with ring:
        assert set(held) == {0} and ring.figures()[0].weight_bytes > 0


async def test_a_loop_of_the_stages_that_fails_ends_the_ring_with_its_reason(tiny: Path) -> None:
    lost: asyncio.Queue[MdiqError] = asyncio.Queue()
    stages = _processes(tiny, RingEvents(on_lost=lost.put_nowait))

    async def fail() -> None:
        raise RuntimeError("a table is full")

    stages._loops.run(fail(), "coordinator")
    async with asyncio.timeout(20):
        error = await lost.get()
    assert isinstance(error, RingError) and "coordinator: RuntimeError('a table is full')" in str(error)
    await stages.aclose()


@pytest.mark.parametrize(
    ("listening", "says"),
    [
        (
            "tcp://0.0.0.0:5002",
            "desk to pi1: nothing that desk sends to tcp://10.0.0.2:5002 arrives there; see whether a",
        ),
        (
            "tcp://0.0.0.0:5009",
            "to tcp://10.0.0.2:5002, and pi1 listens on port 5009 by its copy of the topology; copy",
        ),
    ],
)
async def test_a_hop_that_nothing_crosses_is_named_with_its_address_and_what_to_look_at(
    tiny: Path, listening: str, says: str
) -> None:
    nodes = (RemoteNode("desk", "tcp://10.0.0.1:5001", None), RemoteNode("pi1", "tcp://10.0.0.2:5002", None))
    stages = RemoteWorkers(
        RingOptions(tiny, (LayerRange(0, 2), LayerRange(2, 4)), remote=RemoteRing(nodes, "tcp://c:1", "tcp://w:1")),
        b"the ring's key, of thirty bytes",
        RingEvents(),
    )
    stages._endpoints = [nodes[1].data_endpoint, nodes[0].data_endpoint]
    stages._listening = {"pi1": listening}
    assert says in stages.unreached(0)
    assert stages.unreached(1).startswith("pi1 to desk: nothing that pi1 sends to tcp://10.0.0.1:5001 arrives there")
    await stages.aclose()


async def test_a_stage_of_this_process_that_breaks_ends_the_ring_with_its_reason(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks = asyncio.Event()

    class BreakingStage(StageService):
        async def run(self) -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(super().run())
                await breaks.wait()
                raise KeyError("a row that nobody has")

    monkeypatch.setattr(stage_host, "StageService", BreakingStage)
    options = RingOptions(tiny, (LayerRange(0, 2), LayerRange(2, 4)), in_process=True, kv_tokens=128)
    async with RingHost(options) as ring, asyncio.timeout(20):
        breaks.set()
        error = await ring.until_lost()
    assert isinstance(error, RingError) and "a row that nobody has" in str(error)
