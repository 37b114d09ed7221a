"""A whole Ring: the Starter here, the other Nodes in child processes, in this process, or on other machines.

It opens (Nodes and model), loads (all Nodes at once), forms (epochs.py), and serves. Torch is imported in the worker's
thread, when the other Nodes have begun to start: they take as long for it.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING

from mdiq.core import control
from mdiq.core.ring import RingProtocol
from mdiq.core.sequence import Sequence
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, NodeId, SeqId
from mdiq.engine.memory import return_free_memory, rss_bytes
from mdiq.errors import MdiqError, first_of
from mdiq.plan.measured import MeasuredRing
from mdiq.plan.pace import StageCost
from mdiq.runtime.epochs import Epochs
from mdiq.runtime.kind_of_workers import kind_of_workers
from mdiq.runtime.loaded_ring import USUAL_BYTES_PER_S, LoadedRing
from mdiq.runtime.loops import Supervisor, Worker, make_worker
from mdiq.runtime.options import HopFigures, NodeFigures, PaceFigures, RingOptions
from mdiq.runtime.recovery import Recovery
from mdiq.runtime.starter_service import StarterService, StreamEvent
from mdiq.runtime.takeover import is_like, is_same_but_idle, members_of, with_spares
from mdiq.runtime.text_pipe import NoText, TextPipe
from mdiq.runtime.workers import RingEvents, Workers
from mdiq.telemetry.trace import Span, Tracer

if TYPE_CHECKING:
    from mdiq.runtime.starter_stage import StarterStage


class RingHost:
    """A Ring to ``stream`` Sequences through; use it as an async context manager.

    make_pipe: gives each Sequence the TextPipe that turns its tokens into text.
    on_loading: called with (node, done, total) while weights load.
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
        self._tracer = Tracer(is_on=options.trace)
        self._worker = make_worker(time.monotonic, self._tracer, options.threads)
        self._ring_key = secrets.token_bytes(32)
        events = RingEvents(self._on_fault, self._on_lost, on_loading)
        self._workers: Workers = kind_of_workers(options)(options, self._ring_key, events)
        self._loops = Supervisor(self._on_lost)
        self._ring: LoadedRing | None = None
        self._epochs: Epochs | None = None
        self._service: StarterService | None = None
        self._recovery: Recovery | None = None  # once the Ring is formed
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
        return self._formed.spec.max_tokens

    @property
    def wire_check_nats(self) -> float | None:
        """What i8 would cost on the Hops that it was chosen for; None where it was not in question."""
        return self._formed.wire_check_nats

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
        return self._options

    @property
    def idle_here(self) -> list[str]:
        """The Nodes that stand by, and are here."""
        return self._workers.standing_by

    @property
    def is_paused(self) -> bool:
        """Whether nothing enters the Ring, because of a Node that is gone, or of a change; what runs goes on later."""
        return self._recovery is not None and self._recovery.is_running

    def taken_over(
        self, lost: Collection[str], *, unfit: Collection[str] = (), max_fetch_s: float | None = inf
    ) -> RingOptions | None:
        """Return the Ring without these Nodes, or None; see recovery.ChangingRing."""
        if not self._workers.can_change:
            return None
        spares = [name for name in self._workers.standing_by if name not in unfit]
        options = with_spares(self._options, lost, spares)
        still = [name for name in lost if name in options.node_names]
        if not still:
            return options
        if max_fetch_s is None or not {*unfit}.isdisjoint({*options.node_names} - {*still}):
            return None
        if self.rounds and max_fetch_s < inf:  # a node that is back goes on with the same tokens
            return None
        rates = [hop.bytes_per_s for hop in self.hops() if hop.bytes_per_s is not None]
        return self._loaded.survived(self._options, options, still, max_fetch_s, min(rates, default=USUAL_BYTES_PER_S))

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

    async def replace_idle(self, like: RingOptions) -> None:
        """Have the Nodes stand by that do so in another Ring; the keys of others are cut off before this returns."""
        assert self._recovery is not None  # it serves
        await self._recovery.replace_idle(like)

    def can_change_to(self, options: RingOptions) -> bool:
        """Tell whether ``change`` is for another Ring: it differs in Layers and Nodes alone.

        Nodes that are not here are waited for while this one serves, unless one that serves is to be cut off.
        """
        if self._recovery is None or not self._workers.can_change or not is_like(self._options, options):
            return False
        if self.rounds and not is_same_but_idle(self._options, options):
            return False
        cut_off = members_of(self._options) - members_of(options)
        is_any_in_ring = any(name in self._options.node_names for name, _ in cut_off)
        return not is_any_in_ring or not (self.is_paused or self.absent(options))

    def absent(self, options: RingOptions) -> set[str]:
        """Return the Nodes of a Ring that are not here."""
        return {*options.node_names} - ({*self._options.node_names, *self._workers.standing_by} - {*self.missing})

    async def reform(self, options: RingOptions) -> None:
        """Be another Ring from now on; nobody loads yet."""
        self._options = options
        await self._workers.reform(options)

    async def reload(self) -> None:
        """Have all Nodes hold what they are to hold; raise an MdiqError when one is gone, or cannot."""
        options, ring, epochs = self._options, self._loaded, self._formed
        # A Ring that goes on as it was counts on the KV cache that it had.
        is_same = is_same_but_idle(options, epochs.options)
        kv_tokens = epochs.spec.kv_tokens if is_same else options.kv_tokens
        try:
            async with asyncio.TaskGroup() as tasks:
                reshape = partial(ring.stage.reshape, replace(options, kv_tokens=kv_tokens))
                tasks.create_task(self._worker.run_long(reshape, partial(self._on_loading, self._name)), name="load")
                loading = tasks.create_task(self._workers.reload(epochs.next_epoch(), kv_tokens), name="workers")
        except* MdiqError as group:
            raise first_of(group) from None
        if not is_same:
            self._ring = ring = ring.as_reshaped(options, loading.result())
            await epochs.reshape(options, ring)

    @property
    def rounds(self) -> bool:
        """Whether Hops round activations: another cut between the Layers gives other tokens."""
        return self._options.rounds([hop.wire for hop in self.hops()]) or not self._options.weights.exact

    @property
    def holds_what_runs(self) -> bool:
        """Whether the KV cache, as it is loaded, is large enough for each request that runs."""
        return self._formed.spec.max_tokens >= self.service.ring.needed_tokens

    async def begin_again(self) -> None:
        """Begin the next Epoch, and replay."""
        await self._formed.begin_again(self.service)

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
        bytes_in, bytes_out = self._epochs.bytes_before if self._epochs else (0, 0)
        own = NodeFigures(
            name=self._name,
            layers=self._options.layers[0],
            rss_bytes=rss_bytes(),
            weight_bytes=self._ring.stage.runner.weight_bytes if self._ring else 0,
            busy_s=meter.busy_s,
            waiting_s=meter.waiting_s,
            bytes_in=workers.source.bytes_in - bytes_in if workers.source else 0,
            bytes_out=workers.sink.bytes_out - bytes_out if workers.sink else 0,
            dropped=dict(meter.dropped),
            work=meter.work,
        )
        return [own, *workers.figures()]

    def pace(self) -> PaceFigures:
        """Return the pace of the most Sequences that were in the Ring at once, as it is planned now."""
        return self._formed.pace(self.service)

    def hops(self) -> list[HopFigures]:
        """Return what every Hop is like, the one out of the Starter first; none in a Ring of one Node."""
        return self._formed.hops()

    async def measured(self) -> MeasuredRing:
        """Return what the Nodes measured, for the planner; the head is measured now, between two Batches."""
        return await self._formed.measured()

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
        self._ring = self._epochs = self._service = self._recovery = None
        await asyncio.to_thread(return_free_memory, collect=True)

    @property
    def _loaded(self) -> LoadedRing:
        assert self._ring is not None  # __aenter__ has run
        return self._ring

    @property
    def _formed(self) -> Epochs:
        assert self._epochs is not None  # __aenter__ has run
        return self._epochs

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
        self._ring = await self._load(await self._open())
        self._epochs = Epochs(self._options, self._ring, self._workers, self._worker)
        self._service = self._make_service(self._ring, self._epochs)
        self._loops.run(self._service.run(), "starter")
        await self._epochs.form(self._service)
        if not self._options.is_survey:
            tolerance_s = self._options.outages.tolerance_s
            self._recovery = Recovery(
                self, self._workers, self._service, tolerance_s=tolerance_s, give_up=self._give_up
            )

    async def _open(self) -> "StarterStage":
        """Have the Nodes start, and open the model."""
        is_remote = self._options.remote is not None
        if not is_remote:  # Nodes of other machines have torch already, and are kept waiting by ours
            await self._workers.open()
        stage = await self._worker.run_uncounted(partial(_open_model, self._options))
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
        return StarterService(
            RingProtocol(self._options.ring),
            StageProtocol(),
            ring.stage.engine,
            self._workers.links(ring.stage.runner.wire_limits),
            self._worker,
            make_pipe=self._make_pipe,
            plan_pace=epochs.plan_pace,
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
        if self._loss is None and self._recovery is not None and self._recovery.takes_on(error):
            return
        self._give_up(error)

    def _give_up(self, error: MdiqError) -> None:
        if self._loss is None:
            self._loss = error
            self._is_lost.set()
        if self._service is not None:
            self._service.fail_all(error)


def _open_model(options: RingOptions) -> "StarterStage":
    from mdiq.runtime.starter_stage import StarterStage

    return StarterStage(options)
