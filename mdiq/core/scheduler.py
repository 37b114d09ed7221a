"""Which Sequences enter the Ring and which of their tokens go next. Spends the KV ledger; knows no time and no Frames.

First come, first served: a Sequence that waits for KV cache holds back those behind it, so none starves. Decoding
Sequences have one token in flight each; prompts are cut into chunks, and no more than a budget of prompt tokens is in
the Ring at once, which bounds every queue.

Chunks of one prompt follow each other round the Ring, so that all Stages work on it. A prompt of P tokens in chunks of
n takes a Ring of N Stages (P / n + N - 1) (w + n) units of time, where w is what a forward costs before its first
token, in tokens. That is least at n = sqrt(w P / (N - 1)). When other Sequences are in the Ring, a chunk is no longer
than they may have to wait for (plan/pace.py).

Decoding Sequences enter in groups: as many groups are on their Lap as the Plan has micro-batches in flight, no more.
Without that, a Batch that was cut in two by chance would stay so for ever, since no Stage waits for what comes next.
While a prompt is in the Ring nothing is held back: what is sent must not wait for a group to come home.

First Segments enter in the order of their ids, always: a Stage tells a late first Segment from a new one by its id.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt

from mdiq.core.frame import Segment
from mdiq.core.kv_ledger import KvLedger
from mdiq.core.sequence import Sequence
from mdiq.core.types import CHUNK_STEP, RingSpec, SeqId

_PATIENCE_LAPS = 4
_LEAST_PATIENCE_S = 0.5  # while no Lap has been timed, and where they are short


@dataclass(slots=True, eq=False)
class Entry:
    """A Sequence in the Ring's books, from its submission to its end.

    arrival: its place in the order of submission, kept over Replays.
    most_tokens: tokens that it may grow to, prompt included; within the context.
    seq_id: its id on the wire, or None while it waits.
    num_shared: tokens at its beginning that it finds in the cache and does not send.
    parent: whose cache that is, until the first Segment has made its Lap; None when the Ring no longer needs to know.
    num_known: tokens known when it entered, its prompt in this Ring.
    num_sent: tokens injected under that id, the shared ones included; num_back: tokens whose Lap is done, likewise.
    in_flight: Segments on their Lap, oldest first: where each stops and when it is overdue.
    is_sampling: its newest row is with the sampler.
    num_replays: Replays since its last token.
    sent_at: when its newest Segment was sent.
    token_at: when its newest token came; None before that, and after a Replay.
    group: the group of decode Segments that it was sent in last.
    """

    sequence: Sequence
    arrival: int
    most_tokens: int
    seq_id: SeqId | None = None
    num_shared: int = 0
    parent: SeqId | None = None
    num_known: int = 0
    num_sent: int = 0
    num_back: int = 0
    in_flight: deque[tuple[int, float]] = field(default_factory=deque)
    is_sampling: bool = False
    num_replays: int = 0
    sent_at: float = 0.0
    token_at: float | None = None
    group: int = 0

    @property
    def num_unsent(self) -> int:
        """Known tokens that the Ring has not been sent."""
        return self.sequence.num_tokens - self.num_sent

    @property
    def has_entered(self) -> bool:
        """Whether its first Segment has been sent."""
        return self.num_sent > self.num_shared

    def begin_behind(self, parent: SeqId | None, num_shared: int) -> None:
        """Send the Sequence from ``num_shared`` on: what comes before is in the parent's cache."""
        self.parent = parent
        self.num_shared = self.num_sent = self.num_back = num_shared

    def leave_ring(self) -> None:
        """Forget what the Ring held: the Sequence begins again under a new id."""
        self.seq_id = None
        self.begin_behind(None, 0)
        self.in_flight.clear()
        self.is_sampling = False
        self.token_at = None


