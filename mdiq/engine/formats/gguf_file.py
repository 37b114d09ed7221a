"""GGUF files: metadata and tensors, read lazily from memory maps. Owns the parsing; `gguf` owns the quantized types.

A split model (``NAME-00001-of-0000N.gguf``) is read as a whole from the name of any part: metadata from the first part,
tensors from all.

``gguf.GGUFReader`` builds a numpy array for every token of the vocabulary, which takes seconds in each process of a
ring; this reader takes milliseconds, and checks every length against the file before using it.

Format: GGUF version 2 and 3, little endian (ggml's docs/gguf.md).
"""

import mmap
import re
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import gguf
import numpy as np

from mdiq.errors import ModelError

MAX_ENTRIES = 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SIZE = struct.Struct("<Q")  # before a text
_CHUNK_ELEMENTS = 4 << 20  # dequantizing copies its input, so it gets little at a time
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Location of a tensor: its part, and its place there. ``shape`` is in row-major order: [rows, columns]."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int
    part: int = 0


class GgufFile:
    """An open GGUF file, with all its parts; use it as a context manager, or call ``close``.

    fields: metadata by key; arrays are lists (of str) or numpy arrays (of numbers).
    tensors: where each tensor lies, by name, in the files' order.

    Raises:
        ModelError: a file is missing, truncated, malformed or of an unsupported version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as opened:
            first = opened.enter_context(_Part(path))
            self._parts = [first]
            num_parts = _number(first, "split.count")
            if num_parts > 1:
                paths = _part_paths(path, _number(first, "split.no"), num_parts)
                self._parts = [first if part == path else opened.enter_context(_Part(part)) for part in paths]
            self.fields = self._parts[0].fields
            self.tensors = self._all_tensors()
            self._opened = opened.pop_all()

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files, so that their pages no longer count as this process's memory."""
        self._opened.close()

    @property
    def paths(self) -> list[Path]:
        """The files: one, or all parts."""
        return [part.path for part in self._parts]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return a metadata value of the wanted type, or the default where it is missing.

        Raises:
            ModelError: it has another type, or is missing without a default.
        """
        return _typed(self.fields, self.path, key, kind, default)

    def array(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a tensor, or the rows ``start`` to ``stop - 1`` of a matrix, dequantized: f32, row-major.

        Raises:
            ModelError: there is no such tensor, or `gguf` cannot dequantize its type.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.path}: tensor {name} is missing; fetch or convert the file again")
        data = np.frombuffer(self._parts[tensor.part].map, np.uint8, tensor.num_bytes, tensor.offset)
        shape = tensor.shape
        if start or stop is not None:
            data = data.reshape(shape[0], -1)[start:stop].reshape(-1)
            shape = (len(range(*slice(start, stop).indices(shape[0]))), *shape[1:])
        found = dequantized(data, tensor.type, shape, f"{self.path}: tensor {name}")
        self._drop_pages(tensor)
        return found

    def stored(self, name: str) -> np.ndarray:
        """Return the rows of a matrix as stored: u8 [rows, bytes], a copy."""
        tensor = self.tensors[name]
        data = np.frombuffer(self._parts[tensor.part].map, np.uint8, tensor.num_bytes, tensor.offset)
        rows = data.reshape(tensor.shape[0], -1).copy()
        self._drop_pages(tensor)
        return rows

    def _drop_pages(self, tensor: GgufTensor) -> None:
        """Drop the tensor's pages: they would count as this process's memory until the file is closed."""
        first = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._parts[tensor.part].map.madvise(mmap.MADV_DONTNEED, first, tensor.offset + tensor.num_bytes - first)

    def sample(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a tensor as stored, for a fingerprint of the file."""
        tensor = self.tensors[name]
        return self._parts[tensor.part].map[tensor.offset : tensor.offset + min(num_bytes, tensor.num_bytes)]

    def _all_tensors(self) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for i, part in enumerate(self._parts):
            found = _number(part, "split.no"), _number(part, "split.count")
            if len(self._parts) > 1 and found != (i, len(self._parts)):
                raise ModelError(
                    f"{part.path}: it is part {found[0] + 1} of {found[1]}, and its name says {i + 1} of "
                    f"{len(self._parts)}; fetch the file again"
                )
            for tensor in part.tensors:
                if tensor.name in tensors:
                    raise ModelError(f"{part.path}: tensor {tensor.name[:80]} is there twice; fetch the model again")
                tensors[tensor.name] = replace(tensor, part=i) if i else tensor
        num_tensors = _number(self._parts[0], "split.tensors.count", len(tensors))
        if len(self._parts) > 1 and num_tensors != len(tensors):
            raise ModelError(
                f"{self.path}: its {len(self._parts)} parts have {len(tensors)} tensors, and the model {num_tensors}; "
                "fetch all parts again, from one place"
            )
        return tensors


