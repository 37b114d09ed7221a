"""The Starter's side of the ring protocol: admits Sequences, keeps them in flight, and mends what is lost. No I/O.

Theory. Inputs are calls with the time as an argument; outputs are the Actions of ``poll``. ZeroMQ may lose, and a cut
link may repeat or delay, so delivery is never assumed: every Segment in flight has a deadline, which follows the Laps
that were measured (lap_timer.py). What is overdue, or reported as a gap, is *replayed*: the Sequence gets a new wire id
and its known tokens enter as a prompt again. Emitted tokens are history, never sampled twice, and draws depend on
(seed, position) alone, so a Replay continues the same text. RELEASE travels after the last Segment
of a Sequence, and its KV reservation returns when it has made its Lap; a lost one is sent again. Who gets KV cache, and
who gives it up, is in books.py.

    state of a Sequence    event                              next
    waiting                room in ledger and Ring            in flight (prompt chunks)
    in flight              row for its newest token is back   sampling
    sampling               token, goes on                     in flight (one token)
    sampling               token, last one                    ended; retained, or RELEASE goes round
    retained               its room is wanted                 RELEASE goes round
    in flight or sampling  an older one needs its room        waiting, RELEASE of the old id goes round
    in flight              overdue, or gap reported           waiting, RELEASE of the old id goes round
    in flight              the same, too often                ended with RingStalledError
    any                    cancelled, deadline, failed        ended; RELEASE goes round if it was in flight
    first Segment in       its parent leaves the Ring by one  waiting, RELEASE of the old id goes round
      flight or unsent       of the two lines above
    any but ended          new Epoch                          waiting

While the Ring is *paused*, because a Node of it is lost, nothing enters it and nothing is overdue; Sequences are taken,
cancelled and end at their deadlines, and rows that still come back count. The next Epoch ends the pause.
"""

from collections import Counter
from collections.abc import Iterable

from mdiq.core.books import Books, max_tokens
from mdiq.core.frame import NO_ROWS, Frame, FrameKind, Payload, Segment, TokenIds
from mdiq.core.lap_timer import Flight
from mdiq.core.logprobs import TokenLogprob
from mdiq.core.ring_actions import Action, Ended, HeadRow, Inject, PromptRows, Suspect
from mdiq.core.ring_settings import RingSettings
from mdiq.core.scheduler import Entry, Scheduler
from mdiq.core.sequence import FinishReason, Sequence, TokenEvent
from mdiq.core.stage import NO_EPOCH
from mdiq.core.types import CHUNK_STEP, Epoch, RingSpec, SeqId
from mdiq.errors import CapacityError, LocalProtocolError, RingStalledError


