"""Admit Sequences to the Ring and choose the tokens to send next. Reserves in the KV ledger; knows no Frames.

First come, first served for the Sequences of one owner; between owners, the one that has had the fewest tokens lately
has the next turn (fair_shares.py). A Sequence enters when there is room for its known tokens, for some of its answer,
and for one more KvBlock of every other one in the Ring that may still grow. One that waits for room holds back later
ones, except small ones: a Sequence that fits with its whole answer may pass. None is passed more than MAX_PASSED times.

When room runs out, the Sequence that entered last is preempted (ring.py): the first always proceeds. A preempted one
keeps its turn, so it goes before all that have not been in the Ring. It waits for twice the room for its answer each
time; after MAX_PREEMPTIONS it waits until all Sequences with an earlier turn have ended, and then nothing can preempt
it. So every Sequence ends.

Decoding Sequences have one token in flight each; prompts are cut into chunks, and no more than a budget of prompt
tokens is in the Ring at once, which bounds every queue.

Chunks of one prompt follow each other round the Ring, so that all Stages work on it. A prompt of P tokens in chunks of
n takes a Ring of N Stages (P / n + N - 1) (w + n) units of time, where w is what a forward costs before its first
token, in tokens. The minimum is at n = sqrt(w P / (N - 1)). When other Sequences are in the Ring, the time that they
may have to wait also limits a chunk (plan/pace.py).

Decoding Sequences are sent in groups, and at most as many groups are in flight as the Plan has micro-batches.
Without that, a Batch that was split by chance would stay split for ever, since no Stage waits for later Segments.
While a prompt is in the Ring nothing is held back: Segments must not wait for a group to return.

First Segments enter in the order of their ids, always: a Stage tells a late first Segment from a new one by its id.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from math import sqrt

from mdiq.core.exposure import Exposure
from mdiq.core.fair_shares import FairShares
from mdiq.core.frame import Segment
from mdiq.core.kv_ledger import KvLedger
from mdiq.core.lap_timer import Flight
from mdiq.core.sequence import FinishReason, Sequence
from mdiq.core.types import CHUNK_STEP, RingSpec, SeqId

MAX_PREEMPTIONS = 4
MAX_PASSED = 16
NO_TURN = 1 << 62  # after all turns
_LOOK_PAST = 64  # waiting Sequences that are looked at for one that may pass
_PATIENCE_LAPS = 4
_MIN_PATIENCE_S = 0.5  # while no Lap has been timed, and where they are short


@dataclass(slots=True, eq=False)
class Entry:
    """A Sequence in the Ring's books, from its submission to its end.

    arrival: its place in the order of submission. turn: its place in the order in which Sequences entered the Ring
    first, kept over Replays; NO_TURN before that.
    max_tokens: tokens that it may grow to, prompt included; within the context and the Ring's KV cache.
    seq_id: its id on the wire, or None while it waits.
    num_shared: tokens of its prefix that are in the cache and are not sent.
    parent: the Sequence that holds this cache, until the first Segment has made its Lap; None after that.
    num_granted: tokens that it has room for in the KV cache.
    num_known: tokens known when it entered, its prompt in this Ring.
    num_sent: tokens injected under that id; num_back: tokens whose Lap is done; both include the shared ones.
    in_flight: Segments on their Lap, oldest first.
    is_sampling: its newest row is with the sampler.
    num_replays: Replays since its last token.
    num_preemptions: how often it was preempted. num_passed: how often later ones entered before it.
    sent_at: when its newest Segment was sent.
    token_at: when its newest token came; None before that, and after a Replay.
    group: the group of decode Segments that it was sent in last.
    """

    sequence: Sequence
    arrival: int
    max_tokens: int
    turn: int = NO_TURN
    seq_id: SeqId | None = None
    num_shared: int = 0
    parent: SeqId | None = None
    num_granted: int = 0
    num_known: int = 0
    num_sent: int = 0
    num_back: int = 0
    in_flight: deque[Flight] = field(default_factory=deque)
    is_sampling: bool = False
    num_replays: int = 0
    num_preemptions: int = 0
    num_passed: int = 0
    sent_at: float = 0.0
    token_at: float | None = None
    group: int = 0

    @property
    def num_unsent(self) -> int:
        """Known tokens that the Ring has not been sent."""
        return self.sequence.num_tokens - self.num_sent

    @property
    def num_done(self) -> int:
        """Tokens that are back, without rows that still wait to score the prompt: they take memory on the Starter."""
        scored = len(self.sequence.prompt_logprobs)
        return scored if self.sequence.wants_rows(0, self.num_back) else self.num_back

    @property
    def lacks_room(self) -> bool:
        """Whether its next token has no place in the KV cache."""
        return self.num_granted < self.sequence.num_tokens

    @property
    def has_entered(self) -> bool:
        """Whether its first Segment has been sent."""
        return self.num_sent > self.num_shared

    def note_sent(self, now: float) -> None:
        """Note that a Segment leaves for its Lap."""
        self.sent_at = now
        if self.sequence.entered_at is None:
            self.sequence.entered_at = now

    def begin_after(self, parent: SeqId | None, num_shared: int) -> None:
        """Send the Sequence from ``num_shared`` on: the tokens before are in the parent's cache."""
        self.parent = parent
        self.num_shared = self.num_sent = self.num_back = num_shared

    def leave_ring(self) -> None:
        """Forget what the Ring held: the Sequence begins again under a new id."""
        self.seq_id = None
        self.num_granted = 0
        self.begin_after(None, 0)
        self.in_flight.clear()
        self.is_sampling = False
        self.token_at = None


