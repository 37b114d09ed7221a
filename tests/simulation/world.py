"""A whole Ring in virtual time, with the faults that a seed draws. No sockets, no threads, no clock: an event heap.

The protocols under test are the product's own; the world plays the network, the processes and the coordinator.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from mdiq.core import wire
from mdiq.core.frame import Batch, Frame, FrameKind, Segment
from mdiq.core.logprobs import Drawn, LogprobsWanted, TokenLogprob
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import Ended, Inject, PromptRows, Suspect
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, LayerRange, RingSpec, SeqId
from mdiq.errors import CapacityError, EngineError, MdiqError, RemoteProtocolError
from tests.fakes import VOCAB, ChainEngine, ChainStarter, chain_answer, chain_prompt_logprobs

RING_KEY = b"simulated ring k"
CONTEXT = 64
MOST_HISTORY = 30
FOLLOW_UP = 100
MOST_EVENTS = 60_000
MOST_SECONDS = 4_000.0
REORDER_S = 1.0  # a Frame that waits for another to overtake it waits no longer

EVERY_FAULT = frozenset(
    "drop duplicate corrupt late reorder stale lost_report engine_error crash rejoin cancel deadline".split()
)
"""What a World counts in ``happened`` when it really took place, not when it might have."""


@dataclass(frozen=True)
class Faults:
    """How the network and the processes of one schedule misbehave: probabilities and seconds."""

    drop: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    jitter_s: float = 0.0
    late: float = 0.0
    reorder: float = 0.0
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
            reorder=maybe(0.1),
            lost_report=maybe(0.5),
            engine_error=maybe(0.004),
            num_crashes=rng.choice([0, 0, 1, 2, 3]),
            cancel=maybe(0.3),
            deadline=maybe(0.2),
        )

    @property
    def can_fail(self) -> bool:
        """Whether a Sequence may end with an error or anything is lost at all."""
        return any(
            (self.drop, self.corrupt, self.late, self.reorder, self.jitter_s, self.engine_error, self.num_crashes)
        )


@dataclass(eq=False)
class Hop:
    """The link out of a Node in one Epoch. ``overtaken`` holds deliveries that wait for a later Frame to pass them."""

    receive: Callable[[Frame], None]
    is_network: bool
    num_sent: int = 0
    newest_arrived: int = -1
    overtaken: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class Node:
    """One process: its part of the model in the current Epoch, and whether it runs."""

    name: int
    stage: StageProtocol = field(default_factory=StageProtocol)
    engine: ChainEngine | None = None
    hop: Hop | None = None
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
                lap_timeout_s=3.0,
                token_timeout_s=0.05,
                min_timeout_s=self.rng.choice([0.5, 3.0]),
                silence_s=1.0,
                max_replays=6,
                prefix_tokens=self.rng.choice([None, None, None, 12, 0]),
            )
        )
        self.epoch = Epoch(0)
        self.sequences: list[Sequence] = []
        self.told: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason] = {}
        self.happened: Counter[str] = Counter()
        self.num_forks = self.num_scored = 0
        self.kv_tokens: list[int] = []
        self._beginnings = [self._random_tokens(length) for length in (6, 16)]
        self._polled_for: float | None = None
        self._head = ChainStarter(LayerRange(0, 1), is_last=False)
        self._head_done_at = 0.0
        self._quiet_after = 0.0  # users and nodes do nothing of their own after this

    # -- running ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Play the schedule to its end, and fail if it hangs."""
        self._begin_epoch()
        for index in range(self.rng.randint(1, 8)):
            self._plan(self.rng.random() * 3.0, partial(self._submit, index))
        for _ in range(self.faults.num_crashes):
            self._plan(self.rng.random() * 4.0, self._crash)
        self._probe()
        self._play()
        self.ring.drop_prefixes()
        self._poll()
        self._play()

    def _play(self) -> None:
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
            limit = min(self.kv_tokens, default=CONTEXT)
            answer = chain_answer(sequence.prompt, self.num_layers, sequence.params.max_tokens, sequence.eos_token_ids)
            assert told == sequence.generated
            is_whole = reason is FinishReason.STOP or (
                reason is FinishReason.LENGTH and sequence.num_tokens < min(limit, CONTEXT)
            )
            if is_whole:
                assert told == answer, f"sequence {sequence.index}: {told} is not {answer}"
            else:
                assert told == answer[: len(told)], f"sequence {sequence.index}: {told} does not begin {answer}"
            self._check_logprobs(sequence)
            if reason is FinishReason.ERROR:
                assert isinstance(sequence.error, MdiqError)
                assert self.faults.can_fail
        for node in self.ring_nodes:
            assert node.engine is not None and not node.engine.states, f"node {node.name} leaks KV cache"
            self.num_forks += node.engine.num_forks

    def _check_logprobs(self, sequence: Sequence) -> None:
        found, is_wanted = list(sequence.prompt_logprobs), sequence.logprobs and sequence.logprobs.of_prompt
        right = chain_prompt_logprobs(sequence.prompt, self.num_layers) if is_wanted else []
        if sequence.generated:
            assert found == right, f"sequence {sequence.index}: {found} is not {right}"
        else:
            assert found == right[: len(found)]
        self.num_scored += len(found)

    def _at(self, delay: float, event: Callable[[], None]) -> None:
        self._at_time(self.now + delay, event)

    def _plan(self, delay: float, event: Callable[[], None]) -> None:
        """Have a user or a node do something of its own."""
        self._quiet_after = max(self._quiet_after, self.now + delay)
        self._at(delay, event)

    def _at_time(self, time: float, event: Callable[[], None]) -> None:
        self._num_pushed += 1
        heapq.heappush(self._events, (time, self._num_pushed, event))

    # -- the user ---------------------------------------------------------------------------------------------

    def _random_tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(VOCAB) for _ in range(count))

    def _submit(self, index: int, beginning: tuple[int, ...] | None = None) -> None:
        """Submit a Sequence that begins with ``beginning``, or as others do, or as none."""
        rng = self.rng
        if beginning is None:
            beginning = rng.choice([(), *self._beginnings])
        sequence = Sequence(
            index=index,
            prompt=(*beginning, *self._random_tokens(rng.choice([1, 1, 2, 5, 5 if beginning else 20]))),
            params=SamplingParams(max_tokens=rng.randint(1, 10)),
            eos_token_ids=frozenset({rng.randrange(VOCAB)}) if rng.random() < 0.3 else frozenset(),
            deadline=self.now + rng.random() * 4.0 if rng.random() < self.faults.deadline else None,
            logprobs=rng.choice([None, None, LogprobsWanted(), LogprobsWanted(top=1, of_prompt=True)]),
        )
        try:
            self.ring.submit(sequence, self.now)
        except CapacityError:
            return
        self.sequences.append(sequence)
        self.told[index] = []
        if rng.random() < self.faults.cancel:
            self._at(rng.random() * 3.0, lambda: self._cancel(index))
        self._poll()

    def _ended(self, index: int, reason: FinishReason) -> None:
        self.ends[index] = reason
        sequence = next(sequence for sequence in self.sequences if sequence.index == index)
        # The next turn of a chat begins with all of this one.
        is_answered = reason in (FinishReason.STOP, FinishReason.LENGTH)
        if is_answered and sequence.num_tokens < MOST_HISTORY and self.rng.random() < 0.4:
            history = sequence.tokens(0, sequence.num_tokens)
            self._plan(self.rng.random() * 0.5, partial(self._submit, FOLLOW_UP + index, history))

    def _cancel(self, index: int) -> None:
        self.ring.cancel(index)
        self._poll()

    # -- the Starter ------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        for action in self.ring.poll(self.now):
            match action:
                case Inject(frame):
                    self._arrive(self.nodes[0], frame)
                case Ended(event):
                    assert event.finish_reason is not None
                    self._ended(event.index, event.finish_reason)
                    self.happened["cancel"] += event.finish_reason is FinishReason.CANCELLED
                    self.happened["deadline"] += event.finish_reason is FinishReason.DEADLINE
                case Suspect():
                    pass
        due = self.ring.next_deadline()
        if due is not None and (self._polled_for is None or due < self._polled_for or self._polled_for <= self.now):
            self._polled_for = due
            self._at_time(max(due, self.now), self._poll)

    def _returned(self, frame: Frame) -> None:
        self.happened["stale"] += frame.epoch != self.ring.epoch
        if frame.kind is FrameKind.PROBE:
            if frame.epoch == self.ring.epoch:
                self.ring.heard(self.now)
                self._poll()
            return
        for rows in self.ring.returned(frame, self.now):
            # The head takes its time: the Sequence may be cancelled, replayed or in a new Epoch when it is done.
            self._head_done_at = max(self._head_done_at, self.now) + self.rng.random() * 0.02
            if isinstance(rows, PromptRows):
                found = self._head.score(
                    frame.payload.rows(rows.row, rows.row + rows.num_rows), rows.sequence, rows.start
                )
                self._at_time(self._head_done_at, partial(self._scored, rows.seq_id, rows.start, found))
            else:
                (drawn,) = self._head.sample([frame.payload.rows(rows.row, rows.row + 1)], [rows.sequence])
                self._at_time(self._head_done_at, partial(self._sampled, rows.seq_id, drawn))
        self._poll()

    def _scored(self, seq_id: SeqId, start: int, found: list[TokenLogprob]) -> None:
        self.ring.scored(seq_id, start, found)
        self._poll()

    def _sampled(self, seq_id: SeqId, drawn: Drawn) -> None:
        event = self.ring.sampled(seq_id, drawn.token, logprob=drawn.logprob)
        if event is not None:
            assert event.token is not None
            assert event.logprob == drawn.logprob
            self.told[event.index].append(event.token)
            if event.finish_reason:
                self._ended(event.index, event.finish_reason)
        self._poll()

    def _probe(self) -> None:
        """Send a PROBE round, and another one later, while there is anything to wait for but probes."""
        if self.now <= self._quiet_after or not self.ring.is_quiet:
            self._at(0.4, self._probe)
            if self.ring.epoch:
                self._arrive(self.nodes[0], Frame(self.ring.epoch, FrameKind.PROBE, (Segment(SeqId(0), 0, 0),)))

    # -- the nodes --------------------------------------------------------------------------------------------

    def _arrive(self, node: Node, frame: Frame) -> None:
        if not node.is_up:
            return
        if frame.epoch == node.stage.epoch == self.ring.epoch:
            size = node.stage.num_waiting_tokens + (frame.num_tokens or len(frame.segments))
            assert size <= self.kv_tokens[-1], f"{frame}: a stage would refuse it, see StageService"
        receipt = node.stage.receive(frame)
        self.happened["stale"] += receipt.stale
        if receipt.passes:
            self._send(node, frame)
            return
        if receipt.gaps:
            if self.rng.random() < self.faults.lost_report:
                self.happened["lost_report"] += 1
            else:
                self._at(0.01, lambda: self._gaps(receipt.gaps))
        self._compute(node)

    def _gaps(self, seq_ids: tuple[SeqId, ...]) -> None:
        self.ring.fault(seq_ids)
        self._poll()

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
                self.happened["engine_error"] += 1
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
        hop = node.hop
        assert hop is not None  # a Node that computes was assigned
        if not hop.is_network:
            self._at(0.0, lambda: hop.receive(frame))
            return
        rng, faults = self.rng, self.faults
        parts = [bytes(part) for part in wire.encode(frame, RING_KEY)]
        num_copies = 2 if rng.random() < faults.duplicate else 1
        self.happened["duplicate"] += num_copies - 1
        overtaken, hop.overtaken = hop.overtaken, []
        delay = 0.0
        for _ in range(num_copies):
            if rng.random() < faults.drop:
                self.happened["drop"] += 1
                continue
            delay = 0.002 + rng.random() * faults.jitter_s
            if rng.random() < faults.late:
                self.happened["late"] += 1
                delay += rng.random() * 8.0
            copy = self._corrupted(parts) if rng.random() < faults.corrupt else parts
            deliver = self._delivery(hop, copy, hop.num_sent)
            if rng.random() < faults.reorder:
                hop.overtaken.append(deliver)
                self._at(REORDER_S, deliver)
            else:
                self._at(delay, deliver)
        for deliver in overtaken:
            self._at(delay + 0.001, deliver)
        hop.num_sent += 1

    def _corrupted(self, parts: list[bytes]) -> list[bytes]:
        """Return the parts with one bit flipped."""
        self.happened["corrupt"] += 1
        damaged = [bytearray(part) for part in parts]
        part = self.rng.choice(damaged)
        part[self.rng.randrange(len(part))] ^= 1 << self.rng.randrange(8)
        return [bytes(part) for part in damaged]

    def _delivery(self, hop: Hop, parts: list[bytes], number: int) -> Callable[[], None]:
        """Return the event that delivers the parts; what calls it a second time finds it done."""
        is_done = False

        def deliver() -> None:
            nonlocal is_done
            if is_done:
                return
            is_done = True
            self.happened["reorder"] += number < hop.newest_arrived
            hop.newest_arrived = max(hop.newest_arrived, number)
            self._decode(parts, hop.receive)

        return deliver

    @staticmethod
    def _decode(parts: list[bytes], receive: Callable[[Frame], None]) -> None:
        try:
            frame = wire.decode(parts, RING_KEY, wire.WireLimits())
        except RemoteProtocolError:
            return
        receive(frame)

    # -- the coordinator --------------------------------------------------------------------------------------

    def _begin_epoch(self) -> None:
        """Plan over the nodes that are up, tell each in its own time, and begin the Epoch at the Starter last."""
        ring = [node for node in self.nodes if node.is_up]
        is_first = not self.epoch
        self.epoch = epoch = Epoch(self.epoch + 1)
        cuts = sorted(self.rng.sample(range(1, self.num_layers), len(ring) - 1))
        spec = RingSpec(
            num_stages=len(ring),
            kv_tokens=self.rng.choice([48, 64, 400]),
            context_tokens=CONTEXT,
            caps=self.rng.choice([(1,), (1, 1, 2), (1, 2, 3, 4, 8)]),
            kv_block_tokens=self.rng.choice([1, 4]),
            max_live=self.rng.choice([1, 3, 8]),
            pass_tokens=self.rng.choice([0.0, 16.0]),
            shared_chunks=self.rng.choice([(1,), (64, 4, 2), (16,)]),
            num_chunks=self.rng.choice([1, 3, 64]),
        )
        ready: set[int] = set()

        def assign(place: int, layers: LayerRange, life: int) -> None:
            node = ring[place]
            if epoch != self.epoch or node.life != life:
                return  # another Epoch, or the node's end, came before: this one never begins
            is_last = place == len(ring) - 1
            following = self.nodes[0] if is_last else ring[place + 1]
            node.stage.assign(epoch, is_last=is_last)
            node.engine = ChainEngine(
                layers, is_last=is_last, kv_tokens=spec.kv_tokens, block_tokens=spec.kv_block_tokens
            )
            receive = self._returned if is_last else lambda frame: self._arrive(following, frame)
            node.hop = Hop(receive, is_network=len(ring) > 1)
            ready.add(place)
            if len(ready) == len(ring):
                self.ring_nodes = ring
                self.kv_tokens.append(spec.kv_tokens)
                self.ring.begin_epoch(epoch, spec)
                self._poll()

        bounds = zip([0, *cuts], [*cuts, self.num_layers], strict=True)
        for place, (start, stop) in enumerate(bounds):
            event = partial(assign, place, LayerRange(start, stop), ring[place].life)
            if is_first:
                event()
            else:
                self._at(self.rng.random() * 0.2, event)

    def _crash(self) -> None:
        """Kill a node that is not the Starter; the Ring closes without it later, and it comes back later still."""
        mortal = [node for node in self.nodes[1:] if node.is_up]
        if not mortal:
            return
        node = self.rng.choice(mortal)
        self.happened["crash"] += 1
        node.is_up = False
        node.life += 1
        self._plan(0.3 + self.rng.random(), self._begin_epoch)
        self._plan(1.5 + self.rng.random() * 3.0, lambda: self._rejoin(node))

    def _rejoin(self, node: Node) -> None:
        self.happened["rejoin"] += 1
        node.is_up = True
        node.stage = StageProtocol()
        node.engine = None
        self._begin_epoch()
