"""Which Sequences enter the Ring and which of their tokens go next. Spends the KV ledger; knows no time and no Frames.

First come, first served: a Sequence that waits for KV cache holds back those behind it, so none starves. Decoding
Sequences have one token in flight each; prompts are cut into chunks, and no more than a budget of prompt tokens is in
the Ring at once, which bounds every queue.

First Segments enter in the order of their ids, always: a Stage tells a late first Segment from a new one by its id.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mdiq.core.frame import Segment
from mdiq.core.kv_ledger import KvLedger
from mdiq.core.sequence import Sequence
from mdiq.core.types import SeqId


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


class Scheduler:
    """The waiting and the live Sequences.

    chunk_tokens: most tokens of one prompt Segment.
    prefill_tokens: most prompt tokens in flight, over all Sequences (one chunk may exceed it alone).
    max_live: most Sequences in the Ring at once.
    """

    def __init__(self, *, chunk_tokens: int, prefill_tokens: int, max_live: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._prefill_tokens = prefill_tokens
        self._max_live = max_live
        self._next_id = 0
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
        while self.waiting and len(self.live) < self._max_live and finds_room(self.waiting[0]):
            entry = self.waiting.pop(0)
            entry.seq_id = SeqId(self._next_id)
            self._next_id += 1
            entry.num_known = entry.sequence.num_tokens
            ledger.reserve(entry.seq_id, entry.most_tokens, entry.parent, entry.num_shared)
            self.live[entry.seq_id] = entry

    def take_segments(self, enter: Callable[[Entry], None] = lambda _: None) -> list[tuple[Entry, Segment]]:
        """Return the Segments to inject now, decoding Sequences first, and count them as sent.

        enter: called before the first Segment of a Sequence; it may have more of it begin behind what is cached.
        """
        decoding: list[tuple[Entry, Segment]] = []
        prompts: list[tuple[Entry, Segment]] = []
        budget = self._prefill_tokens - sum(
            entry.num_sent - entry.num_back for entry in self.live.values() if self._is_prefill(entry)
        )
        has_budget = True
        for seq_id, entry in self.live.items():
            if entry.is_sampling:
                continue
            if not self._is_prefill(entry):
                if entry.num_unsent:
                    decoding.append((entry, self._send(seq_id, entry, 1)))
                continue
            if has_budget and not entry.has_entered:
                enter(entry)
            while has_budget and entry.num_unsent:
                length = min(self._chunk_tokens, entry.num_unsent)
                has_budget = length <= budget or budget == self._prefill_tokens
                if has_budget:
                    budget -= length
                    prompts.append((entry, self._send(seq_id, entry, length)))
        return decoding + prompts

    @staticmethod
    def _is_prefill(entry: Entry) -> bool:
        """Whether its first Segment, or more than its newest token, is on its way or still to be sent."""
        return not entry.has_entered or entry.sequence.num_tokens - entry.num_back > 1

    @staticmethod
    def _send(seq_id: SeqId, entry: Entry, length: int) -> Segment:
        start, parent = entry.num_sent, None if entry.has_entered else entry.parent
        entry.num_sent += length
        return Segment(seq_id, start, length, wants_logits=entry.num_unsent == 0, parent=parent)
