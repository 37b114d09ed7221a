"""The Starter's side of the ring protocol: admits Sequences, keeps them in flight, and mends what is lost. No I/O.

Theory. Inputs are calls with the time as an argument; outputs are the Actions of ``poll``. ZeroMQ may lose, and a cut
link may repeat or delay, so delivery is never assumed: every Segment in flight has a deadline. What is overdue, or
reported as a gap, is *replayed*: the Sequence gets a new wire id and its known tokens enter as a prompt again. Emitted
tokens are history and never sampled twice, and draws depend on (seed, position) alone, so a Replay continues the same
text. RELEASE travels behind the last Segment of a Sequence, and its KV reservation returns when it has made its Lap; a
lost one is sent again.

    state of a Sequence    event                              next
    waiting                room in ledger and Ring            in flight (prompt chunks)
    in flight              row for its newest token is back   sampling
    sampling               token, goes on                     in flight (one token)
    sampling               token, last one                    ended; RELEASE goes round
    in flight              overdue, or gap reported           waiting, RELEASE of the old id goes round
    in flight              the same, too often                ended with RingStalledError
    any                    cancelled, deadline, failed        ended; RELEASE goes round if it was in flight
    any but ended          new Epoch                          waiting
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mdiq.core.frame import NO_ROWS, Frame, FrameKind, Payload, Segment, TokenIds
from mdiq.core.kv_ledger import KvLedger
from mdiq.core.scheduler import Entry, Scheduler
from mdiq.core.sequence import FinishReason, Sequence, TokenEvent
from mdiq.core.stage import NO_EPOCH
from mdiq.core.types import CHUNK_STEP, Epoch, RingSpec, SeqId
from mdiq.errors import CapacityError, ContextLengthError, LocalProtocolError, RingStalledError


@dataclass(frozen=True, slots=True)
class RingSettings:
    """Limits of the ring protocol.

    chunk_tokens, prefill_tokens: see Scheduler.
    lap_timeout_s: a Lap may take this long, and token_timeout_s more for every token in flight.
    max_replays: a Sequence that has been replayed so often without a new token ends with an error.
    """

    chunk_tokens: int = 256
    prefill_tokens: int = 2048
    lap_timeout_s: float = 60.0
    token_timeout_s: float = 0.1
    max_replays: int = 5


@dataclass(frozen=True, slots=True)
class Inject:
    """Hand this Frame to the Starter's own Stage."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class Ended:
    """A Sequence ended without a token: tell its caller."""

    event: TokenEvent


@dataclass(frozen=True, slots=True)
class Suspect:
    """A Lap of this Epoch was overdue: something in the Ring is slow or dead."""

    epoch: Epoch


Action = Inject | Ended | Suspect


@dataclass(frozen=True, slots=True)
class HeadRow:
    """A returned row that the head turns into a token: row ``row`` of the Frame, for this Sequence."""

    seq_id: SeqId
    row: int
    sequence: Sequence


