"""Counts the rows of each Sequence that have left the Starter: each tells the Nodes after it a little about the text.

Theory. A row is sent again when its Sequence is replayed, and not at all when it is found in the KV cache. But then it
was sent for another Sequence that began with the same tokens, so it tells of this text too. So a Sequence that begins
after a cached prefix inherits the rows of that prefix, as often as they may have been sent. The counts are upper
bounds: rows count as sent when they enter the Ring, also if they are lost on their way.
"""

from mdiq.core.sequence import Sequence
from mdiq.core.types import SeqId


class Exposure:
    """num_rows: all that were sent. max_rows: the most of one Sequence, those that it inherits included."""

    def __init__(self) -> None:
        self._passes: dict[SeqId, int] = {}  # how often a row of this id, or of what it inherits, may have been sent
        self.num_rows = self.max_rows = 0

    def clear(self) -> None:
        """Begin the counts anew."""
        self.num_rows = self.max_rows = 0

    def new_epoch(self) -> None:
        """Forget the ids of the Epoch before: nothing is in the KV cache."""
        self._passes.clear()

    def enters(self, seq_id: SeqId, sequence: Sequence, parent: SeqId | None, num_shared: int) -> None:
        """Note that a Sequence is about to be sent under this id, after ``num_shared`` rows of ``parent``'s cache."""
        inherited = self._passes.get(parent, 1) if parent is not None else 0
        sequence.num_passes += max(inherited, 1)
        sequence.num_rows_sent += inherited * num_shared
        self._passes[seq_id] = sequence.num_passes

    def sent(self, sequence: Sequence, num_rows: int) -> None:
        """Note that rows of a Sequence are sent."""
        sequence.num_rows_sent += num_rows
        self.num_rows += num_rows
        self.max_rows = max(self.max_rows, sequence.num_rows_sent)

    def forget(self, seq_id: SeqId) -> None:
        """Note that nothing begins with the cache of this id any more."""
        self._passes.pop(seq_id, None)
