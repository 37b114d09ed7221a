"""A matmul with 4-bit weights that is compiled on the device: the wheels have none that is fast everywhere.

With 11264 x 2048 weights and 1 / 4 / 8 / 16 rows one core of a Zen 4 took 0.7 / 0.8 / 1.3 / 2.5 ms, with AVX2 alone
0.7 / 1.1 / 2.0 / 3.9, onnxruntime's MatMulNBits 1.5 / 2.3 / 3.9 / 7.1. The first is what reading the weights from
memory takes.
"""

from importlib.util import find_spec
from typing import ClassVar

import torch
from torch.nn import functional

from mdiq.engine.device import cpu_flags, drop_pages
from mdiq.engine.gguf_blocks import BLOCK
from mdiq.engine.llvm_matmul import CompiledMatmul, compiled
from mdiq.engine.quantize import PackedFile


class LlvmInt4:
    """4-bit weights, int8 activations with one scale (``step``) for 256 columns of a row.

    A block of weights is w = scale * (q - 8) + offset, q in 0..15, scale and offset kept as f16 in a unit for each row
    of the matrix: y = unit * sum(step * sum(scale * ((q - 8) . a) + offset * sum(a))), the products in integers, all
    else in f32 and in the same order for every row. So it is batch-invariant, and the same in both modes.
    """

    name = "llvm-int4"
    formats = ("int4",)
    rounding = "int8 groups"
    _build: ClassVar[dict[str, bool]] = {}

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        machine = compiled("llvm_int4_code", **self._build)
        from mdiq.engine.llvm_int4_code import GROUP, PAD

        nibbles = file.tensor(f"{role}.nibbles")  # u8 [out, in / BLOCK, BLOCK / 2]
        num_out, num_blocks, _ = nibbles.shape
        num_in = num_blocks * BLOCK
        packed, unit = _interleaved(nibbles, file.tensor(f"{role}.scale"), file.find(f"{role}.offset"))
        bias = file.find(f"{role}.bias")
        num_groups = -(-num_in // GROUP)

        def scratch(num_rows: int) -> tuple[torch.Tensor, ...]:
            """Return levels, their steps, and sums and starts of blocks; see llvm_int4_code.py."""
            return (
                torch.empty(num_rows, num_in + PAD, dtype=torch.int8),
                torch.empty(num_rows, num_groups),
                torch.empty(num_rows, num_blocks),
                torch.empty(num_rows, num_blocks, dtype=torch.int32),
            )

        self._matmul = CompiledMatmul(
            machine,
            kind=self.name,
            weights=(packed, unit),
            bias=None if bias is None else bias.clone(),
            num_out=num_out,
            num_padded=len(unit),
            sizes=(num_in,),
            scratch=scratch,
        )

    @staticmethod
    def is_available() -> bool:
        return find_spec("llvmlite") is not None  # not imported: it takes 20 MB, which others can do without

    @property
    def num_bytes(self) -> int:
        return self._matmul.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._matmul(x)


class LlvmInt4Wide(LlvmInt4):
    """The same, to the last bit, with vectors of 512 bits."""

    name = "llvm-int4-wide"
    _build: ClassVar[dict[str, bool]] = {"is_wide": True}

    @staticmethod
    def is_available() -> bool:
        return {"avx512_vnni", "avx512bw"} <= cpu_flags() and LlvmInt4.is_available()


def _interleaved(
    nibbles: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix as llvm_int4_code.py wants it, i32 [rows / ROWS, blocks, words], and the unit: f32 [rows].

    nibbles: u8 [out, blocks, BLOCK / 2]. Rows are filled up to a multiple of ROWS.

    Raises:
        RuntimeError: 16 bits do not hold the offsets.
    """
    from mdiq.engine.llvm_int4_code import PACKED_BYTES, ROWS

    num_out, num_blocks, num_bytes = nibbles.shape
    unit = scale.abs().amax(1).clamp_min_(1e-30)
    offset = torch.zeros_like(scale) if offset is None else offset.float()
    numbers = torch.stack((scale, offset), dim=-1).div_(unit[:, None, None]).half()  # [out, blocks, 2]
    if not bool(numbers.isfinite().all()):
        raise RuntimeError("the offsets are too large for 16 bits")
    missing = -num_out % ROWS
    words = functional.pad(nibbles, (0, 0, 0, 0, 0, missing)).view(torch.int32)
    numbers = functional.pad(numbers, (0, 0, 0, 0, 0, missing))
    packed = torch.empty((num_out + missing) // ROWS, num_blocks, PACKED_BYTES // 4, dtype=torch.int32)
    num_words = ROWS * num_bytes // 4
    for part, at in ((words, slice(num_words)), (numbers, slice(num_words, None))):
        # [rows / ROWS, blocks, words or numbers of one row, ROWS]
        rows = part.view(-1, ROWS, num_blocks, part.shape[-1]).permute(0, 2, 3, 1).contiguous()
        packed[:, :, at] = rows.view(torch.int32).flatten(2)
    for mapped in (nibbles, scale):
        drop_pages(mapped)
    return packed, functional.pad(unit, (0, missing))