class RingProtocol:
    """Owns every Sequence from submission to end.

    counts: what was ignored or mended, for the metrics: stale, unknown, duplicates, replays, overdue.
    decode_gap_s: the longest time between two tokens of a Sequence while a prompt was in the Ring.
    most_live: the most Sequences that were in the Ring at once.
    """

    def __init__(self, settings: RingSettings | None = None) -> None:
        self._settings = settings or RingSettings()
        self._scheduler = Scheduler(
            chunk_tokens=self._settings.chunk_tokens,
            prefill_tokens=self._settings.prefill_tokens,
            spec=RingSpec(1, 1, 1),
        )
        self._entries: dict[int, Entry] = {}
        self._num_arrived = 0
        self._spec: RingSpec | None = None
        self._ledger = KvLedger(0)
        self._releasing: dict[SeqId, float | None] = {}  # due time of the RELEASE under way; None: not sent yet
        self._actions: list[Action] = []
        self.epoch = NO_EPOCH
        self.counts: Counter[str] = Counter()
        self.decode_gap_s = 0.0
        self.most_live = 0
        self._prompt_at = float("-inf")  # when a prompt was last known to be in the Ring

    @property
    def num_live(self) -> int:
        """Sequences in the Ring now."""
        return len(self._scheduler.live)

    @property
    def num_unfinished(self) -> int:
        """Sequences in the Ring or waiting for it."""
        return len(self._entries)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is left to do: no Sequence, and no RELEASE under way."""
        return not self._entries and not self._releasing

    @property
    def kv_reserved_tokens(self) -> int:
        return self._ledger.reserved_tokens

    def submit(self, sequence: Sequence, now: float) -> None:
        """Take a Sequence in; it enters the Ring at a later ``poll``.

        Raises:
            ContextLengthError: the prompt leaves no room for a token in the model's context.
            CapacityError: the Ring has less KV cache than the Sequence may need.
            LocalProtocolError: no Epoch has begun, or the index is in use.
        """
        if self._spec is None or sequence.index in self._entries:
            raise LocalProtocolError(f"submit: sequence {sequence.index} comes before an epoch or a second time")
        if not sequence.prompt:
            raise ContextLengthError("prompt: it has no tokens; give at least one")
        most_tokens = self._most_tokens(sequence, self._spec)
        self._entries[sequence.index] = entry = Entry(sequence, self._num_arrived, most_tokens)
        self._num_arrived += 1
        self._scheduler.wait(entry)

    def cancel(self, index: int) -> None:
        """End a Sequence unfinished; one that has ended already is left alone."""
        if entry := self._entries.get(index):
            self._end(entry, FinishReason.CANCELLED)

    def begin_epoch(self, epoch: Epoch, spec: RingSpec) -> None:
        """Start over in a new Ring: every unfinished Sequence is replayed there, in its old order.

        Raises:
            LocalProtocolError: the Epoch does not grow.
        """
        if epoch <= self.epoch:
            raise LocalProtocolError(f"begin_epoch: epoch {epoch} does not grow (now {self.epoch})")
        self.epoch = epoch
        self._spec = self._scheduler.spec = spec
        self._ledger = KvLedger(spec.kv_tokens, spec.kv_block_tokens)
        self._releasing.clear()
        for entry in list(self._scheduler.live.values()):
            self._leave_ring(entry)
            self._scheduler.wait(entry)
        for entry in list(self._scheduler.waiting):
            try:
                entry.most_tokens = self._most_tokens(entry.sequence, spec)
            except CapacityError as error:
                self._end(entry, FinishReason.ERROR, error)

    def pace(self, spec: RingSpec) -> None:
        """Go on in the same Ring at another pace: the measurements behind it have changed."""
        self._spec = self._scheduler.spec = spec

    def returned(self, frame: Frame) -> list[HeadRow]:
        """Take in a Frame from the last Hop; return the rows to make tokens of, each for ``sampled`` later."""
        if frame.epoch != self.epoch:
            self.counts["stale"] += 1
            return []
        if frame.kind is FrameKind.RELEASE:
            for segment in frame.segments:
                if self._releasing.pop(segment.seq_id, -1) != -1:
                    self._ledger.release(segment.seq_id)
            return []
        rows: list[HeadRow] = []
        row = 0
        for segment in frame.segments:
            if self._accept(segment):
                rows.append(HeadRow(segment.seq_id, row, self._scheduler.live[segment.seq_id].sequence))
            row += frame.rows_of(segment)
        return rows

    def awaits_token(self, seq_id: SeqId) -> bool:
        """Tell whether ``sampled`` would take a token for this id: not when it was cancelled or replayed meanwhile."""
        entry = self._scheduler.live.get(seq_id)
        return entry is not None and entry.is_sampling

    def sampled(
        self, seq_id: SeqId, token: int, *, stop_matched: bool = False, now: float | None = None
    ) -> TokenEvent | None:
        """Note the token that a HeadRow gave, and when; return the event for the caller.

        None when the Sequence was cancelled or replayed in the meantime: the token is not part of its history.
        """
        entry = self._scheduler.live.get(seq_id)
        if entry is None or not entry.is_sampling:
            return None
        sequence = entry.sequence
        position = sequence.num_tokens
        entry.is_sampling = False
        entry.num_replays = 0
        if now is not None and entry.token_at is not None and self._prompt_at >= entry.token_at:
            self.decode_gap_s = max(self.decode_gap_s, now - entry.token_at)
        entry.token_at = now
        reason = sequence.append(token, stop_matched=stop_matched)
        if reason is None and sequence.num_tokens >= entry.most_tokens:
            reason = FinishReason.LENGTH  # the context is full
        if reason is not None:
            self._forget(entry, reason)
        return TokenEvent(sequence.index, token, position, reason)

    def fault(self, seq_ids: Iterable[SeqId]) -> None:
        """Replay Sequences of which a Stage reports a gap; ids that are not live are ignored."""
        for seq_id in seq_ids:
            if entry := self._scheduler.live.get(seq_id):
                self._replay(entry)

    def fail(self, seq_ids: Iterable[SeqId], error: Exception) -> None:
        """End Sequences with an error: a Stage could not compute them."""
        for seq_id in seq_ids:
            if entry := self._scheduler.live.get(seq_id):
                self._end(entry, FinishReason.ERROR, error)

    def fail_all(self, error: Exception) -> None:
        """End every Sequence with an error: the Ring is gone."""
        for entry in list(self._entries.values()):
            self._end(entry, FinishReason.ERROR, error)

    def poll(self, now: float) -> list[Action]:
        """Return what is to be done now. Call it after every other call, and when ``next_deadline`` has come."""
        if self._spec is not None:
            self._check_deadlines(now)
            self._inject_releases(now)
            self._scheduler.admit(self._ledger)
            self.most_live = max(self.most_live, self.num_live)
            self._inject_segments(now)
            if self._scheduler.has_prompt:
                self._prompt_at = now
        actions, self._actions = self._actions, []
        return actions

    def next_deadline(self) -> float | None:
        """Return the time of the next ``poll`` that is needed if nothing else happens, or None."""
        dues = [entry.in_flight[0][1] for entry in self._scheduler.live.values() if entry.in_flight]
        dues += [due for due in self._releasing.values() if due is not None]
        dues += [e.sequence.deadline for e in self._entries.values() if e.sequence.deadline is not None]
        return min(dues, default=None)

    def _most_tokens(self, sequence: Sequence, spec: RingSpec) -> int:
        most_tokens = min(sequence.most_tokens, spec.context_tokens)
        if len(sequence.prompt) >= spec.context_tokens:
            raise ContextLengthError(
                f"prompt: {len(sequence.prompt)} tokens leave no room for an answer in the context of "
                f"{spec.context_tokens}; shorten it"
            )
        if not KvLedger(spec.kv_tokens, spec.kv_block_tokens).fits_ever(most_tokens):
            raise CapacityError(
                f"KV cache: prompt and answer may need {most_tokens} tokens and the ring has room for "
                f"{spec.kv_tokens}; lower max_tokens, shorten the prompt, or give the nodes more memory"
            )
        return most_tokens

    def _accept(self, segment: Segment) -> bool:
        """Take a returned Segment off the in-flight table; return whether its row is to be sampled."""
        entry = self._scheduler.live.get(segment.seq_id)
        if entry is None:
            self.counts["unknown"] += 1
            return False
        # Stages check positions, so a Segment that is back vouches for those before it.
        if not any(stop == segment.stop for stop, _ in entry.in_flight):
            self.counts["duplicates"] += 1
            return False
        while entry.in_flight and entry.in_flight[0][0] <= segment.stop:
            entry.in_flight.popleft()
        entry.num_back = segment.stop
        entry.is_sampling = segment.wants_logits and segment.stop == entry.sequence.num_tokens
        return entry.is_sampling

    def _check_deadlines(self, now: float) -> None:
        is_overdue = False
        for entry in list(self._entries.values()):
            deadline = entry.sequence.deadline
            if deadline is not None and deadline <= now:
                self._end(entry, FinishReason.DEADLINE)
            elif entry.in_flight and entry.in_flight[0][1] <= now:
                self.counts["overdue"] += 1
                is_overdue = True
                self._replay(entry)
        if is_overdue:
            self._actions.append(Suspect(self.epoch))

    def _inject_releases(self, now: float) -> None:
        due = [seq_id for seq_id, at in self._releasing.items() if at is None or at <= now]
        if due:
            for seq_id in due:
                self._releasing[seq_id] = now + self._settings.lap_timeout_s
            segments = tuple(Segment(seq_id, 0, 0) for seq_id in due)
            self._actions.append(Inject(self._frame(FrameKind.RELEASE, segments)))

    def _inject_segments(self, now: float) -> None:
        segments = self._scheduler.take_segments()
        in_flight = sum(entry.num_sent - entry.num_back for entry in self._scheduler.live.values())
        due = now + self._settings.lap_timeout_s + self._settings.token_timeout_s * in_flight
        for entry, segment in segments:
            entry.in_flight.append((segment.stop, due))
            payload = TokenIds(entry.sequence.tokens(segment.start, segment.stop))
            self._actions.append(Inject(self._frame(FrameKind.HIDDEN, (segment,), payload)))

    def _frame(self, kind: FrameKind, segments: tuple[Segment, ...], payload: Payload = NO_ROWS) -> Frame:
        """Return a Frame with the newest wishes to the Stages."""
        cap = self._scheduler.spec.cap(self.num_live)
        # The wire counts chunks in steps, in one byte.
        shared = (self._scheduler.shared_chunk_tokens or 0) // CHUNK_STEP * CHUNK_STEP
        return Frame(self.epoch, kind, segments, payload, cap, min(shared, 255 * CHUNK_STEP))

    def _replay(self, entry: Entry) -> None:
        self.counts["replays"] += 1
        entry.num_replays += 1
        if entry.num_replays > self._settings.max_replays:
            stalled = RingStalledError(
                f"sequence {entry.sequence.index}: no answer from the ring after {self._settings.max_replays} replays; "
                "look at the nodes' logs for the one that is slow or dead"
            )
            self._end(entry, FinishReason.ERROR, stalled)
            return
        self._leave_ring(entry, release=True)
        self._scheduler.wait(entry)

    def _end(self, entry: Entry, reason: FinishReason, error: Exception | None = None) -> None:
        """End a Sequence without a token, and have its caller told."""
        self._forget(entry, reason, error)
        sequence = entry.sequence
        self._actions.append(Ended(TokenEvent(sequence.index, None, sequence.num_tokens, reason, error)))

    def _forget(self, entry: Entry, reason: FinishReason, error: Exception | None = None) -> None:
        entry.sequence.finish_reason = reason
        entry.sequence.error = error
        del self._entries[entry.sequence.index]
        if entry.seq_id is None:
            self._scheduler.waiting.remove(entry)
        else:
            self._leave_ring(entry, release=True)

    def _leave_ring(self, entry: Entry, *, release: bool = False) -> None:
        assert entry.seq_id is not None  # only live entries leave the Ring
        del self._scheduler.live[entry.seq_id]
        if release and entry.num_sent:
            self._releasing[entry.seq_id] = None
        elif release:
            # No Stage knows the id, and a RELEASE would bar lower ids that have not been sent yet either.
            self._ledger.release(entry.seq_id)
        entry.leave_ring()