class Room(Enum):
    """Whether a waiting Sequence has KV cache: now, when room that is being freed is free, or not yet."""

    HERE = auto()
    COMING = auto()
    LACKING = auto()


class Scheduler:
    """The waiting and the live Sequences.

    chunk_tokens: maximum tokens of one prompt Segment.
    prefill_tokens: maximum prompt tokens in flight, over all Sequences (one chunk may exceed it alone).
    spec: the Plan's figures for the Ring; it may be replaced at any time.
    lap_s: how long the newest decode Lap took; 0 before the first.
    exposure: counts the rows that are sent.
    look_again_at: when waiting decode Sequences are sent without waiting for those in flight; None when none waits.
    """

    def __init__(self, *, chunk_tokens: int, prefill_tokens: int, spec: RingSpec) -> None:
        self._chunk_tokens = chunk_tokens
        self._prefill_tokens = prefill_tokens
        self.spec = spec
        self._next_id = self._next_turn = 0
        self._shares = FairShares()
        self._last_owner = ""  # of a Sequence that entered
        self._owners: set[str] = set()
        self._newest_group = 0
        self.lap_s = 0.0
        self.look_again_at: float | None = None
        self.exposure = Exposure()
        self.waiting: list[Entry] = []
        self.live: dict[SeqId, Entry] = {}

    def wait(self, entry: Entry) -> None:
        """Queue a Sequence: a replayed one goes before those that entered after it."""
        self._owners.add(entry.sequence.owner)
        if entry.turn == NO_TURN and not (self.waiting and self.waiting[-1].turn == NO_TURN):
            at_work = {other.sequence.owner for other in self.live.values()} or {self._last_owner}
            self._shares.raise_floor(at_work)
        insort(self.waiting, entry, key=self._place)

    def append(self, sequence: Sequence, token: int, *, stop_matched: bool) -> FinishReason | None:
        """Add a token to an answer and count it as its owner's; see Sequence.append."""
        self._shares.took(sequence.owner, sequence.share, 1)
        return sequence.append(token, stop_matched=stop_matched)

    def _place(self, entry: Entry) -> tuple[int, float, int]:
        return entry.turn, self._shares.had(entry.sequence.owner), entry.arrival

    def admit(self, ledger: KvLedger, find_room: Callable[[Entry], Room] | None = None) -> None:
        """Admit Sequences while there is room; each gets a new wire id and reserves KV cache for its known tokens.

        find_room: returns whether a Sequence has room, and lets it begin after its cached prefix.
        """
        find_room = find_room or (lambda entry: Room.HERE if ledger.fits(self.needed(entry, ledger)) else Room.LACKING)
        place = 0
        self._put_in_order()
        while place < min(len(self.waiting), _LOOK_PAST) and len(self.live) < self.spec.max_live:
            entry = self.waiting[place]
            if not place:
                room = find_room(entry)
                if room is Room.COMING:
                    return
                enters = room is Room.HERE
            else:
                enters = not entry.num_preemptions and ledger.fits(entry.max_tokens + self._margin(ledger))
            if enters:
                if entry.turn == NO_TURN:
                    self._shares.raise_floor({each.sequence.owner for each in self.waiting if each.turn == NO_TURN})
                del self.waiting[place]
                for passed in self.waiting[:place]:
                    passed.num_passed += 1
                self._let_in(entry, ledger)
                if not place:
                    self._put_in_order()
            elif entry.num_passed >= MAX_PASSED:
                return
            else:
                place += 1

    def _put_in_order(self) -> None:
        if len(self._owners) > 1:  # else they are in order, and may be many
            self.waiting.sort(key=self._place)

    def needed(self, entry: Entry, ledger: KvLedger) -> int:
        """Return the tokens that must fit for a waiting Sequence to enter."""
        ahead = ledger.block_tokens << entry.num_preemptions
        return min(entry.sequence.num_tokens + ahead, entry.max_tokens) + self._margin(ledger)

    def is_oldest(self, entry: Entry) -> bool:
        """Whether all Sequences that entered before have ended."""
        others = (*self.live.values(), *self.waiting[:1])
        return all(other.turn >= entry.turn for other in others)

    def _margin(self, ledger: KvLedger) -> int:
        """Return the room that is kept for Sequences in the Ring: a KvBlock for each that may still need one."""
        return ledger.block_tokens * sum(entry.max_tokens > entry.num_granted for entry in self.live.values())

    def _let_in(self, entry: Entry, ledger: KvLedger) -> None:
        entry.seq_id = SeqId(self._next_id)
        self._next_id += 1
        entry.num_known = entry.sequence.num_tokens
        ledger.reserve(entry.seq_id, entry.num_known, entry.parent, entry.num_shared)
        entry.num_granted = ledger.granted_tokens(entry.seq_id)
        self.live[entry.seq_id] = entry
        if entry.turn == NO_TURN:
            entry.turn = self._next_turn
            self._next_turn += 1
            sequence = entry.sequence
            self._last_owner = sequence.owner
            self._shares.took(sequence.owner, sequence.share, entry.num_known - entry.num_shared)

    @property
    def has_prompt(self) -> bool:
        """Whether tokens of a prompt are in the Ring."""
        return any(entry.has_entered and self._is_prefill(entry) for entry in self.live.values())

    @property
    def shared_chunk_tokens(self) -> int | None:
        """Maximum prompt tokens of a Batch beside other Sequences; None while a Sequence has the Ring to itself."""
        num_sequences = len(self.live) + len(self.waiting)
        return self.spec.shared_chunk(num_sequences) if num_sequences > 1 else None

    def take_segments(
        self, enter: Callable[[Entry], None] = lambda _: None, now: float = 0.0
    ) -> list[tuple[Entry, Segment]]:
        """Return the Segments to inject now, decoding Sequences first, and count them as sent.

        enter: called before the first Segment of a Sequence; it may extend the cached prefix after which that begins.
        """
        decoding = [(entry, self._send(seq_id, entry, 1)) for seq_id, entry in self._next_groups(now)]
        prompts: list[tuple[Entry, Segment]] = []
        most = min(self._chunk_tokens, self.shared_chunk_tokens or self._chunk_tokens)
        # Chunks beyond those that keep the Stages busy would only delay the next Sequence.
        max_in_flight = min(self._prefill_tokens, self.spec.num_chunks * most)
        budget = max_in_flight - sum(
            entry.num_sent - entry.num_done
            for entry in self.live.values()
            if self._is_prefill(entry) or entry.num_done < entry.num_back
        )
        has_budget = True
        for seq_id, entry in self.live.items():
            if has_budget and not entry.has_entered:
                enter(entry)
            while has_budget and entry.num_unsent and self._is_prefill(entry):
                alone = chunk_alone(self.spec, entry.sequence.num_tokens - entry.num_shared)
                length = min(alone, most, entry.num_unsent)
                has_budget = length <= budget or budget == max_in_flight
                if has_budget:
                    budget -= length
                    prompts.append((entry, self._send(seq_id, entry, length)))
        return decoding + prompts

    def _next_groups(self, now: float) -> list[tuple[SeqId, Entry]]:
        """Return the decoding Sequences to send now, least recently sent first."""
        decoding = [(seq_id, entry) for seq_id, entry in self.live.items() if not self._is_prefill(entry)]
        ready = [
            (seq_id, entry)
            for seq_id, entry in decoding
            if entry.num_unsent and not (entry.is_sampling or entry.lacks_room)
        ]
        ready.sort(key=lambda item: item[1].group)
        cap = self.spec.cap(len(self.live))
        self.look_again_at = None
        if not self.has_prompt:
            # A group that has been in flight for very long is lost, or its Stage is: others do not wait for it.
            patience_s = max(_PATIENCE_LAPS * self.lap_s, _MIN_PATIENCE_S)
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

    @staticmethod
    def _is_prefill(entry: Entry) -> bool:
        """Whether its first Segment, or more than its newest token, is in flight or still to be sent."""
        return not entry.has_entered or entry.sequence.num_tokens - entry.num_back > 1

    def _send(self, seq_id: SeqId, entry: Entry, length: int) -> Segment:
        start, parent = entry.num_sent, None if entry.has_entered else entry.parent
        if self.spec.num_stages > 1:  # else nothing leaves the Starter
            if not entry.has_entered:
                self.exposure.enters(seq_id, entry.sequence, parent, entry.num_shared)
            self.exposure.sent(entry.sequence, length)
        entry.num_sent += length
        wants_rows = entry.sequence.wants_rows(start, start + length)
        return Segment(seq_id, start, length, entry.num_unsent == 0, parent, wants_rows)


def chunk_alone(spec: RingSpec, num_tokens: int) -> int:
    """Return the chunk length at which a prompt is fastest when it has the Ring to itself."""
    if spec.num_stages == 1:
        return num_tokens
    best = sqrt(spec.pass_tokens * num_tokens / (spec.num_stages - 1))
    num_chunks = max(round(num_tokens / max(best, CHUNK_STEP)), 1)
    return -(-num_tokens // num_chunks // CHUNK_STEP) * CHUNK_STEP
