"""A whole Ring in virtual time, with the faults that a seed draws. No sockets, no threads, no clock: an event heap.

The protocols under test are the product's own; the world plays the network, the processes and the coordinator.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from mdiq.core import wire
from mdiq.core.frame import Batch, Frame
from mdiq.core.ring import Ended, Inject, RingProtocol, RingSettings, Suspect
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, LayerRange, RingSpec, SeqId
from mdiq.errors import EngineError, MdiqError, RemoteProtocolError
from tests.fakes import VOCAB, ChainEngine, chain_answer, chain_token

RING_KEY = b"simulated ring k"
CONTEXT = 64
MOST_EVENTS = 60_000
MOST_SECONDS = 4_000.0


@dataclass(frozen=True)
class Faults:
    """How the network and the processes of one schedule misbehave: probabilities and seconds."""

    drop: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    jitter_s: float = 0.0
    late: float = 0.0
    lost_report: float = 0.0
    engine_error: float = 0.0
    num_crashes: int = 0
    cancel: float = 0.0
    deadline: float = 0.0

    @classmethod
    def drawn(cls, rng: random.Random) -> "Faults":
        """Draw a mix; every fault is absent in some schedules, so that each is met alone and with others."""

        def maybe(value: float) -> float:
            return rng.random() * value if rng.random() < 0.5 else 0.0

        return cls(
            drop=maybe(0.08),
            duplicate=maybe(0.2),
            corrupt=maybe(0.05),
            jitter_s=maybe(0.2),
            late=maybe(0.05),
            lost_report=maybe(0.5),
            engine_error=maybe(0.004),
            num_crashes=rng.choice([0, 0, 1, 2, 3]),
            cancel=maybe(0.3),
            deadline=maybe(0.2),
        )

    @property
    def can_fail(self) -> bool:
        """Whether a Sequence may end with an error or anything is lost at all."""
        return bool(self.drop or self.corrupt or self.late or self.engine_error or self.num_crashes or self.jitter_s)


@dataclass
class Node:
    """One process: its part of the model in the current Epoch, and whether it runs."""

    name: int
    stage: StageProtocol = field(default_factory=StageProtocol)
    engine: ChainEngine | None = None
    is_up: bool = True
    life: int = 0


class World:
    """One schedule, all of it drawn from ``seed``."""

    def __init__(self, seed: int, faults: Faults | None = None) -> None:
        self.rng = random.Random(seed)
        self.faults = faults if faults is not None else Faults.drawn(self.rng)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._num_pushed = 0
        num_nodes = self.rng.randint(1, 5)
        self.num_layers = self.rng.randint(num_nodes, 8)
        self.nodes = [Node(i) for i in range(num_nodes)]
        self.ring_nodes: list[Node] = []
        self.ring = RingProtocol(
            RingSettings(
                chunk_tokens=self.rng.choice([2, 3, 7, 64]),
                prefill_tokens=self.rng.choice([4, 16, 64]),
                max_live=self.rng.choice([1, 3, 8]),
                lap_timeout_s=3.0,
                token_timeout_s=0.05,
                max_replays=6,
            )
        )
        self.epoch = Epoch(0)
        self.sequences: list[Sequence] = []
        self.told: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason] = {}
        self._polled_for: float | None = None

    # -- running ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Play the schedule to its end, and fail if it hangs."""
        self._begin_epoch()
        for index in range(self.rng.randint(1, 8)):
            self._at(self.rng.random() * 3.0, lambda index=index: self._submit(index))
        for _ in range(self.faults.num_crashes):
            self._at(self.rng.random() * 4.0, self._crash)
        while self._events and self._num_events < MOST_EVENTS and self.now < MOST_SECONDS:
            self.now, _, event = heapq.heappop(self._events)
            self._num_events += 1
            event()
        assert not self._events, f"still busy after {self.now:.0f} s and {self._num_events} events"

    def check(self) -> None:
        """Compare every Sequence with the single-process answer."""
        assert self.ring.is_quiet, "the ring has unfinished business"
        assert self.ring.kv_reserved_tokens == 0, "KV tokens were not returned"
        for sequence in self.sequences:
            reason = self.ends[sequence.index]
            told = self.told[sequence.index]
            answer = chain_answer(
                sequence.prompt, self.num_layers, sequence.params.max_tokens, sequence.eos_token_ids
            )
            assert told == sequence.generated
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert told == answer, f"sequence {sequence.index}: {told} is not {answer}"
            else:
                assert told == answer[: len(told)], f"sequence {sequence.index}: {told} does not begin {answer}"
            if reason is FinishReason.ERROR:
                assert isinstance(sequence.error, MdiqError)
                assert self.faults.can_fail
        if not self.faults.num_crashes:
            for node in self.ring_nodes:
                assert node.engine is not None and not node.engine.states, f"node {node.name} leaks KV cache"

    def _at(self, delay: float, event: Callable[[], None]) -> None:
        self._at_time(self.now + delay, event)

    def _at_time(self, time: float, event: Callable[[], None]) -> None:
        self._num_pushed += 1
        heapq.heappush(self._events, (time, self._num_pushed, event))

    # -- the user ---------------------------------------------------------------------------------------------

    def _submit(self, index: int) -> None:
        rng = self.rng
        sequence = Sequence(
            index=index,
            prompt=tuple(rng.randrange(VOCAB) for _ in range(rng.choice([1, 1, 2, 5, 20]))),
            params=SamplingParams(max_tokens=rng.randint(1, 10)),
            eos_token_ids=frozenset({rng.randrange(VOCAB)}) if rng.random() < 0.3 else frozenset(),
            deadline=self.now + rng.random() * 4.0 if rng.random() < self.faults.deadline else None,
        )
        self.sequences.append(sequence)
        self.told[index] = []
        self.ring.submit(sequence, self.now)
        if rng.random() < self.faults.cancel:
            self._at(rng.random() * 3.0, lambda: self._cancel(index))
        self._poll()

    def _cancel(self, index: int) -> None:
        self.ring.cancel(index)
        self._poll()

    # -- the Starter ------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        for action in self.ring.poll(self.now):
            match action:
                case Inject(frame):
                    self._arrive(self.ring_nodes[0], frame)
                case Ended(event):
                    assert event.finish_reason is not None
                    self.ends[event.index] = event.finish_reason
                case Suspect():
                    pass
        due = self.ring.next_deadline()
        if due is not None and (self._polled_for is None or due < self._polled_for or self._polled_for <= self.now):
            self._polled_for = due
            self._at_time(max(due, self.now), self._poll)

    def _returned(self, frame: Frame) -> None:
        for head_row in self.ring.returned(frame):
            data = frame.payload.parts()[2][0]
            row = bytes(data)[head_row.row * 16 : head_row.row * 16 + 16]
            event = self.ring.sampled(head_row.seq_id, chain_token(row))
            if event is not None:
                assert event.token is not None
                self.told[event.index].append(event.token)
                if event.finish_reason:
                    self.ends[event.index] = event.finish_reason
        self._poll()

    # -- the nodes --------------------------------------------------------------------------------------------

    def _arrive(self, node: Node, frame: Frame) -> None:
        if not node.is_up:
            return
        receipt = node.stage.receive(frame)
        if receipt.gaps and self.rng.random() >= self.faults.lost_report:
            self._at(0.01, lambda: (self.ring.fault(receipt.gaps), self._poll()))
        self._compute(node)

    def _compute(self, node: Node) -> None:
        batch = node.stage.take()
        if batch is None or node.engine is None:
            return
        life, fails = node.life, bool(batch.segments) and self.rng.random() < self.faults.engine_error
        epoch = batch.epoch
        node.engine.forward(Batch(epoch, (), (), batch.releases))
        output = None if fails else node.engine.forward(batch)

        def done() -> None:
            if node.life != life or not node.is_up:
                return
            if output is None:
                seq_ids, frames = node.stage.fail(batch)
                if epoch == self.ring.epoch:
                    self._at(0.01, lambda: self._fail(epoch, seq_ids))
            else:
                frames = node.stage.complete(batch, output)
            for frame in frames:
                self._send(node, frame)
            self._compute(node)

        self._at(0.005 + 0.001 * batch.num_tokens, done)

    def _fail(self, epoch: Epoch, seq_ids: tuple[SeqId, ...]) -> None:
        if epoch == self.ring.epoch:
            self.ring.fail(seq_ids, EngineError("the forward pass failed; injected by the simulation"))
            self._poll()

    # -- the network ------------------------------------------------------------------------------------------

    def _send(self, node: Node, frame: Frame) -> None:
        if node not in self.ring_nodes:
            return
        place = self.ring_nodes.index(node)
        ring = self.ring_nodes
        receive: Callable[[Frame], None]
        if place == len(ring) - 1:
            receive = self._returned
        else:
            receive = lambda f: self._arrive(ring[place + 1], f)  # noqa: E731
        if len(ring) == 1:
            self._at(0.0, lambda: receive(frame))
            return
        rng, faults = self.rng, self.faults
        parts = [bytes(part) for part in wire.encode(frame, RING_KEY)]
        for _ in range(2 if rng.random() < faults.duplicate else 1):
            if rng.random() < faults.drop:
                continue
            delay = 0.002 + rng.random() * faults.jitter_s + (rng.random() * 8.0 if rng.random() < faults.late else 0)
            copy = list(parts)
            if rng.random() < faults.corrupt:
                part = rng.randrange(len(copy))
                if copy[part]:
                    damaged = bytearray(copy[part])
                    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
                    copy[part] = bytes(damaged)
            self._at(delay, lambda copy=copy: self._decode(copy, receive))

    @staticmethod
    def _decode(parts: list[bytes], receive: Callable[[Frame], None]) -> None:
        try:
            frame = wire.decode(parts, RING_KEY, wire.WireLimits())
        except RemoteProtocolError:
            return
        receive(frame)

    # -- the coordinator --------------------------------------------------------------------------------------

    def _begin_epoch(self) -> None:
        """Plan over the nodes that are up, tell each, and begin the Epoch at the Starter last."""
        up = [node for node in self.nodes if node.is_up]
        self.epoch = Epoch(self.epoch + 1)
        cuts = sorted(self.rng.sample(range(1, self.num_layers), len(up) - 1))
        for i, (node, start, stop) in enumerate(
            zip(up, [0, *cuts], [*cuts, self.num_layers], strict=True)
        ):
            is_last = i == len(up) - 1
            node.stage.assign(self.epoch, is_last=is_last)
            node.engine = ChainEngine(LayerRange(start, stop), is_last=is_last)
        self.ring_nodes = up
        spec = RingSpec(
            num_stages=len(up),
            kv_tokens=self.rng.choice([32, 64, 400]),
            context_tokens=CONTEXT,
            caps=self.rng.choice([(1,), (1, 1, 2), (1, 2, 3, 4, 8)]),
            kv_block_tokens=self.rng.choice([1, 4]),
        )
        self.ring.begin_epoch(self.epoch, spec)
        self._poll()

    def _crash(self) -> None:
        """Kill a node that is not the Starter; the Ring closes without it later, and it comes back later still."""
        mortal = [node for node in self.nodes[1:] if node.is_up]
        if not mortal:
            return
        node = self.rng.choice(mortal)
        node.is_up = False
        node.life += 1
        self._at(0.3 + self.rng.random(), self._begin_epoch)
        self._at(1.5 + self.rng.random() * 3.0, lambda: self._rejoin(node))

    def _rejoin(self, node: Node) -> None:
        node.is_up = True
        node.stage = StageProtocol()
        node.engine = None
        self._begin_epoch()
