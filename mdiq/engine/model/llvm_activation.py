"""Activation functions of the MLP, compiled on the device: one pass over a row, the same bits in any company.

torch takes another way for the elements after its last whole vector, and which these are depends on the number of
rows and threads.
"""

from itertools import pairwise

import torch

from mdiq.engine.families import Activation
from mdiq.engine.kernels.llvm_matmul import compiled, compiled_or_none, in_threads
from mdiq.engine.model_config import ModelConfig

_FEW_ELEMENTS = 16_384  # of a thread: with fewer, telling it costs as much as its work


class CompiledActivation:
    """What stands between a Layer's two matmuls of the MLP, in f32 on the CPU; see layers.activated."""

    def __init__(self, config: ModelConfig) -> None:
        """Compile it, unless that was done before.

        Raises:
            RuntimeError: it cannot be compiled, or not for such a width.
        """
        self._is_gated = config.family.is_gated
        is_gelu = config.family.activation is Activation.GELU_TANH
        machine = compiled("llvm_activation_code", is_gelu=is_gelu, is_gated=self._is_gated)
        from mdiq.engine.kernels.llvm_activation_code import LANES

        if config.mlp_size < LANES:
            raise RuntimeError(f"rows of {config.mlp_size} are shorter than {LANES}")
        self.machine = machine  # its code lives as long as it does
        self._function = machine.function("activate", 2, 5)

    @classmethod
    def find(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> "CompiledActivation | None":
        """Return it where it can be had, None elsewhere."""
        return compiled_or_none(lambda: cls(config), dtype, device)

    def __call__(self, up: torch.Tensor) -> torch.Tensor:
        """Return what goes down again: [T, mlp_size]."""
        num_rows, width = up.shape[0], up.shape[1] // (2 if self._is_gated else 1)
        found = torch.empty(num_rows, width)
        num_threads = max(min(torch.get_num_threads(), num_rows, num_rows * width // _FEW_ELEMENTS), 1)
        bounds = [num_rows * i // num_threads for i in range(num_threads + 1)]
        sizes = (up.data_ptr(), found.data_ptr(), width, 4 * up.stride(0), 4 * width)
        in_threads(self._function, [(*sizes, first, stop) for first, stop in pairwise(bounds)])
        return found
