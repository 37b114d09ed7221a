"""Weights of the tokens of a vocabulary, compiled on the device: torch takes 1.5 to 2 times as long."""

import threading
from functools import cache

import torch

from mdiq.engine.kernels.llvm_matmul import compiled, compiled_or_none


class CompiledSoftmax:
    """e^((logit - largest) / temperature), sums of neighbours and of like weights; the same bits on every CPU."""

    def __init__(self) -> None:
        """Compile it, unless that was done before.

        Raises:
            RuntimeError: it cannot be compiled.
        """
        self._machine = compiled("llvm_softmax_code")  # its code lives as long as it does
        from mdiq.engine.kernels.llvm_softmax_code import BLOCK, NUM_CLASSES, NUM_SPARE

        self.block = BLOCK
        self._num_classes, self._num_spare = NUM_CLASSES, NUM_SPARE
        self._soften = self._machine.function("soften", 4, 1)
        self._add_classes = self._machine.function("add_classes", 3, 1)
        self._buffers = threading.local()  # memory that is new for each row costs as much as the maths

    @staticmethod
    @cache
    def find() -> "CompiledSoftmax | None":
        """Return it where it can be had, None elsewhere."""
        return compiled_or_none(CompiledSoftmax, torch.float32, torch.device("cpu"))

    def __call__(self, logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights, and the sums of each ``block`` of them, the rest's last: until the next call of this thread.

        logits: f32 [n], of which the largest is a number.
        """
        logits = logits.contiguous()
        count = len(logits)
        weights: torch.Tensor = getattr(self._buffers, "weights", torch.empty(0))
        if len(weights) < count:
            weights = self._buffers.weights = torch.empty(count)
        sums, factor = torch.empty(-(-count // self.block)), torch.tensor([1 / temperature])
        self._soften(*(tensor.data_ptr() for tensor in (logits, factor, weights, sums)), count)
        return weights[:count], sums

    def class_sums(self, weights: torch.Tensor, least: float) -> torch.Tensor:
        """Return the sums of weights of each class, the upper 16 bits of a weight: f64.

        weights: f32 [n], none negative; those under ``least`` do not count.
        """
        sums, bound = torch.zeros(self._num_classes + self._num_spare, dtype=torch.float64), torch.tensor([least])
        self._add_classes(*(tensor.data_ptr() for tensor in (weights, bound, sums)), len(weights))
        return sums[: self._num_classes]