def dequantized(data: np.ndarray, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Return the tensor that stored bytes stand for, f32, row-major. what: names it in an error.

    Raises:
        ModelError: `gguf` cannot dequantize its type.
    """
    if kind in _PLAIN:
        return data.view(_PLAIN[kind]).reshape(shape).astype(np.float32)
    columns = shape[-1]
    num_rows = int(np.prod(shape[:-1], dtype=np.int64))
    rows = data.reshape(num_rows, -1)
    out = np.empty((num_rows, columns), np.float32)
    step = max(_CHUNK_ELEMENTS // columns, 1)
    try:
        for start in range(0, num_rows, step):
            out[start : start + step] = gguf.dequantize(rows[start : start + step], kind)
    except NotImplementedError:
        raise ModelError(f"{what} has type {kind.name}, {_NOT_READ}") from None
    return out.reshape(shape)


class _Part:
    """One file, mapped and parsed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = "it is empty" if isinstance(error, ValueError) else error.strerror
            raise ModelError(f"{path}: cannot be read ({reason}); give a .gguf file") from None
        try:
            self._parse()
        except ModelError:
            self.map.close()
            raise
        except (struct.error, IndexError, ValueError, OverflowError) as error:
            self.map.close()
            raise ModelError(
                f"{path}: its header is truncated or malformed ({str(error)[:100]}); fetch the file again"
            ) from None

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self.map.close()

    def _parse(self) -> None:
        if self.map[:4] != b"GGUF":
            raise ModelError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF'); give a .gguf file")
        (version,) = struct.unpack_from("<I", self.map, 4)
        if version not in (2, 3):
            raise ModelError(
                f"{self.path}: GGUF version {version & 0xFFFF or version >> 16} (or big endian) is not supported; "
                "convert it to version 3, little endian"
            )
        num_tensors, num_fields = struct.unpack_from("<QQ", self.map, 8)
        if max(num_tensors, num_fields) > MAX_ENTRIES:
            raise ValueError(f"{num_tensors} tensors and {num_fields} fields")
        self._at = 24
        self.fields: dict[str, object] = {}
        for _ in range(num_fields):
            key = self._string()
            self.fields[key] = self._value(self._unpack("I"))
        alignment = _number(self, "general.alignment", 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        data_start = min(-(-self._at // alignment) * alignment, len(self.map))
        self.tensors: list[GgufTensor] = []
        for name, shape, kind, offset in infos:
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            num_elements = 1
            for size in shape:
                num_elements *= size
            if shape[-1] % block:
                raise ValueError(f"tensor {name}: {shape[-1]} columns in blocks of {block}")
            tensor = GgufTensor(name, shape, kind, data_start + offset, num_elements // block * block_bytes)
            if tensor.offset + tensor.num_bytes > len(self.map):
                raise ModelError(
                    f"{self.path}: tensor {name} ends at byte {tensor.offset + tensor.num_bytes} and the file at "
                    f"{len(self.map)}: it is truncated; fetch it again"
                )
            self.tensors.append(tensor)

    def _unpack(self, code: str) -> int:
        value: int = struct.unpack_from("<" + code, self.map, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        # A vocabulary is read in every process that opens the file, and a small board's processor is slow: one loop.
        data, at, end, texts, unpack = self.map, self._at, len(self.map), [], _SIZE.unpack_from
        for _ in range(count):
            start = at + _SIZE.size
            at = start + unpack(data, at)[0]
            if at > end:
                raise ValueError(f"a text of {at - start} bytes")
            texts.append(data[start:at].decode("utf-8", errors="replace"))
        self._at = at
        return texts

    def _value(self, kind: int, *, depth: int = 0) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            if depth > 3:
                raise ValueError("arrays nested too deeply")
            item_kind, count = self._unpack("I"), self._unpack("Q")
            if count > len(self.map) - self._at:
                raise ValueError(f"an array of {count} items")
            if item_kind in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[item_kind])
                values = np.frombuffer(self.map[self._at : self._at + count * dtype.itemsize], dtype, count)
                self._at += count * dtype.itemsize
                return values
            if item_kind == _STRING:
                return self._strings(count)
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


def _number(part: _Part, key: str, default: int = 0) -> int:
    return _typed(part.fields, part.path, key, int, default)


def _typed(fields: Mapping[str, object], path: Path, key: str, kind: type[T], default: T | None) -> T:
    value = fields.get(key, default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "is missing" if value is None else f"is of type {type(value).__name__}"
        raise ModelError(f"{path}: {key} {found}; expected {kind.__name__}: fetch or convert the file again")
    return value


def _part_paths(path: Path, no: int, num_parts: int) -> list[Path]:
    """Return the files of a split model, one of which is ``path``."""
    name = _PART_NAME.fullmatch(path.name)
    if name is None or int(name[3]) != num_parts:
        raise ModelError(
            f"{path}: it is part {no + 1} of {num_parts} of a split model, and its name does not end in "
            f"-{no + 1:05}-of-{num_parts:05}.gguf; give all parts their names back, or join them: llama-gguf-split "
            "--merge FIRST-PART WHOLE.gguf"
        )
    paths = [path.with_name(f"{name[1]}-{n:05}-of-{name[3]}{name[4]}") for n in range(1, num_parts + 1)]
    for part in paths:
        if not part.is_file():
            raise ModelError(f"{part}: it is missing; {path.name} is one of {num_parts} parts, and all are needed")
    return paths


_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_KINDS = frozenset(int(kind) for kind in gguf.GGMLQuantizationType)
_NOT_READ = "which is not read; use the model in Q4_K_M or Q8_0"
_PLAIN: dict[gguf.GGMLQuantizationType, np.dtype] = {
    gguf.GGMLQuantizationType.F32: np.dtype("<f4"),
    gguf.GGMLQuantizationType.F16: np.dtype("<f2"),
    gguf.GGMLQuantizationType.F64: np.dtype("<f8"),
}
