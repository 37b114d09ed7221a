"""Loops: nothing that takes long runs on the event loop, Frames keep their order, and no loop ends unnoticed."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from mdiq.core import wire
from mdiq.core.frame import Buffer, Frame, FrameKind, Segment
from mdiq.core.types import Epoch, SeqId
from mdiq.errors import MdiqError, RingError
from mdiq.runtime.loops import LARGE_BYTES, EpochLinks, Supervisor, Worker, receive_frames, send_frames
from mdiq.telemetry.trace import Tracer
from mdiq.transport.memory import MemoryLink

KEY = b"the key of a hop, thirty bytes"
WIDTH = 4_096
LIMITS = wire.WireLimits(max_width=WIDTH, max_context=1_024)


def _frame(number: int, num_rows: int) -> Frame:
    payload = wire.WirePayload("f32", WIDTH, memoryview(bytes(num_rows * WIDTH * 4)))
    return Frame(Epoch(1), FrameKind.HIDDEN, (Segment(SeqId(number), 0, num_rows),), payload)


async def test_tags_of_large_frames_are_computed_in_a_thread_and_frames_keep_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_loop: list[tuple[int, bool]] = []
    make_tag = wire.make_tag

    def noted(key: bytes, *parts: Buffer) -> bytes:
        num_bytes = sum(memoryview(part).nbytes for part in parts)
        on_loop.append((num_bytes, threading.current_thread() is threading.main_thread()))
        return make_tag(key, *parts)

    monkeypatch.setattr(wire, "make_tag", noted)
    link, worker = MemoryLink(), Worker(time.monotonic, Tracer(is_on=False))
    links = EpochLinks(link, link, KEY, KEY, LIMITS)
    queue: asyncio.Queue[Frame] = asyncio.Queue()
    arrived: asyncio.Queue[Frame] = asyncio.Queue()
    tasks = [
        asyncio.create_task(send_frames(queue, links, worker)),
        asyncio.create_task(receive_frames(links, arrived.put_nowait, worker)),
    ]
    sizes: Sequence[int] = (1, 256, 1, 2, 128, 1)
    for number, num_rows in enumerate(sizes):
        queue.put_nowait(_frame(number, num_rows))
    async with asyncio.timeout(20):
        frames = [await arrived.get() for _ in sizes]
    assert [frame.segments[0].seq_id for frame in frames] == list(range(len(sizes)))
    assert len(on_loop) == 2 * len(sizes)
    assert all(is_on_loop == (num_bytes < LARGE_BYTES) for num_bytes, is_on_loop in on_loop)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await worker.aclose()


async def test_beside_a_flood_of_junk_the_loop_is_free_for_others_and_frames_arrive() -> None:
    """The reader would otherwise run all the time: the thread that computes waits for it wherever it needs Python."""
    link, worker = MemoryLink(), Worker(time.monotonic, Tracer(is_on=False))
    receiving: list[bytes] = []

    class Flood:
        """Has a message at once, whenever it is asked: junk, and every hundredth time a Frame."""

        bytes_in = inflow = 0

        async def receive(self) -> list[Buffer]:
            receiving.append(b"")
            if len(receiving) % 100:
                return [b"junk"] * 3
            return list(wire.encode(_frame(len(receiving), 1), KEY))

        async def aclose(self) -> None:
            await link.aclose()

    arrived: list[Frame] = []
    links = EpochLinks(Flood(), link, KEY, KEY, LIMITS)
    reading = asyncio.create_task(receive_frames(links, arrived.append, worker), name="receive")
    cpu_s, start_s = time.thread_time(), time.monotonic()
    await asyncio.sleep(0.5)
    used = (time.thread_time() - cpu_s) / (time.monotonic() - start_s)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await worker.aclose()
    assert arrived
    assert worker.meter.dropped
    assert used < 0.6  # a fifth, and what waking up costs


async def _returns() -> None:
    pass


async def _waits() -> None:
    await asyncio.Event().wait()


async def _is_cancelled() -> None:
    waiting = asyncio.get_running_loop().create_future()
    waiting.cancel()
    await waiting


@pytest.mark.parametrize(("loop", "how"), [(_returns, "returned"), (_is_cancelled, "was cancelled")])
async def test_a_loop_that_ends_while_it_is_needed_is_a_failure_that_names_it(
    loop: Callable[[], Coroutine[Any, Any, None]], how: str
) -> None:
    failed: asyncio.Queue[MdiqError] = asyncio.Queue()
    loops = Supervisor(failed.put_nowait)
    loops.run(_waits(), "another")
    loops.run(loop(), "coordinator")
    async with asyncio.timeout(20):
        error = await failed.get()
    assert isinstance(error, RingError) and f"coordinator: its loop {how}" in str(error)
    await loops.aclose()
    assert failed.empty(), "a loop that is closed has not failed"


async def test_a_loop_that_returns_when_it_is_closed_has_not_failed() -> None:
    failed: list[MdiqError] = []
    loops = Supervisor(failed.append)

    async def ends_well() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    loops.run(ends_well(), "gate")
    await asyncio.sleep(0)
    await loops.aclose()
    assert failed == []
