"""A whole Ring: the Starter here, the other Stages in child processes, in this process, or on other machines.

Torch is imported in the worker's thread, when the other Nodes have begun to start: they take as long for it.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import structlog

from mdiq.control.coordinator import error_from
from mdiq.core import control
from mdiq.core.hop_survey import HopLink
from mdiq.core.ring import RingProtocol
from mdiq.core.sequence import Sequence
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, NodeId, RingSpec, SeqId
from mdiq.core.wire import hop_key
from mdiq.core.wire_formats import AUTO, USUAL
from mdiq.engine.memory import return_free_memory, rss_bytes
from mdiq.errors import MdiqError, first_of
from mdiq.plan.measured import MeasuredRing
from mdiq.plan.micro_batches import MicroBatches
from mdiq.plan.pace import StageCost, paced
from mdiq.plan.wire_choice import WireCosts, choose_wires
from mdiq.runtime.in_process import InProcessWorkers
from mdiq.runtime.link_survey import survey_hops
from mdiq.runtime.loops import Worker, loop_failed, make_worker
from mdiq.runtime.options import HopFigures, NodeFigures, PaceFigures, RingOptions, StandingBy
from mdiq.runtime.processes import ProcessWorkers
from mdiq.runtime.remote import RemoteWorkers
from mdiq.runtime.socket_workers import SocketWorkers
from mdiq.runtime.starter_service import NoText, StarterService, StreamEvent, TextPipe
from mdiq.telemetry.trace import Span, Tracer

if TYPE_CHECKING:
    from mdiq.runtime.starter_stage import StarterStage

log = structlog.get_logger()

FIRST_EPOCH = Epoch(1)  # in which Nodes load and Hops are measured
LOOPBACK_HOP_S = 2e-4  # until the first probe is back: a frame over loopback, both event loops included


class RingHost:
    """A Ring to ``stream`` Sequences through; use it as an async context manager.

    make_pipe: gives each Sequence the TextPipe that turns its tokens into text.
    on_loading: called with (node, done, total) while weights load.
    wire_check_nats: what i8 would cost on the Hops that it was chosen for; None where it was not in question.
    """

    def __init__(
        self,
        options: RingOptions,
        *,
        make_pipe: Callable[[Sequence], TextPipe] = lambda _: NoText(),
        on_loading: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        self._options = options
        self._name = options.node_names[0]
        self._make_pipe = make_pipe
        self._on_loading = on_loading
        self._clock = time.monotonic
        self._tracer = Tracer(is_on=options.trace)
        self._worker = make_worker(self._clock, self._tracer, options.threads)
        self._ring_key = secrets.token_bytes(32)
        self._stages: SocketWorkers | InProcessWorkers | None = None
        self._stage: StarterStage | None = None  # once it is loaded
        self._service: StarterService | None = None
        self._serving: asyncio.Task[None] | None = None
        self._spec: RingSpec | None = None
        self._costs: list[StageCost] = []
        self._ready: list[control.Ready] = []  # of the others
        self._micro_batches: MicroBatches | None = None
        self._epoch = FIRST_EPOCH
        self._links: tuple[HopLink | None, ...] = ()
        self._wires: tuple[str, ...] = ()
        self._bytes_before = (0, 0)  # in and out, when the Ring began to serve
        self._loss: MdiqError | None = None
        self._is_lost = asyncio.Event()
        self.wire_check_nats: float | None = None

    async def __aenter__(self) -> "RingHost":
        try:
            await self._start_unless_lost()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def stream(self, sequence: Sequence) -> AsyncGenerator[StreamEvent, None]:
        """Run a Sequence; see StarterService.stream."""
        assert self._service is not None  # __aenter__ has run
        return self._service.stream(sequence)

    @property
    def service(self) -> StarterService:
        """The Starter, for cancelling and for the ring protocol's figures."""
        assert self._service is not None  # __aenter__ has run
        return self._service

    @property
    def context_tokens(self) -> int:
        """Most tokens of one Sequence that context and KV cache hold."""
        assert self._spec is not None  # __aenter__ has run
        return self._spec.max_tokens

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
        """The Nodes that the Ring waits for, while it starts."""
        return self._stages.missing if isinstance(self._stages, SocketWorkers) else []

    def silent(self, min_s: float) -> Mapping[str, float]:
        """Return the Nodes that have not been heard for so long, and for how long."""
        return self._stages.silent(min_s) if isinstance(self._stages, SocketWorkers) else {}

    async def until_leaving(self) -> str:
        """Wait until a Node asks to be drained; return its name."""
        if isinstance(self._stages, SocketWorkers):
            return await self._stages.until_leaving()
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async def replace_standing_by(self, nodes: tuple[StandingBy, ...]) -> None:
        """Have these Nodes stand by, in place of those that did; others lose their connections."""
        if isinstance(self._stages, RemoteWorkers):
            await self._stages.replace_standing_by(nodes)

    async def until_lost(self) -> MdiqError:
        """Wait until the Ring cannot serve any more; return why."""
        await self._is_lost.wait()
        assert self._loss is not None  # it is set with the event
        return self._loss

    async def drain(self) -> None:
        """Have the other Stages report for the last time and end; ``figures`` and ``spans`` are complete then."""
        if self._stages is not None:
            await self._stages.drain()

    def figures(self) -> list[NodeFigures]:
        """Return what every Node did, in ring order, the Starter first."""
        stages, meter, (bytes_in, bytes_out) = self._stages, self._worker.meter, self._bytes_before
        own = NodeFigures(
            name=self._name,
            layers=self._options.layers[0],
            rss_bytes=rss_bytes(),
            weight_bytes=self._stage.runner.weight_bytes if self._stage else 0,
            busy_s=meter.busy_s,
            waiting_s=meter.waiting_s,
            bytes_in=stages.source.bytes_in - bytes_in if stages and stages.source else 0,
            bytes_out=stages.sink.bytes_out - bytes_out if stages and stages.sink else 0,
            dropped=dict(meter.dropped),
        )
        return [own, *(stages.figures() if stages else [])]

    def pace(self) -> PaceFigures:
        """Return the pace of the most Sequences that were in the Ring at once, as it is planned now."""
        assert self._spec is not None and self._micro_batches is not None  # __aenter__ has run
        ring = self.service.ring
        num_live = max(ring.peak_live, 1)
        return PaceFigures(
            num_live=ring.peak_live,
            in_flight=self._micro_batches.in_flight[num_live - 1],
            cap=self._spec.cap(num_live),
            hops_s=self.service.hops_s,
            predicted_tokens_per_s=self._micro_batches.rates[num_live - 1],
            chunk_tokens=self._spec.shared_chunk(num_live),
            decode_gap_s=ring.decode_gap_s,
        )

    def hops(self) -> list[HopFigures]:
        """Return what every Hop is like, the one out of the Starter first; none in a Ring of one Node."""
        links = self._links or (None,) * len(self._wires)
        return [
            HopFigures(wire, None, None) if link is None else HopFigures(wire, link.delay_s, link.bytes_per_s)
            for wire, link in zip(self._wires, links, strict=True)
        ]

    async def measured(self) -> MeasuredRing:
        """Return what the Nodes measured, for the planner; the head is measured now, between two Batches."""
        stage = self._stage
        assert stage is not None  # __aenter__ has run
        head = await self._worker.run_long(stage.measure_head)
        return stage.measured(self._costs, self._ready, head, tuple(zip(self._wires, self._links, strict=False)))

    def spans(self) -> Mapping[str, list[Span]]:
        """Return every Node's Spans, in ring order."""
        return {self._name: self._tracer.spans, **(self._stages.spans() if self._stages else {})}

    async def aclose(self) -> None:
        """End the loops and the processes, and free what they held."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        if self._stages is not None:
            await self._stages.aclose()
        await self._worker.aclose()
        if self._options.slowdown is not None:
            await self._options.slowdown.aclose()
        # The next Ring's Layers may need the room.
        self._stage = self._service = self._serving = None
        await asyncio.to_thread(return_free_memory, collect=True)

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
        options = self._options
        if options.num_nodes > 1 or (options.remote is not None and options.remote.standing_by):
            make = _kind_of_workers(options)
            self._stages = make(
                options,
                ring_key=self._ring_key,
                on_fault=self._on_fault,
                on_lost=self._on_lost,
                on_loading=self._on_loading,
            )
            if options.remote is None:  # Nodes of other machines have torch already, and are kept waiting by ours
                await self._stages.open()
        stage = await self._worker.run_uncounted(partial(_open_model, options))
        if self._stages is not None and options.remote is not None:
            await self._stages.open()
        try:
            async with asyncio.TaskGroup() as tasks:
                on_loading = partial(self._on_loading, self._name)
                tasks.create_task(self._worker.run_long(stage.load, on_loading), name="load")
                if self._stages is not None:
                    starting = tasks.create_task(self._stages.start(stage.digest, stage.weights), name="stages")
        except* MdiqError as group:
            raise first_of(group) from None
        finally:
            stage.close()
        self._stage = stage
        self._ready = list(starting.result()) if self._stages is not None else []
        if options.slowdown is not None:  # after the start of the others: a child begins in its parent's control group
            options.slowdown.slow_node(self._name, os.getpid())
        own_cost = await self._worker.run_long(stage.measure)
        self._costs = [own_cost, *(StageCost.of(ready.decode_s, ready.prompt_s) for ready in self._ready)]
        self._spec = stage.spec(self._ready)
        stage.check_kinds(self._ready)
        self._service = service = StarterService(
            RingProtocol(options.ring),
            StageProtocol(),
            stage.engine,
            self._stages.source if self._stages else None,
            self._stages.sink if self._stages else None,
            receive_key=hop_key(self._ring_key, 0),
            send_key=hop_key(self._ring_key, 1 % options.num_nodes),
            limits=stage.runner.wire_limits,
            worker=self._worker,
            clock=self._clock,
            tracer=self._tracer,
            make_pipe=self._make_pipe,
            plan_pace=self._plan_pace,
        )
        self._serving = asyncio.create_task(service.run(), name="starter")
        self._serving.add_done_callback(self._on_loops_ended)
        if isinstance(self._stages, SocketWorkers) and options.num_nodes > 1:
            self._links = await survey_hops(
                service, self._stages, self._epoch, options.num_nodes, self._clock, unreached=self._stages.unreached
            )
        if options.is_survey:
            self._wires = self._first_wires
            return
        delays_s = [LOOPBACK_HOP_S if link is None else max(link.delay_s, LOOPBACK_HOP_S) for link in self._links]
        await self._plan_pace(sum(delays_s) if delays_s else LOOPBACK_HOP_S * options.num_nodes)
        await self._begin_epoch(await self._choose_wires(stage))

    @property
    def _first_wires(self) -> tuple[str, ...]:
        """The formats that the Hops begin with."""
        options = self._options
        return tuple(options.wire(i) or USUAL for i in range(options.num_nodes)) if options.num_nodes > 1 else ()

    async def _choose_wires(self, stage: "StarterStage") -> tuple[str, ...]:
        """Return the format of each Hop; where i8 is in question, try it first."""
        from mdiq.engine.measure import measure_packing
        from mdiq.engine.wire_check import check_tokens, divergence_nats
        from mdiq.runtime.rehearsal import NUM_TOKENS, rehearse

        options, first = self._options, self._first_wires
        if not self._links or AUTO not in options.wanted_wires:
            return first
        assert self._spec is not None  # the Ring is paced
        config = stage.runner.config
        packing = await self._worker.run_uncounted(partial(measure_packing, config.hidden_size))
        costs = WireCosts(config.hidden_size, self._costs, self._spec.cap(self._spec.max_live), packing)
        choose = partial(choose_wires, options.wanted_wires, self._links, costs)
        wires = choose()
        if wires == first:
            return wires
        tokens = await self._worker.run_uncounted(partial(check_tokens, options.model, NUM_TOKENS, config.vocab_size))
        logits = []
        for tried in (first, wires):
            await self._begin_epoch(tried)
            logits.append(await rehearse(self.service, stage.engine, tokens))
        self.wire_check_nats = divergence_nats(*logits)
        if self.wire_check_nats <= options.max_divergence_nats:
            return wires
        log.warning("i8_refused", divergence_nats=round(self.wire_check_nats, 4), most_nats=options.max_divergence_nats)
        return choose(avoid_small=True)

    async def _begin_epoch(self, wires: tuple[str, ...]) -> None:
        """Have every Stage serve in a new Epoch with these formats; figures count from here on."""
        assert self._stage is not None and self._spec is not None  # the Ring is loaded and paced
        options, runner = self._options, self._stage.runner
        self._epoch = Epoch(self._epoch + 1)
        self._wires = wires
        if options.weights.exact and options.rounds(wires):
            log.warning("wire_is_not_exact", wires=wires, text="hops round activations: other tokens than on one node")
        if self._stages is not None:
            await self._stages.begin(self._epoch, wires)
        if wires:
            runner.set_wire(wires[0])
        await self._worker.run_uncounted(runner.reset)
        self.service.begin_epoch(self._epoch, self._spec)
        self.service.ring.reset_counts()
        self._worker.reset_meter()
        self._tracer.clear()
        if self._stages is not None and self._stages.source is not None and self._stages.sink is not None:
            self._bytes_before = self._stages.source.bytes_in, self._stages.sink.bytes_out
        log.info("epoch_began", epoch=self._epoch, wires=wires)

    async def _plan_pace(self, hops_s: float) -> RingSpec:
        assert self._spec is not None  # the Ring is known before it is paced
        # In a thread: 30 to 120 ms on a desktop machine.
        planned = await asyncio.to_thread(paced, self._spec, self._costs, hops_s, self._options.pace)
        self._spec, self._micro_batches = planned
        return self._spec

    def _on_fault(self, fault: control.Fault) -> None:
        if self._service is None:
            return
        epoch, seq_ids = Epoch(fault.epoch), tuple(SeqId(seq_id) for seq_id in fault.seq_ids)
        if fault.reason == "gap":
            self._service.report_gaps(epoch, seq_ids)
        else:
            error = error_from(NodeId("ring"), control.Failed(fault.reason, fault.text))
            self._service.report_failure(epoch, seq_ids, error)

    def _on_lost(self, error: MdiqError) -> None:
        if self._loss is None:
            self._loss = error
            self._is_lost.set()
        if self._service is not None:
            self._service.fail_all(error)

    def _on_loops_ended(self, serving: "asyncio.Task[None]") -> None:
        if not serving.cancelled() and (error := serving.exception()) is not None:
            self._on_lost(loop_failed("starter", error))


def _open_model(options: RingOptions) -> "StarterStage":
    from mdiq.runtime.starter_stage import StarterStage

    return StarterStage(options)


def _kind_of_workers(options: RingOptions) -> type[RemoteWorkers] | type[InProcessWorkers] | type[ProcessWorkers]:
    if options.remote is not None:
        return RemoteWorkers
    return InProcessWorkers if options.in_process else ProcessWorkers
