"""Stages in the Starter's own process, over memory links: for tests, debugging, and a Ring of one."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mdiq.core import control
from mdiq.core.types import Epoch, NodeId, SeqId
from mdiq.errors import MdiqError
from mdiq.runtime.loops import Worker, make_worker
from mdiq.runtime.options import RingOptions
from mdiq.runtime.workers import RingEvents, Workers
from mdiq.telemetry.trace import Span, Tracer
from mdiq.transport.memory import MemoryLink

if TYPE_CHECKING:
    from mdiq.runtime.stage_host import StageHost


class InProcessWorkers(Workers):
    """Every Stage but the Starter's, as tasks of this process; none in a Ring of one."""

    def __init__(self, options: RingOptions, ring_key: bytes, events: RingEvents) -> None:
        super().__init__(options, ring_key, events)
        # links[i] leads into Stage i; the first one is the last Hop, back to the Starter.
        self._links = [MemoryLink() for _ in options.layers]
        self._tracers = {node: Tracer(is_on=options.trace) for node in self._names}
        self._workers: list[Worker] = []
        self._stages: dict[NodeId, StageHost] = {}
        if self._names:
            self.source, self.sink = self._links[:2]

    async def open(self) -> None:
        """Nothing of them starts before the model is open."""

    async def _join_and_load(self) -> Mapping[NodeId, control.Ready]:
        """Load every Stage, one after the other, and begin to serve."""
        from mdiq.runtime.stage_host import StageHost

        ready: dict[NodeId, control.Ready] = {}
        for i, node in enumerate(self._names, 1):
            worker = make_worker(time.monotonic, self._tracers[node], self._options.threads)
            self._workers.append(worker)
            stage = StageHost(worker, owns_process=False)
            assign = self._assignment(i, "")
            ready[node] = await stage.load(
                assign, self._options.model, on_loading=lambda *done, node=node: self._events.on_loading(node, *done)
            )
            following = self._links[(i + 1) % len(self._links)]
            self._loops.run(stage.serve(assign, self._links[i], following, self), node)
            self._stages[node] = stage
        return ready

    async def begin(self, epoch: Epoch, wires: Sequence[str]) -> None:
        """Have every Stage serve in a new Epoch; ``wires[i]`` is the format of the Hop out of Stage i."""
        for stage, wire in zip(self._stages.values(), wires[1:], strict=True):
            await stage.begin(control.Begin(epoch, wire))

    def spans(self) -> dict[str, list[Span]]:
        return {node: tracer.spans for node, tracer in self._tracers.items()}

    async def aclose(self) -> None:
        """End the Stages."""
        await super().aclose()
        for worker in self._workers:
            await worker.aclose()

    def gaps(self, epoch: Epoch, seq_ids: tuple[SeqId, ...]) -> None:
        """See StageReports."""
        self._events.on_fault(NodeId("ring"), control.Fault(epoch, seq_ids, "gap", ""))

    def failure(self, epoch: Epoch, seq_ids: tuple[SeqId, ...], error: MdiqError) -> None:
        """See StageReports."""
        self._events.on_fault(NodeId("ring"), control.Fault(epoch, seq_ids, type(error).__name__, str(error)))

    def burst_arrived(self, arrived: control.BurstArrived) -> None:
        """See StageReports; Hops inside a process are not measured."""

    def heartbeats(self) -> Mapping[NodeId, control.Heartbeat]:
        """Return the figures of now."""
        return {node: stage.heartbeat() for node, stage in self._stages.items()}
