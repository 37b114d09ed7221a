"""Attention compiled on the device: one call a Layer for all of a Batch.

torch takes one call for each Sequence, whose dispatch costs more than a short Sequence's maths, or one for all with
their keys copied to one length. And its sums depend on how many tokens of a Sequence are in a Batch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch

from mdiq.engine.kernels.llvm_matmul import compiled, compiled_or_none, in_threads
from mdiq.engine.model.kv_cache import BLOCK_TOKENS, Slots
from mdiq.engine.model.layers import PlacedSegment, store, write_slots
from mdiq.engine.model_config import ModelConfig

_FEW_SLOTS = 128  # of a thread: with fewer, telling it costs as much as its work
_MAX_SCORES = 131_072  # of a tile, half a MiB: tiles of fewer tokens have keys and values come from memory more often
_MAX_TOKENS = 16  # of a tile


class CompiledAttention:
    """Attention in f32 on the CPU."""

    def __init__(self, config: ModelConfig) -> None:
        """Compile it for a model's heads, unless that was done before.

        Raises:
            RuntimeError: it cannot be compiled, or not for such heads.
        """
        groups = config.num_heads // config.num_kv_heads
        shape = {"head_dim": config.head_dim, "groups": groups, "block_tokens": BLOCK_TOKENS}
        machine = compiled("llvm_attention_code", **shape)
        from mdiq.engine.kernels.llvm_attention_code import LANES, row_floats

        if config.head_dim % LANES:
            raise RuntimeError(f"heads of {config.head_dim} are no multiple of {LANES}")
        self.machine = machine  # its code lives as long as it does
        self.function = machine.function("attend", 6, 7)
        self.groups, self.num_kv_heads = groups, config.num_kv_heads
        self.row_floats = partial(row_floats, head_dim=config.head_dim)
        self._all_slots = torch.arange(0)

    @classmethod
    def find(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> "CompiledAttention | None":
        """Return it where it is faster than torch's, None elsewhere."""
        return compiled_or_none(lambda: cls(config), dtype, device)

    def over(self, placed: Sequence[PlacedSegment]) -> "CompiledBatch":
        """Return the attention of one Batch, for all Layers.

        A token gets the same bits in any company: alone, as a token of a prompt, and however that is cut in Segments.
        """
        return CompiledBatch(self, placed, write_slots(placed, torch.device("cpu")))

    def all_slots(self, count: int) -> torch.Tensor:
        """Return the numbers from 0 on, at least as many: any run of slots is a part of them."""
        if len(self._all_slots) < count:
            self._all_slots = torch.arange(2 * count)
        return self._all_slots


class CompiledBatch:
    """The attention of one Batch; see layers.Attend.

    reads, width, scores: as the compiled function wants them, see llvm_attention_code.py; scores are of each thread.
    """

    def __init__(self, compiled: CompiledAttention, placed: Sequence[PlacedSegment], writes: Slots) -> None:
        self._compiled, self._writes = compiled, writes
        reads = [segment.placement.read for segment in placed]
        # What lies at addresses lives as long as this does.
        self._gathered = reads
        self._slots = compiled.all_slots(max(read.stop if isinstance(read, slice) else 0 for read in reads))
        first = self._slots.data_ptr()
        self.width = compiled.row_floats(max(segment.start + segment.length for segment in placed))
        self.slots = first + 8 * writes.start if isinstance(writes, slice) else writes.data_ptr()
        most = min(max(_MAX_SCORES // (compiled.groups * self.width), 1), _MAX_TOKENS)
        tiles: list[tuple[int, int, int, int]] = []
        for segment, read in zip(placed, reads, strict=True):
            address = first + 8 * read.start if isinstance(read, slice) else read.data_ptr()
            tiles += [
                (address, segment.start + i + 1, segment.first + i, min(most, segment.length - i))
                for i in range(0, segment.length, most)
            ]
        self.reads = torch.tensor(tiles)
        self._slots_until = list(accumulate((end * count for _, end, _, count in tiles), initial=0))
        num_threads = max(min(torch.get_num_threads(), self._slots_until[-1] // _FEW_SLOTS), 1)
        self.scores = torch.empty(num_threads, max(tile[3] for tile in tiles) * compiled.groups, self.width)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int,
    ) -> torch.Tensor:
        store(self._writes, k, v, keys, values)
        found = torch.empty(len(q), q.shape[1] * q.shape[2])
        addresses = [tensor.data_ptr() for tensor in (q, keys, values, found, self.reads)]
        sizes = (k.shape[1], 4 * q.stride(0), 4 * found.stride(0), window, self.width)
        in_threads(
            self._compiled.function,
            [
                (*addresses, scores.data_ptr(), *sizes, first, stop)
                for scores, (first, stop) in zip(self.scores, pairwise(self._bounds(k.shape[1])), strict=True)
            ],
        )
        return found

    def bounds(self, num_threads: int) -> torch.Tensor:
        """Return which items each of so many threads begins with, and the end; some have none: i64 [threads + 1]."""
        bounds = self._bounds(self._compiled.num_kv_heads)
        return torch.tensor(bounds + bounds[-1:] * (num_threads + 1 - len(bounds)))

    def _bounds(self, num_kv_heads: int) -> list[int]:
        """Return which items each thread does, from one number to the next: about as many slots to read in each."""
        num_threads, total = len(self.scores), self._slots_until[-1]
        bounds = [0]
        for i in range(1, num_threads):
            tile = bisect_right(self._slots_until, total * i // num_threads) - 1
            rest = total * i // num_threads - self._slots_until[tile]
            slots = self._slots_until[tile + 1] - self._slots_until[tile]
            bounds.append(num_kv_heads * tile + num_kv_heads * rest // slots)
        return [*bounds, num_kv_heads * (len(self._slots_until) - 1)]
