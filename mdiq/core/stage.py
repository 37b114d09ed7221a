"""The Stage's side of the ring protocol: which Frames to accept, what to run next, what to forward. No I/O.

Theory. Position is the sequence number: for every Sequence a Stage knows how many tokens it has taken in
(``num_expected``, cached or queued). A Segment that starts there is queued; one that starts before it is a duplicate
and dropped; one that starts after it is a gap, which is reported to the Starter and repaired with a Replay. The Epoch
filters Frames of an older Ring, and ids that only grow filter those of Sequences that have ended. A Stage remembers
nothing else of a Sequence, and all of it can be rebuilt: that is what *stateless stage* means here.

A Sequence may begin with the cache of another, its parent, if their first tokens are the same: its first Segment
starts after them. It waits until the parent's Segments before that position have run.

    event                          known, start == expected    start < expected    start > expected
    HIDDEN                         queue                       duplicate           gap
    HIDDEN, unknown, newest id     queue (start 0)             -                   gap
    HIDDEN, unknown, older id      duplicate (start 0)         -                   gap
    HIDDEN with a parent, unknown  newest id: queue if the parent is known up to start, else gap; older id: duplicate
    RELEASE                        drop what is queued, free the cache with the next Batch, send on;
                                   drop what is queued to begin with that cache: gap
    any of another Epoch           stale

Decode Segments and prompts wait in separate queues and are not mixed in a Batch. When both wait they take turns, and
a decode Batch takes all waiting decode Segments: so a decode Segment waits for at most one Batch of a prompt, and
prompts make progress. First Segments keep the order of their ids, and no RELEASE overtakes one of a lower id: the next
Stage would then refuse that one.
"""

from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, replace

from mdiq.core.coalesce import Queued, coalesce
from mdiq.core.frame import MAX_SEGMENTS, Batch, Frame, FrameKind, Payload, Segment
from mdiq.core.types import Epoch, SeqId
from mdiq.errors import LocalProtocolError, RemoteProtocolError

NO_EPOCH = Epoch(0)
"""The Epoch of a Stage that has no assignment: no Frame carries it."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The outcome for a Frame: counts of its Segments, and the Sequences that have a gap.

    passes: the Frame goes on to the next Stage at once, as it is.
    """

    queued: int = 0
    duplicates: int = 0
    stale: int = 0
    gaps: tuple[SeqId, ...] = ()
    passes: bool = False


