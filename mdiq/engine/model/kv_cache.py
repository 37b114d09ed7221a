"""The KV cache of one Stage: KvBlocks of a pool, given to Sequences as they grow, taken back when they end.

A Sequence gets neighbouring KvBlocks where it can, since attention then reads its keys as one view of the pool; where
it cannot, they are gathered. Pages of the pool that no Sequence has touched take no memory, so Sequences begin in as
much of the pool as they need together and some more: a pool may be far larger than what its Ring can use.

A Sequence may begin with whole KvBlocks of another. They are full, so nobody writes to them again, and they are taken
back when the last Sequence that holds them ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from mdiq.core.frame import Segment
from mdiq.core.types import SeqId
from mdiq.errors import CapacityError, EngineError

BLOCK_TOKENS = 32
_ZONE_BLOCKS = 128
"""Sequences begin in so much of the pool at least: 4,096 tokens."""
_ZONE_SHARE = 4
"""And in so many times what is in use. They seldom grow into each other then: of the forwards of 64 Sequences of 30 to
3,000 tokens that come and go, under 1 % gathered keys; with twice, 4 to 6 %."""

Slots = slice | torch.Tensor


@dataclass(slots=True)
class _Table:
    """One Sequence's KvBlocks in order, and how many of its tokens are cached."""

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    is_run: bool = True  # the blocks are neighbours


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where a Segment's K and V go, and where all of its Sequence's lie: slots of the pool.

    write: [length] slots; read: [stop] slots, positions 0 to stop - 1.
    """

    write: Slots
    read: Slots


class KvCache:
    """K and V of every Layer of a Stage.

    keys, values: one pool per Layer, [capacity_tokens, num_kv_heads, head_dim].
    """

    def __init__(
        self,
        num_layers: int,
        capacity_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._num_blocks = capacity_tokens // BLOCK_TOKENS
        self.capacity_tokens = self._num_blocks * BLOCK_TOKENS
        shape = (self.capacity_tokens, num_kv_heads, head_dim)
        try:
            self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
            self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        except RuntimeError:
            num_bytes = 2 * num_layers * self.capacity_tokens * num_kv_heads * head_dim * dtype.itemsize
            raise CapacityError(
                f"KV cache: {num_bytes >> 20} MiB for {self.capacity_tokens} tokens cannot be allocated; "
                "lower --kv-tokens or free memory"
            ) from None
        # Where the pools of each Layer are, for compiled code: i64 [layers, 2].
        self.addresses = torch.tensor(
            [[k.data_ptr(), v.data_ptr()] for k, v in zip(self.keys, self.values, strict=True)]
        )
        self._device = device
        self._tables: dict[SeqId, _Table] = {}
        self._is_free = bytearray(b"\1" * self._num_blocks)
        self._num_holders = [0] * self._num_blocks
        self._num_free = self._num_blocks

    @property
    def tokens_in_use(self) -> int:
        """Slots of all KvBlocks that Sequences hold."""
        return (self._num_blocks - self._num_free) * BLOCK_TOKENS

    def misfits(self, segments: Sequence[Segment]) -> dict[SeqId, str]:
        """Return the Sequences of a Batch for which ``fork`` or ``extend`` would fail, and why; nothing is changed.

        The others fit together without them.
        """
        wrong: dict[SeqId, str] = {}
        num_free = self._num_free
        for segment in segments:
            table = self._tables.get(segment.seq_id) or _Table()
            num_tokens, num_blocks = table.num_tokens, len(table.blocks)
            if segment.parent is not None:
                parent = self._tables.get(segment.parent) or _Table()
                if num_tokens or segment.start > parent.num_tokens or segment.start % BLOCK_TOKENS:
                    wrong[segment.seq_id] = f"it cannot begin with {segment.start} of {parent.num_tokens} tokens"
                    continue
                num_tokens, num_blocks = segment.start, segment.start // BLOCK_TOKENS
            missing = max(-(-segment.stop // BLOCK_TOKENS) - num_blocks, 0)
            if segment.start != num_tokens:
                wrong[segment.seq_id] = f"{num_tokens} tokens are cached, a segment begins at {segment.start}"
            elif missing > num_free:
                wrong[segment.seq_id] = f"KV cache: {missing} blocks are needed and {num_free} are free"
            else:
                num_free -= missing
        return wrong

    def extend(self, seq_id: SeqId, start: int, length: int) -> Placement:
        """Make room for a Segment and return where it goes.

        Raises:
            EngineError: ``start`` is not the number of tokens cached for the Sequence.
            CapacityError: no KvBlock is free.
        """
        table = self._tables.get(seq_id) or _Table()
        if start != table.num_tokens:
            raise EngineError(f"sequence {seq_id}: {table.num_tokens} tokens are cached, a segment begins at {start}")
        stop = start + length
        missing = -(-stop // BLOCK_TOKENS) - len(table.blocks)
        if missing > self._num_free:
            raise CapacityError(f"KV cache: {missing} blocks are needed and {self._num_free} are free")
        self._tables[seq_id] = table
        if missing > 0:
            self._grow(table, missing)
        table.num_tokens = stop
        if table.is_run:
            base = table.blocks[0] * BLOCK_TOKENS
            return Placement(slice(base + start, base + stop), slice(base, base + stop))
        blocks = torch.tensor(table.blocks, device=self._device)
        slots = (blocks[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=self._device)).flatten()[:stop]
        return Placement(slots[start:], slots)

    def fork(self, seq_id: SeqId, parent: SeqId, num_tokens: int) -> None:
        """Have a new Sequence begin with the first ``num_tokens`` of another.

        Raises:
            EngineError: the Sequence is known, its parent has not so many tokens, or they are not whole KvBlocks.
        """
        source = self._tables.get(parent) or _Table()
        if seq_id in self._tables or num_tokens > source.num_tokens or num_tokens % BLOCK_TOKENS:
            raise EngineError(
                f"sequence {seq_id}: it cannot begin with {num_tokens} of the {source.num_tokens} tokens of {parent}"
            )
        blocks = source.blocks[: num_tokens // BLOCK_TOKENS]
        for block in blocks:
            self._num_holders[block] += 1
        is_run = all(following == block + 1 for block, following in pairwise(blocks))
        if is_run:
            self._clear_the_way(source, len(blocks))
        self._tables[seq_id] = _Table(blocks, num_tokens, is_run)

    def _clear_the_way(self, parent: _Table, num_shared: int) -> None:
        """Move the parent's last KvBlock if it alone lies after the shared ones, so that the fork can grow as a run.

        The usual parent is the last turn of a chat: it has ended, and nobody reads that block. Without the move every
        token of the fork gathers its keys: 36 ms instead of 24 in 30 layers of SmolLM2 at 1,000 tokens, f32, one core.
        """
        tail = parent.blocks[num_shared:]
        to = self._is_free.rfind(1)
        if not num_shared or len(tail) != 1 or tail[0] != parent.blocks[num_shared - 1] + 1 or to < 0:
            return
        if self._num_holders[tail[0]] > 1:
            return
        source, target = (slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS) for block in (tail[0], to))
        for pool in (*self.keys, *self.values):
            pool[target] = pool[source]
        parent.blocks[-1], parent.is_run = to, False
        self._is_free[tail[0]], self._is_free[to] = 1, 0
        self._num_holders[tail[0]], self._num_holders[to] = 0, 1

    def free(self, seq_id: SeqId) -> None:
        """Take back the KvBlocks that only this Sequence holds; one that is unknown is ignored."""
        if (table := self._tables.pop(seq_id, None)) is not None:
            for block in table.blocks:
                self._num_holders[block] -= 1
                if not self._num_holders[block]:
                    self._is_free[block] = 1
                    self._num_free += 1

    def reset(self) -> None:
        """Take every KvBlock back."""
        for seq_id in list(self._tables):
            self.free(seq_id)

    def _grow(self, table: _Table, count: int) -> None:
        for _ in range(count):
            if table.blocks and (following := table.blocks[-1] + 1) < self._num_blocks and self._is_free[following]:
                block = following
            else:
                block = self._roomiest()
                table.is_run = table.is_run and not table.blocks
            self._is_free[block] = 0
            self._num_holders[block] = 1
            self._num_free -= 1
            table.blocks.append(block)

    def _roomiest(self) -> int:
        """Return a free KvBlock with much room after it: the start of the zone, or the middle of its longest gap."""
        num_used = self._num_blocks - self._num_free
        zone = min(max(_ZONE_BLOCKS, _ZONE_SHARE * num_used), self._num_blocks)
        best, best_length, at = -1, 0, self._is_free.find(1)
        while 0 <= at and (at < zone or best < 0):
            stop = self._is_free.find(0, at, zone)
            stop = max(zone, at + 1) if stop < 0 else stop
            if stop - at > best_length:
                best, best_length = at, stop - at
            at = self._is_free.find(1, stop)
        # Behind another Sequence that may still grow, begin half-way into the gap.
        return best + best_length // 2 if best > 0 and best_length > 1 else best
