"""Matrix kernels: weights in some format, and the matmul that reads them. One interface; formats are its classes.

A kernel is *batch-invariant* when a row's result does not depend, to the last bit, on the rows beside it. In exact mode
all kernels of int8 and int4 are: then a Sequence gets the same tokens alone and among others. Which kernel serves a
matrix on this device is choice.py's to measure. Kernels of one ``rounding`` give the same bits: in exact mode
the measurements choose among those alone, so that devices of one kind agree however noisy they are.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional

from mdiq.engine.formats.gguf_blocks import BLOCK, q6_values, scale_and_offset
from mdiq.engine.formats.packed_file import PackedFile
from mdiq.engine.formats.quantize import unpack_int4
from mdiq.engine.kernels.hot_split import HotSplit
from mdiq.engine.kernels.kernel import Kernel
from mdiq.engine.kernels.llvm_int4 import LlvmInt4, LlvmInt4Wide, LlvmQ4K, LlvmQ4KWide, LlvmQ6K, LlvmQ6KWide
from mdiq.engine.kernels.llvm_int8 import LlvmInt8
from mdiq.engine.memory import drop_pages

_LEVELS = 127  # of an activation rounded to 8 bits, above and below 0
_ALIGNMENT = 64  # bytes: what the widest loads want
_FEW_ROWS = 16  # the largest batch that the first kernel of TorchInt8 serves in fast mode


class Linear(Protocol):
    """y = x W^T + bias, with W kept in the kernel's own format."""

    @property
    def num_bytes(self) -> int:
        """Bytes of weights and bias in memory."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, out], x's dtype, for x: [n, in]."""
        ...


class PlainLinear:
    """Weights as they are, f32 or bf16: torch's own matmul.

    Not bitwise batch-invariant: a row may round differently beside other rows.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight  # [out, in]
        self._bias = bias  # [out]

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)


class StackedLinear:
    """Matrices on top of each other that different kernels serve."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = parts

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=1)


class FbgemmInt8(Kernel):
    """int8 weights in FBGEMM's packing, int8 activations with one scale per row. x86 only.

    Batch-invariant, and so the same in both modes: what is summed are integers. Its results have the bits of LlvmInt8,
    and yet a rounding of its own: norms beside it are torch's, beside LlvmInt8 they are compiled.
    """

    name = "fbgemm"
    formats = ("int8",)
    rounding = name

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        super().__init__(file, role, exact=exact)
        q, scale = file.tensor(f"{role}.q"), file.tensor(f"{role}.scale")
        self.weight_bytes = q.nbytes + scale.nbytes
        self._packed = _fbgemm_packed(q, scale)
        self._split = HotSplit.find(file, role)
        drop_pages(q)

    @staticmethod
    def is_available() -> bool:
        return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
            torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32"
        )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        if self._split is not None:
            wide = self._split(wide)
        step = _step(wide)
        y: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            wide / step, 1.0, _LEVELS + 1, self._packed
        )
        return y.mul_(step)


class TorchInt8(Kernel):
    """int8 weights as they lie in the file, two kernels of torch: bf16 activations, or for many rows int8 ones.

    Both are batch-invariant, yet they differ from each other: in exact mode the first serves all batches. Results
    are rounded to bf16.
    """

    name = "torch-int8"
    formats = ("int8",)
    rounding = name

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        super().__init__(file, role, exact=exact)
        self._q = _mapped(file.tensor(f"{role}.q"))
        self._scale = file.tensor(f"{role}.scale").clone()
        self._split = HotSplit.find(file, role)
        self.weight_bytes = self._q.nbytes + self._scale.nbytes
        self._ones = torch.ones(self._q.shape[0], dtype=torch.bfloat16)
        self._max_rows = 1 << 30 if exact else _FEW_ROWS

    @staticmethod
    def is_available() -> bool:
        return hasattr(torch, "_weight_int8pack_mm")

    def product(self, x: torch.Tensor) -> torch.Tensor:
        split = x if self._split is None else self._split(x)
        if x.shape[0] <= self._max_rows:
            y = torch._weight_int8pack_mm(_aligned(split.to(torch.bfloat16)), self._q, self._ones).float()
        else:
            wide = split.float()
            step = _step(wide)
            y = torch._int_mm((wide / step).round_().to(torch.int8), self._q.t()).float().mul_(step)
        return y.mul_(self._scale)