class RingProtocol:
    """Owns every Sequence from submission to end.

    counts: what was ignored or mended, for the metrics: stale, unknown, duplicates, replays, overdue, restarts,
    preemptions, recoveries (pauses that have ended).
    prefill: what became of prompts, Replays included: prefill_tokens were computed, prefix_tokens found in the cache,
    by prefix_hits Sequences. exposure: counts the rows that were sent.
    decode_gap_s: the longest time between two tokens of a Sequence while a prompt was in the Ring.
    peak_live: the largest number of Sequences that were in the Ring at once. resumed: those that were in it when the
    newest pause ended, by index.
    """

    def __init__(self, settings: RingSettings | None = None) -> None:
        self._settings = settings = settings or RingSettings()
        self._scheduler = Scheduler(
            chunk_tokens=settings.chunk_tokens, prefill_tokens=settings.prefill_tokens, spec=RingSpec(1, 1, 1)
        )
        self.exposure = self._scheduler.exposure
        self.counts: Counter[str] = Counter()
        self._books = Books(self._scheduler, self.counts)
        self._spec: RingSpec | None = None
        self._overdue: dict[SeqId, Flight] = {}  # of ids that were given up and may still come back
        self._timer = self._settings.new_timer()
        self._actions: list[Action] = []
        self.epoch, self.is_paused = NO_EPOCH, False
        self.resumed: list[int] = []
        self.decode_gap_s, self.peak_live = 0.0, 0
        self._prompt_at = float("-inf")  # when a prompt was last known to be in the Ring
        self.prefill: Counter[str] = Counter()

    @property
    def num_live(self) -> int:
        """Sequences in the Ring now."""
        return len(self._scheduler.live)

    @property
    def num_unfinished(self) -> int:
        """Sequences in the Ring or waiting for it."""
        return len(self._books.unfinished)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is left to do: no Sequence, and no RELEASE under way."""
        return not self._books.unfinished and not self._books.releasing

    @property
    def kv_reserved_tokens(self) -> int:
        return self._books.reserved_tokens

    @property
    def kv_live_tokens(self) -> int:
        return self._books.live_tokens

    @property
    def needed_tokens(self) -> int:
        """KV cache that the longest unfinished Sequence may need."""
        return max((entry.max_tokens for entry in self._books.unfinished.values()), default=0)

    def submit(self, sequence: Sequence, now: float) -> None:
        """Take a Sequence in; it enters the Ring at a later ``poll``. Tokens that it brings are never sampled again.

        Raises:
            ContextLengthError: the prompt leaves no room for a token in the model's context.
            CapacityError: the prompt leaves no room for a token in the Ring's KV cache.
            LocalProtocolError: no Epoch has begun, or the index is in use.
        """
        if self._spec is None or sequence.index in self._books.unfinished:
            raise LocalProtocolError(f"submit: sequence {sequence.index} comes before an epoch or a second time")
        entry = self._books.submit(sequence, max_tokens(sequence, self._spec))
        if sequence.num_tokens >= entry.max_tokens:
            self._end(entry, FinishReason.LENGTH)  # this Ring holds no more of it

    def cancel(self, index: int) -> None:
        """End a Sequence unfinished; one that has ended already is left alone."""
        if entry := self._books.unfinished.get(index):
            self._end(entry, FinishReason.CANCELLED)

    def pause(self) -> None:
        """Put nothing into the Ring until the next Epoch begins."""
        self.is_paused = True

    def begin_epoch(self, epoch: Epoch, spec: RingSpec) -> None:
        """Start over in a new Ring: every unfinished Sequence is replayed there, in its old order.

        Raises:
            LocalProtocolError: the Epoch does not grow.
        """
        if epoch <= self.epoch:
            raise LocalProtocolError(f"begin_epoch: epoch {epoch} does not grow (now {self.epoch})")
        if self.is_paused:
            self.is_paused = False
            self.counts["recoveries"] += 1
            self.resumed = [entry.sequence.index for entry in self._scheduler.live.values()]
            for entry in list(self._scheduler.live.values()):
                self._may_replay(entry)  # else a prompt that kills a Node would do so for ever
        self.epoch = epoch
        self._spec = self._scheduler.spec = spec
        self._books.begin_epoch(spec, self._settings.prefix_tokens)
        self._overdue.clear()
        self._timer = self._settings.new_timer()
        for entry in list(self._scheduler.waiting):
            try:
                entry.max_tokens = max_tokens(entry.sequence, spec)
            except CapacityError as error:
                self._end(entry, FinishReason.ERROR, error)
                continue
            if entry.sequence.num_tokens >= entry.max_tokens:
                self._end(entry, FinishReason.LENGTH)  # this Ring holds no more of it
        self.resumed = [index for index in self.resumed if index in self._books.unfinished]

    def pace(self, spec: RingSpec) -> None:
        """Go on in the same Ring at another pace: the measurements that it follows from have changed."""
        self._spec = self._scheduler.spec = spec

    def reset_counts(self) -> None:
        """Begin all figures anew: what came before was a rehearsal."""
        self.counts.clear()
        self.prefill.clear()
        self.exposure.clear()
        self.decode_gap_s, self.peak_live = 0.0, 0

    def heard(self, now: float) -> None:
        """Note that something came round, a PROBE perhaps: the Ring is not cut."""
        if self._timer.heard(now):
            flights = [flight for entry in self._scheduler.live.values() for flight in entry.in_flight]
            for flight in (*flights, *self._books.releasing.values()):
                if flight is not None:
                    self._timer.begin_anew(flight, now)

    def returned(self, frame: Frame, now: float | None = None) -> list[HeadRow | PromptRows]:
        """Take in a Frame from the last Hop; return its rows for the head, in their order.

        HeadRows are to be made tokens of, each for ``sampled`` later; PromptRows are for ``scored``, which comes before
        ``sampled`` of the same Sequence.
        """
        if frame.epoch != self.epoch:
            self.counts["stale"] += 1
            return []
        if now is not None:
            self.heard(now)
        if frame.kind is FrameKind.RELEASE:
            for segment in frame.segments:
                self._overdue.pop(segment.seq_id, None)
                self._books.released(segment.seq_id)
            return []
        rows: list[HeadRow | PromptRows] = []
        row = 0
        for segment in frame.segments:
            entry = self._accept(segment, now)
            if entry is not None and segment.wants_rows:
                rows.append(PromptRows.of(segment, row, entry.sequence))
            row += frame.rows_of(segment)
            if entry is not None and entry.is_sampling:
                rows.append(HeadRow(segment.seq_id, row - 1, entry.sequence))
        return rows

    def scored(self, seq_id: SeqId, start: int, logprobs: list[TokenLogprob]) -> None:
        """Note what PromptRows gave: log-probabilities of tokens from ``start + 1`` on; ignored as in ``sampled``."""
        if entry := self._scheduler.live.get(seq_id):
            known = entry.sequence.prompt_logprobs
            known.extend(logprobs[len(known) - start :])

    def awaits_scores(self, seq_id: SeqId) -> bool:
        """Tell whether ``scored`` would take log-probabilities for this id."""
        return seq_id in self._scheduler.live

    def awaits_token(self, seq_id: SeqId) -> bool:
        """Tell whether ``sampled`` would take a token for this id: not when it was cancelled or replayed meanwhile."""
        entry = self._scheduler.live.get(seq_id)
        return entry is not None and entry.is_sampling

    def sampled(
        self,
        seq_id: SeqId,
        token: int,
        *,
        stop_matched: bool = False,
        now: float | None = None,
        logprob: TokenLogprob | None = None,
    ) -> TokenEvent | None:
        """Note the token that a HeadRow gave, and when; return the event for the caller.

        None when the Sequence was cancelled or replayed in the meantime: the token is not part of its history.
        """
        entry = self._scheduler.live.get(seq_id)
        if entry is None or not entry.is_sampling:
            return None
        sequence = entry.sequence
        position = sequence.num_tokens
        entry.is_sampling, entry.num_replays = False, 0
        if now is not None and entry.token_at is not None and self._prompt_at >= entry.token_at:
            self.decode_gap_s = max(self.decode_gap_s, now - entry.token_at)
        if now is not None and position > entry.num_known:
            self._scheduler.lap_s = now - entry.sent_at
        entry.token_at = now
        reason = self._scheduler.append(sequence, token, stop_matched=stop_matched)
        if reason is None and sequence.num_tokens >= entry.max_tokens:
            reason = FinishReason.LENGTH  # the context is full, or the KV cache
        if reason is not None:
            self._books.end_with_token(entry, reason)
        return TokenEvent(sequence.index, token, position, reason, logprob=logprob)

    def fault(self, seq_ids: Iterable[SeqId]) -> None:
        """Replay Sequences of which a Stage reports a gap; others, and all in a pause, are ignored."""
        for seq_id in () if self.is_paused else seq_ids:
            if entry := self._scheduler.live.get(seq_id):
                parent = entry.parent
                self._replay(entry)
                # A parent that a Stage does not know would give a gap to the next one as well.
                self._books.drop_prefix(parent)

    def fail(self, seq_ids: Iterable[SeqId], error: Exception) -> None:
        """End Sequences with an error: a Stage could not compute them."""
        for seq_id in seq_ids:
            if entry := self._scheduler.live.get(seq_id):
                self._end(entry, FinishReason.ERROR, error)

    def fail_all(self, error: Exception) -> None:
        """End every Sequence with an error: the Ring is gone."""
        for entry in list(self._books.unfinished.values()):
            self._end(entry, FinishReason.ERROR, error)

    def drop_prefixes(self) -> None:
        """Give up the cache of every ended Sequence; what is in use stays."""
        self._books.drop_prefixes()

    def poll(self, now: float) -> list[Action]:
        """Return what is to be done now. Call it after every other call, and when ``next_deadline`` has come."""
        if self._spec is not None:
            self._check_deadlines(now)
        if self._spec is not None and not self.is_paused:
            self._books.admit()
            self._inject_releases(now)
            self.peak_live = max(self.peak_live, self.num_live)
            self._inject_segments(now)
            if self._scheduler.has_prompt:
                self._prompt_at = now
        actions, self._actions = self._actions, []
        return actions

    def next_deadline(self) -> float | None:
        """Return the time of the next ``poll`` that is needed if nothing else happens, or None."""
        dues = [e.sequence.deadline for e in self._books.unfinished.values() if e.sequence.deadline is not None]
        if not self.is_paused:
            dues += [entry.in_flight[0].due for entry in self._scheduler.live.values() if entry.in_flight]
            if self._scheduler.look_again_at is not None:
                dues.append(self._scheduler.look_again_at)
            dues += [flight.due for flight in self._books.releasing.values() if flight is not None]
        return min(dues, default=None)

    def _accept(self, segment: Segment, now: float | None) -> Entry | None:
        """Take a returned Segment off the in-flight table; return its Entry, or None if it is not to be used."""
        entry = self._scheduler.live.get(segment.seq_id)
        if entry is None:
            self.counts["unknown"] += 1
            late = self._overdue.get(segment.seq_id)
            if late is not None and now is not None and late.stop == segment.stop:
                # It was slow and not lost: the next one is waited for.
                self._timer.returned(self._overdue.pop(segment.seq_id), now, is_decode=segment.length == 1)
            return None
        # Stages check positions, so a Segment that is back vouches for those before it.
        is_newest = segment.stop == entry.sequence.num_tokens
        wants = segment.wants_logits, segment.wants_rows
        is_wanted = is_newest, entry.sequence.wants_rows(segment.start, segment.stop)
        if wants != is_wanted or not any(f.stop == segment.stop for f in entry.in_flight):
            self.counts["duplicates"] += 1
            return None
        if entry.sequence.wants_rows(entry.num_back, segment.start):  # their Frame was lost on the last Hop
            self._replay(entry)
            return None
        while entry.in_flight and entry.in_flight[0].stop <= segment.stop:
            flight = entry.in_flight.popleft()
            if flight.stop == segment.stop and now is not None:
                self._timer.returned(flight, now, is_decode=segment.length == 1)
        entry.num_back = segment.stop
        entry.parent = None
        entry.is_sampling = is_newest
        return entry

    def _check_deadlines(self, now: float) -> None:
        is_overdue = False
        for entry in list(self._books.unfinished.values()):
            deadline = entry.sequence.deadline
            if deadline is not None and deadline <= now:
                self._end(entry, FinishReason.DEADLINE)
            elif entry.in_flight and not self.is_paused and self._timer.is_overdue(entry.in_flight[0], now):
                assert entry.seq_id is not None  # it is in the Ring
                self.counts["overdue"] += 1
                is_overdue = True
                self._overdue[entry.seq_id] = entry.in_flight[0]
                self._replay(entry)
        if is_overdue:
            self._actions.append(Suspect(self.epoch))

    def _inject_releases(self, now: float) -> None:
        releasing = self._books.releasing
        due = [seq_id for seq_id, flight in releasing.items() if flight is None or self._timer.is_overdue(flight, now)]
        if due:
            for seq_id in due:
                before = releasing[seq_id]
                num_sent = 0 if before is None else before.num_replays + 1
                releasing[seq_id] = self._timer.sent(0, 0, now, num_sent)
            segments = tuple(Segment(seq_id, 0, 0) for seq_id in due)
            self._actions.append(Inject(self._frame(FrameKind.RELEASE, segments)))

    def _inject_segments(self, now: float) -> None:
        segments = self._scheduler.take_segments(self._books.enter, now)
        in_flight = sum(entry.num_sent - entry.num_back for entry in self._scheduler.live.values())
        longest = max((segment.length for _, segment in segments), default=0)
        if longest > 1:
            for entry in self._scheduler.live.values():
                for flight in entry.in_flight:
                    self._timer.followed(flight, longest)
        for entry, segment in segments:
            self._count(entry, segment)
            entry.in_flight.append(self._timer.sent(segment.stop, in_flight, now, entry.num_replays))
            entry.note_sent(now)
            payload = TokenIds(entry.sequence.tokens(segment.start, segment.stop))
            self._actions.append(Inject(self._frame(FrameKind.HIDDEN, (segment,), payload)))

    def _frame(self, kind: FrameKind, segments: tuple[Segment, ...], payload: Payload = NO_ROWS) -> Frame:
        """Return a Frame with the newest wishes to the Stages."""
        cap = self._scheduler.spec.cap(self.num_live)
        # The wire counts chunks in steps, in one byte.
        shared = (self._scheduler.shared_chunk_tokens or 0) // CHUNK_STEP * CHUNK_STEP
        return Frame(self.epoch, kind, segments, payload, cap, min(shared, 255 * CHUNK_STEP))

    def _count(self, entry: Entry, segment: Segment) -> None:
        self.prefill["prefill_tokens"] += max(min(segment.stop, entry.num_known) - segment.start, 0)
        if segment.start == entry.num_shared:
            if not entry.sequence.generated:
                entry.sequence.cached_prompt_tokens = entry.num_shared
            if entry.num_shared:
                self.prefill.update(prefix_hits=1, prefix_tokens=entry.num_shared)

    def _replay(self, entry: Entry) -> None:
        if self._may_replay(entry):
            self._books.begin_again(entry)

    def _may_replay(self, entry: Entry) -> bool:
        """Count a Replay of a Sequence; end it if there were too many without a new token."""
        self.counts["replays"] += 1
        entry.num_replays += 1
        if entry.num_replays > self._settings.max_replays:
            stalled = RingStalledError(
                f"sequence {entry.sequence.index}: no answer from the ring after {self._settings.max_replays} replays; "
                "look at the nodes' logs for the one that is slow or dead"
            )
            self._end(entry, FinishReason.ERROR, stalled)
            return False
        return True

    def _end(self, entry: Entry, reason: FinishReason, error: Exception | None = None) -> None:
        """End a Sequence without a token, and have its caller told."""
        self._books.end(entry, reason, error)
        self._actions.append(Ended(TokenEvent(entry.sequence.index, None, entry.sequence.num_tokens, reason, error)))
