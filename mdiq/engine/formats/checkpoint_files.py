"""Where tensors lie on disk: GGUF files and safetensors directories, by their own names."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from mdiq.engine.formats.gguf_blocks import KEPT, Blocks, take_apart
from mdiq.engine.formats.gguf_file import GgufFile
from mdiq.engine.model_config import read_json
from mdiq.errors import ModelError

_SAMPLE_BYTES = 4096
_QUANTIZED_KINDS = ("F8", "F6", "F4")


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

    def stored(self, name: str) -> torch.Tensor:
        """Return a tensor that is there, with the bytes that it has in the file: u8 if torch has no such type."""
        ...

    def stored_kind(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Return type and shape of a tensor that ``stored`` returns as u8; None of others."""
        ...

    def files(self) -> list[Path]:
        """Return the files that hold tensors."""
        ...

    def close(self) -> None:
        """Unmap the files."""
        ...


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

    def stored(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._file.stored(name))

    def stored_kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        return self.kind(name), self._file.tensors[name].shape

    def files(self) -> list[Path]:
        return self._file.paths

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

    def stored(self, name: str) -> torch.Tensor:
        return self.read(name)

    def stored_kind(self, name: str) -> None:
        return None

    def files(self) -> list[Path]:
        return [self._path / name for name in _shard_names(self._path)]

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
