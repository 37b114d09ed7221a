"""A matmul with 4-bit weights that is compiled on the device: the wheels have none that is fast on CPUs without VNNI.

With 11264 x 2048 weights and 1 / 4 / 8 / 16 rows one core with AVX2 took 1.1 / 1.9 / 3.7 / 6.3 ms, onnxruntime's
MatMulNBits 2.2 / 4.3 / 6.3 / 11.2. The first is what reading the weights from memory takes.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from mdiq.engine.quantize import BLOCK, PackedFile

if TYPE_CHECKING:
    from mdiq.engine.llvm_code import Machine

_FEW_OUTPUTS = 256  # of a thread: with fewer, telling it costs as much as its work


class LlvmInt4:
    """4-bit weights as they lie in the file, int8 activations with one scale per block of a row.

    So do onnxruntime at accuracy level 4, and llama.cpp for its Q4 formats. Of a block w = scale * q + low, with q in
    0..15 and low = offset - 8 * scale, it adds scale * step * sum(q * a) + low * step * sum(a): the first sum in
    integers, all else in f32, in the same order for every row. So it is batch-invariant, and the same in both modes.
    """

    name = "llvm-int4"
    formats = ("int4",)

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        from mdiq.engine.llvm_int4_code import LANES, PAD, WIDTH

        self._nibbles = file.tensor(f"{role}.nibbles")  # u8 [out, in / BLOCK, BLOCK / 2]
        self._scale = file.tensor(f"{role}.scale")  # f32 [out, in / BLOCK]
        self._out, num_blocks, _ = self._nibbles.shape
        self._in = num_blocks * BLOCK
        if self._in % WIDTH:
            raise RuntimeError(f"{self._in} columns are no multiple of {WIDTH}")
        low = self._scale * -8
        if (offset := file.find(f"{role}.offset")) is not None:
            low += offset
        self._num_blocks = -(-num_blocks // LANES) * LANES  # with what fills the last vector up
        # In 16 bits, which is what GGUF keeps of them.
        self._low = functional.pad(low, (0, self._num_blocks - num_blocks)).half()
        if not bool(self._low.isfinite().all()):
            raise RuntimeError("the offsets are too large for 16 bits")
        bias = file.find(f"{role}.bias")
        self._bias = None if bias is None else bias.clone()
        self._pad = PAD
        self._prepare = _machine().function("prepare", 4, 3)
        self._multiply = _machine().function("multiply", 7, 6)

    @staticmethod
    def is_available() -> bool:
        return find_spec("llvmlite") is not None  # not imported: it takes 46 MB, which int8 can do without

    @property
    def num_bytes(self) -> int:
        tensors = (self._nibbles, self._scale, self._low, self._bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float().contiguous()
        num_rows = wide.shape[0]
        rounded = torch.empty(num_rows, self._in + self._pad, dtype=torch.int8)
        steps = torch.empty(num_rows, (self._in // 2 + self._pad) // 4)
        sums = torch.zeros(num_rows, self._num_blocks)
        y = torch.empty(num_rows, self._out)
        activations = (rounded.data_ptr(), steps.data_ptr(), sums.data_ptr())
        sizes = (num_rows, self._in, self._num_blocks)
        self._prepare(wide.data_ptr(), *activations, *sizes)
        weights = (self._nibbles.data_ptr(), self._scale.data_ptr(), self._low.data_ptr())

        def multiply(first: int, stop: int) -> None:
            self._multiply(*weights, *activations, y.data_ptr(), self._out, first, stop, *sizes)

        num_threads = max(min(torch.get_num_threads(), self._out // _FEW_OUTPUTS), 1)
        bounds = [self._out * i // num_threads for i in range(num_threads + 1)]
        others = [_threads().submit(multiply, *pair) for pair in zip(bounds[1:-1], bounds[2:], strict=True)]
        multiply(bounds[0], bounds[1])
        for other in others:
            other.result()
        return (y if self._bias is None else y.add_(self._bias)).to(x.dtype)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(torch.get_num_threads() - 1, 1), thread_name_prefix="matmul")


@functools.cache
def _machine() -> "Machine":
    """Return the compiled code, compiled now if it never was: half a second."""
    from mdiq.engine.llvm_code import Machine, host_features
    from mdiq.engine.llvm_int4_code import build

    return Machine(build(host_features()))
