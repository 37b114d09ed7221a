"""A matmul with 4-bit weights that is compiled on the device, for x86 CPUs with instructions for dot products (VNNI).

With 11264 x 2048 weights and 1 / 4 / 8 / 16 rows one core of a Zen 4 took 0.9 / 1.2 / 1.8 / 3.4 ms, LlvmInt4, which
takes more steps for each row of activations, 0.7 / 1.2 / 2.5 / 4.6, onnxruntime's MatMulNBits 1.5 / 2.3 / 3.9 / 7.1.
"""

from importlib.util import find_spec
from typing import ClassVar

import torch

from mdiq.engine.device import cpu_flags, drop_pages
from mdiq.engine.llvm_matmul import CompiledMatmul, compiled
from mdiq.engine.quantize import BLOCK, PackedFile

_MOST_NOISE = 0.25  # of what 8 bits add, as a part of the noise that 4 bits have: 0.04 in usual models


class LlvmInt4Dot:
    """4-bit weights as they lie in the file, int8 activations with one scale (``step``) for 256 columns of a row.

    A block's weights w = scale * q + offset - 8 * scale, q in 0..15, are rounded once more while they are used, to 255
    levels of a unit for each row of the matrix: l = (factor * q + start) >> 8. Then y = unit * sum(step * sum(l * a)),
    the inner sum of 256 columns in integers, the outer in f32 and in the same order for every row. So it is
    batch-invariant, and the same in both modes. A unit is far below a block's scale, unless offsets are far above
    it: such a matrix it refuses.
    """

    name = "llvm-int4-dot"
    formats = ("int4",)
    _build: ClassVar[dict[str, bool]] = {}

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        machine = compiled("llvm_int4_dot_code", **self._build)
        from mdiq.engine.llvm_int4_dot_code import GROUP, LANES, PAD, WIDTH

        nibbles = file.tensor(f"{role}.nibbles")  # u8 [out, in / BLOCK, BLOCK / 2]
        num_out, num_blocks, _ = nibbles.shape
        num_in = num_blocks * BLOCK
        if num_in % WIDTH:
            raise RuntimeError(f"{num_in} columns are no multiple of {WIDTH}")
        scale = file.tensor(f"{role}.scale")
        scales, unit = _scales(scale, file.find(f"{role}.offset"))
        drop_pages(scale)
        bias = file.find(f"{role}.bias")
        num_groups = -(-num_in // GROUP)

        def scratch(num_rows: int) -> tuple[torch.Tensor, ...]:
            """Return levels, their steps, and where sums start; see llvm_int4_dot_code.py."""
            return (
                torch.empty(num_rows, num_in + PAD, dtype=torch.int8),
                torch.empty(num_rows, num_groups),
                torch.empty(num_rows, num_groups, LANES, dtype=torch.int32),
            )

        self._matmul = CompiledMatmul(
            machine,
            kind=self.name,
            weights=(nibbles, scales, unit),
            bias=None if bias is None else bias.clone(),
            num_out=num_out,
            sizes=(num_in,),
            scratch=scratch,
        )

    @staticmethod
    def is_available() -> bool:
        return bool({"avx512_vnni", "avx_vnni", "asimddp"} & cpu_flags()) and find_spec("llvmlite") is not None

    @property
    def num_bytes(self) -> int:
        return self._matmul.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._matmul(x)


class LlvmInt4DotWide(LlvmInt4Dot):
    """The same, to the last bit, with vectors of 512 bits: faster on Intel's CPUs that have them, slower on a Zen 4."""

    name = "llvm-int4-dot-wide"
    _build: ClassVar[dict[str, bool]] = {"is_wide": True}

    @staticmethod
    def is_available() -> bool:
        return {"avx512_vnni", "avx512bw"} <= cpu_flags() and LlvmInt4Dot.is_available()


def _scales(scale: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors and starts: u16 as i16, [out, blocks, 2], and the unit: f32 [out].

    Raises:
        RuntimeError: 255 levels of a unit do not tell the values of blocks apart.
    """
    from mdiq.engine.llvm_int4_dot_code import FRACTION, ZERO

    low = scale * -8
    if offset is not None:
        low += offset
    unit = torch.maximum(low.abs(), (low + scale * 15).abs()).amax(1).div_(ZERO - 1).clamp_min_(1e-30)
    noise = unit.square().mean() / scale.square().mean()
    if not bool(noise <= _MOST_NOISE):  # nor where it is no number
        raise RuntimeError(f"the offsets are too large for 8 bits: rounding adds {noise:.2g} of the noise")
    one = float(1 << FRACTION)
    per_unit = one / unit[:, None]
    starts = (low * per_unit).round_() + (ZERO + 0.5) * one  # a half: so that the shift rounds
    numbers = torch.stack(((scale * per_unit).round_(), starts), dim=-1)
    return numbers.to(torch.int32).to(torch.int16), unit  # the conversion to 32 bits first: 16 bits wrap round
