"""The loops that every Stage runs: receive, compute, send. They overlap in asyncio; the protocols stay free of it.

All protocol calls happen on the event loop's thread and never await inside, so no state machine needs a lock. Maths
runs in one worker thread per Node, and nothing spins: every loop sleeps on a socket, a queue or an event.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, TypeVar

import structlog

from mdiq.core import wire
from mdiq.core.control import SendBurst
from mdiq.core.frame import Buffer, Frame
from mdiq.core.hop_survey import burst_frames
from mdiq.core.work import Work
from mdiq.errors import MdiqError, RemoteProtocolError, RingError, first_of
from mdiq.telemetry.trace import COMPUTE, Tracer
from mdiq.transport.base import FrameSink, FrameSource
from mdiq.transport.junk import JunkBudget

log = structlog.get_logger()

LARGE_BYTES = 2**20
"""A tag over as many bytes is computed in a thread: 1.3 ms on a desktop machine, where a thread costs 0.1 ms."""
CLOSE_S = 20.0  # a service that ends is killed by its manager 30 s after it was told to
Clock = Callable[[], float]
Progress = Callable[[int, int], None]
"""Called with (done, total) after each step of a long job."""
T = TypeVar("T")

# Threads of their own: a Hop would seem to stand still while the others are busy with long texts.
_large_frames = ThreadPoolExecutor(2, thread_name_prefix="frames")


@dataclass(frozen=True, slots=True)
class EpochLinks:
    """A Stage's two Hops in an Epoch: where Frames come from and go to, the keys that tag them, and their limits."""

    source: FrameSource
    sink: FrameSink
    receive_key: bytes
    send_key: bytes
    limits: wire.WireLimits


