"""The Starter's books: which Sequences are unfinished, which are in the Ring, and who holds its KV cache.

No time, no Frames: core/ring.py says when, and sends the RELEASEs that are listed here.

KV cache is reserved as Sequences grow, for the oldest first, by their turns. When there is none, ended Sequences give
up what they hold, then the newest in the Ring is *put back* (preempted): released, and replayed when there is room
again. It is never failed for it, and how often it may happen to one Sequence is bounded (scheduler.py).

A Sequence whose first tokens are in the KV cache already begins after them, with the cache of the one that holds them
(its parent): one in the Ring that has sent them, or an ended one that is retained for this (prefix_index.py). Stages
keep the order of arrival, so the parent's Segments need not be back yet. What goes wrong with a parent costs time only:
the Sequence begins again. A Replay computes all its tokens itself, and so does a Sequence whose prompt is scored.

Room comes back in two steps: an id that is released is listed in ``releasing``, and its room counts as taken until its
RELEASE has made its Lap.
"""

from collections import Counter
from collections.abc import Iterable

from mdiq.core.kv_ledger import KvLedger
from mdiq.core.lap_timer import Flight
from mdiq.core.prefix_index import PrefixIndex
from mdiq.core.scheduler import MAX_PREEMPTIONS, Entry, Room, Scheduler
from mdiq.core.sequence import FinishReason, Sequence
from mdiq.core.types import RingSpec, SeqId
from mdiq.errors import CapacityError, ContextLengthError


