"""A Starter's keeper, its Nodes' services and their callers: the product's own code in one virtual-time loop.

Only what would need torch, files, threads or sockets is stood in for: engines are chains of hashes (tests/fakes.py),
weights come in a stated time, links are those of network.py.
"""

import asyncio
import contextvars
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import structlog
import zmq.asyncio

import mdiq
from mdiq.core import wire
from mdiq.core.control import CHECKSUM_KEY
from mdiq.core.logprobs import Drawn, TokenLogprob
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.types import PLAIN_WEIGHTS, LayerRange, RingSpec
from mdiq.errors import CapacityError, ConfigError, EngineError, MdiqError, SequenceError
from mdiq.plan.micro_batches import MicroBatches
from mdiq.plan.pace import StageCost
from mdiq.runtime import epochs, loops, node, remote, ring_host, stage_host
from mdiq.runtime.loops import Clock, Progress, Worker
from mdiq.runtime.node import NodeOptions
from mdiq.runtime.options import Outages, RemoteNode, RemoteRing, RingOptions, RingPeers, StandingBy
from mdiq.runtime.ring_host import RingHost
from mdiq.runtime.ring_keeper import Form, KeeperState, OnLoading, RingKeeper
from mdiq.service import replanning, worker
from mdiq.service.worker import NodeService
from mdiq.telemetry.trace import Tracer
from tests.fakes import VOCAB, ChainEngine, ChainStarter, chain_answer
from tests.virtual.clock import VirtualExecutor, VirtualTimeLoop
from tests.virtual.network import PROCESS, Network, Plane, Process, Transports, public_key

NUM_LAYERS = 6
STARTER = "desk"
JOIN_WAIT_S = 24 * 3600.0  # as the service has it
JOB_S = 0.005
KV_BLOCK_TOKENS = 4
LONG_JOB_S = 1.0  # loading, measuring
RESTART_S = 5.0  # a service manager's, after a failure
LIMITS = wire.WireLimits(max_width=4, max_context=512)
CHANNEL = Plane()
HOP = Plane(gap_s=0.008)  # a burst of the smallest Frames says how slow it is
_COST = ((1, 0.01), (16, 0.02))

Transport = type[Any]


class _VirtualWorker(Worker):
    """A Worker without a thread: jobs take JOB_S, long ones LONG_JOB_S, and forwards what the House says."""

    def __init__(self, house: "House", clock: Clock, tracer: Tracer) -> None:
        super().__init__(clock, tracer, loop_clock=lambda: 0.0)
        self._house = house
        self._next_job_s = JOB_S

    async def run(self, label: str, job: Callable[[], Any]) -> Any:
        if not label.startswith("head"):
            self._next_job_s = self._house.forward_s(int(label.split()[0]))
        return await super().run(label, job)

    async def _timed(self, job: Callable[[], Any]) -> tuple[Any, float, float]:
        executor: Any = self._executor
        executor.job_s, self._next_job_s = self._next_job_s, JOB_S
        job_s = executor.job_s
        result, _, stop_s = await super()._timed(job)
        return result, stop_s - job_s, stop_s

    async def run_long(self, job: Callable[[Progress], Any], on_progress: Progress = lambda *_: None) -> Any:
        for done in range(1, 5):
            await asyncio.sleep(LONG_JOB_S / 4)
            on_progress(done, 4)
        return await super().run_long(job, on_progress)


class _ChainRunner:
    """A StageRunner of the chain model, also the Starter's."""

    wire_limits = LIMITS
    kv_capacity_tokens = 4_096
    weight_bytes = 4_000_000  # minutes over these hops
    kv_bytes_per_token = 1
    kv_tokens_in_use = 0
    config = SimpleNamespace(context_tokens=256, hidden_size=4, num_layers=NUM_LAYERS, vocab_size=VOCAB, head_layers=0)

    def __init__(self, house: "House", engine: ChainEngine) -> None:
        self._house = house
        self._engine = engine
        self._machine = PROCESS.get().machine

    def forward(self, batch: Any) -> Any:
        if self._machine in self._house.breaks:
            self._house.breaks.discard(self._machine)
            raise EngineError("a sum is not a number")
        if self._machine in self._house.refuses and len(batch.segments) > 1:
            self._house.refuses.discard(self._machine)
            raise SequenceError("a token that the model does not have", (batch.segments[0].seq_id,))
        if self._machine in self._house.kills:
            self._house.loop.call_soon(self._house.dies, self._machine)
        return self._engine.forward(batch)

    def reset(self) -> None:
        self._engine.reset()

    def set_wire(self, _: str | None) -> None:
        """Chain rows are f32."""

    def lacks(self, layers: LayerRange) -> list[int]:
        return [layer for layer in layers if layer not in self._engine._layers]

    def reshape(self, _: Any, layers: LayerRange, *, is_last: bool, progress: Progress, **__: Any) -> None:
        progress(1, 1)
        if (error := self._house.has_no_room.pop(self._machine, None)) is not None:
            raise error
        self._engine = type(self._engine)(layers, is_last=is_last)


