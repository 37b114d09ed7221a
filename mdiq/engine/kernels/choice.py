"""Which kernel serves a matrix on this device: measured once for each shape and batch class, and remembered on disk.

No kernel is the fastest everywhere: it depends on the CPU's instructions, on the shape, and on how many rows come.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

import mdiq
from mdiq.cache import scratch_directory, temporary, write_whole
from mdiq.engine.device import cpu_name, is_out_of_memory
from mdiq.engine.formats.gguf_blocks import BLOCK, GROUP
from mdiq.engine.formats.packed_file import PackedFile, write_tensors
from mdiq.engine.formats.packed_model import VERSION
from mdiq.engine.formats.quantize import num_hot
from mdiq.engine.kernels.kernel import Kernel
from mdiq.engine.kernels.linear import KERNELS, Linear, StackedLinear
from mdiq.engine.program import engine_digest
from mdiq.errors import EngineError

BATCH_CLASSES = (1, 8, 64)
"""Rows of the batches that are timed: one user, several, a part of a prompt."""
_REPEATS = 5
_FLUSH_BYTES = 64 << 20  # read between two runs: what the layers between two runs of one matrix do to the caches
_MAX_SECONDS = 1.0  # for one kernel and shape
_MAX_KEPT = 16  # machines and programs: of others, those that were measured longest ago go

Times = dict[str, list[float]]


class KernelChoice:
    """Chooses kernels for one mode.

    folder: where the measurements are kept, in kernels.json; not kept where it cannot be written.
    """

    def __init__(self, *, exact: bool, folder: Path) -> None:
        self._exact = exact
        self._path = folder / "kernels.json"
        self._known: dict[str, Times] = {}
        kernels = " ".join(sorted(kernel.name for kernel in KERNELS if kernel.is_available()))
        self._key = "|".join(
            (
                kernels,
                cpu_name(),
                f"torch {torch.__version__}",
                f"mdiq {mdiq.__version__} {engine_digest()}",
                f"{torch.get_num_threads()} threads",
                f"packing {VERSION}",
            )
        )

    def load(self, file: PackedFile, role: str) -> Linear:
        """Return a packed matrix in the kernel that is fastest for its shape.

        In exact mode it is one of the first rounding that takes the matrix: what is measured never changes a result.

        Raises:
            EngineError: no kernel of this device can serve it.
        """
        if any(name.startswith(f"{role}.0.") for name in file.names):
            parts = {name.split(".")[1] for name in file.names if name.startswith(f"{role}.")}
            return StackedLinear([self.load(file, f"{role}.{k}") for k in range(len(parts))])
        weights, shape = _format(file, role), _shape(file, role)
        times = self.times(weights, shape)
        kernels = {kernel.name: kernel for kernel in KERNELS}
        refusals: list[str] = []
        measured = sorted(times, key=lambda name: math.prod(times[name]))
        others = (name for name, kernel in kernels.items() if name not in times and _serves(kernel, weights))
        for name in chain(measured, others):
            try:
                return kernels[name](file, role, exact=self._exact)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                refusals.append(f"{name}: {error}")  # it takes the shape, and not these values
        raise EngineError(f"{file.path.name}, {role}: no kernel of this device takes it ({'; '.join(refusals)[:300]})")

    def times(self, weights: str, shape: tuple[int, int]) -> Times:
        """Return seconds of a matmul with a matrix [out, in], by kernel, for each of BATCH_CLASSES.

        In exact mode of the kernels of one rounding, the first of KERNELS that takes the shape.

        Raises:
            EngineError: this device has no kernel for the format.
        """
        column = f"{weights} {'exact' if self._exact else 'fast'} {shape[0]}x{shape[1]}"
        if column in self._known:
            return self._known[column]
        times = _read(self._path).get(self._key, {}).get(column, {})
        if not _is_complete(times):
            times = dict(_measured(weights, shape, self._path.parent / "packed", exact=self._exact))
            if not times:
                raise EngineError(f"{weights} weights: this device has no kernel for them; use bf16 or f32")
            kept = _read(self._path)  # another Node may have written meanwhile
            kept[self._key] = kept.pop(self._key, {}) | {column: times}
            _write(self._path, dict(list(kept.items())[-_MAX_KEPT:]))
        self._known[column] = times
        return times


def _format(file: PackedFile, role: str) -> str:
    """Return what KERNELS call a matrix's format."""
    if f"{role}.mins" in file.names:
        return "q4_k"
    if f"{role}.high" in file.names:
        return "q6_k"
    return "int4" if f"{role}.nibbles" in file.names else "int8"


