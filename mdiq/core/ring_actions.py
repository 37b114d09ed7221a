"""What the ring protocol asks of its caller: values alone; core/ring.py makes them."""

from dataclasses import dataclass

from mdiq.core.frame import Frame, Segment
from mdiq.core.sequence import Sequence, TokenEvent
from mdiq.core.types import Epoch, SeqId


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


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Returned rows that score tokens of a prompt: ``num_rows`` of the Frame from row ``row`` on.

    start: the position of the first; each tells how likely the token after it is.
    """

    seq_id: SeqId
    row: int
    num_rows: int
    start: int
    sequence: Sequence

    @classmethod
    def of(cls, segment: Segment, row: int, sequence: Sequence) -> "PromptRows":
        """Return those of a Segment that wants rows: the first one that is still needed, and all after it."""
        start = max(segment.start, len(sequence.prompt_logprobs))
        num_rows = min(segment.stop, len(sequence.prompt) - 1) - start
        return cls(segment.seq_id, row + start - segment.start, num_rows, start, sequence)
