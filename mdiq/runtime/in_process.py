"""Stages in the Starter's own process, over memory links: for tests, debugging and machines where one is enough."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mdiq.core import control
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, SeqId, WeightSettings
from mdiq.core.wire import hop_key
from mdiq.engine.memory import rss_bytes
from mdiq.errors import MdiqError
from mdiq.plan.pace import StageCost
from mdiq.runtime.loops import Progress, Worker, loop_failed, make_worker
from mdiq.runtime.options import NodeFigures, RingOptions
from mdiq.runtime.stage_service import StageService
from mdiq.telemetry.trace import Span, Tracer
from mdiq.transport.memory import MemoryLink

if TYPE_CHECKING:
    from mdiq.engine.runner import StageRunner


class InProcessWorkers:
    """Every Stage but the Starter's, as tasks of this process; the arguments are those of ProcessWorkers."""

    def __init__(
        self,
        options: RingOptions,
        *,
        ring_key: bytes,
        on_fault: Callable[[control.Fault], None],
        on_lost: Callable[[MdiqError], None],
        on_loading: Callable[[str, int, int], None],
    ) -> None:
        self._options = options
        self._ring_key = ring_key
        self._on_fault = on_fault
        self._on_lost = on_lost
        self._on_loading = on_loading
        # links[i] leads into Stage i; the first one is the last Hop, back to the Starter.
        self._links = [MemoryLink() for _ in options.layers]
        self._tracers = [Tracer(is_on=options.trace) for _ in options.layers[1:]]
        self._workers: list[Worker] = []
        self._runners: list[StageRunner] = []
        self._stages: list[StageProtocol] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.source = self._links[0]
        self.sink = self._links[1]

    async def open(self) -> None:
        """Nothing of them starts before the model is open."""

    async def start(self, model_digest: str, weights: WeightSettings) -> Sequence[control.Ready]:
        """Load every Stage, one after the other, and begin to serve; return what each has, in ring order."""
        self._options = replace(self._options, weights=weights)
        ready: list[control.Ready] = []
        for i in range(1, self._options.num_nodes):
            worker = make_worker(time.monotonic, self._tracers[i - 1], self._options.threads)
            self._workers.append(worker)
            runner, cost = await worker.run_long(partial(self._load, i), partial(self._on_loading, f"node-{i}"))
            self._runners.append(runner)
            worker.reset_meter()
            stage = StageProtocol()
            stage.assign(Epoch(1), is_last=i == self._options.num_nodes - 1)
            self._stages.append(stage)
            service = StageService(
                stage,
                runner,
                self._links[i],
                self._links[(i + 1) % len(self._links)],
                receive_key=hop_key(self._ring_key, i),
                send_key=hop_key(self._ring_key, (i + 1) % len(self._links)),
                limits=runner.wire_limits,
                worker=worker,
                clock=time.monotonic,
                tracer=self._tracers[i - 1],
                report_gaps=lambda epoch, seq_ids: self._on_fault(control.Fault(epoch, seq_ids, "gap", "")),
                report_failure=self._report_failure,
                report_burst=lambda _: None,
            )
            self._tasks.append(asyncio.create_task(self._serve(service), name=f"node-{i}"))
            ready.append(
                control.Ready(
                    epoch=1,
                    kv_tokens=runner.kv_capacity_tokens,
                    weight_bytes=runner.weight_bytes,
                    kv_bytes_per_token=runner.kv_bytes_per_token,
                    rss_bytes=rss_bytes(),
                    decode_s=cost.decode.points,
                    prompt_s=cost.prompt.points,
                )
            )
        return ready

    async def begin(self, epoch: Epoch, wires: Sequence[str]) -> None:
        """Have every Stage serve in a new Epoch; ``wires[i]`` is the format of the Hop out of Stage i."""
        last = len(self._stages)
        for i, (stage, runner, worker) in enumerate(zip(self._stages, self._runners, self._workers, strict=True), 1):
            stage.assign(epoch, is_last=i == last)
            runner.set_wire(wires[i])
            await worker.run_uncounted(runner.reset)
            worker.reset_meter()

    async def drain(self) -> None:
        """Nothing is buffered elsewhere: figures and Spans are complete as they are."""

    def figures(self) -> list[NodeFigures]:
        """Return the figures of every Stage; they share one process, hence its memory."""
        return [
            NodeFigures(
                name=f"node-{i}",
                layers=self._options.layers[i],
                rss_bytes=rss_bytes(),
                weight_bytes=runner.weight_bytes,
                busy_s=worker.meter.busy_s,
                waiting_s=worker.meter.waiting_s,
                bytes_in=self._links[i].bytes_in,
                bytes_out=self._links[(i + 1) % len(self._links)].bytes_out,
                dropped=dict(worker.meter.dropped),
            )
            for i, (runner, worker) in enumerate(zip(self._runners, self._workers, strict=True), 1)
        ]

    def spans(self) -> dict[str, list[Span]]:
        return {f"node-{i}": tracer.spans for i, tracer in enumerate(self._tracers, 1)}

    async def aclose(self) -> None:
        """End the Stages."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers:
            await worker.aclose()

    def _load(self, i: int, progress: Progress) -> "tuple[StageRunner, StageCost]":
        from mdiq.engine.kept_cost import kept_cost
        from mdiq.engine.runner import StageRunner

        options = self._options
        runner = StageRunner.load(
            options.model,
            options.layers[i],
            is_last=i == options.num_nodes - 1,
            owns_embedding_and_head=False,
            kv_tokens=options.kv_tokens,
            weights=options.weights,
            wire=options.wire(i),
            memory_share=1 / options.num_nodes,
            progress=progress,
        )
        return runner, kept_cost(runner, progress=progress)

    async def _serve(self, service: StageService) -> None:
        try:
            await service.run()
        except Exception as error:
            self._on_lost(loop_failed("a stage of this process", error))

    def _report_failure(self, epoch: Epoch, seq_ids: tuple[SeqId, ...], error: MdiqError) -> None:
        self._on_fault(control.Fault(epoch, seq_ids, type(error).__name__, str(error)))