def _shape(file: PackedFile, role: str) -> tuple[int, int]:
    """Return [out, in] of a matrix, without copies of hot columns."""
    if f"{role}.nibbles" in file.names:
        num_out, num_blocks, _ = file.shape(f"{role}.nibbles")
        return num_out, num_blocks * BLOCK
    num_copies = file.shape(f"{role}.hot")[0] if f"{role}.hot" in file.names else 0
    num_out, num_columns = file.shape(f"{role}.q")
    return num_out, num_columns - num_copies


def _serves(kernel: type[Kernel], weights: str) -> bool:
    return weights in kernel.formats and kernel.is_available()


def _measured(weights: str, shape: tuple[int, int], folder: Path, *, exact: bool) -> Iterator[tuple[str, list[float]]]:
    # Not in /tmp if it can be helped: it may be small, and is often memory.
    with (
        temporary(scratch_directory(folder), "measure-") as scratch,
        torch.inference_mode(),
    ):
        path = scratch / "matrix.safetensors"
        write_tensors(path, _random_matrix(weights, shape))
        flush = torch.zeros(_FLUSH_BYTES // 8, dtype=torch.int64)
        rounding = None
        for kernel in KERNELS:
            if not _serves(kernel, weights) or (exact and rounding not in (None, kernel.rounding)):
                continue
            try:
                linear: Linear = kernel(PackedFile(path), "w", exact=exact)
                times = [_min_s(linear, rows, shape[1], flush) for rows in BATCH_CLASSES]
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise MemoryError(str(error)) from None
                continue  # a kernel that does not take this shape, or that this CPU lacks
            rounding = kernel.rounding
            yield kernel.name, times


def _min_s(linear: Linear, num_rows: int, num_in: int, flush: torch.Tensor) -> float:
    """Return seconds of a matmul as in a forward: weights and code come from memory, activations were just computed.

    With its code in the cache, a kernel of much code looked a third faster than it was in a forward, and was chosen.
    """
    x = torch.randn(num_rows, num_in)
    linear(x)
    times: list[float] = []
    begin_s = time.perf_counter()
    while len(times) < _REPEATS and time.perf_counter() - begin_s < _MAX_SECONDS:
        flush.sum()
        x.neg_()
        start_s = time.perf_counter()
        linear(x)
        times.append(time.perf_counter() - start_s)
    return min(times)  # a device that is busy with other things slows some runs, and speeds none up


def _random_matrix(weights: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    num_out, num_in = shape
    if weights == "int8":
        num_copies = num_hot(num_in, "qkv")
        q = torch.randint(-60, 61, (num_out, num_in + num_copies), dtype=torch.int8)
        matrix = {"w.q": q, "w.scale": torch.full((num_out,), 0.01)}
        return matrix | ({"w.hot": torch.arange(num_copies)} if num_copies else {})
    blocks, groups = (num_out, num_in // BLOCK), (num_out, num_in // GROUP)
    nibbles = {"w.nibbles": torch.randint(0, 256, (*blocks, BLOCK // 2), dtype=torch.uint8)}
    if weights == "q4_k":
        small = {f"w.{name}": torch.full(groups, 0.001, dtype=torch.float16) for name in ("d", "dmin")}
        large = {f"w.{name}": torch.randint(0, 64, blocks, dtype=torch.uint8) for name in ("scales", "mins")}
        return nibbles | small | large
    if weights == "q6_k":
        high = torch.randint(0, 256, (*blocks, BLOCK // 4), dtype=torch.uint8)
        scales = torch.randint(-60, 61, (*blocks, 2), dtype=torch.int8)
        return nibbles | {"w.high": high, "w.scales": scales, "w.d": torch.full(groups, 0.001, dtype=torch.float16)}
    # With offsets, as most matrices have them: some kernels pay for them.
    return nibbles | {"w.scale": torch.full(blocks, 0.01), "w.offset": torch.full(blocks, 0.01)}


def _is_complete(times: object) -> bool:
    """Tell whether a value from the file is what ``times`` returns, with kernels that this device has now."""
    names = {kernel.name for kernel in KERNELS if kernel.is_available()}
    return (
        isinstance(times, dict)
        and bool(times)
        and all(
            name in names
            and isinstance(row, list)
            and len(row) == len(BATCH_CLASSES)
            and all(isinstance(value, float) and value > 0 for value in row)
            for name, row in times.items()
        )
    )


def _read(path: Path) -> dict[str, dict[str, Times]]:
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) and all(isinstance(value, dict) for value in kept.values()) else {}


def _write(path: Path, kept: dict[str, dict[str, Times]]) -> None:
    with contextlib.suppress(OSError):
        write_whole(path, json.dumps(kept, indent=1).encode())
