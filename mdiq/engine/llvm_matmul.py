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
from mdiq.errors import ConfigError

if TYPE_CHECKING:
    from mdiq.engine.llvm_code import Machine

T = TypeVar("T")

_FEW_OUTPUTS = 256  # of a thread: with fewer, telling it costs as much as its work
_OUTPUT_STEP = 16  # a thread's outputs begin at a multiple
_MOST_BUFFERS = 16  # sizes of a batch and a matrix that come again and again: two or three widths, some batches

Scratch = Callable[[int], tuple[torch.Tensor, ...]]
"""Makes the buffers that hold so many rows of activations as the compiled code wants them."""


class CompiledMatmul:
    """y = x W^T + bias by functions ``prepare`` and ``multiply`` of a machine; see llvm_code.build_multiply.

    prepare(x, activations.., num_rows, sizes..) writes rounded activations into buffers; one thread does it.
    multiply fills some columns of y; all threads do it, each its own.

    weights: what multiply reads. bias: f32 [out]. num_padded: columns of y that multiply fills, where they are more
    than num_out. sizes: numbers that describe the matrix, its columns first. scratch: what makes buffers for
    activations; matrices of one kind and of equal sizes share them.
    """

    def __init__(
        self,
        machine: "Machine",
        *,
        kind: str,
        weights: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        num_out: int,
        num_padded: int | None = None,
        sizes: Sequence[int],
        scratch: Scratch,
    ) -> None:
        self._machine = machine  # its code lives as long as it does
        self._weights, self._bias = weights, bias
        self._addresses = [tensor.data_ptr() for tensor in weights]
        self._kind, self._sizes, self._scratch = kind, tuple(sizes), scratch
        self._out, self._padded = num_out, num_padded or num_out
        num_buffers = len(scratch(1))
        self._prepare = machine.function("prepare", 1 + num_buffers, 1 + len(sizes))
        self._multiply = machine.function("multiply", len(weights) + num_buffers + 1, 4 + len(sizes))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._weights, self._bias) if tensor is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, out], x's dtype, for x: [n, in]."""
        wide = x.float().contiguous()
        num_rows, num_in = wide.shape
        if num_in != self._sizes[0]:  # compiled code checks nothing
            raise RuntimeError(f"{num_in} columns of activations meet {self._sizes[0]} of weights")
        activations = _BUFFERS.addresses((self._kind, num_rows, *self._sizes), self._scratch)
        y = torch.empty(num_rows, self._padded)
        sizes = (num_rows, *self._sizes)
        self._prepare(wide.data_ptr(), *activations, *sizes)
        num_threads = max(min(torch.get_num_threads(), self._padded // _FEW_OUTPUTS), 1)
        bounds = [self._padded * i // num_threads // _OUTPUT_STEP * _OUTPUT_STEP for i in range(num_threads)]
        bounds.append(self._padded)
        parts = [
            (*self._addresses, *activations, y.data_ptr(), self._padded, first, stop, *sizes)
            for first, stop in pairwise(bounds)
        ]
        in_threads(self._multiply, parts)
        if self._padded > self._out:
            y = y[:, : self._out].contiguous()
        return (y if self._bias is None else y.add_(self._bias)).to(x.dtype)


class _Buffers(threading.local):
    """Where rounded activations lie during a matmul: a few buffers that all matrices of a thread share."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str | int, ...], tuple[torch.Tensor, ...]] = {}

    def addresses(self, key: tuple[str | int, ...], scratch: Scratch) -> list[int]:
        if key not in self._kept:
            if len(self._kept) >= _MOST_BUFFERS:
                self._kept.clear()
            self._kept[key] = scratch(int(key[1]))
        return [tensor.data_ptr() for tensor in self._kept[key]]


_BUFFERS = _Buffers()


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
        from mdiq.engine.llvm_code import Machine, host_features

        module = importlib.import_module(f"mdiq.engine.{code}")
    except (ImportError, OSError) as error:  # OSError: a library that llvmlite itself needs
        raise RuntimeError(f"llvmlite: {error}") from error
    try:
        kept = cache_directory() / "code"
    except ConfigError:  # a user without a home compiles each time
        kept = None
    return Machine(module.build(host_features(), **options), kept)


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
