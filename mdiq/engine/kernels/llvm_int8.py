"""A matmul with int8 weights that is compiled on the device, for CPUs with products of bytes.

FBGEMM has them too; yet with 11264 x 2048 weights and 1 / 4 / 8 / 16 rows one core of a Zen 4 (VNNI) took 0.85 / 1.0 /
1.1 / 2.2 ms, FBGEMM 1.3 / 1.3 / 1.6 / 2.7; one of a Zen 3 (AVX2) 1.7 / 1.8 / 3.0 / 5.3, FBGEMM 2.4 / 2.4 / 3.3 / 5.8.
The first of each are what reading the weights from memory takes.
"""

from importlib.util import find_spec

import torch

from mdiq.engine.device import cpu_flags
from mdiq.engine.formats.packed_file import PackedFile
from mdiq.engine.kernels.hot_split import HotSplit
from mdiq.engine.kernels.llvm_matmul import CompiledMatmul, compiled

_ROWS_AT_ONCE = 256


class LlvmInt8(CompiledMatmul):
    """int8 weights as they lie in the file, int8 activations with one scale (``step``) per row.

    y = scale * step * sum(q * a), the sum in integers: batch-invariant, the same in both modes, and the same bits as
    FbgemmInt8. Activations are kept as a + 128; ``starts`` takes out what that adds.
    """

    name = "llvm-int8"
    formats = ("int8",)
    rounding = "int8 rows"

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        super().__init__(file, role, exact=exact)
        machine = compiled("llvm_int8_code")
        from mdiq.engine.kernels.llvm_int8_code import STEP, ZERO, row_bytes

        q = file.tensor(f"{role}.q")
        num_out, num_in = q.shape
        split = HotSplit.find(file, role)
        num_copies = 0 if split is None else len(split.hot)
        if num_in % STEP or num_copies % STEP:
            raise RuntimeError(f"{num_in} columns are no multiple of {STEP}")
        starts = torch.empty(num_out, dtype=torch.int32)
        # torch makes a copy in int32 of what it sums: a gigabyte for the head of a large vocabulary.
        for first in range(0, num_out, _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            torch.sum(q[rows], 1, dtype=torch.int32, out=starts[rows])
        starts.mul_(-ZERO)
        spread = (torch.empty(0),) * 2 if split is None else (split.hot, split.share)
        self.set_up(
            machine,
            weights=(q, file.tensor(f"{role}.scale").clone(), starts),
            sizes=(num_in, num_copies),
            more=spread,
            num_in=num_in - num_copies,
            num_out=num_out,
            row_bytes=row_bytes(num_in, num_copies),
        )

    @staticmethod
    def is_available() -> bool:
        return bool({"avx2", "asimddp"} & cpu_flags()) and find_spec("llvmlite") is not None