class Books:
    """Every Sequence from submission to end, and every id from its first token to its RELEASE.

    unfinished: Sequences in the Ring or waiting for it, by index.
    releasing: ids whose RELEASE is under way; None: it has not been sent yet.
    retained: ended Sequences whose cache is kept for others.
    counts: what was mended: preemptions, restarts.
    """

    def __init__(self, scheduler: Scheduler, counts: Counter[str]) -> None:
        self._scheduler = scheduler
        self._ledger = KvLedger(0)
        self._prefixes = PrefixIndex(1)
        self._num_arrived = 0
        self.counts = counts
        self.unfinished: dict[int, Entry] = {}
        self.releasing: dict[SeqId, Flight | None] = {}

    @property
    def reserved_tokens(self) -> int:
        return self._ledger.reserved_tokens

    @property
    def live_tokens(self) -> int:
        """KV cache that no eviction frees: it is of Sequences in the Ring, or on its way out."""
        return self._ledger.tokens_without(self._prefixes.retained)

    @property
    def retained(self) -> list[SeqId]:
        return self._prefixes.retained

    def begin_epoch(self, spec: RingSpec, prefix_tokens: int | None) -> None:
        """Forget what the old Ring held: every unfinished Sequence waits, in its old order."""
        self._ledger = KvLedger(spec.kv_tokens, spec.kv_block_tokens)
        self._prefixes = PrefixIndex(spec.kv_block_tokens, prefix_tokens)
        self.releasing.clear()
        self._scheduler.exposure.new_epoch()
        for entry in list(self._scheduler.live.values()):
            self._leave_ring(entry)
            self._scheduler.wait(entry)

    def submit(self, sequence: Sequence, max_tokens: int) -> Entry:
        """Have a new Sequence wait; return its Entry. max_tokens: see ``max_tokens``."""
        self.unfinished[sequence.index] = entry = Entry(sequence, self._num_arrived, max_tokens)
        self._num_arrived += 1
        self._scheduler.wait(entry)
        return entry

    def admit(self) -> None:
        """Give room to the Sequences in the Ring first, then to those that wait."""
        self._grow()
        self._scheduler.admit(self._ledger, self._find_room)

    def enter(self, entry: Entry) -> None:
        """Have a Sequence begin after its cached prefix, which may be longer than when the Sequence was admitted."""
        assert entry.seq_id is not None  # it is live
        parent, num_shared = self._longest_prefix(entry)
        if parent is not None and num_shared > entry.num_shared:
            self._ledger.share(entry.seq_id, parent, num_shared)
            entry.begin_after(parent, num_shared)

    def begin_again(self, entry: Entry) -> None:
        """Take a Sequence out of the Ring, to enter it again as a prompt under a new id."""
        self._leave_ring(entry, release=True)
        self._scheduler.wait(entry)

    def end(self, entry: Entry, reason: FinishReason, error: Exception | None = None) -> None:
        """End a Sequence, wherever it is, and keep nothing of it."""
        entry.sequence.finish_reason = reason
        entry.sequence.error = error
        del self.unfinished[entry.sequence.index]
        if entry.seq_id is None:
            self._scheduler.waiting.remove(entry)
        else:
            self._leave_ring(entry, release=True)

    def end_with_token(self, entry: Entry, reason: FinishReason) -> None:
        """End a Sequence with its newest token, which no Stage has seen; keep what is cached of the others."""
        assert entry.seq_id is not None  # it was live when the token was drawn
        seq_id, num_sent = entry.seq_id, entry.num_sent
        self._prefixes.extend(seq_id, entry.sequence, num_sent)
        if not self._prefixes.retain(seq_id):
            self.end(entry, reason)
            return
        entry.sequence.finish_reason = reason
        del self.unfinished[entry.sequence.index], self._scheduler.live[seq_id]
        self._ledger.shrink(seq_id, num_sent)
        pinned = self._pinned()
        self._give_up([other for other in self._prefixes.covered(seq_id) if other not in pinned])
        for oldest in self._prefixes.to_give_up(pinned):
            if self._prefixes.is_over:
                self._give_up([oldest])

    def drop_prefixes(self) -> None:
        """Give up the cache of every ended Sequence; what is in use stays."""
        self._give_up(self._prefixes.to_give_up(self._pinned()))

    def drop_prefix(self, seq_id: SeqId | None) -> None:
        """Give up the cache of one ended Sequence, unless it is in use."""
        self._give_up([other for other in self._prefixes.to_give_up(self._pinned()) if other == seq_id])

    def released(self, seq_id: SeqId) -> None:
        """Take room back: a RELEASE has made its Lap. It may come round twice."""
        if self.releasing.pop(seq_id, -1) != -1:
            self._ledger.release(seq_id)

    def _grow(self) -> None:
        """Give decoding Sequences room for their next token, the oldest first."""
        lacking = [entry for entry in self._scheduler.live.values() if entry.lacks_room]
        for entry in sorted(lacking, key=lambda entry: entry.turn):
            if entry.seq_id is not None and (self._has_room(entry) or self._make_room(entry)):
                self._ledger.grow(entry.seq_id, entry.sequence.num_tokens)
                entry.num_granted = self._ledger.granted_tokens(entry.seq_id)

    def _has_room(self, entry: Entry) -> bool:
        return self._ledger.fits(entry.sequence.num_tokens, entry.num_granted)

    def _make_room(self, entry: Entry) -> bool:
        """Have others give up what a Sequence needs to grow; return whether it is there at once.

        If all that came after it hold too little, the Sequence itself is put back, unless it is the oldest.
        """
        live, pinned = self._scheduler.live, self._pinned()
        newer = sorted((e for e in live.values() if e.turn > entry.turn), key=lambda e: -e.turn)
        candidates = [*self._prefixes.to_give_up(pinned), *(e.seq_id for e in newer if e.seq_id not in pinned)]
        chosen = self._ledger.to_give_up(
            entry.sequence.num_tokens, [seq_id for seq_id in candidates if seq_id is not None], entry.num_granted
        )
        if chosen is None:
            # What is pinned will be free in a Lap.
            if len(live) > 1 and not newer and not pinned:
                self._put_back(entry)
            return False
        for seq_id in chosen:
            if seq_id in live:
                self._put_back(live[seq_id])
            else:
                self._give_up([seq_id] if seq_id in self._prefixes.retained else [])
        return entry.seq_id is not None and self._has_room(entry)

    def _put_back(self, entry: Entry) -> None:
        """Take a Sequence out of the Ring to make room; it is replayed later."""
        self.counts["preemptions"] += 1
        entry.num_preemptions += 1
        self.begin_again(entry)

    def _find_room(self, entry: Entry) -> Room:
        """Tell whether there is room for a waiting Sequence, and have it begin after its cached prefix.

        If there is not, ended Sequences give up what they hold, as far as it helps. Their room is back after a Lap.
        """
        if entry.num_preemptions >= MAX_PREEMPTIONS and not self._scheduler.is_oldest(entry):
            return Room.LACKING
        needed = self._scheduler.needed(entry, self._ledger)
        parent, num_shared = self._longest_prefix(entry)
        if self._ledger.fits(needed, num_shared):
            entry.begin_after(parent, num_shared)
            return Room.HERE
        pinned = self._pinned()
        others = self._prefixes.to_give_up({*pinned, parent})
        seq_ids = self._ledger.to_give_up(needed, others, num_shared)
        if seq_ids is None:
            seq_ids = self._ledger.to_give_up(needed, self._prefixes.to_give_up(pinned))
        self._give_up(seq_ids or [])
        return Room.LACKING if seq_ids is None else Room.COMING

    def _longest_prefix(self, entry: Entry) -> tuple[SeqId | None, int]:
        for seq_id, live in self._scheduler.live.items():
            if live.has_entered:
                self._prefixes.extend(seq_id, live.sequence, live.num_sent)
        # Of what is taken over no rows come back.
        is_scored = entry.sequence.wants_rows(0, entry.sequence.num_tokens)
        found = None if entry.num_replays or is_scored else self._prefixes.longest(entry.sequence)
        if found is None:
            return None, 0
        self._prefixes.touch(found[0])
        return found

    def _pinned(self) -> set[SeqId]:
        """Return whose cache a Sequence is about to begin with, at some Stage at least."""
        return {entry.parent for entry in self._scheduler.live.values() if entry.parent is not None}

    def _give_up(self, seq_ids: Iterable[SeqId]) -> None:
        """Release ended Sequences that were retained."""
        for seq_id in seq_ids:
            self._prefixes.remove(seq_id)
            self._release(seq_id)

    def _leave_ring(self, entry: Entry, *, release: bool = False) -> None:
        assert entry.seq_id is not None  # only live entries leave the Ring
        seq_id = entry.seq_id
        del self._scheduler.live[seq_id]
        self._prefixes.remove(seq_id)
        if release and entry.has_entered:
            self._release(seq_id)
        elif release:
            # No Stage knows the id, and a RELEASE would bar lower ids that have not been sent yet either.
            self._ledger.release(seq_id)
        entry.leave_ring()
        for child in [child for child in self._scheduler.live.values() if release and child.parent == seq_id]:
            self.counts["restarts"] += 1
            self.begin_again(child)

    def _release(self, seq_id: SeqId) -> None:
        self._scheduler.exposure.forget(seq_id)
        self.releasing[seq_id] = None
        self._ledger.leave(seq_id)


def max_tokens(sequence: Sequence, spec: RingSpec) -> int:
    """Return the tokens that a Sequence may grow to in this Ring, prompt included.

    Raises:
        ContextLengthError, CapacityError: the prompt is empty, or it leaves no room for an answer.
    """
    if not sequence.prompt:
        raise ContextLengthError("prompt: it has no tokens; give at least one")
    if len(sequence.prompt) >= spec.context_tokens:
        raise ContextLengthError(
            f"prompt: {len(sequence.prompt)} tokens leave no room for an answer in the context of "
            f"{spec.context_tokens}; shorten it"
        )
    if len(sequence.prompt) >= spec.max_tokens:
        raise CapacityError(
            f"KV cache: the prompt has {len(sequence.prompt)} tokens and the ring has room for {spec.max_tokens} with "
            "the answer; shorten the prompt, or give the nodes more memory"
        )
    return min(sequence.max_total_tokens, spec.max_tokens)
