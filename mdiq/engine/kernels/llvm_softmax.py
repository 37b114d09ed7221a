"""Weights of the tokens of a vocabulary, compiled on the device: torch takes 1.5 to 2 times as long."""

import threading
from functools import cache

import numpy as np
import torch

from mdiq.engine.kernels.llvm_matmul import compiled, compiled_or_none


class CompiledSoftmax:
    """e^((logit - largest) / temperature), and sums of neighbours; the same bits on every CPU."""

    def __init__(self) -> None:
        """Compile it, unless that was done before.

        Raises:
            RuntimeError: it cannot be compiled.
        """
        self._machine = compiled("llvm_softmax_code")  # its code lives as long as it does
        from mdiq.engine.kernels.llvm_softmax_code import BLOCK

        self.block = BLOCK
        self._soften = self._machine.function("soften", 4, 1)
        self._add_up = self._machine.function("add_up", 3, 1)
        self._buffers = threading.local()  # memory that is new for each row costs as much as the maths

    @staticmethod
    @cache
    def find() -> "CompiledSoftmax | None":
        """Return it where it can be had, None elsewhere."""
        return compiled_or_none(CompiledSoftmax, torch.float32, torch.device("cpu"))

    def sums(self, logits: np.ndarray, largest: float, temperature: float) -> np.ndarray:
        """Return the sums of each ``block`` of weights, the rest's last, f32; the weights themselves are not kept.

        logits: f32 [n], contiguous. largest: of all logits of the row; finite.
        """
        numbers = _numbers(largest, temperature)
        sums = np.empty(-(-len(logits) // self.block), np.float32)
        self._add_up(logits.ctypes.data, numbers.ctypes.data, sums.ctypes.data, len(logits))
        return sums

    def weights(self, logits: np.ndarray, largest: float, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights, f32 [n], until the next call of this thread, and their sums; see ``sums``."""
        count = len(logits)
        numbers = _numbers(largest, temperature)
        weights: np.ndarray = getattr(self._buffers, "weights", np.empty(0, np.float32))
        if len(weights) < count:
            weights = self._buffers.weights = np.empty(count, np.float32)
        sums = np.empty(-(-count // self.block), np.float32)
        self._soften(*(array.ctypes.data for array in (logits, numbers, weights, sums)), count)
        return weights[:count], sums


def _numbers(largest: float, temperature: float) -> np.ndarray:
    """Return the numbers of a row that compiled code reads: f32 [2]."""
    return np.array([largest, 1 / temperature], np.float32)
