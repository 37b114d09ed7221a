"""The Starter at work: the ring protocol, its own Stage, the head and the sampler. Owns every stream to a caller."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn

import structlog

from mdiq.core import control, wire
from mdiq.core.frame import Frame, FrameKind, Segment
from mdiq.core.hops import WINDOW, HopMeter
from mdiq.core.logprobs import Drawn, Logprobs
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import Ended, HeadRow, Inject, Suspect
from mdiq.core.sequence import Sequence, TokenEvent
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, RingSpec, SeqId
from mdiq.errors import LocalProtocolError, MdiqError, RingError
from mdiq.runtime.bursts import AwaitedBursts
from mdiq.runtime.head import Head
from mdiq.runtime.loops import EpochLinks, Worker, queue_burst, receive_frames, send_frames
from mdiq.runtime.recovery_times import RecoveryTimes
from mdiq.runtime.stage_service import compute_batch
from mdiq.runtime.starter_engine import StarterEngine
from mdiq.runtime.text_pipe import NoText, TextPipe, text_of

log = structlog.get_logger()

MAX_RETURNED = 16_384  # Segments that are back and not sampled yet: many more than are in flight
PROBE_S, FIRST_PROBES_S = 1.0, 0.05  # the first ones follow each other soon, so that the pace is right from the start


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """What a caller gets: a step of its Sequence, its text, when, and when it entered the Ring, by the clock.

    prompt_logprobs: those of the prompt's tokens from the second one on, with the first token if they are wanted.
    stop_text: the stop text that ended it. cached_tokens: of the prompt, which were in the KV cache.
    """

    step: TokenEvent
    text: str
    at_s: float
    entered_s: float | None = None
    prompt_logprobs: Logprobs | None = None
    stop_text: str | None = None
    cached_tokens: int = 0


@dataclass(slots=True)
class _Stream:
    pipe: TextPipe
    events: "asyncio.Queue[StreamEvent]"


class StarterService:
    """Serves Sequences on one Ring. ``run`` keeps it going; ``stream`` is what callers use.

    links: to the other Stages, or None when this Stage is the only one.
    make_pipe: gives each Sequence its TextPipe.
    plan_pace: called with how long the Hops take when that has changed noticeably; returns the Ring's new pace. None
    disables the measuring.
    """

    def __init__(
        self,
        ring: RingProtocol,
        stage: StageProtocol,
        engine: StarterEngine,
        links: EpochLinks | None,
        worker: Worker,
        *,
        make_pipe: Callable[[Sequence], TextPipe] = lambda _: NoText(),
        plan_pace: Callable[[float], Awaitable[RingSpec]] | None = None,
    ) -> None:
        self._ring = ring
        self._stage = stage
        self._engine = engine
        self._links = links
        self._worker = worker
        self._clock = worker.clock
        self._make_pipe = make_pipe
        self._plan_pace = plan_pace
        self._hops, self._new_hops_s = HopMeter(), 0.0
        self._probe_back = 0  # the newest of this Epoch
        self._head = Head(ring, engine, worker, self._deliver)
        self._outgoing: asyncio.Queue[Frame] = asyncio.Queue(maxsize=256)
        self._wake, self._rearm, self._is_pace_old = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._relinked, self._is_linked = asyncio.Event(), asyncio.Event()
        self._armed_for: float | None = None
        self._streams: dict[int, _Stream] = {}
        self._bursts = AwaitedBursts()
        self._ended: BaseException | None = None
        self._pause: RecoveryTimes | None = None  # of the newest pause

    async def run(self) -> None:
        """Receive, compute and send until cancelled, or until a loop fails; every stream ends with an error then."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._compute(), name="compute")
                tasks.create_task(self._watch_deadlines(), name="deadlines")
                tasks.create_task(self._serve_hops(), name="hops")
        finally:
            self.fail_all(RingError("starter: its loops have ended; see the log"))

    def pause(self) -> None:
        """Put nothing into the Ring until the next Epoch; streams stay open."""
        self._ring.pause()
        self._poll()

    def note_begun(self, times: RecoveryTimes) -> None:
        """Note in ``times`` that the Ring goes on after a pause, and from now on when what ran does."""
        times.begun(self._ring.resumed, self._clock())
        self._pause = times

    def _went_on(self, step: TokenEvent) -> None:
        if (times := self._pause) and times.went_on(step.index, self._clock(), has_token=step.token is not None):
            log.info("ring_has_replayed", **times.shown())

    @property
    def links(self) -> EpochLinks | None:
        """The Hops of this Epoch."""
        return self._links

    async def relink(self, links: EpochLinks | None) -> None:
        """Go on over these Hops, for the next Epoch; None: this Stage is the only one. Nothing uses others after this.

        What waits to leave is of an Epoch that is over.
        """
        while not self._outgoing.empty():
            self._outgoing.get_nowait()
        self._links, self._hops = links, HopMeter()
        self._is_linked.clear()
        self._relinked.set()
        await self._is_linked.wait()

    async def begin_epoch(self, epoch: Epoch, spec: RingSpec) -> None:
        """Serve on a new Ring from now on; unfinished Sequences are replayed there."""
        # The Stage first: no Batch of the old Epoch is taken and put into the cache after the engine has emptied it.
        self._stage.assign(epoch, is_last=spec.num_stages == 1)
        await self._worker.run_uncounted(self._engine.reset)
        self._head.clear()
        self._probe_back = 0
        self._ring.begin_epoch(epoch, spec)
        self._poll()

    async def stream(self, sequence: Sequence) -> AsyncGenerator[StreamEvent, None]:
        """Run a Sequence and yield its events; the last one carries the finish reason. Leaving early cancels it.

        Raises:
            CapacityError: it can never fit; see RingProtocol.submit.
            RingError: the Ring is gone.
        """
        if self._ended is not None:
            raise RingError(f"the ring has ended: {self._ended}")
        stream = _Stream(self._make_pipe(sequence), asyncio.Queue())
        self._ring.submit(sequence, self._clock())
        self._streams[sequence.index] = stream
        self._poll()
        try:
            while True:
                event = await stream.events.get()
                yield event
                if event.step.finish_reason is not None:
                    return
        finally:
            self._streams.pop(sequence.index, None)
            self.cancel(sequence.index)

    async def send_burst(self, burst: control.SendBurst) -> float:
        """Send a burst over the first Hop; return when it began to leave."""
        assert self._links is not None  # a Ring of one has no Hop
        return await queue_burst(burst, self._links.limits, self._outgoing, self._clock)

    def burst_arrived(self, number: int) -> "asyncio.Future[control.BurstArrived]":
        """Return a future of what comes of a burst over the last Hop; it fails when the Ring is gone."""
        return self._bursts.expect(number)

    def cancel(self, index: int) -> None:
        """End a Sequence; one that has ended is left alone."""
        self._ring.cancel(index)
        self._poll()

    def report_gaps(self, epoch: Epoch, seq_ids: tuple[SeqId, ...]) -> None:
        """Note that a Stage misses Frames of these Sequences; they are replayed."""
        if epoch == self._ring.epoch:
            self._ring.fault(seq_ids)
            self._poll()

    def report_failure(self, epoch: Epoch, seq_ids: tuple[SeqId, ...], error: MdiqError) -> None:
        """Note that a Stage could not compute these Sequences; they end with the error."""
        if epoch == self._ring.epoch:
            self._ring.fail(seq_ids, error)
            self._poll()

    def fail_all(self, error: MdiqError) -> None:
        """End every Sequence, and refuse new ones: the Ring is gone."""
        if self._ended is None:
            self._ended = error
            self._bursts.fail(error)
            self._ring.fail_all(error)
            self._poll()

    @property
    def ring(self) -> RingProtocol:
        """The protocol, for counts and figures."""
        return self._ring

    @property
    def hops_s(self) -> float | None:
        """Seconds of all Hops together, as measured; None when they were not."""
        return self._hops.hops_s

    @property
    def probes(self) -> tuple[int, int]:
        """Number of the newest PROBE that was sent, and of the newest of this Epoch that is back."""
        return self._hops.num_sent, self._probe_back

    async def _serve_hops(self) -> NoReturn:
        """Run the loops of the Hops, and those of other Hops after ``relink``."""
        while True:
            self._relinked.clear()
            self._is_linked.set()
            serving = asyncio.create_task(self._hop_loops(self._links), name="hop loops")
            relinked = asyncio.create_task(self._relinked.wait(), name="relinked")
            try:
                await asyncio.wait({serving, relinked}, return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    serving.result()
            finally:
                for task in (serving, relinked):
                    task.cancel()
                await asyncio.gather(serving, relinked, return_exceptions=True)

    async def _hop_loops(self, links: EpochLinks | None) -> NoReturn:
        async with asyncio.TaskGroup() as tasks:
            if links is not None:
                tasks.create_task(receive_frames(links, self._accept, self._worker), name="receive")
                tasks.create_task(send_frames(self._outgoing, links, self._worker), name="send")
                if self._plan_pace is not None:
                    tasks.create_task(self._probe_hops(), name="probe")
                    tasks.create_task(self._renew_pace(self._plan_pace), name="pace")
            await asyncio.get_running_loop().create_future()
        raise AssertionError("these loops do not end by themselves")

    async def _probe_hops(self) -> NoReturn:
        """Send a PROBE round again and again; those that do not return are not waited for."""
        while True:
            if self._ring.epoch:  # one that finds no place counts as well: a Hop may be stuck
                number = SeqId(self._hops.send(self._clock()))
                if not self._outgoing.full():
                    self._outgoing.put_nowait(Frame(self._ring.epoch, FrameKind.PROBE, (Segment(number, 0, 0),)))
            await asyncio.sleep(FIRST_PROBES_S if self._hops.num_sent < WINDOW else PROBE_S)

    def _probe_returned(self, frame: Frame) -> None:
        if frame.epoch == self._ring.epoch:
            self._probe_back = max(self._probe_back, frame.segments[0].seq_id)
            self._ring.heard(self._clock())
            self._poll()
        hops_s = self._hops.returned(frame.segments[0].seq_id, self._clock())
        if hops_s is not None:
            self._new_hops_s = hops_s
            self._is_pace_old.set()

    def renew_pace(self) -> None:
        """Have the pace planned anew, once it is known how long the Hops take."""
        if self._new_hops_s:
            self._is_pace_old.set()

    async def _renew_pace(self, plan_pace: Callable[[float], Awaitable[RingSpec]]) -> NoReturn:
        """Plan anew when the Hops take longer or less: not while a probe is received, since planning takes long."""
        while True:
            await self._is_pace_old.wait()
            self._is_pace_old.clear()
            hops_s = self._new_hops_s
            spec = await plan_pace(hops_s)
            log.info("pace_planned", hops_s=round(hops_s, 6))
            self._ring.pace(spec)
            self._poll()

    def _accept(self, frame: Frame) -> None:
        if frame.kind is FrameKind.PROBE:
            self._probe_returned(frame)
            return
        if frame.kind is FrameKind.BURST:
            self._bursts.frame_came(frame, self._clock())
            return
        if frame.kind is FrameKind.HIDDEN:
            # Only the last Stage sends here, and it sends rows for the head.
            raise wire.BadFrame("kind", f"{frame}: activations came to the starter; check the order of the ring's hops")
        if self._head.num_waiting + len(frame.segments) > MAX_RETURNED:
            raise wire.BadFrame("full", f"{frame}: too many rows wait for the head; look at the last node")
        self._head.add(frame)
        self._worker.work_waits()
        self._wake.set()

    async def _compute(self) -> NoReturn:
        while True:
            # Returned rows first: their tokens are what the next Batch is made of.
            if not (await self._sample_returned() | await self._run_batch() | await self._score_prompts()):
                self._worker.nothing_waits()
                self._wake.clear()
                await self._wake.wait()

    async def _run_batch(self) -> bool:
        if self._ring.is_paused:  # what waits is of an Epoch that is over, and the Layers may be others by now
            return False
        frames = await compute_batch(
            self._stage, self._engine, self._worker, self.report_failure, is_paused=lambda: self._ring.is_paused
        )
        if frames is None:
            return False
        for frame in frames:
            if self._links is None:
                if frame.kind is FrameKind.HIDDEN:
                    raise LocalProtocolError(f"{frame}: no stage comes after the starter's, and it lacks layers")
                self._head.add(frame)
            else:
                await self._outgoing.put(frame)
        return True

    async def _sample_returned(self) -> bool:
        if not await self._head.sample():
            return False
        self._poll()
        return True

    async def _score_prompts(self) -> bool:
        if not await self._head.score():
            return False
        self._poll()
        return True

    def _deliver(self, row: HeadRow, drawn: Drawn) -> None:
        token = drawn.token
        if not self._ring.awaits_token(row.seq_id):
            return
        stream = self._streams.get(row.sequence.index)
        text = "" if stream is None else text_of(stream.pipe, row.sequence, token)
        stop_matched = stream is not None and stream.pipe.stop_matched
        step = self._ring.sampled(
            row.seq_id, token, stop_matched=stop_matched, now=self._clock(), logprob=drawn.logprob
        )
        if step is None:
            return
        self._went_on(step)
        if stream is not None:
            if step.finish_reason is not None:
                text += stream.pipe.finish()
            # Until now the prompt's log-probabilities might have had to be completed by a Replay.
            is_first = step.position == len(row.sequence.prompt)
            scored = row.sequence.prompt_logprobs if is_first else None
            entered_s, cached = row.sequence.entered_at, row.sequence.cached_prompt_tokens
            stop_text = stream.pipe.stop_text
            stream.events.put_nowait(StreamEvent(step, text, self._clock(), entered_s, scored, stop_text, cached))

    def _poll(self) -> None:
        gaps: list[SeqId] = []
        for action in self._ring.poll(self._clock()):
            match action:
                case Inject(frame):
                    gaps += self._stage.receive(frame).gaps
                case Ended(step):
                    self._went_on(step)
                    if stream := self._streams.get(step.index):
                        stream.events.put_nowait(StreamEvent(step, stream.pipe.finish(), self._clock()))
                case Suspect(epoch):
                    log.warning("lap_overdue", epoch=epoch)
        if gaps:
            self._ring.fault(gaps)
            self._poll()
        if self._stage.has_work:
            self._worker.work_waits()
            self._wake.set()
        due = self._ring.next_deadline()
        if due is not None and (self._armed_for is None or due < self._armed_for):
            self._rearm.set()

    async def _watch_deadlines(self) -> NoReturn:
        """Poll when the ring protocol's next deadline comes."""
        while True:
            self._rearm.clear()
            self._armed_for = due = self._ring.next_deadline()
            try:
                async with asyncio.timeout(None if due is None else max(due - self._clock(), 0.0)):
                    await self._rearm.wait()
            except TimeoutError:
                self._poll()