class _ChainStarterRunner(_ChainRunner):
    """The Starter's: its KV cache is as large as it is told, else as the house says, and no larger."""

    _engine: ChainStarter

    def shape(self, options: RingOptions) -> None:
        self.kv_capacity_tokens = options.kv_tokens or self._house.kv_tokens
        self._engine = ChainStarter(
            options.layers[0],
            is_last=options.num_nodes == 1,
            kv_tokens=self.kv_capacity_tokens,
            block_tokens=KV_BLOCK_TOKENS,
        )

    def sample(self, rows: Any, sequences: Any) -> list[Drawn]:
        return self._engine.sample(rows, sequences)

    def score(self, rows: Any, sequence: Any, start: int) -> list[TokenLogprob]:
        return self._engine.score(rows, sequence, start)


class _ChainStage:
    """A StarterStage of the chain model."""

    digest = "d1" * 32
    weights = PLAIN_WEIGHTS
    cpu = "a cpu"

    def __init__(self, house: "House", options: RingOptions, _: object) -> None:
        self._house = house
        self._options = options
        self.runner = self.engine = _ChainStarterRunner(house, ChainStarter(options.layers[0], is_last=False))
        self.runner.shape(options)

    def load(self, progress: Progress) -> None:
        progress(1, 1)

    def reshape(self, options: RingOptions, progress: Progress) -> None:
        self._options = options
        self.runner.reshape(None, options.layers[0], is_last=options.num_nodes == 1, progress=progress)
        self.runner.shape(options)

    def memory(self) -> tuple[int, int]:
        return self._house.free_bytes, 1

    def close(self) -> None:
        """Nothing is open."""

    def measure(self, progress: Progress) -> StageCost:
        return StageCost.of(_COST, _COST)

    def measure_head(self, progress: Progress) -> None:
        """Nothing to measure."""

    def measured(self, *_: Any) -> str:
        return "what was measured"

    def check_kinds(self, others: Any) -> None:
        """All are of one kind."""

    def spec(self, others: Any) -> RingSpec:
        kv_tokens = min([self.runner.kv_capacity_tokens, *(ready.kv_tokens for ready in others)])
        return RingSpec(self._options.num_nodes, kv_tokens, context_tokens=256, kv_block_tokens=KV_BLOCK_TOKENS)


def _paced(spec: RingSpec, *_: Any) -> tuple[RingSpec, MicroBatches]:
    caps = (1, 1, 2, 4)
    planned = RingSpec(spec.num_stages, spec.kv_tokens, spec.context_tokens, caps, spec.kv_block_tokens, max_live=8)
    return planned, MicroBatches(caps * 2, (1,) * 8, (10.0,) * 8, 8)


class PlansOfHouse(replanning.Plans, Protocol):
    """Plans of the Nodes of a House. split: the Layers that each is to have now."""

    split: Mapping[str, int]

    def note_formed(self) -> None:
        """Plan with what the Ring has measured of itself."""

    def note_not_changed(self) -> None:
        """Plan as before: the Ring could not change."""


class Answer:
    """What came of one request."""

    def __init__(self, number: int, sequence: Sequence, starter: Process) -> None:
        self.number = number
        self.starter = starter
        self.has_left = False
        self.sequence = sequence
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self.error: BaseException | None = None
        self.asked_s = self.ended_s = 0.0

    def check(self) -> None:
        """See that it was answered as a single process would, or ended with an error that says why."""
        right = chain_answer(self.sequence.prompt, NUM_LAYERS, self.sequence.params.max_tokens)
        assert self.tokens == right[: len(self.tokens)], f"request {self.number}: {self.tokens} is not {right}"
        if self.error is None:
            assert self.reason is FinishReason.LENGTH and len(self.tokens) == len(right), f"request {self.number}"
        else:
            assert isinstance(self.error, MdiqError) and str(self.error), f"request {self.number}: {self.error!r}"


