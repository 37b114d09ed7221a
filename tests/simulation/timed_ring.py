"""A Ring in virtual time whose Stages take as long as their costs say: the product's protocols and plan, no faults.

The Starter's loop is that of StarterService: rows that are back go through the head first, then one Batch runs.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mdiq.core.frame import Batch, Frame
from mdiq.core.hops import HopMeter
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import Inject
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import SamplingParams
from mdiq.core.sequence import Sequence as TokenSequence
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, RingSpec, SeqId
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import PaceSettings, StageCost, paced

EPOCH = Epoch(1)
CONTEXT = 4_096
NO_HEAD = Curve(((1, 0.0),))


@dataclass(frozen=True)
class Rows:
    """Rows that nobody looks at."""

    num_rows: int

    def rows(self, start: int, stop: int) -> "Rows":
        return Rows(stop - start)

    def parts(self) -> tuple[str, int, Sequence[bytes]]:
        raise NotImplementedError


class TimedRing:
    """A Ring of Stages with these costs.

    head: what the Starter's head takes by rows; the plan is told of it as part of the Starter's decode cost.
    hop_s: of every Hop, one way, or one for each; jitter: times vary by this share.
    sends: for how long a Frame keeps each Hop's line busy, by rows; the plan knows of it.
    growth: a Batch takes by this share longer for every 1,000 tokens of context; the plan knows nothing of it.
    """

    def __init__(
        self,
        costs: Sequence[StageCost],
        *,
        head: Curve = NO_HEAD,
        hop_s: float | Sequence[float] = 2e-4,
        sends: Sequence[Curve] = (),
        jitter: float = 0.0,
        growth: float = 0.0,
        settings: PaceSettings | None = None,
        seed: int = 0,
    ) -> None:
        self._costs = costs
        self._head = head
        self._hops_s = [hop_s] * len(costs) if isinstance(hop_s, float) else list(hop_s)
        self._sends = sends
        self._line_free_at = [0.0] * len(costs)
        self._jitter = jitter
        self._growth = growth
        self._rng = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._stages = [StageProtocol() for _ in costs]
        self._returned: deque[Frame] = deque()
        self._is_busy = [False] * len(costs)
        self._num_submitted = 0
        self.token_times: dict[int, list[float]] = {}
        sizes = sorted({size for size, _ in (*costs[0].decode.points, *head.points)})
        starter = Curve(tuple((n, costs[0].decode.seconds(n) + head.seconds(n)) for n in sizes))
        known = [StageCost(starter, costs[0].prompt), *costs[1:]]
        hops = HopMeter()  # the product measures the Hops with probes; so does this Ring
        measured_s = hops.returned(hops.send(0.0), sum(self._hops_s) if len(costs) > 1 else 0.0)
        assert measured_s is not None
        spec = RingSpec(len(costs), kv_tokens=1_000_000, context_tokens=CONTEXT)
        self.spec, self.prediction = paced(spec, known, measured_s, settings or PaceSettings(), sends)
        self.ring = RingProtocol(RingSettings())
        for i, stage in enumerate(self._stages):
            stage.assign(EPOCH, is_last=i == len(costs) - 1)
        self.ring.begin_epoch(EPOCH, self.spec)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_times.values()))

    def submit(self, num_prompt: int, max_tokens: int, at: float = 0.0) -> int:
        """Have a Sequence come at a time; return its index."""
        index = self._num_submitted
        self._num_submitted += 1
        self.token_times[index] = []
        sequence = TokenSequence(index, (0,) * num_prompt, SamplingParams(max_tokens=max_tokens))
        self._at(at, partial(self._submit, sequence))
        return index

    def run(self, until: float = 1e6) -> None:
        """Play to the end, or to a time."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def _at(self, time: float, event: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time, self._num_events, event))

    def _submit(self, sequence: TokenSequence) -> None:
        self.ring.submit(sequence, self.now)
        self._poll()

    def _poll(self) -> None:
        self.ring.heard(self.now)  # as if probes came round all the time: nothing but measured Laps excuses a slow one
        for action in self.ring.poll(self.now):
            assert isinstance(action, Inject), "a Lap that was only slow was given up"
            self._stages[0].receive(action.frame)
        self._work(0)

    def _arrive(self, place: int, frame: Frame) -> None:
        if place == len(self._stages):
            self._returned.append(frame)
            self._work(0)
        else:
            self._stages[place].receive(frame)
            self._work(place)

    def _work(self, place: int) -> None:
        if self._is_busy[place]:
            return
        if place == 0 and self._returned:
            rows = [row for frame in self._returned for row in self.ring.returned(frame, self.now)]
            self._returned.clear()
            self._is_busy[0] = True
            took_s = self._vary(self._head.seconds(len(rows))) if rows else 0.0
            self._at(self.now + took_s, lambda: self._sampled([row.seq_id for row in rows]))
            return
        batch = self._stages[place].take()
        if batch is not None:
            self._is_busy[place] = True
            self._at(self.now + self._seconds(place, batch), lambda: self._done(place, batch))

    def _sampled(self, seq_ids: Sequence[SeqId]) -> None:
        self._is_busy[0] = False
        for seq_id in seq_ids:
            event = self.ring.sampled(seq_id, 1, now=self.now)
            assert event is not None
            self.token_times[event.index].append(self.now)
        self._poll()

    def _done(self, place: int, batch: Batch) -> None:
        stage, is_last = self._stages[place], place == len(self._stages) - 1
        self._is_busy[place] = False
        num_rows = sum(s.wants_logits for s in batch.segments) if is_last else batch.num_tokens
        for frame in stage.complete(batch, Rows(num_rows)):
            sent_at = max(self.now, self._line_free_at[place])
            if self._sends:
                sent_at += self._vary(self._sends[place].seconds(frame.num_rows))
            self._line_free_at[place] = sent_at
            hop_s = self._hops_s[place] if len(self._stages) > 1 else 0.0
            self._at(sent_at + hop_s, partial(self._arrive, place + 1, frame))
        self._work(place)

    def _seconds(self, place: int, batch: Batch) -> float:
        if not batch.segments:
            return 0.0
        cost = self._costs[place]
        is_decode = all(segment.length == 1 for segment in batch.segments)
        time_s = cost.decode.seconds(len(batch.segments)) if is_decode else cost.prompt.seconds(batch.num_tokens)
        return self._vary(time_s * (1 + self._growth * max(s.stop for s in batch.segments) / 1_000))

    def _vary(self, time_s: float) -> float:
        return time_s * self._rng.uniform(1 - self._jitter, 1 + self._jitter)