class TorchInt4(Kernel):
    """4-bit weights in torch's own packing, bf16 activations."""

    name = "torch-int4"
    formats = ("int4", "q4_k")
    rounding = name

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        super().__init__(file, role, exact=exact)
        names = ("nibbles", "scale", "offset", "scales", "mins", "d", "dmin")
        blocks = {name: tensor for name in names if (tensor := file.find(f"{role}.{name}")) is not None}
        self._packed = torch._convert_weight_to_int4pack_for_cpu(unpack_int4(blocks["nibbles"]).int(), 1)
        drop_pages(blocks["nibbles"])
        numbers = [part.t().to(torch.bfloat16) for part in scale_and_offset(blocks)]
        self._scales_and_zeros = torch.stack(numbers, dim=-1).contiguous()  # [in / BLOCK, out, 2]
        self.weight_bytes = self._packed.nbytes + self._scales_and_zeros.nbytes

    @staticmethod
    def is_available() -> bool:
        return hasattr(torch, "_weight_int4pack_mm_for_cpu")

    def product(self, x: torch.Tensor) -> torch.Tensor:
        y = torch._weight_int4pack_mm_for_cpu(
            _aligned(x.to(torch.bfloat16)), self._packed, BLOCK, self._scales_and_zeros
        )
        return y.float()


class TorchQ6K(Kernel):
    """Weights of Q6_K in bf16, for devices where nothing can be compiled. A matmul for every row is batch-invariant."""

    name = "torch-q6k"
    formats = ("q6_k",)
    rounding = name

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        super().__init__(file, role, exact=exact)
        blocks = {name: file.tensor(f"{role}.{name}") for name in ("nibbles", "high", "scales", "d")}
        self._weight = q6_values(blocks).to(torch.bfloat16)
        self.weight_bytes = self._weight.nbytes
        drop_pages(blocks["nibbles"])

    @staticmethod
    def is_available() -> bool:
        return True

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rows = [functional.linear(row[None], self._weight) for row in x.to(torch.bfloat16)]
        return torch.cat(rows).float()


KERNELS: tuple[type[Kernel], ...] = (
    LlvmInt8,
    FbgemmInt8,
    TorchInt8,
    LlvmInt4,
    LlvmInt4Wide,
    LlvmQ4K,
    LlvmQ4KWide,
    LlvmQ6K,
    LlvmQ6KWide,
    TorchInt4,
    TorchQ6K,
)
"""The candidates for packed weights; of each format, the rounding that exact mode wants most comes first."""


class Embedding(Protocol):
    """Rows of a matrix by token id."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrix."""
        ...

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return [T, hidden_size] for token ids [T]."""
        ...


class PlainEmbedding:
    """The matrix as it is, f32 or bf16."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.weight[token_ids]


class PackedEmbedding:
    """int8 rows with a scale each, in a mapped file: only the pages of tokens that occur take memory."""

    def __init__(self, file: PackedFile, dtype: torch.dtype) -> None:
        self._q = file.tensor("embedding.q")
        self._scale = file.tensor("embedding.scale").clone()
        copies = file.find("embedding.hot")  # of the head, where it is the same matrix
        self._width = self._q.shape[1] - (0 if copies is None else len(copies))
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        return self._q.nbytes + self._scale.nbytes

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows = self._q[token_ids, : self._width].float() * self._scale[token_ids][:, None]
        return rows.to(self._dtype)


def _fbgemm_packed(q: torch.Tensor, scale: torch.Tensor) -> Any:
    with warnings.catch_warnings():  # torch calls its quantized tensors deprecated; TorchInt8 stands by
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "fbgemm"
        zeros = torch.zeros(q.shape[0], dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(q, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)


def _step(x: torch.Tensor) -> torch.Tensor:
    """Return what one of _LEVELS stands for in each row: f32, [n, 1]."""
    return x.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(_LEVELS)


def _mapped(q: torch.Tensor) -> torch.Tensor:
    """Return q where it lies in the mapped file if torch's kernels, which check nothing, can read it there."""
    if q.shape[1] % 16:  # they read past such rows
        raise RuntimeError(f"{q.shape[1]} columns are no multiple of 16")
    if not q.data_ptr() % _ALIGNMENT:
        return q
    copy = q.clone()
    drop_pages(q)
    return copy


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x in memory that aligned loads may read: a view of another tensor may begin anywhere."""
    return x if x.is_contiguous() and not x.data_ptr() % _ALIGNMENT else x.clone(memory_format=torch.contiguous_format)


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> PlainLinear:
    """Return the kernel that serves a matrix [out, in] in ``dtype`` on ``device``."""
    weight = weight.to(device=device, dtype=dtype)
    return PlainLinear(weight, None if bias is None else bias.to(device=device, dtype=dtype))
