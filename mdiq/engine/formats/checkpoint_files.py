"""Where tensors lie on disk: GGUF files, safetensors directories, and partial copies of either, by their own names."""

import hashlib
import json
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from mdiq.core.weights import PART_SUFFIX, SHA256_BYTES, Manifest, decode
from mdiq.engine.formats.gguf_blocks import KEPT, Blocks, take_apart
from mdiq.engine.formats.gguf_file import GgufFile
from mdiq.engine.model_config import read_json
from mdiq.errors import ModelError, RemoteProtocolError

_SAMPLE_BYTES = 4096
_QUANTIZED_KINDS = ("F8", "F6", "F4")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a tensor lie: in the file of that name."""

    file: str
    offset: int
    num_bytes: int


class Source(Protocol):
    """Tensors by their own names."""

    def has(self, name: str) -> bool:
        """Tell whether a tensor of that name is stored."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read one tensor, or the rows ``start`` to ``stop - 1`` of a matrix.

        Raises:
            ModelError: it is missing or cannot be read.
        """
        ...

    def kind(self, name: str) -> str:
        """Return a tensor's type, as the file calls it, without reading the tensor."""
        ...

    def blocks(self, name: str) -> Blocks | None:
        """Return a matrix as it is stored, or None where its type is not one of KEPT.

        Raises:
            ModelError: it is missing or cannot be read.
        """
        ...

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        ...

    def fingerprint(self, name: str) -> bytes:
        """Return a SHA-256 of shape, type and first bytes of a tensor, for the digest."""
        ...

    def place(self, name: str) -> Place:
        """Return where a tensor lies."""
        ...

    def headers(self) -> Mapping[str, int]:
        """Return the files that hold tensors, by name, and the bytes in front of the tensors of each."""
        ...

    def close(self) -> None:
        """Unmap the files."""
        ...


def read_note(path: Path) -> Manifest | None:
    """Return what is there of a partial copy, or None of a whole model."""
    where = path.with_name(path.name + PART_SUFFIX)
    try:
        note = decode(where.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, RemoteProtocolError) as error:
        raise ModelError(f"{where}: cannot be read ({str(error)[:100]}); delete it and fetch the model again") from None
    if not isinstance(note, Manifest):
        raise ModelError(f"{where}: it does not say what of the model is there; delete it and fetch the model again")
    return note


class PartialSource:
    """Another Source, of which only some ranges of bytes are there: the rest of its files are holes."""

    def __init__(self, source: Source, note: Manifest, path: Path) -> None:
        self._source = source
        self._note = note
        self._path = path
        self._files = {name: i for i, (name, _, _) in enumerate(note.files)}
        names = source.names()
        if len(note.fingerprints) != len(names) * SHA256_BYTES:
            raise ModelError(f"{path}: its note is about another model; delete both and fetch the model again")
        self._order = {name: i for i, name in enumerate(names)}

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        self._check(name)
        return self._source.read(name, start, stop)

    def kind(self, name: str) -> str:
        return self._source.kind(name)

    def blocks(self, name: str) -> Blocks | None:
        self._check(name)
        return self._source.blocks(name)

    def names(self) -> list[str]:
        return self._source.names()

    def fingerprint(self, name: str) -> bytes:
        if self._holds(name):
            return self._source.fingerprint(name)
        at = self._order[name] * SHA256_BYTES
        return self._note.fingerprints[at : at + SHA256_BYTES]

    def place(self, name: str) -> Place:
        return self._source.place(name)

    def headers(self) -> Mapping[str, int]:
        return self._source.headers()

    def close(self) -> None:
        self._source.close()

    def _check(self, name: str) -> None:
        if self.has(name) and not self._holds(name):
            raise ModelError(f"{self._path}: tensor {name} was not fetched to this node; fetch its layer first")

    def _holds(self, name: str) -> bool:
        place, chunk_bytes = self._source.place(name), self._note.chunk_bytes
        file = self._files.get(place.file) if self._note.is_directory else 0
        return any(
            i == file and first * chunk_bytes <= place.offset and place.offset + place.num_bytes <= stop * chunk_bytes
            for i, first, stop in self._note.ranges
        )


