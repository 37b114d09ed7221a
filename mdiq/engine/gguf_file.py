"""GGUF files: metadata and tensors, read lazily from a memory map. Owns the parsing; `gguf` owns the quantized types.

``gguf.GGUFReader`` builds a numpy array for every token of the vocabulary, which takes seconds in each process of a
ring; this reader takes milliseconds, and checks every length against the file before it believes it.

Format: GGUF version 2 and 3, little endian (ggml's docs/gguf.md).
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import gguf
import numpy as np

from mdiq.errors import ModelError

MOST_ENTRIES = 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CHUNK_ELEMENTS = 4 << 20  # dequantizing makes copies of what it is given: give it little at a time
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. ``shape`` is in row-major order: [rows, columns]."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GgufFile:
    """An open GGUF file; use it as a context manager, or call ``close``.

    fields: metadata by key; arrays are lists (of str) or numpy arrays (of numbers).
    tensors: where each tensor lies, by name, in the file's order.
    header_bytes: what lies in front of the tensors.

    Raises:
        ModelError: the file is missing, truncated, malformed or of an unsupported version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = "it is empty" if isinstance(error, ValueError) else error.strerror
            raise ModelError(f"{path}: cannot be read ({reason}); give a .gguf file") from None
        try:
            self._parse()
        except ModelError:
            self._map.close()
            raise
        except (struct.error, IndexError, ValueError, OverflowError) as error:
            self._map.close()
            raise ModelError(
                f"{path}: its header is truncated or malformed ({str(error)[:100]}); fetch the file again"
            ) from None

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file, so that its pages no longer count as this process's memory."""
        self._map.close()

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return a metadata value of the wanted type, or the default where it is missing.

        Raises:
            ModelError: it has another type, or is missing without a default.
        """
        value = self.fields.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "is missing" if value is None else f"is of type {type(value).__name__}"
            raise ModelError(f"{self.path}: {key} {found}; expected {kind.__name__}: fetch or convert the file again")
        return value

    def array(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a tensor, or the rows ``start`` to ``stop - 1`` of a matrix, dequantized: f32, row-major.

        Raises:
            ModelError: there is no such tensor, or `gguf` cannot dequantize its type.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.path}: tensor {name} is missing; fetch or convert the file again")
        data = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)
        shape = tensor.shape
        if start or stop is not None:
            data = data.reshape(shape[0], -1)[start:stop].reshape(-1)
            shape = (len(range(*slice(start, stop).indices(shape[0]))), *shape[1:])
        if tensor.type in _PLAIN:
            plain = data.view(_PLAIN[tensor.type]).reshape(shape).astype(np.float32)
            self._drop_pages(tensor)
            return plain
        columns = shape[-1]
        num_rows = int(np.prod(shape[:-1], dtype=np.int64))
        rows = data.reshape(num_rows, -1)
        out = np.empty((num_rows, columns), np.float32)
        step = max(_CHUNK_ELEMENTS // columns, 1)
        try:
            for start in range(0, num_rows, step):
                out[start : start + step] = gguf.dequantize(rows[start : start + step], tensor.type)
        except NotImplementedError:
            raise ModelError(f"{self.path}: tensor {name} has type {tensor.type.name}, {_NOT_READ}") from None
        self._drop_pages(tensor)
        return out.reshape(shape)

    def stored(self, name: str) -> np.ndarray:
        """Return the rows of a matrix as stored: u8 [rows, bytes], a copy."""
        tensor = self.tensors[name]
        data = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)
        rows = data.reshape(tensor.shape[0], -1).copy()
        self._drop_pages(tensor)
        return rows

    def _drop_pages(self, tensor: GgufTensor) -> None:
        """Let the tensor's pages go: they would count as this process's memory until the file is closed."""
        first = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, tensor.offset + tensor.num_bytes - first)

    def sample(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a tensor as stored, for a fingerprint of the file."""
        tensor = self.tensors[name]
        return self._map[tensor.offset : tensor.offset + min(num_bytes, tensor.num_bytes)]

    def _parse(self) -> None:
        if self._map[:4] != b"GGUF":
            raise ModelError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF'); give a .gguf file")
        (version,) = struct.unpack_from("<I", self._map, 4)
        if version not in (2, 3):
            raise ModelError(
                f"{self.path}: GGUF version {version & 0xFFFF or version >> 16} (or big endian) is not supported; "
                "convert it to version 3, little endian"
            )
        num_tensors, num_fields = struct.unpack_from("<QQ", self._map, 8)
        if max(num_tensors, num_fields) > MOST_ENTRIES:
            raise ValueError(f"{num_tensors} tensors and {num_fields} fields")
        self._at = 24
        self.fields: dict[str, object] = {}
        for _ in range(num_fields):
            key = self._string()
            self.fields[key] = self._value(self._unpack("I"))
        if (num_parts := self.get("split.count", int, 0)) > 1:
            raise ModelError(
                f"{self.path}: it is part {self.get('split.no', int, 0) + 1} of {num_parts} of a split model; join "
                "them first: llama-gguf-split --merge FIRST-PART WHOLE.gguf"
            )
        alignment = self.get("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        self.header_bytes = data_start = min(-(-self._at // alignment) * alignment, len(self._map))
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            num_elements = 1
            for size in shape:
                num_elements *= size
            if shape[-1] % block:
                raise ValueError(f"tensor {name}: {shape[-1]} columns in blocks of {block}")
            tensor = GgufTensor(name, shape, kind, data_start + offset, num_elements // block * block_bytes)
            if tensor.offset + tensor.num_bytes > len(self._map):
                raise ModelError(
                    f"{self.path}: tensor {name} ends at byte {tensor.offset + tensor.num_bytes} and the file at "
                    f"{len(self._map)}: it is truncated; fetch it again"
                )
            self.tensors[name] = tensor

    def _unpack(self, code: str) -> int:
        value: int = struct.unpack_from("<" + code, self._map, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        size = self._unpack("Q")
        if size > len(self._map) - self._at:
            raise ValueError(f"a text of {size} bytes")
        text = self._map[self._at : self._at + size].decode("utf-8", errors="replace")
        self._at += size
        return text

    def _value(self, kind: int, *, depth: int = 0) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            if depth > 3:
                raise ValueError("arrays nested too deeply")
            item_kind, count = self._unpack("I"), self._unpack("Q")
            if count > len(self._map) - self._at:
                raise ValueError(f"an array of {count} items")
            if item_kind in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[item_kind])
                values = np.frombuffer(self._map[self._at : self._at + count * dtype.itemsize], dtype, count)
                self._at += count * dtype.itemsize
                return values
            return [self._value(item_kind, depth=depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        return self._unpack(_SCALARS[kind])

    def _tensor_info(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name, num_dims = self._string(), self._unpack("I")
        if not 1 <= num_dims <= 4:
            raise ValueError(f"tensor {name}: {num_dims} dimensions")
        shape = tuple(reversed([self._unpack("Q") for _ in range(num_dims)]))
        if min(shape) < 1 or max(shape) > 1 << 40:
            raise ValueError(f"tensor {name}: shape {shape}")
        kind = self._unpack("I")
        if kind not in _KINDS:
            raise ModelError(f"{self.path}: tensor {name} has type {kind}, {_NOT_READ}")
        return name, shape, gguf.GGMLQuantizationType(kind), self._unpack("Q")


_KINDS = frozenset(int(kind) for kind in gguf.GGMLQuantizationType)
_NOT_READ = "which is not read; use the model in Q4_K_M or Q8_0"
_PLAIN: dict[gguf.GGMLQuantizationType, np.dtype] = {
    gguf.GGMLQuantizationType.F32: np.dtype("<f4"),
    gguf.GGMLQuantizationType.F16: np.dtype("<f2"),
    gguf.GGMLQuantizationType.F64: np.dtype("<f8"),
}
