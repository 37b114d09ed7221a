"""A whole Ring on this machine: the Starter here, the other Stages in child processes or, if asked, in this process."""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

from mdiq.control.coordinator import error_from
from mdiq.core import control
from mdiq.core.ring import RingProtocol
from mdiq.core.sequence import Sequence
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, NodeId, RingSpec, SeqId
from mdiq.core.wire import hop_key
from mdiq.engine.checkpoint import open_checkpoint
from mdiq.engine.device import rss_bytes
from mdiq.engine.kv_cache import BLOCK_TOKENS
from mdiq.engine.measure import measure_cost
from mdiq.engine.runner import StageRunner
from mdiq.errors import MdiqError, first_of
from mdiq.plan.micro_batches import MicroBatches
from mdiq.plan.pace import StageCost, paced
from mdiq.runtime.cpu_quota import CpuQuota
from mdiq.runtime.engine_worker import TorchStarter, make_worker, wire_limits
from mdiq.runtime.in_process import InProcessStages
from mdiq.runtime.options import NodeFigures, PaceFigures, RingOptions
from mdiq.runtime.processes import ProcessStages
from mdiq.runtime.starter_service import NoText, StarterService, StreamEvent, TextPipe
from mdiq.telemetry.trace import Span, Tracer

FIRST_EPOCH = Epoch(1)
LOOPBACK_HOP_S = 2e-4  # until the first probe is back: a frame over loopback, both event loops included
STARTER = "node-0"


