"""Frames and Segments (sent over a Hop) and Batches (run by one forward). No bytes (wire.py), no tensors (engine/).

A payload is opaque here: core only counts its rows, slices them and hands them on. The engine concatenates payloads
and turns them into tensors, so a Ring inside one process passes tensors on without a copy.
"""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from mdiq.core.types import Epoch, SeqId

Buffer = bytes | bytearray | memoryview

MAX_SEGMENTS = 1_024
"""Maximum number of Segments in a Frame."""


class Payload(Protocol):
    """Rows of activations (or of token ids, on their way into the Starter's own Stage)."""

    @property
    def num_rows(self) -> int:
        """Rows that the payload holds."""
        ...

    def rows(self, start: int, stop: int) -> "Payload":
        """Return rows ``start`` to ``stop - 1`` as a payload that shares this one's memory."""
        ...

    def parts(self) -> tuple[str, int, AbstractSequence[Buffer]]:
        """Return what the wire needs: dtype name (see wire_formats.py), row width in elements, and the bytes."""
        ...


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The payload that enters the Ring: token ids, one a row. It never travels a Hop."""

    ids: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return len(self.ids)

    def rows(self, start: int, stop: int) -> "TokenIds":
        return TokenIds(self.ids[start:stop])

    def parts(self) -> tuple[str, int, AbstractSequence[Buffer]]:
        raise TypeError("token ids stay on the Starter: a Frame of them has no wire form")


@dataclass(frozen=True, slots=True)
class NoRows:
    """The payload of a Frame that carries no activations."""

    @property
    def num_rows(self) -> int:
        return 0

    def rows(self, start: int, stop: int) -> "NoRows":
        return self

    def parts(self) -> tuple[str, int, AbstractSequence[Buffer]]:
        return "none", 0, ()


NO_ROWS = NoRows()


class FrameKind(IntEnum):
    """What a Frame carries."""

    HIDDEN = 1
    """Activations between two Stages: one row per token of every Segment."""
    HEAD = 2
    """The last Hop, back to the Starter: all rows of a Segment that wants them, one row of another that wants logits,
    and none of the others."""
    RELEASE = 3
    """Segments of length 0: their Sequences have ended, free their KV cache. Makes a full Lap."""
    PROBE = 4
    """One Segment of length 0, whose id numbers the probe. Stages forward it at once, so its Lap times the Hops."""
    BURST = 5
    """Bytes that measure one Hop and are not forwarded. One Segment: its id numbers the burst, ``start`` counts the
    Frames of the burst still to come, and the payload is ``length`` rows of no meaning."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one Sequence: positions ``start`` to ``stop - 1``.

    wants_logits: the Segment ends with the Sequence's last known token, so that row goes to the head.
    wants_rows: the rows of all its tokens go to the head, to score the tokens of the prompt that come after them.
    parent: on the first Segment of a Sequence that begins with another's KV cache, the id of that other; the first
    ``start`` tokens are the same in both.
    """

    seq_id: SeqId
    start: int
    length: int
    wants_logits: bool = False
    parent: SeqId | None = None
    wants_rows: bool = False

    @property
    def num_head_rows(self) -> int:
        """Rows of it that go to the head; the last of them is that of its last token."""
        return self.length if self.wants_rows else int(self.wants_logits)

    @property
    def is_first(self) -> bool:
        """Whether this is the first Segment with its id."""
        return self.start == 0 or self.parent is not None

    @property
    def stop(self) -> int:
        return self.start + self.length

    def __str__(self) -> str:
        origin = "" if self.parent is None else f"<{self.parent}"
        wants = "*" * self.wants_logits + "+" * self.wants_rows
        return f"{self.seq_id}{origin}[{self.start}:{self.stop}]{wants}"


@dataclass(frozen=True, slots=True)
class Frame:
    """The unit sent over a Hop: the Epoch, some Segments, and the payload that holds their rows in order.

    cap: the MicroBatch cap that the Starter sets; Stages use the newest one they have seen.
    chunk_tokens: maximum prompt tokens of a Batch, a multiple of CHUNK_STEP; 0 leaves it to the Stage.
    """

    epoch: Epoch
    kind: FrameKind
    segments: tuple[Segment, ...]
    payload: Payload = NO_ROWS
    cap: int = 1
    chunk_tokens: int = 0

    def rows_of(self, segment: Segment) -> int:
        """Return how many payload rows belong to one Segment of this Frame."""
        if self.kind in (FrameKind.HIDDEN, FrameKind.BURST):
            return segment.length
        return segment.num_head_rows if self.kind is FrameKind.HEAD else 0

    @property
    def num_rows(self) -> int:
        """Rows that the Segments call for; equals ``payload.num_rows`` in every legal Frame."""
        return sum(self.rows_of(segment) for segment in self.segments)

    @property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    def __str__(self) -> str:
        """Describe the Frame without its payload, so that no prompt can reach a log."""
        return f"{self.kind.name} epoch {self.epoch} [{' '.join(map(str, self.segments))}]"


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of one forward: Segments of distinct Sequences with one payload each, after some releases.

    releases: Sequences whose KV cache the engine frees before it runs the Segments.
    """

    epoch: Epoch
    segments: tuple[Segment, ...]
    payloads: tuple[Payload, ...]
    releases: tuple[SeqId, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)


class Engine(Protocol):
    """The interface between a Stage and its compute: torch in production, the chain engine in the simulation."""

    def forward(self, batch: Batch) -> Payload:
        """Run the Batch through this Stage's layers and return its rows, in the order of the Segments.

        A Stage that is not the last returns one row per token; the last Stage the ``num_head_rows`` of each Segment.
        """
        ...

    def reset(self) -> None:
        """Forget every Sequence (a new Epoch begins)."""
        ...