class House:
    """The machines, what runs on them, and what their operator does. num_nodes: beside the Starter.

    events: what happened when, for those who read a schedule that failed.
    """

    def __init__(
        self,
        loop: VirtualTimeLoop,
        num_nodes: int,
        *,
        seed: int = 0,
        control_plane: Plane = CHANNEL,
        data_plane: Plane = HOP,
        is_measured: bool = True,
        skews_s: tuple[float, ...] = (),
        lap_s: float = 60.0,
        outages: Outages | None = None,
        num_spares: int = 0,
    ) -> None:
        self.loop = loop
        self.rng = random.Random(seed)
        self.network = Network(loop, self.rng, control_plane, data_plane)
        self.spares = [f"spare{i}" for i in range(1, num_spares + 1)]
        self.names = [f"pi{i}" for i in range(1, num_nodes + 1)] + self.spares
        self.skews_s = dict(zip(self.names, skews_s, strict=False))
        self._lap_s = lap_s
        self._outages = outages or Outages()
        self.is_measured = is_measured
        self.revoked: set[str] = set()
        self.num_keys: dict[str, int] = {}  # that Nodes have had before the one in the topology
        self.swaps: dict[str, str] = {}  # Nodes that have the key which was another one's
        self.cannot_load: dict[str, MdiqError] = {}  # the next time
        self.stands_still: set[str] = set()  # with its next load, though it is heard
        self.has_no_room: dict[str, MdiqError] = {}  # for other Layers, the next time
        self.free_bytes = 1 << 30  # on every machine; 0: nobody can take over
        self.disks: dict[str, set[int]] = {name: set() for name in self.names}  # Layers that Nodes have on theirs
        self.keeps_standby_layers = False
        self.full_disks: set[str] = set()
        self.breaks: set[str] = set()  # whose next forward fails
        self.refuses: set[str] = set()  # whose next forward of several Segments refuses the first
        self.kills: set[str] = set()  # who dies whenever it computes
        self.kv_tokens = 4_096  # that the Starter's KV cache has room for, where it chooses by itself
        self.wires: tuple[str, ...] = ("f32",)  # of the topology; what travels is f32
        self.versions: dict[str, str] = {}  # of mdiq, where a machine has another one
        self.fetch_s = 1.0
        self.layer_s: dict[str, Callable[[float], float]] = {}  # seconds of a Segment, by machine and time
        self.plans: PlansOfHouse | None = None  # that decide the Layers; None: all have as many
        self.events: list[tuple[float, str]] = []
        self.answers: list[Answer] = []
        self.callers: dict[asyncio.Task[None], Process] = {}
        self.starter = Process(STARTER)
        self.keeper: RingKeeper | None = None
        self.states: list[KeeperState] = []
        self.rings: list[_NotedRing] = []
        self.log: list[MutableMapping[str, Any]] = []
        self._mains: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, Process] = {}
        self._services: dict[str, NodeService] = {}
        self._beside: set[asyncio.Task[Any]] = set()
        self._tasks: dict[Process, weakref.WeakSet[asyncio.Task[Any]]] = {}
        loop.set_task_factory(self._make_task)

    # What an operator and the world do.

    def start(self) -> None:
        for name in self.names:
            self.start_node(name)
        self.start_starter()

    def fill_disks(self) -> None:
        """Have every Node have all Layers on its disk."""
        for disk in self.disks.values():
            disk.update(range(NUM_LAYERS))

    def note(self, what: str) -> None:
        self.events.append((round(self.loop.time(), 3), what))

    def start_starter(self) -> None:
        self.note("the starter starts")
        self.starter = Process(STARTER)
        self._mains[STARTER] = self._spawn(self._keep(), self.starter, STARTER)

    async def kill_starter(self) -> None:
        self.note("the starter is killed")
        await self._kill(STARTER, self.starter)
        for task in self._beside:
            task.cancel()
        callers = [task for task, process in self.callers.items() if process is self.starter]
        for task in callers:  # they were connected to it
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)

    def start_node(self, name: str) -> None:
        self.note(f"{name} starts")
        process = self._processes[name] = Process(name, self.skews_s.get(name, 0.0))
        self._mains[name] = self._spawn(self._serve_node(name, process), process, name)

    async def kill(self, name: str) -> None:
        """End a Node's process as a power cut does: it says nothing more."""
        self.note(f"{name} is killed")
        self._processes[name].is_silent = True
        await self._kill(name, self._processes[name])

    def dies(self, name: str) -> None:
        """Have a Node's process crash by itself."""
        if self.is_up(name):
            self._beside.add(self._spawn(self.crash(name), self.starter, f"{name} dies"))

    async def stop(self, name: str) -> None:
        """Have a Node's service end at once, as a second signal does."""
        self.note(f"{name} is stopped")
        node = self._services[name]._process
        if node is not None:
            await self._spawn(node.leave(), self._processes[name], f"{name} stops")
        await self._kill(name, self._processes[name])

    async def crash(self, name: str) -> None:
        """End a Node's process alone: its machine closes its connections."""
        self.note(f"{name} crashes")
        await self._kill(name, self._processes[name])

    def fails(self, name: str, error: MdiqError) -> None:
        """Have a loop of a Node fail, which ends its part in the Ring; nothing if it has none."""
        service = self._services.get(name)
        if service is not None and service._process is not None:
            service._process._on_failed(error)

    async def leave(self, name: str) -> None:
        """Have a Node's service end, as a service manager does."""
        self.note(f"{name} is to leave")
        process = self._processes[name]
        if (service := self._services.get(name)) is not None:
            leaving = self._spawn(service._leave(), process, f"{name} leaves")
            await asyncio.wait({leaving})
            if not leaving.cancelled():  # its process may die meanwhile
                leaving.result()
        await self._kill(name, process)

    def is_up(self, name: str) -> bool:
        return self._processes[name].is_alive

    def forward_s(self, num_segments: int) -> float:
        """Return the seconds of a forward on the machine that asks, with the Layers that it has now."""
        machine = PROCESS.get().machine
        if machine not in self.layer_s:
            return JOB_S
        options = self.rings[-1].options
        num_layers = len(options.layers[options.node_names.index(machine)])
        return num_segments * num_layers * self.layer_s[machine](self.loop.time())

    @property
    def is_starter_up(self) -> bool:
        return self.keeper is not None and self.starter.is_alive

    @property
    def is_serving(self) -> bool:
        return self.keeper is not None and self.starter.is_alive and self.keeper.state.is_serving

    def reload(self) -> None:
        """Have the Starter read its topology again."""
        if self.keeper is not None and self.starter.is_alive:
            self._beside.add(self._spawn(self._answered(self.keeper.reload()), self.starter, "reload"))

    def rotate(self, name: str) -> None:
        """Give a Node another key, in its key file and in everyone's topology; who runs has to read them again."""
        self.num_keys[name] = self.num_keys.get(name, 0) + 1

    async def reload_node(self, name: str) -> None:
        """Have a Node's service read its files again."""
        await self._spawn(self._services[name]._reload(), self._processes[name], f"{name} reloads")

    def drain(self, name: str, *, undo: bool = False) -> None:
        if self.keeper is not None and self.starter.is_alive:
            work = self.keeper.drain_node(name, undo=undo)
            self._beside.add(self._spawn(self._answered(work), self.starter, f"drain {name}"))

    def story(self) -> list[tuple[float, str]]:
        """Return all that happened, with the log, in order of time."""
        lines = [
            (line.pop("at_s", 0.0), f"    {line.pop('machine', '')}: {line.pop('event')} {dict(line)}")
            for line in map(dict, self.log)
        ]
        return sorted([*self.events, *lines], key=lambda line: line[0])

    def ask(self, *, max_tokens: int = 8, leaves_after: int | None = None) -> Answer:
        """Have a caller ask the Ring; leaves_after: so many tokens."""
        number = len(self.answers)
        prompt = tuple((number * 7 + i * 3) % VOCAB for i in range(1 + number % 9))
        answer = Answer(number, Sequence(number, prompt, SamplingParams(max_tokens=max_tokens)), self.starter)
        self.answers.append(answer)
        task = self._spawn(self._call(answer, leaves_after), self.starter, f"caller {number}")
        self.callers[task] = self.starter
        return answer

    async def serving(self, within_s: float) -> None:
        """Wait until the Ring serves.

        Raises:
            AssertionError: it does not within so many seconds.
        """
        deadline_s = self.loop.time() + within_s
        while self.keeper is None or not self.keeper.state.is_serving:
            state = "nothing" if self.keeper is None else f"{self.keeper.describe()} ({self.keeper.last_error})"
            assert self.loop.time() < deadline_s, f"no ring within {within_s:g} s: {state}"
            self._check_mains()
            await asyncio.sleep(0.25)

    async def answered(self, within_s: float) -> None:
        """Wait until every caller has been answered."""
        waiting = [task for task in self.callers if not task.done()]
        if waiting:
            _, left = await asyncio.wait(waiting, timeout=within_s)
            assert not left, f"not answered within {within_s:g} s: {', '.join(task.get_name() for task in left)}"

    async def close(self) -> None:
        """End everything in order."""
        for task in self._beside:  # what an operator asks for may fail; this runs as long as the service
            is_over = task.get_name() == "replanning" and task.done() and not task.cancelled()
            if is_over and (error := task.exception()) is not None:
                raise AssertionError(f"{task.get_name()} has ended: {error!r}") from error
        for task in (*self.callers, *self._beside):
            task.cancel()
        await asyncio.gather(*self.callers, *self._beside, return_exceptions=True)
        for name, task in reversed(self._mains.items()):  # the Starter first, as it came last
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled() or task.exception() is None, f"{name}: {task.exception()!r}"

    def check_counts(self) -> None:
        """See that the Starter counts its requests as their callers saw them end; all have ended."""
        assert self.keeper is not None
        counts = self.keeper.status()["requests"]
        seen = [answer for answer in self.answers if answer.starter is self.starter]
        done, left = sum(answer.error is None for answer in seen), sum(answer.has_left for answer in seen)
        assert (counts["running"], counts["done"], counts["left"]) == (0, done, left), counts

    def check(self) -> None:
        """See what holds of every schedule, however it went."""
        for answer in self.answers:
            answer.check()

    def _check_mains(self) -> None:
        for name, task in self._mains.items():
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise AssertionError(f"{name} has ended: {error!r}") from error

    # What the machines run.

    async def _keep(self) -> None:
        self.keeper = keeper = RingKeeper(
            self._read,
            self._open_ring,
            clock=time.monotonic,
            on_state=self.states.append,
            on_formed=self._formed,
            on_not_changed=lambda _: self.plans.note_not_changed() if self.plans else None,
        )
        if self.plans is not None:
            watch = replanning.Replanning(keeper, lambda: self.plans, clock=time.monotonic)
            self._beside.add(self._spawn(watch.run(), self.starter, "replanning"))
        await keeper.run()

    def _read(self) -> Form:
        names = [name for name in self.names if name not in self.revoked]

        def form(drained: frozenset[str]) -> RingOptions:
            if STARTER in drained:
                raise ConfigError(f"{STARTER}: it is the Starter")
            spares = [name for name in self.spares if name in names and name not in drained]
            if self.plans is not None:
                spares += [name for name in names if name not in {*self.plans.split, *spares, *drained}]
            nodes = [self._remote_node(name) for name in (STARTER, *names) if name not in {*drained, *spares}]
            cuts = [NUM_LAYERS * i // len(nodes) for i in range(len(nodes) + 1)]
            if self.plans is not None:
                cuts = [0, *accumulate(self.plans.split[node.name] for node in nodes)]
            layers = tuple(LayerRange(*cut) for cut in zip(cuts, cuts[1:], strict=False))
            idle = tuple(
                StandingBy(name, self._public(name), "it is drained" if name in drained else "it is a spare")
                for name in names
                if name in {*drained, *spares}
            )
            ring = RemoteRing(
                tuple(nodes),
                "tcp://127.0.0.1:7000",
                "tcp://127.0.0.1:7001",
                secret=self._secret(STARTER),
                join_wait_s=JOIN_WAIT_S,
                standing_by=idle,
                spares=tuple(map(self._remote_node, spares)),
            )
            return RingOptions(
                Path("model.gguf"),
                layers,
                PLAIN_WEIGHTS,
                self.wires,
                remote=ring,
                outages=self._outages,
                is_survey=not self.is_measured,
                ring=RingSettings(lap_timeout_s=self._lap_s),
            )

        return form

    def _open_ring(self, options: RingOptions, on_loading: OnLoading) -> RingHost:
        for before in self.rings[-1:]:
            assert before.is_closed or not before.process.is_alive, "two rings at once"
        ring = _NotedRing(self, options, on_loading=on_loading)
        self.rings.append(ring)
        return ring

    async def _formed(self, ring: RingHost) -> None:
        await ring.measured()
        self.is_measured = True
        if self.plans is not None:
            self.plans.note_formed()

    async def _serve_node(self, name: str, process: Process) -> None:
        """Run a Node's service, and start it again when it fails, as a service manager does."""
        while True:
            notifier: Any = SimpleNamespace(**_NOTIFIER)
            options = partial(self._node_options, name)
            self._services[name] = service = NodeService(options, notifier, once=False)
            try:
                await service._rings()
                return
            except (MdiqError, ExceptionGroup) as error:
                self.note(f"{name} fails: {error!r}")
            await asyncio.sleep(RESTART_S)

    def _node_options(self, name: str) -> NodeOptions:
        nodes = tuple(self._remote_node(each) for each in (STARTER, *self.names))
        peers = RingPeers(nodes, "tcp://127.0.0.1:7001", self._secret(name))
        listen = next(node.data_endpoint for node in nodes if node.name == name)
        return NodeOptions(name, "tcp://127.0.0.1:7000", listen, CHECKSUM_KEY, peers=peers)

    def _secret(self, name: str) -> bytes:
        return f"secret {self.swaps.get(name, name)} {self.num_keys.get(name, 0)}".encode()

    def _public(self, name: str) -> str:
        return public_key(self._secret(name))

    def _remote_node(self, name: str) -> RemoteNode:
        port = 7002 + (STARTER, *self.names).index(name)
        endpoint = f"tcp://127.0.0.1:{port}"
        return RemoteNode(name, endpoint, self._public(name), keeps_standby_layers=self.keeps_standby_layers)

    async def _call(self, answer: Answer, leaves_after: int | None) -> None:
        answer.asked_s = self.loop.time()
        keeper = self.keeper
        assert keeper is not None
        events = keeper.stream(answer.sequence)
        try:
            async for event in events:
                if event.step.token is not None:
                    answer.tokens.append(event.step.token)
                answer.reason, answer.error = event.step.finish_reason, event.step.error
                if leaves_after is not None and len(answer.tokens) >= leaves_after:
                    answer.error, answer.has_left = MdiqError("the caller left"), True
                    break
        except MdiqError as error:
            answer.error = error
        except asyncio.CancelledError:
            answer.error = MdiqError("its starter died, or the schedule ended")
            raise
        finally:
            await events.aclose()
            answer.ended_s = self.loop.time()

    async def _answered(self, work: Awaitable[Any]) -> None:
        try:
            self.note(f"{await work}")
        except MdiqError as error:
            self.note(f"refused: {error}")

    async def _kill(self, name: str, process: Process) -> None:
        self.network.kill(process)
        main = self._mains[name]
        main.cancel()
        await asyncio.gather(main, return_exceptions=True)
        left = [task for task in self._tasks.pop(process, ()) if not task.done()]  # it was about to end
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _make_task(self, loop: Any, work: Any, context: contextvars.Context | None = None) -> "asyncio.Task[Any]":
        task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, context=context)
        process = PROCESS.get(None) if context is None else context.get(PROCESS)
        if process is not None:
            self._tasks.setdefault(process, weakref.WeakSet()).add(task)
        return task

    def _spawn(self, work: Coroutine[Any, Any, Any], process: Process, name: str) -> "asyncio.Task[Any]":
        context = contextvars.copy_context()
        context.run(PROCESS.set, process)
        return self.loop.create_task(work, name=name, context=context)

    def _stamp(self, _: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        process = PROCESS.get(None)
        return {**line, "at_s": self.loop.time(), "machine": process.machine if process else "?"}

    # What is stood in for.

    async def _fetch(self, *where: Any, progress: Progress, **__: Any) -> Any:
        machine, layers = PROCESS.get().machine, where[-1]
        for layer in sorted({*layers} - self.disks[machine]):
            await asyncio.sleep(self.fetch_s / len(layers))
            if machine in self.full_disks:
                raise CapacityError("no space left for weights")
            self.disks[machine].add(layer)
            progress(layer, layers.stop)
        if machine in self.stands_still:
            self.stands_still.discard(machine)
            self.note(f"{machine} stands still")
            await asyncio.Event().wait()
        if (error := self.cannot_load.pop(PROCESS.get().machine, None)) is not None:
            self.note(f"{PROCESS.get().machine} cannot load")
            raise error
        return SimpleNamespace(
            num_fetched=1, num_bytes=1, num_mended=0, paths=dict.fromkeys(layers, Path("layer")), in_use=None
        )

    def _load(
        self, _: Any, layers: LayerRange, *, is_last: bool, progress: Progress = lambda *_: None, **__: Any
    ) -> _ChainRunner:
        progress(1, 1)
        return _ChainRunner(self, ChainEngine(layers, is_last=is_last))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the product's modules use this house's clock, network and engines."""
        transports = Transports(self.network)
        executor = partial(VirtualExecutor, self.loop, JOB_S)
        with ExitStack() as stack:

            def put(where: Any, name: str, what: Any) -> None:
                stack.enter_context(mock.patch.object(where, name, what))

            put(zmq.asyncio, "Context", lambda: SimpleNamespace(term=lambda: None))
            put(time, "monotonic", lambda: self.loop.time() + _skew_s())
            put(loops, "ThreadPoolExecutor", lambda *_, **__: executor())
            for name in transports.names:
                for module in (node, remote):
                    if hasattr(module, name):
                        put(module, name, transports.of(name))
            for module in (node, ring_host):
                put(module, "make_worker", lambda clock, tracer, _: _VirtualWorker(self, clock, tracer))
            for module in (ring_host, worker):
                put(module, "return_free_memory", lambda **_: None)
            put(ring_host, "_open_model", partial(_ChainStage, self))
            put(ring_host, "rss_bytes", lambda: 1)
            put(stage_host, "rss_bytes", lambda: 1)
            put(stage_host, "choose_device", lambda _: None)
            put(stage_host, "free_bytes", lambda _: self.free_bytes)
            put(stage_host, "kind_of", lambda _: "a cpu")
            put(stage_host, "reset_peak", lambda: False)
            put(stage_host, "StageRunner", SimpleNamespace(load=self._load))
            put(stage_host, "measure_cost", lambda *_, **__: StageCost.of(_COST, _COST))
            put(epochs, "paced", _paced)
            put(node, "mdiq", _Installed(self))
            put(node, "fetch_weights", self._fetch)
            put(node, "LayerFiles", lambda *_: Path("layers"))
            put(node, "stored_layers", lambda _: tuple(sorted(self.disks[PROCESS.get().machine])))
            put(stage_host, "return_free_memory", lambda **_: None)
            put(remote.RemoteWorkers, "_serve_weights", _serve_no_weights)
            with structlog.testing.capture_logs(processors=[self._stamp]) as self.log:
                yield


class _NotedRing(RingHost):
    """A RingHost that tells when it is closed."""

    def __init__(self, house: House, options: RingOptions, *, on_loading: OnLoading) -> None:
        super().__init__(options, on_loading=on_loading)
        self.is_closed = False
        self.process = house.starter

    async def aclose(self) -> None:
        await super().aclose()
        self.is_closed = True


class _Installed:
    """The package, as a machine has it."""

    def __init__(self, house: House) -> None:
        self._house = house

    @property
    def __version__(self) -> str:
        return self._house.versions.get(PROCESS.get().machine, mdiq.__version__)


_NOTIFIER: dict[str, Callable[..., None]] = {
    name: lambda *_: None for name in ("starting", "ready", "status", "stopping", "reloading", "reloaded")
}


async def _serve_no_weights(*_: Any) -> None:
    """Weights come from nowhere; see House._fetch."""


def _skew_s() -> float:
    process = PROCESS.get(None)
    return 0.0 if process is None else process.skew_s


def no_memory(name: str) -> MdiqError:
    """What a Node says that cannot load."""
    return CapacityError(f"{name} has no memory for its layers")
