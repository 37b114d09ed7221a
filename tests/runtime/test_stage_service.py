"""A Stage at work while its Epoch changes."""

import time
from typing import Any, cast

import pytest

from mdiq.core import wire
from mdiq.core.frame import NO_ROWS, Batch, Frame, FrameKind, Segment, TokenIds
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, LayerRange, SeqId
from mdiq.errors import SequenceError
from mdiq.runtime.loops import Worker
from mdiq.runtime.stage_service import StageService, compute_batch
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


async def test_no_more_waits_at_a_stage_than_its_kv_cache_holds_whatever_the_node_before_sends() -> None:
    stage, engine = StageProtocol(), ChainEngine(LayerRange(0, 2), is_last=False)
    stage.assign(Epoch(1), is_last=False)
    worker = Worker(time.monotonic, Tracer(is_on=False))
    service = StageService(stage, engine, cast(Any, None), worker, cast(Any, None), kv_tokens=8)

    def send(seq_id: int, length: int = 0) -> None:
        kind = FrameKind.HIDDEN if length else FrameKind.RELEASE
        payload = TokenIds(tuple(range(length))) if length else NO_ROWS
        service._accept(Frame(Epoch(1), kind, (Segment(SeqId(seq_id), 0, length),), payload, 8))

    for seq_id in range(1, 4):
        send(seq_id, 2)
    with pytest.raises(wire.BadFrame, match="more waits than the KV cache holds") as refused:
        send(4, 3)
    assert refused.value.reason == "full" and stage.num_waiting == 3
    send(4, 2)
    for _ in range(3):
        with pytest.raises(wire.BadFrame):
            send(5)
    assert stage.take() is not None  # its tokens are in the cache now
    send(5)
    send(6, 7)
    with pytest.raises(wire.BadFrame):
        send(7)
    await worker.aclose()
