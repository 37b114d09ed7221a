"""Whole Rings of services with chain engines, over memory links or loopback sockets. No torch, no processes."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as AbstractSequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import pytest
import zmq.asyncio

from mdiq.core import wire
from mdiq.core.control import BurstArrived
from mdiq.core.frame import Buffer
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import Action
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, LayerRange, RingSpec
from mdiq.runtime.loops import EpochLinks, Worker
from mdiq.runtime.stage_service import StageService
from mdiq.runtime.starter_service import StarterService, StreamEvent
from mdiq.telemetry.trace import Tracer
from mdiq.transport.memory import Copies, MemoryLink, once
from mdiq.transport.push_pull import PullSource, PushSink
from tests.fakes import VOCAB, ChainEngine, ChainStarter, chain_answer

RING_KEY = b"the ring's key, of thirty bytes"
NUM_LAYERS = 6
LIMITS = wire.WireLimits(max_width=4, max_context=512)
END_OF_ATTACK = b"a part that begins no frame, and that WatchedSource knows"

MakeEngine = Callable[[LayerRange, bool], ChainEngine]


class WatchedRing(RingProtocol):
    """A RingProtocol that tells what was submitted, and when nothing is left to do in the Ring."""

    def __init__(self, settings: RingSettings) -> None:
        super().__init__(settings)
        self.quiet = asyncio.Event()
        self.submitted: asyncio.Queue[int] = asyncio.Queue()

    def submit(self, sequence: Sequence, now: float) -> None:
        super().submit(sequence, now)
        self.submitted.put_nowait(sequence.index)

    def poll(self, now: float) -> list[Action]:
        actions = super().poll(now)
        if self.is_quiet and not actions:
            self.quiet.set()
        else:
            self.quiet.clear()
        return actions


class WatchedSource:
    """A FrameSource that tells when all that came before END_OF_ATTACK has been dealt with."""

    def __init__(self, source: PullSource) -> None:
        self._source = source
        self._is_last = False
        self.attack_over = asyncio.Event()

    @property
    def bytes_in(self) -> int:
        return self._source.bytes_in

    @property
    def inflow(self) -> int:
        return self._source.inflow

    async def receive(self) -> list[Buffer]:
        if self._is_last:
            self.attack_over.set()
        parts = await self._source.receive()
        self._is_last = parts == [END_OF_ATTACK]
        return parts

    async def aclose(self) -> None:
        await self._source.aclose()


class RecordingSink:
    """A FrameSink that keeps copies of what it sent."""

    def __init__(self, sink: PushSink) -> None:
        self._sink = sink
        self.sent: list[list[bytes]] = []

    @property
    def bytes_out(self) -> int:
        return self._sink.bytes_out

    async def send(self, parts: AbstractSequence[Buffer]) -> None:
        self.sent.append([bytes(part) for part in parts])
        await self._sink.send(parts)

    async def aclose(self) -> None:
        await self._sink.aclose()


class Ring:
    """A Ring at work; Stage 0 is the Starter's."""

    def __init__(
        self,
        sources: list[Any],
        sinks: list[Any],
        *,
        settings: RingSettings,
        spec: RingSpec,
        make_engine: MakeEngine | None,
        plan_pace: Callable[[float], Awaitable[RingSpec]] | None = None,
    ) -> None:
        self.sources, self.sinks = sources, sinks
        self.endpoints: list[str] = []
        self.bursts: asyncio.Queue[tuple[int, BurstArrived]] = asyncio.Queue()  # with the Stage that they came to
        self.protocol = WatchedRing(settings)
        size = spec.num_stages
        cuts = [NUM_LAYERS * i // size for i in range(size + 1)]
        layers = [LayerRange(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]
        make = make_engine or (lambda layers, is_last: ChainEngine(layers, is_last=is_last))
        self.engines = [ChainStarter(layers[0], is_last=size == 1)]
        self.engines += [make(layers[i], i == size - 1) for i in range(1, size)]  # type: ignore[misc]
        self.stages = [StageProtocol() for _ in range(size)]
        self.tracer = Tracer(is_on=False)
        self.workers = [Worker(time.monotonic, self.tracer) for _ in range(size)]
        links = [
            EpochLinks(
                sources[i],
                sinks[i],
                wire.hop_key(RING_KEY, f"{i}"),
                wire.hop_key(RING_KEY, f"{(i + 1) % size}"),
                LIMITS,
            )
            for i in range(size)
        ]
        self.starter = StarterService(
            self.protocol,
            self.stages[0],
            self.engines[0],
            links[0] if size > 1 else None,
            self.workers[0],
            plan_pace=plan_pace,
        )
        self.services: list[StageService] = []
        for i in range(1, size):
            self.stages[i].assign(Epoch(1), is_last=i == size - 1)
            self.services.append(
                StageService(
                    self.stages[i],
                    self.engines[i],
                    links[i],
                    self.workers[i],
                    Reports(self, i),
                    kv_tokens=spec.kv_tokens,
                )
            )
        self.tasks = [asyncio.create_task(run()) for run in (self.starter.run, *(s.run for s in self.services))]

    async def stream(self, sequence: Sequence, on_event: Callable[[StreamEvent], None] | None = None) -> list[int]:
        """Run a Sequence to its end and return its tokens."""
        tokens: list[int] = []
        async with aclosing(self.starter.stream(sequence)) as events:
            async for event in events:
                if event.step.token is not None:
                    tokens.append(event.step.token)
                if on_event is not None:
                    on_event(event)
        assert sequence.finish_reason is not None
        return tokens

    async def check(self, *sequences: Sequence) -> None:
        """Run Sequences at once, and compare each with the single-process answer."""
        answers = await asyncio.gather(*(self.stream(sequence) for sequence in sequences))
        for sequence, tokens in zip(sequences, answers, strict=True):
            assert sequence.finish_reason is FinishReason.LENGTH, sequence.error
            assert tokens == right_answer(sequence), f"sequence {sequence.index}"

    async def check_quiet(self) -> None:
        """Wait until the Ring has nothing left to do, and see that no Stage holds anything."""
        async with asyncio.timeout(10.0):
            await self.protocol.quiet.wait()
            self.protocol.drop_prefixes()
            self.starter.cancel(-1)  # has the Starter look at what is to be done
            await self.protocol.quiet.wait()
        assert self.protocol.kv_reserved_tokens == 0
        assert [engine.states for engine in self.engines] == [{}] * len(self.engines)

    async def aclose(self) -> None:
        failed = [task.exception() for task in self.tasks if task.done()]
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for link in (*self.sinks, *self.sources):
            await link.aclose()
        for worker in self.workers:
            await worker.aclose()
        assert not failed, "a service ended by itself"


class Reports:
    """What a Stage of a Ring tells its Starter: faults at once, bursts through the Ring's queue."""

    def __init__(self, ring: Ring, stage: int) -> None:
        self.gaps = ring.starter.report_gaps
        self.failure = ring.starter.report_failure
        self._ring = ring
        self._stage = stage

    def burst_arrived(self, arrived: BurstArrived) -> None:
        self._ring.bursts.put_nowait((self._stage, arrived))


def make_sequence(index: int, *, num_prompt: int = 5, max_tokens: int = 12) -> Sequence:
    prompt = tuple((index * 7 + i * 3) % VOCAB for i in range(num_prompt))
    return Sequence(index, prompt, SamplingParams(max_tokens=max_tokens))


def right_answer(sequence: Sequence) -> list[int]:
    return chain_answer(sequence.prompt, NUM_LAYERS, sequence.params.max_tokens)


OpenRing = Callable[..., AbstractAsyncContextManager[Ring]]


@pytest.fixture
def open_ring() -> OpenRing:
    """``async with open_ring(num_stages, kind)`` gives a Ring; kind is "memory" or "sockets".

    copies: the faults of all memory links; kv_tokens, caps: of the RingSpec; make_engine: makes the engines of the
    Stages behind the Starter; plan_pace: of the Starter, which measures the Hops for it.
    """

    @asynccontextmanager
    async def open_it(
        num_stages: int,
        kind: str = "memory",
        *,
        settings: RingSettings | None = None,
        copies: Copies = once,
        kv_tokens: int = 4_096,
        caps: tuple[int, ...] = (1, 1, 2, 4),
        make_engine: MakeEngine | None = None,
        plan_pace: Callable[[float], Awaitable[RingSpec]] | None = None,
    ) -> AsyncIterator[Ring]:
        spec = RingSpec(num_stages, kv_tokens, context_tokens=256, caps=caps)
        ring_settings = settings or RingSettings(chunk_tokens=4, prefill_tokens=16)
        if kind == "memory":
            links = [MemoryLink(copies=copies) for _ in range(num_stages)]
            sinks = [links[(i + 1) % num_stages] for i in range(num_stages)]
            ring = Ring(links, sinks, settings=ring_settings, spec=spec, make_engine=make_engine, plan_pace=plan_pace)
            try:
                await ring.starter.begin_epoch(Epoch(1), spec)
                yield ring
            finally:
                await ring.aclose()
            return
        context = zmq.asyncio.Context()
        bound = [await PullSource.bind(context, "tcp://127.0.0.1:0") for _ in range(num_stages)]
        endpoints = [source.endpoint for source in bound]
        pushed = [
            RecordingSink(await PushSink.connect(context, endpoints[(i + 1) % num_stages])) for i in range(num_stages)
        ]
        watched = [WatchedSource(source) for source in bound]
        ring = Ring(watched, pushed, settings=ring_settings, spec=spec, make_engine=make_engine, plan_pace=plan_pace)
        ring.endpoints = endpoints
        try:
            await ring.starter.begin_epoch(Epoch(1), spec)
            yield ring
        finally:
            await ring.aclose()
            context.destroy(linger=0)

    return open_it