class Scheduler:
    """The waiting and the live Sequences.

    chunk_tokens: most tokens of one prompt Segment.
    prefill_tokens: most prompt tokens in flight, over all Sequences (one chunk may exceed it alone).
    spec: what the Plan says of the Ring; it may be replaced at any time.
    lap_s: how long the newest decode Lap took; 0 before the first.
    look_again_at: when decoding Sequences that wait for those under way wait no longer; None when none waits.
    """

    def __init__(self, *, chunk_tokens: int, prefill_tokens: int, spec: RingSpec) -> None:
        self._chunk_tokens = chunk_tokens
        self._prefill_tokens = prefill_tokens
        self.spec = spec
        self._next_id = 0
        self._newest_group = 0
        self.lap_s = 0.0
        self.look_again_at: float | None = None
        self.waiting: list[Entry] = []
        self.live: dict[SeqId, Entry] = {}

    def wait(self, entry: Entry) -> None:
        """Queue a Sequence by its arrival: a replayed one goes before those that came after it."""
        insort(self.waiting, entry, key=lambda e: e.arrival)

    def admit(self, ledger: KvLedger, finds_room: Callable[[Entry], bool] | None = None) -> None:
        """Let Sequences in, in order, while there is room; each gets a new wire id and reserves its KV cache.

        finds_room: tells whether a Sequence fits, having it begin behind what is cached of it.
        """
        finds_room = finds_room or (lambda entry: ledger.fits(entry.most_tokens))
        while self.waiting and len(self.live) < self.spec.max_live and finds_room(self.waiting[0]):
            entry = self.waiting.pop(0)
            entry.seq_id = SeqId(self._next_id)
            self._next_id += 1
            entry.num_known = entry.sequence.num_tokens
            ledger.reserve(entry.seq_id, entry.most_tokens, entry.parent, entry.num_shared)
            self.live[entry.seq_id] = entry

    @property
    def has_prompt(self) -> bool:
        """Whether tokens of a prompt are in the Ring."""
        return any(entry.has_entered and self._is_prefill(entry) for entry in self.live.values())

    @property
    def shared_chunk_tokens(self) -> int | None:
        """Most prompt tokens that others may meet in a Batch; None while a Sequence has the Ring to itself."""
        num_sequences = len(self.live) + len(self.waiting)
        return self.spec.shared_chunk(num_sequences) if num_sequences > 1 else None

    def take_segments(
        self, enter: Callable[[Entry], None] = lambda _: None, now: float = 0.0
    ) -> list[tuple[Entry, Segment]]:
        """Return the Segments to inject now, decoding Sequences first, and count them as sent.

        enter: called before the first Segment of a Sequence; it may have more of it begin behind what is cached.
        """
        decoding = [(entry, self._send(seq_id, entry, 1)) for seq_id, entry in self._next_groups(now)]
        prompts: list[tuple[Entry, Segment]] = []
        most = min(self._chunk_tokens, self.shared_chunk_tokens or self._chunk_tokens)
        # More chunks than keep the Stages at work would only stand in the way of who comes next.
        most_in_flight = min(self._prefill_tokens, self.spec.num_chunks * most)
        budget = most_in_flight - sum(
            entry.num_sent - entry.num_back for entry in self.live.values() if self._is_prefill(entry)
        )
        has_budget = True
        for seq_id, entry in self.live.items():
            if has_budget and not entry.has_entered:
                enter(entry)
            while has_budget and entry.num_unsent and self._is_prefill(entry):
                length = min(self._chunk(entry), most, entry.num_unsent)
                has_budget = length <= budget or budget == most_in_flight
                if has_budget:
                    budget -= length
                    prompts.append((entry, self._send(seq_id, entry, length)))
        return decoding + prompts

    def _next_groups(self, now: float) -> list[tuple[SeqId, Entry]]:
        """Return the decoding Sequences to send now, those first that were sent longest ago."""
        decoding = [(seq_id, entry) for seq_id, entry in self.live.items() if not self._is_prefill(entry)]
        ready = [(seq_id, entry) for seq_id, entry in decoding if entry.num_unsent and not entry.is_sampling]
        ready.sort(key=lambda item: item[1].group)
        cap = self.spec.cap(len(self.live))
        self.look_again_at = None
        if not self.has_prompt:
            # A group that has been on its Lap for very long is lost, or its Stage is: others do not wait for it.
            patience_s = max(_PATIENCE_LAPS * self.lap_s, _LEAST_PATIENCE_S)
            out = [entry for _, entry in decoding if entry.num_sent > entry.num_back]
            out = [entry for entry in out if entry.sent_at + patience_s > now]
            under_way = {entry.group for entry in out}
            num_free = max(-(-len(self.live) // cap) - len(under_way), 0)
            if len(ready) > num_free * cap:
                self.look_again_at = min(entry.sent_at for entry in out) + patience_s
            ready = ready[: num_free * cap]
        for i, (_, entry) in enumerate(ready):
            entry.group = self._newest_group + 1 + i // cap
        self._newest_group += -(-len(ready) // cap)
        return ready

    def _chunk(self, entry: Entry) -> int:
        """Return the length of the chunks in which a prompt is fastest when it has the Ring to itself."""
        num_tokens = entry.sequence.num_tokens - entry.num_shared
        if self.spec.num_stages == 1:
            return num_tokens
        best = sqrt(self.spec.pass_tokens * num_tokens / (self.spec.num_stages - 1))
        num_chunks = max(round(num_tokens / max(best, CHUNK_STEP)), 1)
        return -(-num_tokens // num_chunks // CHUNK_STEP) * CHUNK_STEP

    @staticmethod
    def _is_prefill(entry: Entry) -> bool:
        """Whether its first Segment, or more than its newest token, is on its way or still to be sent."""
        return not entry.has_entered or entry.sequence.num_tokens - entry.num_back > 1

    @staticmethod
    def _send(seq_id: SeqId, entry: Entry, length: int) -> Segment:
        start, parent = entry.num_sent, None if entry.has_entered else entry.parent
        entry.num_sent += length
        return Segment(seq_id, start, length, wants_logits=entry.num_unsent == 0, parent=parent)
