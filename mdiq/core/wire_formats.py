"""The formats that activations have on a Hop, in one table. Tensors of each are made and read in engine/tensors.py."""

from dataclasses import dataclass
from typing import Literal

DtypeName = Literal["f32", "bf16"]
"""Formats of activations inside a Stage, and of its KV cache and plain weights."""

WireName = Literal[DtypeName, "i8"]
"""Formats of activations on a Hop."""


@dataclass(frozen=True, slots=True)
class WireFormat:
    """One format.

    code: in a Frame's header. element_bytes: of a number. extra_bytes: of each row, beside its numbers.
    """

    code: int
    element_bytes: int
    extra_bytes: int = 0


WIRE_FORMATS: dict[str, WireFormat] = {
    "f32": WireFormat(1, 4),
    "bf16": WireFormat(2, 2),
    "i8": WireFormat(3, 1, extra_bytes=4),  # the row's scale, an f32
}
"""In this order: each holds less of a number than the one before."""

AUTO = "auto"
"""The Ring chooses; see plan/wire_choice.py."""
USUAL = "bf16"
SMALL = "i8"


def rounds(wire: str, dtype: str) -> bool:
    """Return whether a Hop of format ``wire`` changes activations of ``dtype``."""
    formats = [*WIRE_FORMATS]
    return formats.index(wire) > formats.index(dtype)


def row_bytes(wire: str, width: int) -> int:
    """Return the bytes of one row."""
    return width * WIRE_FORMATS[wire].element_bytes + WIRE_FORMATS[wire].extra_bytes
