"""How much KV cache is promised to whom, counted in tokens at the Starter alone. The cache is engine/kv_cache.py.

A token takes at most one slot in every Stage, so the Ring's capacity is the least over its Stages, and what the ledger
grants no Stage can lack. A Sequence reserves all that it may grow to when it enters: nothing has to be preempted later.
"""

from mdiq.core.types import SeqId
from mdiq.errors import LocalProtocolError


class KvLedger:
    """Reservations of KV cache, in tokens rounded up to whole KvBlocks."""

    def __init__(self, capacity_tokens: int, block_tokens: int = 1) -> None:
        self._block_tokens = block_tokens
        self.capacity_tokens = capacity_tokens // block_tokens * block_tokens
        self._reserved: dict[SeqId, int] = {}
        self.reserved_tokens = 0

    def fits(self, num_tokens: int) -> bool:
        """Tell whether ``num_tokens`` can be reserved now."""
        return self.reserved_tokens + self._rounded(num_tokens) <= self.capacity_tokens

    def fits_ever(self, num_tokens: int) -> bool:
        """Tell whether ``num_tokens`` could be reserved in an empty Ring."""
        return self._rounded(num_tokens) <= self.capacity_tokens

    def reserve(self, seq_id: SeqId, num_tokens: int) -> None:
        """Promise ``num_tokens`` to a Sequence.

        Raises:
            LocalProtocolError: it does not fit, or the Sequence has a reservation already.
        """
        if seq_id in self._reserved or not self.fits(num_tokens):
            raise LocalProtocolError(f"KvLedger: {num_tokens} tokens for sequence {seq_id} cannot be reserved")
        self._reserved[seq_id] = self._rounded(num_tokens)
        self.reserved_tokens += self._reserved[seq_id]

    def release(self, seq_id: SeqId) -> None:
        """Take a promise back; one that is unknown is ignored, since a RELEASE may come round twice."""
        self.reserved_tokens -= self._reserved.pop(seq_id, 0)

    def _rounded(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens) * self._block_tokens
