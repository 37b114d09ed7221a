"""A matmul with 4-bit weights that is compiled on the device: the wheels have none that is fast everywhere.

With 11264 x 2048 weights and 1 / 4 / 8 / 16 rows one core of a Zen 4 took 0.7 / 0.8 / 1.3 / 2.5 ms, with AVX2 alone
0.7 / 1.1 / 2.0 / 3.9, onnxruntime's MatMulNBits 1.5 / 2.3 / 3.9 / 7.1. The first is what reading the weights from
memory takes.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch.nn import functional

from mdiq.engine.device import cpu_flags
from mdiq.engine.formats.gguf_blocks import BLOCK
from mdiq.engine.formats.packed_file import PackedFile
from mdiq.engine.kernels.llvm_matmul import CompiledMatmul, compiled
from mdiq.engine.memory import drop_pages


class LlvmInt4(CompiledMatmul):
    """4-bit weights, int8 activations with one scale (``step``) for each block of a row.

    A block of weights is w = scale * (q - 8) + offset, q in 0..15, scale and offset kept as f16 in a unit for each row
    of the matrix: y = unit * sum(step * (scale * ((q - 8) . a) + offset * sum(a))), the products in integers, all
    else in f32 and in the same order for every row. So it is batch-invariant, and the same in both modes.
    """

    name = "llvm-int4"
    formats = ("int4",)
    rounding = "int8 blocks"
    _build: ClassVar[dict[str, int]] = {}

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        super().__init__(file, role, exact=exact)
        machine = compiled("llvm_int4_code", **self._build)
        from mdiq.engine.kernels.llvm_int4_code import row_bytes

        num_out, num_blocks, _ = file.shape(f"{role}.nibbles")  # u8 [out, in / BLOCK, BLOCK / 2]
        num_in = num_blocks * BLOCK
        packed, unit = self._interleaved(file, role)
        self.set_up(
            machine,
            weights=(packed, unit),
            sizes=(num_in,),
            num_in=num_in,
            num_out=num_out,
            num_padded=len(unit),
            row_bytes=row_bytes(num_in),
        )

    @staticmethod
    def is_available() -> bool:
        return find_spec("llvmlite") is not None  # not imported: it takes 20 MB, which others can do without

    @staticmethod
    def _interleaved(file: PackedFile, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a matrix as llvm_int4_code.py wants it, and what each row's results are multiplied with: f32 [rows].

        Rows are filled up to a multiple of ROWS.

        Raises:
            RuntimeError: 16 bits do not hold the offsets.
        """
        from mdiq.engine.kernels.llvm_int4_code import ROWS

        nibbles, scale = file.tensor(f"{role}.nibbles"), file.tensor(f"{role}.scale")
        offset = file.find(f"{role}.offset")
        unit = scale.abs().amax(1).clamp_min_(1e-30)
        offset = torch.zeros_like(scale) if offset is None else offset
        numbers = torch.stack((scale, offset), dim=-1).div_(unit[:, None, None]).half()  # [out, blocks, 2]
        if not bool(numbers.isfinite().all()):
            raise RuntimeError("the offsets are too large for 16 bits")
        packed = torch.cat((_in_lanes(nibbles, 4), _in_lanes(numbers, 2)), dim=-1)
        for mapped in (nibbles, scale):
            drop_pages(mapped)
        return packed, functional.pad(unit, (0, -len(unit) % ROWS))


class LlvmInt4Wide(LlvmInt4):
    """The same, to the last bit, with vectors of 512 bits."""

    name = "llvm-int4-wide"
    _build: ClassVar[dict[str, int]] = {"is_wide": True}

    @staticmethod
    def is_available() -> bool:
        return {"avx512_vnni", "avx512bw"} <= cpu_flags() and LlvmInt4.is_available()


class LlvmQ4K(LlvmInt4):
    """4-bit weights in groups as Q4_K has them: w = d * scales * q - dmin * mins, kept as they are.

    y = sum(step * (d * sum(scales * (q . a)) - dmin * sum(mins * sum(a)))), over groups of 256 columns: all but the
    three numbers of each are integers, so a step is of a group here. Steps of blocks took 3 to 9 % longer for 8 rows
    with AVX2, 10 to 30 % for 64.
    """

    name = "llvm-q4k"
    formats = ("q4_k",)
    _build: ClassVar[dict[str, int]] = {"grouped": 4}

    @staticmethod
    def _interleaved(file: PackedFile, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        return _in_groups(file, role, {"nibbles": 4, "scales": 1, "mins": 1}, ("d", "dmin"))


class LlvmQ4KWide(LlvmQ4K):
    """The same, to the last bit, with vectors of 512 bits."""

    name = "llvm-q4k-wide"
    _build: ClassVar[dict[str, int]] = {"grouped": 4, "is_wide": True}

    @staticmethod
    def is_available() -> bool:
        return LlvmInt4Wide.is_available()


class LlvmQ6K(LlvmInt4):
    """6-bit weights in groups as Q6_K has them: w = d * scales * (q - 32), kept as they are."""

    name = "llvm-q6k"
    formats = ("q6_k",)
    _build: ClassVar[dict[str, int]] = {"grouped": 6}

    @staticmethod
    def _interleaved(file: PackedFile, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        return _in_groups(file, role, {"nibbles": 4, "high": 4, "scales": 2}, ("d",))


class LlvmQ6KWide(LlvmQ6K):
    """The same, to the last bit, with vectors of 512 bits."""

    name = "llvm-q6k-wide"
    _build: ClassVar[dict[str, int]] = {"grouped": 6, "is_wide": True}

    @staticmethod
    def is_available() -> bool:
        return LlvmInt4Wide.is_available()


def _in_groups(
    file: PackedFile, role: str, of_blocks: Mapping[str, int], of_groups: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in groups, see LlvmInt4._interleaved: the blocks of each group, then the group's own numbers.

    of_blocks: the names of tensors with numbers of each block, and how many bytes of a row stay together.
    of_groups: those with one f16 for each group.
    """
    from mdiq.engine.kernels.llvm_int4_code import ROWS

    tensors = {name: file.tensor(f"{role}.{name}") for name in (*of_blocks, *of_groups)}
    blocks = torch.cat([_in_lanes(tensors[name], size) for name, size in of_blocks.items()], dim=-1)
    num_groups = tensors[of_groups[0]].shape[1]
    groups = blocks.view(len(blocks), num_groups, -1)
    packed = torch.cat((groups, *(_in_lanes(tensors[name], 2) for name in of_groups)), dim=-1)
    drop_pages(tensors["nibbles"])
    return packed, torch.ones(len(packed) * ROWS)


def _in_lanes(part: torch.Tensor, size: int) -> torch.Tensor:
    """Return rows of a matrix side by side: u8 [rows / ROWS, blocks, bytes], for [out, blocks] or [out, blocks, n].

    Of each block come the first ``size`` bytes of ROWS rows, then the next of each; missing rows are zeros.
    """
    from mdiq.engine.kernels.llvm_int4_code import ROWS

    num_out, num_blocks = part.shape[:2]
    pieces = part.contiguous().view(num_out, num_blocks, -1).view(torch.uint8).view(num_out, num_blocks, -1, size)
    pieces = functional.pad(pieces, (0, 0, 0, 0, 0, 0, 0, -num_out % ROWS))
    return pieces.view(-1, ROWS, num_blocks, pieces.shape[2], size).permute(0, 2, 3, 1, 4).flatten(2)