class LocalRing:
    """A Ring to ``stream`` Sequences through; use it as an async context manager.

    make_pipe: gives each Sequence the TextPipe that turns its tokens into text.
    on_loading: told (node, done, total) while weights load.
    """

    def __init__(
        self,
        options: RingOptions,
        *,
        make_pipe: Callable[[Sequence], TextPipe] = lambda _: NoText(),
        on_loading: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        self._options = options
        self._make_pipe = make_pipe
        self._on_loading = on_loading
        self._clock = time.monotonic
        self._tracer = Tracer(is_on=options.trace)
        self._worker = make_worker(self._clock, self._tracer, options.threads)
        self._ring_key = secrets.token_bytes(32)
        self._stages: ProcessStages | InProcessStages | None = None
        self._runner: StageRunner | None = None
        self._service: StarterService | None = None
        self._serving: asyncio.Task[None] | None = None
        self._quota: CpuQuota | None = None
        self._spec: RingSpec | None = None
        self._costs: list[StageCost] = []
        self._micro_batches: MicroBatches | None = None

    async def __aenter__(self) -> "LocalRing":
        try:
            await self._start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def stream(self, sequence: Sequence) -> AsyncIterator[StreamEvent]:
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
        """Most tokens of one Sequence."""
        assert self._runner is not None  # __aenter__ has run
        return self._runner.config.context_tokens

    async def drain(self) -> None:
        """Have the other Stages report for the last time and end; ``figures`` and ``spans`` are complete then."""
        if self._stages is not None:
            await self._stages.drain()

    def figures(self) -> list[NodeFigures]:
        """Return what every Node did, in ring order, the Starter first."""
        stages, meter = self._stages, self._worker.meter
        own = NodeFigures(
            name=STARTER,
            layers=self._options.layers[0],
            rss_bytes=rss_bytes(),
            weight_bytes=self._runner.weight_bytes if self._runner else 0,
            busy_s=meter.busy_s,
            waiting_s=meter.waiting_s,
            bytes_in=stages.source.bytes_in if stages and stages.source else 0,
            bytes_out=stages.sink.bytes_out if stages and stages.sink else 0,
            dropped=dict(meter.dropped),
        )
        return [own, *(stages.figures() if stages else [])]

    def pace(self) -> PaceFigures:
        """Return the pace of the most Sequences that were in the Ring at once, as it is planned now."""
        assert self._spec is not None and self._micro_batches is not None  # __aenter__ has run
        ring = self.service.ring
        num_live = max(ring.most_live, 1)
        return PaceFigures(
            num_live=ring.most_live,
            in_flight=self._micro_batches.in_flight[num_live - 1],
            cap=self._spec.cap(num_live),
            hops_s=self.service.hops_s,
            predicted_tokens_per_s=self._micro_batches.rates[num_live - 1],
            chunk_tokens=self._spec.shared_chunk(num_live),
            decode_gap_s=ring.decode_gap_s,
        )

    def spans(self) -> Mapping[str, list[Span]]:
        """Return every Node's Spans, in ring order."""
        return {STARTER: self._tracer.spans, **(self._stages.spans() if self._stages else {})}

    async def aclose(self) -> None:
        """End the loops and the processes, and free what they held."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        if self._stages is not None:
            await self._stages.aclose()
        self._worker.close()
        if self._quota is not None:
            self._quota.close()

    async def _start(self) -> None:
        options = self._options
        loop = asyncio.get_running_loop()
        digest = await self._worker.run_uncounted(partial(_digest, options.model))
        others: list[control.Ready] = []
        if options.num_nodes > 1:
            make = InProcessStages if options.in_process else ProcessStages
            self._stages = make(
                options,
                ring_key=self._ring_key,
                model_digest=digest,
                on_fault=self._on_fault,
                on_lost=self._on_lost,
                on_loading=self._on_loading,
            )
        load = partial(
            StageRunner.load,
            options.model,
            options.layers[0],
            is_last=options.num_nodes == 1,
            owns_embedding_and_head=True,
            dtype=options.dtype,
            device=options.device,
            kv_tokens=options.kv_tokens,
            weights=options.weights,
            exact=options.exact,
            wire=options.wire(0),
            memory_share=1 / options.num_nodes,
            progress=lambda done, total: loop.call_soon_threadsafe(self._on_loading, STARTER, done, total),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                loading = tasks.create_task(self._worker.run_uncounted(load), name="load")
                starting = tasks.create_task(self._stages.start(), name="stages") if self._stages else None
        except* MdiqError as group:
            raise first_of(group) from None
        self._runner = loading.result()
        if starting is not None:
            others = list(starting.result())
        if options.cpu is not None:
            # Behind the start of the others: a child begins in its parent's control group.
            self._quota = CpuQuota.create(STARTER, options.cpu)
            self._quota.add(os.getpid())
        own_cost = await self._worker.run_uncounted(partial(measure_cost, self._runner))
        self._costs = [own_cost, *(StageCost.of(ready.decode_s, ready.prompt_s) for ready in others)]
        self._spec = RingSpec(
            num_stages=options.num_nodes,
            kv_tokens=min([self._runner.kv_capacity_tokens, *(ready.kv_tokens for ready in others)]),
            context_tokens=self._runner.config.context_tokens,
            kv_block_tokens=BLOCK_TOKENS,
        )
        self._worker.reset_meter()
        self._service = StarterService(
            RingProtocol(options.ring),
            StageProtocol(),
            TorchStarter(self._runner),
            self._stages.source if self._stages else None,
            self._stages.sink if self._stages else None,
            receive_key=hop_key(self._ring_key, 0),
            send_key=hop_key(self._ring_key, 1 % options.num_nodes),
            limits=wire_limits(self._runner),
            worker=self._worker,
            clock=self._clock,
            tracer=self._tracer,
            make_pipe=self._make_pipe,
            plan_pace=self._plan_pace,
        )
        self._service.begin_epoch(FIRST_EPOCH, self._plan_pace(LOOPBACK_HOP_S * options.num_nodes))
        self._serving = asyncio.create_task(self._service.run(), name="starter")

    def _plan_pace(self, hops_s: float) -> RingSpec:
        assert self._spec is not None  # the Ring is known before it is paced
        self._spec, self._micro_batches = paced(self._spec, self._costs, hops_s, self._options.pace)
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
        if self._service is not None:
            self._service.fail_all(error)


def _digest(model: Path) -> str:
    with open_checkpoint(model) as checkpoint:
        return checkpoint.digest
