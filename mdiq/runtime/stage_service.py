"""One Stage at work: its protocol, engine and links, joined by the three loops. The Starter is starter_service.py."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import NoReturn, Protocol

import structlog

from mdiq.core import control, wire
from mdiq.core.frame import Engine, Frame, FrameKind
from mdiq.core.hop_survey import BurstMeter
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, SeqId
from mdiq.errors import EngineError, MdiqError, SequenceError
from mdiq.runtime.loops import EpochLinks, Worker, queue_burst, receive_frames, send_frames

log = structlog.get_logger()

FailureReport = Callable[[Epoch, tuple[SeqId, ...], MdiqError], None]


class StageReports(Protocol):
    """What a Stage tells the Starter; an Agent does it for one on another machine."""

    def gaps(self, epoch: Epoch, seq_ids: tuple[SeqId, ...]) -> None:
        """Report Sequences whose Frames were lost on the way here."""
        ...

    def failure(self, epoch: Epoch, seq_ids: tuple[SeqId, ...], error: MdiqError) -> None:
        """Report Sequences that the engine could not compute."""
        ...

    def burst_arrived(self, arrived: control.BurstArrived) -> None:
        """Report a burst that came over the Hop into this Stage."""
        ...


class StageService:
    """Runs a Stage that is not the Starter until it is cancelled.

    kv_tokens: what its KV cache holds. No more tokens can wait, whatever the Node before it sends.
    """

    def __init__(
        self,
        stage: StageProtocol,
        engine: Engine,
        links: EpochLinks,
        worker: Worker,
        reports: StageReports,
        *,
        kv_tokens: int,
    ) -> None:
        self._kv_tokens = self._room = kv_tokens
        self._stage = stage
        self._engine = engine
        self._links = links
        self._worker = worker
        self._reports = reports
        self._bursts = BurstMeter()
        self._outgoing: asyncio.Queue[Frame] = asyncio.Queue(maxsize=64)
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Receive, compute and send until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(receive_frames(self._links, self._accept, self._worker), name="receive")
            tasks.create_task(self._compute(), name="compute")
            tasks.create_task(send_frames(self._outgoing, self._links, self._worker), name="send")

    async def send_burst(self, burst: control.SendBurst) -> float:
        """Send a burst over the Hop out of this Stage; return when it began to leave."""
        return await queue_burst(burst, self._links.limits, self._outgoing, self._worker.clock)

    def _accept(self, frame: Frame) -> None:
        if frame.kind is FrameKind.BURST:
            arrived = self._bursts.arrived(frame, self._worker.clock()) if frame.epoch == self._stage.epoch else None
            if arrived is not None:
                self._reports.burst_arrived(arrived)
            return
        self._check_room(frame)
        receipt = self._stage.receive(frame)
        if receipt.passes and not self._outgoing.full():
            self._outgoing.put_nowait(frame)
        if receipt.gaps:
            self._reports.gaps(frame.epoch, receipt.gaps)
        if self._stage.has_work:
            self._worker.work_waits()
            self._wake.set()

    def _check_room(self, frame: Frame) -> None:
        """Refuse a Frame that a Starter which keeps its books cannot have sent: what waits has no room there."""
        size = frame.num_tokens or len(frame.segments)
        if self._room < size:  # since it was counted: counting takes long
            self._room = self._kv_tokens - self._stage.num_waiting_tokens
            if self._room < size:
                raise wire.BadFrame("full", f"{frame}: more waits than the KV cache holds; look at the node before")
        self._room -= size

    async def _compute(self) -> NoReturn:
        while True:
            frames = await compute_batch(self._stage, self._engine, self._worker, self._reports.failure)
            if frames is None:
                self._worker.nothing_waits()
                self._wake.clear()
                await self._wake.wait()
                continue
            for frame in frames:
                await self._outgoing.put(frame)


async def compute_batch(
    stage: StageProtocol,
    engine: Engine,
    worker: Worker,
    report_failure: FailureReport,
    *,
    is_paused: Callable[[], bool] = lambda: False,
) -> list[Frame] | None:
    """Run what waits at the Stage as one Batch; return the Frames to send on, or None when nothing waits.

    is_paused: whether the engine may have other Layers by the time of its next job.
    """
    batch = stage.take()
    if batch is None:
        return None
    try:
        output = None
        while output is None:
            try:
                meter, before_s = worker.meter, worker.meter.busy_s
                output = await worker.run(
                    f"{len(batch.segments)} segments, {batch.num_tokens} tokens", partial(engine.forward, batch)
                )
                meter.work = meter.work.plus(batch, meter.busy_s - before_s)  # of an Epoch that is over, perhaps
            except SequenceError as error:  # of some: the others of the Batch are run without them
                seq_ids = tuple(map(SeqId, error.seq_ids))
                log.warning("sequences_refused", seq_ids=seq_ids, error=str(error))
                report_failure(batch.epoch, seq_ids, error)
                batch = stage.drop(batch, seq_ids)
                # Nothing may come after the reset of the engine, or meet its other Layers.
                if batch.epoch != stage.epoch or is_paused():
                    return stage.fail(batch)[1]
    except MdiqError as error:
        log.error("forward_failed", segments=len(batch.segments), tokens=batch.num_tokens, error=str(error))
        seq_ids, frames = stage.fail(batch)
        if seq_ids:
            report_failure(batch.epoch, seq_ids, error)
        return frames
    try:
        return stage.complete(batch, output)
    except MdiqError as error:
        raise EngineError(f"stage: {error}") from error
