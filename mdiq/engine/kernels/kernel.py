"""What all kernels of packed matrices have: a name, formats, a bias."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from mdiq.engine.formats.packed_file import PackedFile


class Kernel(ABC):
    """y = x W^T + bias for a packed matrix: a linear.Linear. A row of linear.KERNELS.

    formats: of the weights that it takes, as choice.py calls them. rounding: kernels of one give the same bits.
    bias: f32 [out], a copy: a view would keep the whole file mapped. weight_bytes: of the matrix in memory.
    """

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    rounding: ClassVar[str]
    weight_bytes: int

    def __init__(self, file: PackedFile, role: str, *, exact: bool) -> None:
        """Make a file's matrix ready. exact: see linear.py.

        Raises:
            RuntimeError: the kernel does not take such a shape or such values, or this CPU lacks it.
        """
        bias = file.find(f"{role}.bias")
        self.bias = None if bias is None else bias.clone()

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Return whether this device has the kernel; without compiling or loading it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of weights and bias in memory."""
        return self.weight_bytes + (0 if self.bias is None else self.bias.nbytes)

    @abstractmethod
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T for x: [n, in]; f32 [n, out], new memory."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, out], x's dtype, for x: [n, in]."""
        y = self.product(x)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)
