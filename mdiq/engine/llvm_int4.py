"""A matmul with 4-bit weights that is compiled on the device: the wheels have none that is fast on CPUs without VNNI.

With 11264 x 2048 weights and 1 / 4 / 8 / 16 rows one core with AVX2 took 1.1 / 1.9 / 3.7 / 6.3 ms, onnxruntime's
MatMulNBits 2.2 / 4.3 / 6.3 / 11.2. The first is what reading the weights from memory takes.
"""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from mdiq.engine.device import drop_pages
from mdiq.engine.quantize import BLOCK, PackedFile

if TYPE_CHECKING:
    from mdiq.engine.llvm_code import Machine

_FEW_OUTPUTS = 256  # of a thread: with fewer, telling it costs as much as its work
_MOST_BUFFERS = 16  # sizes of a batch and a matrix that come again and again: two or three widths, some batches


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
        self._machine = _machine()  # its code lives as long as it does
        from mdiq.engine.llvm_int4_code import FACTORS, LANES, WIDTH

        self._nibbles = file.tensor(f"{role}.nibbles")  # u8 [out, in / BLOCK, BLOCK / 2]
        scale = file.tensor(f"{role}.scale")  # f32 [out, in / BLOCK]
        self._out, num_blocks, _ = self._nibbles.shape
        self._in = num_blocks * BLOCK
        if self._in % WIDTH:
            raise RuntimeError(f"{self._in} columns are no multiple of {WIDTH}")
        self._unit = scale.abs().amax(1).div_(FACTORS)
        self._factors = (scale / self._unit[:, None]).round_().to(torch.int16)
        low = scale * -8
        if (offset := file.find(f"{role}.offset")) is not None:
            low += offset
        self._num_blocks = -(-num_blocks // LANES) * LANES  # with what fills the last vector up
        drop_pages(scale)
        # In 16 bits, which is what GGUF keeps of them.
        self._low = functional.pad(low, (0, self._num_blocks - num_blocks)).half()
        if not bool(self._low.isfinite().all()):
            raise RuntimeError("the offsets are too large for 16 bits")
        bias = file.find(f"{role}.bias")
        self._bias = None if bias is None else bias.clone()
        self._prepare = self._machine.function("prepare", 4, 3)
        self._multiply = self._machine.function("multiply", 8, 6)
        self._weights = [tensor.data_ptr() for tensor in (self._nibbles, self._factors, self._unit, self._low)]

    @staticmethod
    def is_available() -> bool:
        return find_spec("llvmlite") is not None  # not imported: it takes 46 MB, which int8 can do without

    @property
    def num_bytes(self) -> int:
        tensors = (self._nibbles, self._factors, self._unit, self._low, self._bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float().contiguous()
        num_rows, num_in = wide.shape
        if num_in != self._in:  # compiled code checks nothing
            raise RuntimeError(f"{num_in} columns of activations meet {self._in} of weights")
        sizes = (num_rows, self._in, self._num_blocks)
        activations = _SCRATCH.addresses(*sizes)
        y = torch.empty(num_rows, self._out)
        self._prepare(wide.data_ptr(), *activations, *sizes)
        num_threads = max(min(torch.get_num_threads(), self._out // _FEW_OUTPUTS), 1)
        bounds = [self._out * i // num_threads for i in range(num_threads + 1)]
        parts = [
            (*self._weights, *activations, y.data_ptr(), self._out, first, stop, *sizes)
            for first, stop in pairwise(bounds)
        ]
        others = [_threads().submit(self._multiply, *part) for part in parts[1:]]
        self._multiply(*parts[0])
        for other in others:
            other.result()
        return (y if self._bias is None else y.add_(self._bias)).to(x.dtype)


class _Scratch(threading.local):
    """Where rounded activations lie during a matmul: a few buffers that all matrices of a thread share."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, int], tuple[torch.Tensor, ...]] = {}

    def addresses(self, num_rows: int, num_in: int, num_blocks: int) -> list[int]:
        """Return addresses of the levels, their steps, and the sums of blocks; see llvm_int4_code.py."""
        key = (num_rows, num_in, num_blocks)
        if key not in self._kept:
            from mdiq.engine.llvm_int4_code import PAD

            if len(self._kept) >= _MOST_BUFFERS:
                self._kept.clear()
            self._kept[key] = (
                torch.empty(num_rows, num_in + PAD, dtype=torch.int8),
                torch.empty(num_rows, (num_in // 2 + PAD) // 4),
                torch.zeros(num_rows, num_blocks),  # what fills the last vector up stays 0
            )
        return [tensor.data_ptr() for tensor in self._kept[key]]


_SCRATCH = _Scratch()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(torch.get_num_threads() - 1, 1), thread_name_prefix="matmul")


@functools.cache
def _machine() -> "Machine":
    """Return the compiled code, compiled now if it never was: half a second.

    Raises:
        RuntimeError: llvmlite cannot be loaded here, or cannot compile for this CPU.
    """
    try:
        from mdiq.engine.llvm_code import Machine, host_features
        from mdiq.engine.llvm_int4_code import build
    except (ImportError, OSError) as error:  # OSError: a library that llvmlite itself needs
        raise RuntimeError(f"llvmlite: {error}") from error
    return Machine(build(host_features()))
