"""Runs matmuls that were compiled on the device: buffers for activations, threads, and the bias."""

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch

from mdiq.cache import cache_directory
from mdiq.engine.device import cpu_flags
from mdiq.engine.kernels.kernel import Kernel
from mdiq.errors import ConfigError

if TYPE_CHECKING:
    from mdiq.engine.kernels.llvm_machine import Machine

T = TypeVar("T")

_FEW_OUTPUTS = 256  # of a thread: with fewer, telling it costs as much as its work
_OUTPUT_STEP = 16  # a thread's outputs begin at a multiple
_LINE = 64  # bytes


class CompiledMatmul(Kernel):
    """A matmul by functions ``prepare`` and ``multiply`` of a machine; see llvm_tiles_code.build_multiply.

    machine: whose functions they are. words: the matrix as they want it described. row_bytes: what a row of rounded
    activations takes, a multiple of 64. num_padded: columns of y that multiply fills, of which num_out are results.
    """

    def set_up(
        self,
        machine: "Machine",
        *,
        weights: Sequence[torch.Tensor],
        sizes: Sequence[int],
        more: Sequence[torch.Tensor] = (),
        num_in: int,
        num_out: int,
        num_padded: int | None = None,
        row_bytes: int,
    ) -> None:
        """Describe a matrix: by its weights, its sizes, and what else ``prepare`` reads."""
        self._addressed = (*weights, *more)  # tensors at addresses live as long as this does
        self.machine = machine
        self.words = torch.tensor([*(w.data_ptr() for w in weights), *sizes, *(other.data_ptr() for other in more)])
        self.num_in, self.num_out, self.num_padded = num_in, num_out, num_padded or num_out
        self.row_bytes = -(-row_bytes // _LINE) * _LINE
        self.weight_bytes = sum(tensor.nbytes for tensor in weights)
        self._prepare = machine.function("prepare", 3, 3)
        self._multiply = machine.function("multiply", 3, 4)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float().contiguous()
        num_rows, num_in = wide.shape
        if num_in != self.num_in:  # compiled code checks nothing
            raise RuntimeError(f"{num_in} columns of activations meet {self.num_in} of weights")
        words, rounded = self.words.data_ptr(), _ROUNDED.address(num_rows * self.row_bytes)
        y = torch.empty(num_rows, self.num_padded)
        self._prepare(wide.data_ptr(), words, rounded, num_rows, 0, num_rows)
        num_threads = max(min(torch.get_num_threads(), self.num_padded // _FEW_OUTPUTS), 1)
        bounds = [self.num_padded * i // num_threads // _OUTPUT_STEP * _OUTPUT_STEP for i in range(num_threads)]
        bounds.append(self.num_padded)
        given = (words, rounded, y.data_ptr(), self.num_padded)
        in_threads(self._multiply, [(*given, first, stop, num_rows) for first, stop in pairwise(bounds)])
        return y[:, : self.num_out].contiguous() if self.num_padded > self.num_out else y


class _Rounded(threading.local):
    """Where rounded activations lie during a matmul: what all matrices of a thread share."""

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)

    def address(self, num_bytes: int) -> int:
        if self._kept.nbytes < num_bytes:
            self._kept = torch.empty(num_bytes, dtype=torch.uint8)
        return self._kept.data_ptr()


_ROUNDED = _Rounded()


def in_threads(function: Callable[..., None], calls: Sequence[Sequence[int]]) -> None:
    """Call a compiled function with each of these arguments at once, the first in this thread; wait for all."""
    others = [_threads().submit(function, *call) for call in calls[1:]]
    function(*calls[0])
    for other in others:
        other.result()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(torch.get_num_threads() - 1, 1), thread_name_prefix="matmul")


@cache
def compiled(code: str, **options: int) -> "Machine":
    """Return a module of this package, compiled now if this machine has not kept its code: half a second.

    code: of a module with a function ``build``, its name in this package. options: for ``build``.

    Raises:
        RuntimeError: llvmlite cannot be loaded here, or cannot compile for this CPU.
    """
    try:
        kept = cache_directory() / "code"
    except ConfigError:  # a user without a home compiles each time
        kept = None
    try:
        from mdiq.engine.kernels.llvm_machine import Machine, host_features

        def build() -> object:
            return importlib.import_module(f"mdiq.engine.kernels.{code}").build(host_features(), **options)

        return Machine(build, kept, f"{code} {sorted(options.items())}")
    except (ImportError, OSError) as error:  # OSError: a library that llvmlite itself needs
        raise RuntimeError(f"llvmlite: {error}") from error


def compiled_or_none(make: Callable[[], T], dtype: torch.dtype, device: torch.device) -> T | None:
    """Return what ``make`` compiles for this CPU in f32, or None where that cannot be had."""
    # Without them each sum of products would be a call of C's library.
    has_fused_sums = bool({"fma", "asimd"} & cpu_flags())
    if dtype != torch.float32 or device.type != "cpu" or not has_fused_sums or find_spec("llvmlite") is None:
        return None
    try:
        return make()
    except RuntimeError:
        return None
