"""What the ring protocol asks of its caller: values alone; core/ring.py makes them."""

from dataclasses import dataclass

from mdiq.core.frame import Frame
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