class GgufSource:
    """Tensors of a .gguf file, or of all files of one that is split."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def has(self, name: str) -> bool:
        return name in self._file.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return torch.from_numpy(self._file.array(name, start, stop))

    def kind(self, name: str) -> str:
        return self._file.tensors[name].type.name

    def blocks(self, name: str) -> Blocks | None:
        if name not in self._file.tensors or self.kind(name) not in KEPT:
            return None
        return take_apart(self._file.stored(name), self.kind(name))

    def names(self) -> list[str]:
        return sorted(self._file.tensors)

    def fingerprint(self, name: str) -> bytes:
        tensor = self._file.tensors[name]
        description = f"{tensor.shape} {tensor.type.name} ".encode() + self._file.sample(name, _SAMPLE_BYTES)
        return hashlib.sha256(description).digest()

    def place(self, name: str) -> Place:
        tensor = self._file.tensors[name]
        return Place(self._file.file_of(tensor).name, tensor.offset, tensor.num_bytes)

    def headers(self) -> Mapping[str, int]:
        return self._file.headers

    def close(self) -> None:
        self._file.close()


class SafetensorsSource:
    """Tensors of a directory of .safetensors files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}  # safetensors gives its handles no type
        try:
            for name in _shard_names(path):
                file = self._stack.enter_context(safe_open(path / name, framework="pt"))
                self._files.update(dict.fromkeys(file.keys(), file))
        except (SafetensorError, OSError) as error:
            self._stack.close()
            raise ModelError(f"{path / name}: cannot be read ({str(error)[:120]}); fetch the file again") from None
        try:
            self._check_kinds()
        except ModelError:
            self._stack.close()
            raise

    def _check_kinds(self) -> None:
        """Refuse quantized weights: without the scales beside them they would be noise."""
        for name, file in self._files.items():
            kind = str(file.get_slice(name).get_dtype())
            if kind.startswith(_QUANTIZED_KINDS):
                raise ModelError(
                    f"{self._path}: tensor {name} ({kind}) is of quantized weights, which are not read; use the "
                    "model's original directory (bf16, f16 or f32), or a .gguf file (Q4_K_M or Q8_0)"
                )

    def has(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if name not in self._files:
            raise ModelError(f"{self._path}: tensor {name} is missing; fetch the model again")
        try:
            is_whole = not start and stop is None
            tensor: torch.Tensor = (
                self._files[name].get_tensor(name) if is_whole else self._files[name].get_slice(name)[start:stop]
            )
        except SafetensorError as error:
            raise ModelError(f"{self._path}: tensor {name} cannot be read ({str(error)[:120]})") from None
        if not tensor.is_floating_point():
            raise ModelError(f"{self._path}: tensor {name} is {tensor.dtype}; only floating point is supported")
        return tensor

    def kind(self, name: str) -> str:
        return str(self._files[name].get_slice(name).get_dtype())

    def blocks(self, name: str) -> Blocks | None:
        return None

    def names(self) -> list[str]:
        return sorted(self._files)

    def fingerprint(self, name: str) -> bytes:
        view = self._files[name].get_slice(name)
        shape = view.get_shape()
        sample = view[:1] if shape else self.read(name).reshape(1)
        data = sample.contiguous().reshape(-1)[: _SAMPLE_BYTES // sample.element_size()]
        description = f"{shape} {view.get_dtype()} ".encode() + data.view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(description).digest()

    def place(self, name: str) -> Place:
        return self._index[0][name]

    def headers(self) -> Mapping[str, int]:
        return self._index[1]

    @cached_property
    def _index(self) -> tuple[dict[str, Place], dict[str, int]]:
        """Where the tensors lie, and the bytes in front of those of each file; safetensors tells neither."""
        places: dict[str, Place] = {}
        headers: dict[str, int] = {}
        for shard in _shard_names(self._path):
            with (self._path / shard).open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))  # safe_open has checked it
            headers[shard] = 8 + size
            for name, entry in header.items():
                if name != "__metadata__":
                    start, stop = entry["data_offsets"]
                    places[name] = Place(shard, 8 + size + start, stop - start)
        return places, headers

    def close(self) -> None:
        self._files.clear()
        self._stack.close()


def _shard_names(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    # A whole file goes before an index, which may be left over from another build; transformers takes it so too.
    if (path / "model.safetensors").exists():
        return ["model.safetensors"]
    if not index.exists():
        hint = "only safetensors are read (a .bin file can run code): convert it"
        raise ModelError(f"{path}: model.safetensors is missing; {hint if any(path.glob('*.bin')) else 'fetch it'}")
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ModelError(f"{index}: weight_map is missing; fetch the file again")
    names = sorted({str(name) for name in weights.values()})
    for name in names:
        # A name comes from the file and must not lead out of the directory.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: {name!r} is not a file name of this directory; fetch the model again")
        if not (path / name).is_file():
            raise ModelError(f"{path / name}: it is missing; fetch the model again")
    return names
