"""A matmul with 4-bit weights that is compiled on the device: the wheels have none that is fast on CPUs without VNNI.

With 11264 x 2048 weights and 1 / 4 / 8 / 16 rows one core with AVX2 took 1.1 / 1.9 / 3.7 / 6.3 ms, onnxruntime's
MatMulNBits 2.2 / 4.3 / 6.3 / 11.2. The first is what reading the weights from memory takes.
"""

from importlib.util import find_spec

import torch
from torch.nn import functional

from mdiq.engine.device import drop_pages
from mdiq.engine.llvm_matmul import CompiledMatmul, compiled
from mdiq.engine.quantize import BLOCK, PackedFile


class LlvmInt4:
    """4-bit weights as they lie in the file, int8 activations with one scale (``step``) for 64 columns of a row.

    A block of weights is w = scale * q + low, with q in 0..15 and low = offset - 8 * scale. Scales are kept as integer
    factors of a unit for each row of the matrix, 15 bits of them: then y = unit * sum(step * factor * (q . a)) +
    sum(low * step * sum(a)), with factor * (q . a) in integers, all else in f32 and in the same order for every row. So
    it is batch-invariant, and the same in both modes.
    """

    name = "llvm-int4"
    formats = ("int4",)

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        machine = compiled("llvm_int4_code")
        from mdiq.engine.llvm_int4_code import FACTORS, LANES, PAD, WIDTH

        nibbles = file.tensor(f"{role}.nibbles")  # u8 [out, in / BLOCK, BLOCK / 2]
        scale = file.tensor(f"{role}.scale")  # f32 [out, in / BLOCK]
        num_out, num_blocks, _ = nibbles.shape
        num_in = num_blocks * BLOCK
        if num_in % WIDTH:
            raise RuntimeError(f"{num_in} columns are no multiple of {WIDTH}")
        unit = scale.abs().amax(1).div_(FACTORS)
        factors = (scale / unit[:, None]).round_().to(torch.int16)
        low = scale * -8
        if (offset := file.find(f"{role}.offset")) is not None:
            low += offset
        drop_pages(scale)
        num_filled = -(-num_blocks // LANES) * LANES  # with what fills the last vector up
        # In 16 bits, which is what GGUF keeps of them.
        low = functional.pad(low, (0, num_filled - num_blocks)).half()
        if not bool(low.isfinite().all()):
            raise RuntimeError("the offsets are too large for 16 bits")
        bias = file.find(f"{role}.bias")

        def scratch(num_rows: int) -> tuple[torch.Tensor, ...]:
            """Return levels, their steps, and the sums of blocks; see llvm_int4_code.py."""
            return (
                torch.empty(num_rows, num_in + PAD, dtype=torch.int8),
                torch.empty(num_rows, (num_in // 2 + PAD) // 4),
                torch.zeros(num_rows, num_filled),  # what fills the last vector up stays 0
            )

        self._matmul = CompiledMatmul(
            machine,
            kind=self.name,
            weights=(nibbles, factors, unit, low),
            bias=None if bias is None else bias.clone(),
            num_out=num_out,
            sizes=(num_in, num_filled),
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