class StageProtocol:
    """Queues what arrives, hands out Batches, and turns their output into Frames for the next Stage.

    token_budget: maximum tokens of a Batch (one Segment may exceed it alone).
    counts: Segments by outcome, for the metrics. newest_probe: number of the newest PROBE in this Epoch; 0 before it.
    """

    def __init__(self, token_budget: int = 512) -> None:
        self._token_budget = token_budget
        self._is_last = False
        self._cap = 1
        self._num_expected: dict[SeqId, int] = {}
        self._num_run: dict[SeqId, int] = {}  # tokens whose Batch is done
        self._newest_id = SeqId(-1)
        self._chunk_tokens = 0
        self._decoding: deque[Queued] = deque()
        self._prompts: deque[Queued] = deque()
        self._was_prompt = False  # the newest Batch
        self._releases: dict[SeqId, None] = {}  # a dict for its order
        self._running: Batch | None = None
        self.epoch = NO_EPOCH
        self.newest_probe = 0
        self.counts: Counter[str] = Counter()

    def assign(self, epoch: Epoch, *, is_last: bool) -> None:
        """Begin a new Epoch: every Sequence is forgotten, and Frames of other Epochs are stale from now on.

        The caller resets the engine. A Batch that still runs is dropped when it completes.

        Raises:
            LocalProtocolError: the Epoch is not larger than the current one.
        """
        if epoch <= self.epoch:
            raise LocalProtocolError(f"assign: epoch {epoch} does not grow (now {self.epoch})")
        self.epoch = epoch
        self._is_last = is_last
        self.newest_probe = 0
        self._cap = 1
        self._chunk_tokens = 0
        self._num_expected.clear()
        self._decoding.clear()
        self._prompts.clear()
        self._num_run.clear()
        self._releases.clear()

    @property
    def num_waiting(self) -> int:
        """Segments that wait to be run."""
        return len(self._decoding) + len(self._prompts)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of these, and one for each RELEASE: a Starter has room for each in the KV cache."""
        queued = sum(queued.segment.length for queue in (self._decoding, self._prompts) for queued in queue)
        return queued + len(self._releases)

    @property
    def has_work(self) -> bool:
        """Whether ``take`` would return a Batch."""
        return self._running is None and bool(self._decoding or self._prompts or self._releases)

    def receive(self, frame: Frame) -> Receipt:
        """Process a Frame and return its outcome.

        Raises:
            RemoteProtocolError: the Frame is of a kind that must not be sent to a Stage.
        """
        if frame.kind is FrameKind.HEAD:
            raise RemoteProtocolError(f"{frame}: rows for the head came to a stage; check the order of the ring's hops")
        if frame.kind is FrameKind.BURST:
            raise RemoteProtocolError(f"{frame}: a burst measures a hop; it must not reach the ring protocol")
        if frame.epoch != self.epoch:
            self.counts["stale"] += len(frame.segments)
            return Receipt(stale=len(frame.segments))
        if frame.kind is FrameKind.PROBE:
            self.newest_probe = max(self.newest_probe, frame.segments[0].seq_id)
            return Receipt(passes=True)
        self._cap = frame.cap
        self._chunk_tokens = frame.chunk_tokens
        if frame.kind is FrameKind.RELEASE:
            gaps = tuple(seq_id for segment in frame.segments for seq_id in self._release(segment.seq_id))
            self.counts.update(gaps=len(gaps))
            return Receipt(gaps=gaps)
        return self._queue(frame)

    def take(self) -> Batch | None:
        """Return the Batch to run next, or None when nothing waits or one is running."""
        if not self.has_work:
            return None
        taken = self._take_segments()
        # Ids from which first Segments are accepted: those of this Batch are sent after its releases.
        firsts = [queued.segment.seq_id for queued in (*taken, *self._prompts) if queued.is_first]
        releases = tuple(seq_id for seq_id in self._releases if not firsts or seq_id < min(firsts))
        for seq_id in releases:
            del self._releases[seq_id]
        self._running = Batch(
            epoch=self.epoch,
            segments=tuple(queued.segment for queued in taken),
            payloads=tuple(queued.payload for queued in taken),
            releases=releases,
        )
        return self._running

    def complete(self, batch: Batch, output: Payload) -> list[Frame]:
        """Return the Frames to send on, now that the Batch has run; none when its Epoch is over."""
        self._stop_running(batch)
        if batch.epoch != self.epoch:
            return []
        for segment in batch.segments:
            if segment.seq_id in self._num_expected:  # not released in the meantime
                self._num_run[segment.seq_id] = segment.stop
        frames = self._release_frames(batch)
        if batch.segments:
            kind, segments = FrameKind.HIDDEN, batch.segments
            if self._is_last:
                kind, segments = FrameKind.HEAD, tuple(replace(segment, parent=None) for segment in batch.segments)
            frame = Frame(batch.epoch, kind, segments, output, self._cap, self._chunk_tokens)
            if frame.num_rows != output.num_rows:
                raise LocalProtocolError(f"{frame}: the engine gave {output.num_rows} rows, not {frame.num_rows}")
            frames.append(frame)
        return frames

    def fail(self, batch: Batch) -> tuple[tuple[SeqId, ...], list[Frame]]:
        """Drop a Batch whose forward failed: return its Sequences, to report to the Starter, and the Frames to send.

        Other queued Segments of those Sequences are dropped, and Sequences that would begin with their cache: the
        Starter replays these. The cache is freed when its RELEASE comes.
        """
        self._stop_running(batch)
        if batch.epoch != self.epoch:
            return (), []
        seq_ids = tuple(segment.seq_id for segment in batch.segments)
        self._forget(set(seq_ids))
        return seq_ids, self._release_frames(batch)

    def drop(self, batch: Batch, seq_ids: Collection[SeqId]) -> Batch:
        """Drop some Sequences of the running Batch, as ``fail`` does; return the Batch to run in its place."""
        self._stop_running(batch)
        if batch.epoch == self.epoch:
            self._forget(set(seq_ids))
        kept = [i for i, segment in enumerate(batch.segments) if segment.seq_id not in seq_ids]
        self._running = replace(
            batch,
            segments=tuple(batch.segments[i] for i in kept),
            payloads=tuple(batch.payloads[i] for i in kept),
        )
        return self._running

    def _take_segments(self) -> list[Queued]:
        is_prompts_turn = bool(self._prompts) and not (self._decoding and self._was_prompt)
        taken: list[Queued] = []
        if is_prompts_turn:
            chunk_tokens = min(self._chunk_tokens or self._token_budget, self._token_budget)
            taken = coalesce(self._prompts, min(self._cap, MAX_SEGMENTS), chunk_tokens, self._is_ready)
        self._was_prompt = bool(taken)
        if taken:
            return taken
        # Also where the prompts that wait begin with what a decode Segment has still to compute.
        most = MAX_SEGMENTS if self._prompts else min(self._cap, MAX_SEGMENTS)
        return coalesce(self._decoding, most, self._token_budget)

    def _queue_for(self, segment: Segment, *, is_first: bool) -> deque[Queued]:
        """Return the queue of a Segment: that of its Sequence, if any of it waits, so that none passes its own."""
        for queue in (self._prompts, self._decoding):
            if any(queued.segment.seq_id == segment.seq_id for queued in queue):
                return queue
        return self._prompts if is_first or segment.length > 1 else self._decoding

    def _queue(self, frame: Frame) -> Receipt:
        queued = duplicates = row = 0
        gaps: list[SeqId] = []
        for segment in frame.segments:
            payload = frame.payload.rows(row, row + segment.length)
            row += segment.length
            expected = self._num_expected.get(segment.seq_id)
            if expected is None:
                is_new = segment.seq_id > self._newest_id and self._can_begin(segment)
                is_old = segment.seq_id <= self._newest_id and segment.is_first
            else:
                is_new = segment.start == expected and segment.parent is None
                is_old = segment.start < expected
            if is_new:
                self._newest_id = max(self._newest_id, segment.seq_id)
                self._num_expected[segment.seq_id] = segment.stop
                self._queue_for(segment, is_first=expected is None).append(Queued(segment, payload, expected is None))
                queued += 1
            elif is_old:
                duplicates += 1
            else:
                gaps.append(segment.seq_id)
        self.counts.update(queued=queued, duplicates=duplicates, gaps=len(gaps))
        return Receipt(queued=queued, duplicates=duplicates, gaps=tuple(gaps))

    def _can_begin(self, segment: Segment) -> bool:
        """Whether the tokens before a Sequence's first Segment are here, or there are none."""
        if segment.parent is None:
            return segment.start == 0
        return self._num_expected.get(segment.parent, -1) >= segment.start

    def _is_ready(self, segment: Segment) -> bool:
        return segment.parent is None or self._num_run.get(segment.parent, -1) >= segment.start

    def _forget(self, seq_ids: set[SeqId]) -> list[SeqId]:
        """Forget Sequences and drop their queued Segments; return those that waited to begin with their cache."""
        children: list[SeqId] = []
        for queue in (self._prompts, self._decoding):
            kept: list[Queued] = []
            for queued in queue:
                segment = queued.segment
                if segment.parent in seq_ids and segment.seq_id not in seq_ids:
                    children.append(segment.seq_id)
                    seq_ids = {*seq_ids, segment.seq_id}
                if segment.seq_id not in seq_ids:
                    kept.append(queued)
            queue.clear()
            queue.extend(kept)
        for seq_id in seq_ids:
            self._num_expected.pop(seq_id, None)
            self._num_run.pop(seq_id, None)
        return children

    def _release(self, seq_id: SeqId) -> list[SeqId]:
        children = self._forget({seq_id}) if seq_id in self._num_expected else []
        # A Sequence that was never seen here is barred as well: its first Frame may be late.
        self._newest_id = max(self._newest_id, seq_id)
        self._releases[seq_id] = None
        return children

    def _release_frames(self, batch: Batch) -> list[Frame]:
        segments = [Segment(seq_id, 0, 0) for seq_id in batch.releases]
        # Releases pile up while a Hop is down: in one Frame, too large for the wire, they would never be delivered.
        return [
            Frame(
                batch.epoch,
                FrameKind.RELEASE,
                tuple(segments[i : i + MAX_SEGMENTS]),
                cap=self._cap,
                chunk_tokens=self._chunk_tokens,
            )
            for i in range(0, len(segments), MAX_SEGMENTS)
        ]

    def _stop_running(self, batch: Batch) -> None:
        if batch is not self._running:
            raise LocalProtocolError("complete or fail: this Batch is not the one that take() gave")
        self._running = None
