"""A Stage at work while its Epoch changes."""

import time

from mdiq.core.frame import Batch, Frame, FrameKind, Segment, TokenIds
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, LayerRange, SeqId
from mdiq.errors import SequenceError
from mdiq.runtime.loops import Worker
from mdiq.runtime.stage_service import compute_batch
from mdiq.telemetry.trace import Tracer
from tests.fakes import ChainEngine, ChainRows


async def test_what_is_left_of_a_batch_is_not_run_after_the_engine_was_reset_for_a_new_epoch() -> None:
    """Its Sequences would hold room in the KV cache that no release frees."""
    stage = StageProtocol()
    stage.assign(Epoch(1), is_last=False)
    segments = tuple(Segment(SeqId(i), 0, 1) for i in (1, 2))
    stage.receive(Frame(Epoch(1), FrameKind.HIDDEN, segments, TokenIds((5, 6)), 8))
    engine = ChainEngine(LayerRange(0, 2), is_last=False)

    def forward(batch: Batch) -> ChainRows:
        if batch.segments == segments:
            stage.assign(Epoch(2), is_last=False)  # as Begin does while a Batch runs
            engine.reset()
            raise SequenceError("no room", (1,))
        return engine.forward(batch)

    refusing = ChainEngine(LayerRange(0, 2), is_last=False)
    refusing.forward = forward  # type: ignore[method-assign]
    worker = Worker(time.monotonic, Tracer(is_on=False))
    assert await compute_batch(stage, refusing, worker, lambda *_: None) == []
    await worker.aclose()
    assert engine.states == {}
    stage.receive(Frame(Epoch(2), FrameKind.HIDDEN, (Segment(SeqId(3), 0, 1),), TokenIds((5,)), 8))
    assert stage.has_work
