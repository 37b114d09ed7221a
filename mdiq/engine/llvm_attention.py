"""Attention of Segments of one token, compiled on the device: one call a Layer for all of a Batch.

torch takes one call for each Sequence, whose dispatch costs more than a short Sequence's maths, or one for all with
their keys copied to one length.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise

import torch

from mdiq.engine.device import cpu_flags
from mdiq.engine.kv_cache import Slots
from mdiq.engine.layers import Attend, Span, attention_over, look_back, store, write_slots
from mdiq.engine.llvm_matmul import compiled, in_threads
from mdiq.engine.model_config import ModelConfig

_FEW_SLOTS = 128  # of a thread: with fewer, telling it costs as much as its work


class CompiledAttention:
    """Attention of Segments of one token, in f32 on the CPU."""

    def __init__(self, config: ModelConfig) -> None:
        """Compile it for a model's heads, unless that was done before.

        Raises:
            RuntimeError: it cannot be compiled, or not for such heads.
        """
        groups = config.num_heads // config.num_kv_heads
        machine = compiled("llvm_attention_code", head_dim=config.head_dim, groups=groups)
        from mdiq.engine.llvm_attention_code import LANES

        if config.head_dim % LANES:
            raise RuntimeError(f"heads of {config.head_dim} are no multiple of {LANES}")
        self._machine = machine  # its code lives as long as it does
        self.function = machine.function("attend", 6, 7)
        self.groups, self.lanes = groups, LANES
        self._all_slots = torch.arange(0)

    @classmethod
    def find(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> "CompiledAttention | None":
        """Return it where it is faster than torch's, None elsewhere."""
        # Without them each sum of products would be a call of C's library.
        has_fused_sums = bool({"fma", "asimd"} & cpu_flags())
        if dtype != torch.float32 or device.type != "cpu" or not has_fused_sums or find_spec("llvmlite") is None:
            return None
        try:
            return cls(config)
        except RuntimeError:
            return None

    def over(self, spans: Sequence[Span]) -> Attend:
        """Return the attention of one Batch, for all Layers; torch computes that of longer Segments.

        A Segment gets the same bits in any company: in all of them one token goes this way.
        """
        cpu = torch.device("cpu")
        if all(span.length > 1 for span in spans):
            return attention_over(spans, cpu)
        return _DecodeAttention(self, spans, write_slots(spans, cpu))

    def all_slots(self, count: int) -> torch.Tensor:
        """Return the numbers from 0 on, at least as many: any run of slots is a part of them."""
        if len(self._all_slots) < count:
            self._all_slots = torch.arange(2 * count)
        return self._all_slots


class _DecodeAttention:
    """The attention of one Batch; see layers.Attend."""

    def __init__(self, compiled: CompiledAttention, spans: Sequence[Span], writes: Slots) -> None:
        ones = [span for span in spans if span.length == 1]
        reads = [span.placement.read for span in ones]
        counts = [span.start + 1 for span in ones]
        self._compiled, self._writes = compiled, writes
        self._others = [span for span in spans if span.length > 1]
        self._rows_of_others = [span.first + i for span in self._others for i in range(span.length)]
        # What lies at addresses lives as long as this does.
        self._gathered = reads
        self._slots = compiled.all_slots(max(read.stop if isinstance(read, slice) else 0 for read in reads))
        first = self._slots.data_ptr()
        addresses = [first + 8 * read.start if isinstance(read, slice) else read.data_ptr() for read in reads]
        rows = [span.first for span in ones]
        self._reads = torch.tensor(list(zip(addresses, counts, rows, strict=True)))
        self._num_threads = max(min(torch.get_num_threads(), sum(counts) // _FEW_SLOTS), 1)
        self._width = max(counts) + compiled.lanes
        self._scores = torch.empty(self._num_threads, compiled.groups, self._width)

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
        addresses = [tensor.data_ptr() for tensor in (q, keys, values, found, self._reads)]
        sizes = (k.shape[1], 4 * q.stride(0), 4 * found.stride(0), window, self._width)
        num_items = len(self._reads) * k.shape[1]
        bounds = [num_items * i // self._num_threads for i in range(self._num_threads + 1)]
        in_threads(
            self._compiled.function,
            [
                (*addresses, scores.data_ptr(), *sizes, first, stop)
                for scores, (first, stop) in zip(self._scores, pairwise(bounds), strict=True)
            ],
        )
        if self._others:
            found[self._rows_of_others] = look_back(self._others, q, keys, values, window)
        return found
