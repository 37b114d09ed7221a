"""Payload bytes to torch tensors and back, without a copy where memory allows. The wire's dtype names end here."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mdiq.core.frame import Buffer, Payload
from mdiq.errors import EngineError

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class TensorRows:
    """A payload of activations: [num_rows, width], f32 or bf16, on any device."""

    tensor: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.tensor.shape[0]

    def rows(self, start: int, stop: int) -> "TensorRows":
        """Return a view of some rows."""
        return TensorRows(self.tensor[start:stop])

    def parts(self) -> tuple[str, int, Sequence[Buffer]]:
        """Return dtype name, width, and the bytes: a view of the tensor's memory when it is on the CPU."""
        tensor = self.tensor.detach().cpu().contiguous()
        if not tensor.numel():
            return _NAMES[tensor.dtype], tensor.shape[1], (b"",)
        return _NAMES[tensor.dtype], tensor.shape[1], (tensor.view(torch.uint8).numpy().data.cast("B"),)


def to_tensor(payload: Payload, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a payload's rows as a tensor: [num_rows, width], ``dtype``, on ``device``; possibly read-only memory.

    Raises:
        EngineError: the rows have another width: the peer runs another model.
    """
    if isinstance(payload, TensorRows):
        tensor = payload.tensor
    else:
        name, row_width, buffers = payload.parts()
        data = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        if name not in DTYPES or not len(data):
            raise EngineError(f"a frame brought {len(data)} bytes of {name}; expected rows of f32 or bf16")
        # Received memory may be read-only; nothing below writes to it.
        tensor = torch.frombuffer(_writable_view(data), dtype=DTYPES[name]).view(-1, row_width)
    if tensor.shape[1] != width:
        raise EngineError(f"a frame brought rows of width {tensor.shape[1]}, the model has {width}; restart the ring")
    return tensor.to(device=device, dtype=dtype)


def _writable_view(data: Buffer) -> Buffer:
    """Return bytes that torch takes without a warning: a copy where they are read-only."""
    return bytearray(data) if isinstance(data, bytes) or memoryview(data).readonly else data
