"""Reservations of KV cache per Sequence, in tokens, kept by the Starter alone. The cache is engine/model/kv_cache.py.

A token takes at most one slot in every Stage, so the Ring's capacity is the minimum over its Stages, and every Stage
has room for what the ledger grants. A Sequence reserves its known tokens when it enters, and more KvBlocks as it
grows; a token without room is not sent. Freed room counts as taken until the RELEASE has made its Lap.

Sequences with a common prefix may share their first KvBlocks: each is counted once and is free again when the last
Sequence that holds it has left every Stage. So the ledger numbers KvBlocks; a Stage chooses its own.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import count

from mdiq.core.types import SeqId
from mdiq.errors import LocalProtocolError


class KvLedger:
    """Reservations of KV cache, in tokens rounded up to whole KvBlocks."""

    def __init__(self, capacity_tokens: int, block_tokens: int = 1) -> None:
        self.block_tokens = block_tokens
        self.capacity_tokens = capacity_tokens // block_tokens * block_tokens
        self._blocks: dict[SeqId, list[int]] = {}
        self._holders: Counter[int] = Counter()  # of each block: Sequences that hold it
        self._staying: Counter[int] = Counter()  # of these, Sequences that are not on their way out
        self._leaving: set[SeqId] = set()
        self._new_blocks = count()

    @property
    def reserved_tokens(self) -> int:
        return len(self._holders) * self.block_tokens

    def tokens_without(self, seq_ids: Iterable[SeqId]) -> int:
        """Return what would be reserved if these Sequences had left every Stage."""
        without = frozenset(seq_ids)
        held = {block for seq_id, blocks in self._blocks.items() if seq_id not in without for block in blocks}
        return len(held) * self.block_tokens

    def fits(self, num_tokens: int, shared_tokens: int = 0) -> bool:
        """Tell whether ``num_tokens`` can be reserved now, the first ``shared_tokens`` of them in another's blocks."""
        return self._num_blocks(num_tokens - shared_tokens) + len(self._holders) <= self._capacity_blocks

    def reserve(self, seq_id: SeqId, num_tokens: int, parent: SeqId | None = None, shared_tokens: int = 0) -> None:
        """Promise ``num_tokens`` to a Sequence, the first ``shared_tokens`` of them in its parent's blocks.

        Raises:
            LocalProtocolError: it does not fit, or the Sequence has a reservation already.
        """
        if seq_id in self._blocks or not self.fits(num_tokens, shared_tokens):
            raise LocalProtocolError(f"KvLedger: {num_tokens} tokens for sequence {seq_id} cannot be reserved")
        shared = [] if parent is None else self._first_blocks(parent, shared_tokens)
        blocks = [*shared, *(next(self._new_blocks) for _ in range(self._num_blocks(num_tokens) - len(shared)))]
        self._hold(blocks)
        self._blocks[seq_id] = blocks

    def granted_tokens(self, seq_id: SeqId) -> int:
        """Return how many tokens a Sequence has room for."""
        return len(self._blocks[seq_id]) * self.block_tokens

    def grow(self, seq_id: SeqId, num_tokens: int) -> None:
        """Promise a Sequence room for ``num_tokens`` in all.

        Raises:
            LocalProtocolError: it does not fit, or the Sequence has no reservation or is on its way out.
        """
        granted = self.granted_tokens(seq_id) if seq_id in self._blocks else 0
        if not granted or seq_id in self._leaving or not self.fits(num_tokens, granted):
            raise LocalProtocolError(f"KvLedger: sequence {seq_id} cannot grow to {num_tokens} tokens")
        blocks = [next(self._new_blocks) for _ in range(self._num_blocks(num_tokens - granted))]
        self._hold(blocks)
        self._blocks[seq_id] += blocks

    def share(self, seq_id: SeqId, parent: SeqId, shared_tokens: int) -> None:
        """Put the parent's blocks in place of a Sequence's first ones, which no Stage has given it yet."""
        shared = self._first_blocks(parent, shared_tokens)
        blocks = self._blocks[seq_id]
        replaced, blocks[: len(shared)] = blocks[: len(shared)], shared
        self._hold(shared)
        self._drop(replaced, self._staying, self._holders)

    def shrink(self, seq_id: SeqId, num_tokens: int) -> None:
        """Reduce a reservation to ``num_tokens``: no Stage has given the Sequence more than these."""
        blocks = self._blocks[seq_id]
        keep = self._num_blocks(num_tokens)
        self._drop(blocks[keep:], self._staying, self._holders)
        del blocks[keep:]

    def leave(self, seq_id: SeqId) -> None:
        """Note that a Sequence is about to be released: its room will be free again."""
        if seq_id in self._blocks and seq_id not in self._leaving:
            self._leaving.add(seq_id)
            self._drop(self._blocks[seq_id], self._staying)

    def release(self, seq_id: SeqId) -> None:
        """Free a reservation; an unknown one is ignored, since a RELEASE may return twice."""
        self.leave(seq_id)
        self._leaving.discard(seq_id)
        self._drop(self._blocks.pop(seq_id, ()), self._holders)

    def to_give_up(self, num_tokens: int, candidates: Iterable[SeqId], shared_tokens: int = 0) -> list[SeqId] | None:
        """Return the first of ``candidates`` whose eviction makes room for ``num_tokens``, or None if all are too few.

        The list is empty if enough room is being freed already.
        """
        lacking = self._num_blocks(num_tokens - shared_tokens) + len(self._staying) - self._capacity_blocks
        chosen: list[SeqId] = []
        num_chosen: Counter[int] = Counter()
        for seq_id in candidates:
            if lacking <= 0:
                break
            chosen.append(seq_id)
            for block in self._blocks[seq_id]:
                num_chosen[block] += 1
                lacking -= num_chosen[block] == self._staying[block]
        return chosen if lacking <= 0 else None

    @property
    def _capacity_blocks(self) -> int:
        return self.capacity_tokens // self.block_tokens

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def _first_blocks(self, seq_id: SeqId, num_tokens: int) -> list[int]:
        num_blocks = num_tokens // self.block_tokens
        blocks = self._blocks[seq_id][:num_blocks]
        assert len(blocks) == num_blocks and num_tokens % self.block_tokens == 0  # only whole, cached blocks are shared
        return blocks

    def _hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._holders[block] += 1
            self._staying[block] += 1

    @staticmethod
    def _drop(blocks: Iterable[int], *counters: Counter[int]) -> None:
        for block in blocks:
            for counter in counters:
                counter[block] -= 1
                if not counter[block]:
                    del counter[block]
