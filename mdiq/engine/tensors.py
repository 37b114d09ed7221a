"""Payload bytes to torch tensors and back, without a copy where possible; names of wire formats become dtypes here."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mdiq.core.frame import Buffer, Payload
from mdiq.core.wire_formats import SMALL, WIRE_FORMATS
from mdiq.engine.formats.quantize import quantize_int8
from mdiq.errors import EngineError

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_SCALE_BYTES = WIRE_FORMATS[SMALL].extra_bytes
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


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """A payload of int8 activations: bytes [num_rows, width + 4], the row's elements and its scale, as on the wire."""

    data: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.data.shape[0]

    def rows(self, start: int, stop: int) -> "PackedRows":
        """Return a view of some rows."""
        return PackedRows(self.data[start:stop])

    def parts(self) -> tuple[str, int, Sequence[Buffer]]:
        """Return dtype name, width, and the bytes."""
        data = self.data.contiguous()
        return SMALL, data.shape[1] - _SCALE_BYTES, (data.numpy().data.cast("B") if data.numel() else b"",)

    def tensor(self) -> torch.Tensor:
        """Return the activations: f32 [num_rows, width]."""
        # Always a copy: a row's scale may not be aligned as a float.
        scale = self.data[:, -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return self.data[:, :-_SCALE_BYTES].view(torch.int8).float() * scale


def to_wire(hidden: torch.Tensor, wire: str) -> TensorRows | PackedRows:
    """Return rows [n, width] as the payload that a Hop of format ``wire`` sends, on the CPU."""
    if wire != SMALL:
        return TensorRows(hidden.to(device="cpu", dtype=DTYPES[wire]))
    if not hidden.numel():
        return PackedRows(torch.empty(0, hidden.shape[1] + _SCALE_BYTES, dtype=torch.uint8))
    q, scale = quantize_int8(hidden.cpu())
    return PackedRows(torch.cat((q.view(torch.uint8), scale[:, None].view(torch.uint8)), dim=1))


def to_tensor(payload: Payload, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a payload's rows as a tensor: [num_rows, width], ``dtype``, on ``device``; possibly read-only memory.

    Raises:
        EngineError: the rows have another width: the peer runs another model.
    """
    if isinstance(payload, TensorRows):
        tensor = payload.tensor
    elif isinstance(payload, PackedRows):
        tensor = payload.tensor()
    else:
        name, row_width, buffers = payload.parts()
        data = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        if name not in WIRE_FORMATS or not len(data):
            raise EngineError(
                f"a frame brought {len(data)} bytes of {name}; expected rows of {', '.join(WIRE_FORMATS)}"
            )
        # Received memory may be read-only; nothing below writes to it.
        if name == SMALL:
            raw = torch.frombuffer(_writable_view(data), dtype=torch.uint8)
            tensor = PackedRows(raw.view(-1, row_width + _SCALE_BYTES)).tensor()
        else:
            tensor = torch.frombuffer(_writable_view(data), dtype=DTYPES[name]).view(-1, row_width)
    if tensor.shape[1] != width:
        raise EngineError(f"a frame brought rows of width {tensor.shape[1]}, the model has {width}; restart the ring")
    return tensor.to(device=device, dtype=dtype)


def _writable_view(data: Buffer) -> Buffer:
    """Return bytes that torch accepts without a warning: a copy if they are read-only."""
    return bytearray(data) if isinstance(data, bytes) or memoryview(data).readonly else data
