"""One Stage that is not the Starter's, wherever it runs: loaded as an Assign says, measured, and served.

How its Node joins and what its Hops lead to is for its callers: node.py and in_process.py.
"""

from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from mdiq.core import control
from mdiq.core.stage import NO_EPOCH, StageProtocol
from mdiq.core.types import Epoch, LayerRange, WeightSettings
from mdiq.engine.device import choose_device, free_bytes, kind_of
from mdiq.engine.formats.layer_files import LayerFiles
from mdiq.engine.kept_cost import kept_cost
from mdiq.engine.measure import SUSTAINED_S, measure_cost
from mdiq.engine.memory import peak_bytes, reset_peak, return_free_memory, rss_bytes
from mdiq.engine.model.kv_cache import BLOCK_TOKENS
from mdiq.engine.runner import StageRunner
from mdiq.errors import LocalProtocolError
from mdiq.plan.pace import StageCost
from mdiq.runtime.loops import EpochLinks, Progress, Worker
from mdiq.runtime.stage_service import StageReports, StageService
from mdiq.transport.base import FrameSink, FrameSource

log = structlog.get_logger()


class StageHost:
    """The parts of a Stage in the order in which they come: ``load``, ``serve``, then ``begin`` for every Epoch.

    It may be loaded again, for other Layers or a Ring of another order, when nobody serves it any more.

    owns_process: nothing else of the Ring is in this process, so that its memory is the Stage's.
    is_rationed: the device may have its CPU time rationed, so that its costs are measured anew and for longer.
    """

    def __init__(self, worker: Worker, *, owns_process: bool = True, is_rationed: bool = False) -> None:
        self._worker = worker
        self._owns_process = owns_process
        self._is_rationed = is_rationed
        self._stage = StageProtocol()
        self._runner: StageRunner | None = None
        self._links: EpochLinks | None = None
        self._service: StageService | None = None
        self._loaded_for: control.Assign | None = None
        self._memory: tuple[float, int | None] = (1.0, None)  # that it may take: share of the machine's, bytes
        self._is_last = False
        self._bytes_before = (0, 0)  # in and out, when this Epoch began

    async def load(
        self,
        assign: control.Assign,
        model: Path | LayerFiles | None,
        *,
        memory_bytes: int | None = None,
        on_loading: Progress = lambda *_: None,
        on_measuring: Callable[[], None] = lambda: None,
    ) -> control.Ready:
        """Load the Layers that are not here yet, and measure what they cost if wanted; return what there is then.

        model: None where no Layer is lacking; see ``lacks``.

        Raises:
            MdiqError: see StageRunner.load. There is no Stage any more.
        """
        can_peak = self._owns_process and reset_peak()
        before, self._runner = self._runner if self._is_of(assign) else None, None
        # A Batch of the old one may have been cut off: it counts as running for ever.
        self._stage, self._service, self._links = StageProtocol(), None, None
        shape = partial(
            before.reshape if before is not None else self._first_load(assign),
            model,
            LayerRange(assign.layer_start, assign.layer_stop),
            is_last=assign.is_last,
            kv_tokens=assign.kv_tokens or None,
            memory_share=assign.memory_share,
            memory_bytes=memory_bytes,
            digest=assign.model_digest,
        )
        loaded: StageRunner | None = None
        memory = assign.memory_share, memory_bytes
        if before is not None and self._has_all(before, assign) and memory == self._memory:
            await self._worker.run_uncounted(before.reset)
        else:
            loaded = await self._worker.run_long(lambda progress: shape(progress=progress), on_loading)
        runner = before or loaded
        assert runner is not None  # a first load returns one
        self._loaded_for, self._memory = assign, memory
        runner.noise = assign.noise
        measure = partial(measure_cost, min_s=SUSTAINED_S) if self._is_rationed else kept_cost
        cost: StageCost | None = None
        if assign.measures:
            cost = await self._worker.run_long(
                lambda progress: measure(runner, progress=progress), lambda *_: on_measuring()
            )
        self._runner = runner
        self._is_last = assign.is_last
        self._worker.reset_meter()
        self._stage.assign(Epoch(assign.epoch), is_last=assign.is_last)
        device = choose_device(assign.weights.device)
        return control.Ready(
            epoch=assign.epoch,
            kv_tokens=runner.kv_capacity_tokens,
            weight_bytes=runner.weight_bytes,
            kv_bytes_per_token=runner.kv_bytes_per_token,
            rss_bytes=rss_bytes(),
            decode_s=cost.decode.points if cost else (),
            prompt_s=cost.prompt.points if cost else (),
            free_bytes=free_bytes(device) if self._owns_process else 0,
            peak_bytes=peak_bytes() if can_peak else 0,
            cpu=kind_of(device),
        )

    def lacks(self, assign: control.Assign) -> bool:
        """Tell whether a Layer of an assignment is not here."""
        layers = LayerRange(assign.layer_start, assign.layer_stop)
        return not self._is_of(assign) or self._runner is None or bool(self._runner.lacks(layers))

    async def warm_up(self, model: LayerFiles, layer: int, weights: WeightSettings) -> None:
        """Load a Layer and let it go, before it matters how long that takes: its kernels are compiled and chosen then.

        One alone is not enough: matrices of a model may be held in several formats.

        Raises:
            MdiqError: see StageRunner.load.
        """

        def load_and_free(progress: Progress) -> None:
            one = LayerRange(layer, layer + 1)
            load = partial(StageRunner.load, model, one, is_last=False, owns_embedding_and_head=False, weights=weights)
            load(kv_tokens=BLOCK_TOKENS, progress=progress)
            return_free_memory()

        await self._worker.run_long(load_and_free)

    def _has_all(self, runner: StageRunner, assign: control.Assign) -> bool:
        """Whether nothing is to be loaded, nor let go: the Ring is another one, and this Stage's part the same."""
        before = self._loaded_for
        if before is None or (before.layer_start, before.layer_stop, before.is_last) != (
            assign.layer_start,
            assign.layer_stop,
            assign.is_last,
        ):
            return False
        # As many tokens as there is room for, where no number is said: that was looked at before, unless one was said.
        return assign.kv_tokens <= runner.kv_capacity_tokens if assign.kv_tokens else not before.kv_tokens

    @staticmethod
    def _first_load(assign: control.Assign) -> Callable[..., StageRunner]:
        return partial(
            StageRunner.load, owns_embedding_and_head=False, weights=assign.weights, wire=assign.wire or None
        )

    def _is_of(self, assign: control.Assign) -> bool:
        """Whether what is loaded is of an assignment's model, held as it says."""
        before = self._loaded_for
        return before is not None and (before.model_digest, before.weights) == (assign.model_digest, assign.weights)

    def serve(
        self, assign: control.Assign, source: FrameSource, sink: FrameSink, reports: StageReports
    ) -> Coroutine[Any, Any, None]:
        """Have these Hops from now on; return what serves over them until it is cancelled."""
        assert self._runner is not None  # it is loaded
        if self._service is not None:  # a Batch of it may have been cut off, and would count as running for ever
            self._stage = StageProtocol()
        limits, kv_tokens = self._runner.wire_limits, self._runner.kv_capacity_tokens
        self._links = EpochLinks(source, sink, assign.receive_key, assign.send_key, limits)
        self._service = StageService(self._stage, self._runner, self._links, self._worker, reports, kv_tokens=kv_tokens)
        return self._service.run()

    async def send_burst(self, burst: control.SendBurst) -> control.BurstSent:
        """Send a burst over the Hop out of this Stage; nothing if its Epoch is over, since nobody waits for it then."""
        if self._service is None:
            raise LocalProtocolError("burst: there is no hop before an assignment; restart the ring")
        is_now = burst.epoch == self._stage.epoch
        sent_s = await self._service.send_burst(burst) if is_now else self._worker.clock()
        return control.BurstSent(burst.epoch, burst.number, sent_s)

    async def begin(self, begin: control.Begin) -> control.Begun:
        """Forget every Sequence and serve in a new Epoch; figures count from here on."""
        if self._runner is None or self._links is None:
            raise LocalProtocolError("begin: there is nothing to serve before an assignment; restart the ring")
        self._stage.assign(Epoch(begin.epoch), is_last=self._is_last)
        self._runner.set_wire(begin.wire)
        # In the worker's turn: a Batch of the old Epoch may still run.
        await self._worker.run_uncounted(self._runner.reset)
        self._worker.reset_meter()
        self._worker.tracer.clear()
        self._bytes_before = self._links.source.bytes_in, self._links.sink.bytes_out
        log.info("epoch_began", epoch=begin.epoch, wire=begin.wire)
        return control.Begun(begin.epoch)

    def free(self) -> None:
        """Let go of the weights."""
        self._runner = self._service = self._links = self._loaded_for = None
        return_free_memory(collect=True)

    def heartbeat(self) -> control.Heartbeat:
        """Return the figures of now."""
        meter, links, (bytes_in, bytes_out) = self._worker.meter, self._links, self._bytes_before
        return control.Heartbeat(
            epoch=self._stage.epoch or NO_EPOCH,
            rss_bytes=rss_bytes(),
            busy_s=meter.busy_s,
            waiting_s=meter.waiting_s,
            bytes_in=links.source.bytes_in - bytes_in if links else 0,
            bytes_out=links.sink.bytes_out - bytes_out if links else 0,
            frames_dropped=dict(meter.dropped),
            kv_tokens_in_use=self._runner.kv_tokens_in_use if self._runner else 0,
            queue_depth=self._stage.num_waiting,
            probe=self._stage.newest_probe,
            inflow=links.source.inflow if links else 0,
            work=self._worker.work if self._owns_process else meter.work,
        )
