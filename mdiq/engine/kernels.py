"""Matrix kernels: weights in some format, and the matmul that reads them. One interface; formats are its classes."""

from typing import Protocol

import torch
from torch.nn import functional


class Linear(Protocol):
    """y = x W^T + bias, with W kept in the kernel's own format."""

    @property
    def num_bytes(self) -> int:
        """Bytes of weights and bias in memory."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, out], x's dtype, for x: [n, in]."""
        ...


class PlainLinear:
    """Weights as they are, f32 or bf16: torch's own matmul.

    Not bitwise batch-invariant: a row may round differently beside other rows.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight  # [out, in]
        self._bias = bias  # [out]

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> PlainLinear:
    """Return the kernel that serves a matrix [out, in] in ``dtype`` on ``device``."""
    weight = weight.to(device=device, dtype=dtype)
    return PlainLinear(weight, None if bias is None else bias.to(device=device, dtype=dtype))