class Supervisor:
    """Runs loops until ``aclose``; calls ``on_failed`` with the reason when one ends before, in whatever way."""

    def __init__(self, on_failed: Callable[[MdiqError], None]) -> None:
        self._on_failed = on_failed
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False

    def run(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        """Run a loop; its name stands in the error if it fails in a way that nobody has foreseen."""
        task = asyncio.create_task(loop, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def aclose(self) -> None:
        """Cancel all loops and wait for their ends."""
        self._is_closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_failed(loop_failed(task.get_name(), error))
        elif not self._is_closing:
            how = "was cancelled" if task.cancelled() else "returned"
            log.error("loop_ended", loop=task.get_name(), how=how)
            self._on_failed(RingError(f"{task.get_name()}: its loop {how} while it was needed; this is a bug in mdiq"))


class GivenUp(Exception):
    """Ends a long job from within: nobody waits for its result any more."""


@dataclass(slots=True)
class Meter:
    """What a Node's loops have done since its assignment.

    busy_s: seconds in which the worker computed.
    waiting_s: seconds in which work waited while the worker did not compute.
    work: its forwards.
    dropped: Frames that were refused, by reason; since the Node began to listen.
    """

    busy_s: float = 0.0
    waiting_s: float = 0.0
    work: Work = Work()
    dropped: Counter[str] = field(default_factory=Counter)


class Worker:
    """The one thread that computes, with its meter, and with the clock and tracer of its Node.

    initialize: called once in the thread, for settings that torch keeps per thread.
    loop_clock: returns the CPU seconds of the event loop's thread; called there.
    """

    def __init__(
        self,
        clock: Clock,
        tracer: Tracer,
        initialize: Callable[[], None] = lambda: None,
        *,
        loop_clock: Clock = time.thread_time,
    ) -> None:
        self.clock = clock
        self.tracer = tracer
        self._loop_clock, self._loop_since_s = loop_clock, loop_clock()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="mdiq-compute", initializer=initialize)
        self._work_since: float | None = None
        self._jobs: set[Future[Any]] = set()  # queued or running, also those that nobody waits for any more
        self._is_closing = False
        self._last_progress_s = clock()
        self.meter = Meter()

    @property
    def has_work(self) -> bool:
        """Whether anything waits for the worker or runs in it."""
        return bool(self._jobs) or self._work_since is not None

    @property
    def last_progress_s(self) -> float:
        """When, by the clock, a job last ended or told of its progress."""
        return self._last_progress_s

    @property
    def work(self) -> Work:
        """The forwards since the meter was reset, and what the event loop has taken since then."""
        return replace(self.meter.work, handling_s=max(self._loop_clock() - self._loop_since_s, 0.0))

    def note_progress(self) -> None:
        """Say that a job goes on: a watchdog does not take it for a stuck one then. From any thread."""
        self._last_progress_s = self.clock()

    def work_waits(self) -> None:
        """Note that there is work: from now on an idle worker is one that lets work wait."""
        if not self._jobs and self._work_since is None:
            self._work_since = self.clock()

    async def run(self, label: str, job: Callable[[], T]) -> T:
        """Run ``job`` in the worker thread and return its result; it counts as compute time."""
        result, start_s, stop_s = await self._timed(job)
        self.meter.busy_s += stop_s - start_s
        if self._work_since is not None:
            self.meter.waiting_s += max(start_s - self._work_since, 0.0)
        # What arrived meanwhile waits from this moment on; the compute loop clears it when nothing did.
        self._work_since = stop_s
        self.tracer.add(COMPUTE, label, start_s, stop_s)
        return result

    async def run_uncounted(self, job: Callable[[], T]) -> T:
        """Run ``job``, which is short, in the worker thread outside of all figures."""
        result, _, _ = await self._timed(job)
        return result

    async def run_long(self, job: Callable[[Progress], T], on_progress: Progress = lambda *_: None) -> T:
        """Run ``job`` in the worker thread outside of all figures: loading, measuring.

        job: called with a function that it calls with (done, total) after each of its steps. A watchdog sees by that
        how it goes on, and a job that nobody waits for any more ends there. on_progress: called with the same on the
        event loop.
        """
        loop = asyncio.get_running_loop()
        is_given_up = False

        def note(done: int, total: int) -> None:
            if is_given_up or self._is_closing:
                raise GivenUp
            self.note_progress()
            loop.call_soon_threadsafe(on_progress, done, total)

        try:
            return await self.run_uncounted(lambda: job(note))
        finally:
            is_given_up = True

    def nothing_waits(self) -> None:
        """Note that the worker is idle for want of work."""
        self._work_since = None

    def reset_meter(self) -> None:
        """Begin to count time anew. Refused Frames stay: a stranger's come at any time."""
        self.meter = Meter(dropped=self.meter.dropped)
        self._loop_since_s = self._loop_clock()
        self._work_since = None

    async def aclose(self) -> None:
        """End the thread after its running job, a long one after its step; wait for that, at most CLOSE_S."""
        self._is_closing = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        ending = [asyncio.wrap_future(job) for job in self._jobs]
        for job in ending:
            job.add_done_callback(lambda job: job.cancelled() or job.exception())  # whoever waited has it too
        if ending and (await asyncio.wait(ending, timeout=CLOSE_S))[1]:
            log.warning("job_goes_on", waited_s=CLOSE_S, text="it holds its memory until it ends")

    async def _timed(self, job: Callable[[], T]) -> tuple[T, float, float]:
        def timed() -> tuple[T, float, float]:
            start_s = self.clock()
            result = job()
            return result, start_s, self.clock()

        running = self._executor.submit(timed)
        self._jobs.add(running)
        running.add_done_callback(self._ended)
        return await asyncio.wrap_future(running)

    def _ended(self, job: "Future[Any]") -> None:
        self.note_progress()
        self._jobs.discard(job)


def make_worker(clock: Clock, tracer: Tracer, threads: int) -> Worker:
    """Return the Node's worker; its thread count is set inside the thread too, since torch keeps it per thread."""

    def initialize() -> None:
        import torch  # if nobody has yet, it is the first job of this thread that waits for it

        torch.set_num_threads(threads)

    return Worker(clock, tracer, initialize)


def loop_failed(name: str, error: BaseException) -> MdiqError:
    """Return why the Ring ends when a loop of this name has failed; what nobody has foreseen is logged whole."""
    first = first_of(error)
    if isinstance(first, MdiqError):
        return first
    log.error("loop_failed", loop=name, exc_info=first)
    return RingError(f"{name}: {first!r}; see the log")


async def receive_frames(links: EpochLinks, accept: Callable[[Frame], None], worker: Worker) -> NoReturn:
    """Decode what arrives and hand it to ``accept``, for ever; what is not a legal Frame is dropped and counted."""
    junk = JunkBudget()
    while True:
        parts = await links.source.receive()
        start_s = worker.clock()
        try:
            decode = partial(wire.decode, parts, links.receive_key, links.limits)
            frame = await _in_thread(decode) if _num_bytes(parts) >= LARGE_BYTES else decode()
            accept(frame)
        except RemoteProtocolError as error:
            reason = error.reason if isinstance(error, wire.BadFrame) else "protocol"
            worker.meter.dropped[reason] += 1
            log.warning("frame_dropped", reason=reason, error=str(error))
            await junk.spent(worker.clock() - start_s)
            continue
        worker.tracer.add("receive", f"{len(frame.segments)} segments", start_s, worker.clock())


async def send_frames(queue: "asyncio.Queue[Frame]", links: EpochLinks, worker: Worker) -> NoReturn:
    """Send what is queued on the Hop, for ever."""
    while True:
        frame = await queue.get()
        start_s = worker.clock()
        encode = partial(wire.encode, frame, links.send_key)
        is_large = _num_bytes(frame.payload.parts()[2]) >= LARGE_BYTES
        await links.sink.send(await _in_thread(encode) if is_large else encode())
        worker.tracer.add("send", f"{len(frame.segments)} segments", start_s, worker.clock())


async def is_first(one: Coroutine[Any, Any, Any], other: Coroutine[Any, Any, Any]) -> bool:
    """Wait for one of two things; return whether the first one has come."""
    tasks = [asyncio.create_task(each) for each in (one, other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return not tasks[0].cancelled()


async def _in_thread(call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_large_frames, call)


def _num_bytes(parts: Sequence[Buffer]) -> int:
    return sum(memoryview(part).nbytes for part in parts)


async def queue_burst(burst: SendBurst, limits: wire.WireLimits, queue: "asyncio.Queue[Frame]", clock: Clock) -> float:
    """Queue the Frames of a burst; return when the first of them was on its way to the send loop."""
    frames = burst_frames(burst, limits)
    sent_s = clock()
    for frame in frames:
        await queue.put(frame)
    return sent_s
