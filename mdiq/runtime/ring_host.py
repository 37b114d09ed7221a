"""A whole Ring: the Starter here, the other Nodes in child processes, in this process, or on other machines.

It opens (Nodes and model), loads (all Nodes at once), forms (epochs.py), and serves. Torch is imported in the worker's
thread, when the other Nodes have begun to start: they take as long for it.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from mdiq.core import control
from mdiq.core.hop_survey import HopLink
from mdiq.core.ring import RingProtocol
from mdiq.core.sequence import Sequence
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, NodeId, SeqId
from mdiq.engine.memory import return_free_memory, rss_bytes
from mdiq.errors import MdiqError, NodeDiedError, first_of
from mdiq.plan.measured import MeasuredRing
from mdiq.plan.pace import StageCost
from mdiq.runtime.epochs import Epochs
from mdiq.runtime.fetch_ahead import FetchAhead
from mdiq.runtime.kind_of_workers import kind_of_workers
from mdiq.runtime.loaded_ring import LoadedRing
from mdiq.runtime.loops import Supervisor, Worker, make_worker
from mdiq.runtime.options import HopFigures, NodeFigures, PaceFigures, RingOptions
from mdiq.runtime.recovery import QUICK_FETCH_S, Recovery
from mdiq.runtime.recovery_times import RecoveryTimes
from mdiq.runtime.serving_ring import ServingRing
from mdiq.runtime.starter_service import StarterService, StreamEvent
from mdiq.runtime.takeover import is_like, is_same_but_members, members_of
from mdiq.runtime.text_pipe import NoText, TextPipe
from mdiq.runtime.workers import RingEvents, Workers
from mdiq.telemetry.trace import Span, Tracer

if TYPE_CHECKING:
    from mdiq.engine.text.grammar import Grammars
    from mdiq.runtime.starter_stage import StarterStage


class RingHost:
    """A Ring to ``stream`` Sequences through; use it as an async context manager.

    make_pipe: gives each Sequence the TextPipe that turns its tokens into text.
    grammars: of Sequences that have one; None: there are none.
    on_loading: called with (node, done, total) while weights load.
    """

    def __init__(
        self,
        options: RingOptions,
        *,
        make_pipe: Callable[[Sequence], TextPipe] = lambda _: NoText(),
        on_loading: Callable[[str, int, int], None] = lambda *_: None,
        grammars: "Grammars | None" = None,
    ) -> None:
        self._options = options
        self._grammars = grammars
        self._name = options.node_names[0]
        self._make_pipe = make_pipe
        self._on_loading = on_loading
        self._tracer = Tracer(is_on=options.trace)
        self._worker = make_worker(time.monotonic, self._tracer, options.threads)
        self._ring_key = secrets.token_bytes(32)
        events = RingEvents(self._on_fault, self._on_lost, on_loading)
        self._workers: Workers = kind_of_workers(options)(options, self._ring_key, events)
        self._loops = Supervisor(self._on_lost)
        self._ring: ServingRing | None = None  # once its Layers are loaded
        self._service: StarterService | None = None
        self._recovery: Recovery | None = None  # once the Ring is formed
        self._ahead: FetchAhead | None = None
        self._loss: MdiqError | None = None
        self._is_lost = asyncio.Event()

    async def __aenter__(self) -> "RingHost":
        is_up = False
        try:
            await self._start_unless_lost()
            is_up = True
        finally:
            if not is_up:
                await self.aclose()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def stream(self, sequence: Sequence) -> AsyncGenerator[StreamEvent, None]:
        """Run a Sequence; see StarterService.stream."""
        return self.service.stream(sequence)

    @property
    def service(self) -> StarterService:
        """The Starter, for cancelling and for the ring protocol's figures."""
        assert self._service is not None  # __aenter__ has run
        return self._service

    @property
    def context_tokens(self) -> int:
        """Max tokens of one Sequence that context and KV cache hold."""
        return self._loaded.context_tokens

    @property
    def wire_check_nats(self) -> float | None:
        """What i8 would cost on the Hops that it was chosen for; None where it was not in question."""
        return self._loaded.epochs.wire_check_nats

    @property
    def is_survey(self) -> bool:
        """Whether this Ring only measures."""
        return self._options.is_survey

    @property
    def worker(self) -> Worker:
        """What computes here, for a watchdog."""
        return self._worker

    @property
    def missing(self) -> list[str]:
        """The Nodes that the Ring waits for, while it starts or pauses."""
        return self._workers.missing

    @property
    def options(self) -> RingOptions:
        """What the Ring is now."""
        return self._options if self._ring is None else self._ring.options

    @property
    def idle_here(self) -> list[str]:
        """The Nodes that stand by, and are here."""
        return self._workers.standing_by

    @property
    def at_hand(self) -> Mapping[str, frozenset[int]]:
        """The Layers that Nodes have on their disks, as far as is known."""
        return self._workers.at_hand

    @property
    def pauses(self) -> Collection[RecoveryTimes]:
        """The newest pauses."""
        return () if self._recovery is None else self._recovery.times

    @property
    def is_paused(self) -> bool:
        """Whether nothing enters the Ring, because of a Node that is gone, or of a change; what runs goes on later."""
        return self._recovery is not None and self._recovery.is_running

    @property
    def hop_trouble(self) -> str:
        """Which Hops carry nothing, in words; empty if all do."""
        return self._workers.hop_trouble

    async def change(self, options: RingOptions) -> None:
        """Serve with other Nodes or Layers from now on; what runs goes on there. See ``can_change_to``.

        Raises: see Recovery.change.
        """
        assert self._recovery is not None  # it serves
        await self._recovery.change(options)

    async def go_without(self, name: str) -> bool:
        """Have others take over from a Node that asks to leave; return whether they have. It may come back."""
        assert self._recovery is not None  # it serves
        return await self._recovery.go_without(name)

    async def replace_members(self, like: RingOptions) -> None:
        """Let in whom another Ring lets in, under its keys; other keys are cut off before this returns."""
        assert self._recovery is not None  # it serves
        await self._recovery.replace_members(like)

    def give_way(self) -> None:
        """Have a change that only gets ready be given up."""
        if self._ahead is not None:
            self._ahead.give_way()

    def can_change_to(self, options: RingOptions) -> bool:
        """Tell whether ``change`` is for another Ring: it differs in Layers and Nodes alone.

        Nodes that are not here are waited for while this one serves, unless one that serves is to be cut off.
        """
        now = self.options
        if self._recovery is None or not self._workers.can_change or not is_like(now, options):
            return False
        is_same = is_same_but_members(now, options) or is_same_but_members(self._recovery.planned, options)
        if (self._loaded.rounds or options.begins_rounding) and not is_same:
            return False
        # One that has another key may come back with it.
        cut_off = {*now.node_names} - {name for name, _ in members_of(options)}
        return not cut_off or not (self._loaded.absent(options) or (self.is_paused and cut_off - {*self.missing}))

    def silent(self, min_s: float) -> Mapping[str, float]:
        """Return the Nodes that have not been heard for so long, and for how long."""
        return self._workers.silent(min_s)

    async def until_leaving(self) -> str:
        """Wait until a Node asks to be drained; return its name."""
        return await self._workers.until_leaving()

    async def until_staying(self) -> None:
        """Wait until the Node that asked to be drained has been started again: it is in the Ring again."""
        await self._workers.until_staying()

    async def until_lost(self) -> MdiqError:
        """Wait until the Ring cannot serve any more; return why."""
        await self._is_lost.wait()
        assert self._loss is not None  # it is set with the event
        return self._loss

    async def drain(self) -> None:
        """Have the other Stages report for the last time and end; ``figures`` and ``spans`` are complete then."""
        await self._workers.drain()

    def figures(self) -> list[NodeFigures]:
        """Return what every Node did, in ring order, the Starter first."""
        workers, meter = self._workers, self._worker.meter
        bytes_in, bytes_out = self._ring.epochs.bytes_before if self._ring else (0, 0)
        own = NodeFigures(
            name=self._name,
            layers=self.options.layers[0],
            rss_bytes=rss_bytes(),
            weight_bytes=self._ring.loaded.stage.runner.weight_bytes if self._ring else 0,
            busy_s=meter.busy_s,
            waiting_s=meter.waiting_s,
            bytes_in=workers.source.bytes_in - bytes_in if workers.source else 0,
            bytes_out=workers.sink.bytes_out - bytes_out if workers.sink else 0,
            dropped=dict(meter.dropped),
            work=self._worker.work,
        )
        return [own, *workers.figures()]

    def pace(self) -> PaceFigures:
        """Return the pace of the most Sequences that were in the Ring at once, as it is planned now."""
        return self._loaded.pace()

    def hops(self) -> list[HopFigures]:
        """Return what every Hop is like, the one out of the Starter first; none in a Ring of one Node."""
        return self._loaded.hops()

    async def measured(self) -> MeasuredRing:
        """Return what the Nodes measured, for the planner; the head is measured now, between two Batches."""
        return await self._loaded.measured()

    async def measure_hops(self) -> tuple[HopLink | None, ...]:
        """Measure the Hops again while nothing runs; see Workers. Nothing if it was in vain."""
        if self.is_paused or self._workers.is_fetching:
            return ()
        return await self._loaded.epochs.measure_hops(self.service)

    def spans(self) -> Mapping[str, list[Span]]:
        """Return every Node's Spans, in ring order."""
        return {self._name: self._tracer.spans, **self._workers.spans()}

    async def aclose(self) -> None:
        """End the loops and the processes, and free what they held."""
        if self._recovery is not None:
            await self._recovery.aclose()
        await self._loops.aclose()
        await self._workers.aclose()
        await self._worker.aclose()
        if self._options.slowdown is not None:
            await self._options.slowdown.aclose()
        # The next Ring's Layers may need the room.
        self._options = self.options
        self._ring = self._service = self._recovery = None
        await asyncio.to_thread(return_free_memory, collect=True)

    @property
    def _loaded(self) -> ServingRing:
        assert self._ring is not None  # __aenter__ has run
        return self._ring

    async def _start_unless_lost(self) -> None:
        """Start; a Node that is lost meanwhile, or a loop that fails, ends that at once, whatever is waited for."""
        starting = asyncio.create_task(self._start(), name="start")
        losing = asyncio.create_task(self._is_lost.wait(), name="lost")
        try:
            await asyncio.wait({starting, losing}, return_when=asyncio.FIRST_COMPLETED)
            if self._loss is not None and not starting.done():
                raise self._loss
        finally:
            for task in (starting, losing):
                task.cancel()
            await asyncio.gather(starting, losing, return_exceptions=True)
        starting.result()

    async def _start(self) -> None:
        loaded = await self._load(await self._open())
        epochs = Epochs(self._options, loaded, self._workers, self._worker)
        self._service = service = self._make_service(loaded, epochs)
        on_loading = partial(self._on_loading, self._name)
        self._ring = ring = ServingRing(loaded, epochs, service, self._workers, self._worker, on_loading)
        self._loops.run(service.run(), "starter")
        await epochs.form(service)
        if not self._options.is_survey:
            tolerance_s = self._options.outages.tolerance_s
            self._ahead = ahead = FetchAhead(ring, self._workers)
            self._loops.run(ahead.run(), "fetch ahead")
            self._loops.run(epochs.watch_handling(service), "handling")
            self._recovery = Recovery(
                ring, self._workers, service, ahead, tolerance_s=tolerance_s, give_up=self._give_up
            )
            without = partial(ring.taken_over, max_fetch_s=QUICK_FETCH_S)
            self._loops.run(self._workers.guard_hops(service, without), "hop guard")

    async def _open(self) -> "StarterStage":
        """Have the Nodes start, and open the model."""
        is_remote = self._options.remote is not None
        if not is_remote:  # Nodes of other machines have torch already, and are kept waiting by ours
            await self._workers.open()
        stage = await self._worker.run_uncounted(partial(_open_model, self._options, self._grammars))
        if is_remote:
            await self._workers.open()
        return stage

    async def _load(self, stage: "StarterStage") -> LoadedRing:
        """Load all Nodes' Layers at once, then measure what they cost here."""
        options = self._options
        try:
            async with asyncio.TaskGroup() as tasks:
                on_loading = partial(self._on_loading, self._name)
                tasks.create_task(self._worker.run_long(stage.load, on_loading), name="load")
                starting = tasks.create_task(self._workers.start(stage.digest, stage.weights), name="workers")
        except* MdiqError as group:
            raise first_of(group) from None
        finally:
            stage.close()
        others = starting.result()
        stage.check_kinds(others)
        if options.slowdown is not None:  # after the start of the others: a child begins in its parent's control group
            options.slowdown.slow_node(self._name, os.getpid())
        own_cost = await self._worker.run_long(stage.measure)
        costs = [own_cost, *(StageCost.of(ready.decode_s, ready.prompt_s) for ready in others)]
        return LoadedRing(options, stage, others, costs)

    def _make_service(self, ring: LoadedRing, epochs: Epochs) -> StarterService:
        protocol, links = RingProtocol(self._options.ring), self._workers.links(ring.stage.runner.wire_limits)
        pipe, pace = self._make_pipe, epochs.plan_pace
        return StarterService(
            protocol, StageProtocol(), ring.stage.engine, links, self._worker, make_pipe=pipe, plan_pace=pace
        )

    def _on_fault(self, node: NodeId, fault: control.Fault) -> None:
        if self._service is None:
            return
        epoch, seq_ids = Epoch(fault.epoch), tuple(SeqId(seq_id) for seq_id in fault.seq_ids)
        if fault.reason == "gap":
            self._service.report_gaps(epoch, seq_ids)
        else:
            error = control.Failed(fault.reason, fault.text).as_error(node)
            self._service.report_failure(epoch, seq_ids, error)

    def _on_lost(self, error: MdiqError) -> None:
        # A loop of this process that has failed is no Node that cannot do what another Ring wants of it.
        is_of_node = error.node is not None or isinstance(error, NodeDiedError)
        if self._loss is None and is_of_node and self._recovery is not None and self._recovery.takes_on(error):
            return
        self._give_up(error)

    def _give_up(self, error: MdiqError) -> None:
        if self._loss is None:
            self._loss = error
            self._is_lost.set()
        if self._service is not None:
            self._service.fail_all(error)


def _open_model(options: RingOptions, grammars: "Grammars | None") -> "StarterStage":
    from mdiq.runtime.starter_stage import StarterStage

    return StarterStage(options, grammars)
