"""Files of packed weights: mapped into memory to be read, and whole when they have their name."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mdiq.cache import make_room, no_space, put_whole, says_no_space, temporary
from mdiq.errors import ModelError

_ABOUT = "mdiq"  # the one key of a file's metadata: safetensors does not keep the order of several


class PackedFile:
    """Tensors of one file, mapped into memory until none of them is in use any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = safe_open(path, framework="pt")  # safetensors gives its handles no type
        self.names = frozenset[str](self._file.keys())  # type: ignore[no-untyped-call]

    @property
    def about(self) -> str:
        """What the file says of itself: see about.py; empty where it says nothing."""
        return str((self._file.metadata() or {}).get(_ABOUT, ""))

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; its memory is the file's. Raises KeyError where there is none."""
        if name not in self.names:
            raise KeyError(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def find(self, name: str) -> torch.Tensor | None:
        """Return a tensor, or None where the file has none of that name."""
        return self.tensor(name) if name in self.names else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without touching its memory."""
        return tuple(self._file.get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Return a tensor's type, as safetensors calls it, without touching its memory."""
        return str(self._file.get_slice(name).get_dtype())


def written(path: Path, tensors: dict[str, torch.Tensor], scratch: Path, *, about: str | None = None) -> PackedFile:
    """Write a file and return it. about: what it says of itself; then the SHA-256 of the whole is added to its name.

    scratch: a folder on the same disk. Several Nodes of one machine may make the same file: each writes its own there,
    and the last one stays; a power cut leaves a whole file or none.

    Raises:
        CapacityError: the disk is full.
        ModelError: the file cannot be written.
    """
    with _write_errors(path, tensors), temporary(scratch, "write-") as folder:
        own = folder / path.name
        save_file(tensors, own, metadata=None if about is None else {_ABOUT: about})
        if about is not None:
            with own.open("rb") as file:
                path = path.with_stem(f"{path.stem}-{hashlib.file_digest(file, 'sha256').hexdigest()}")
        put_whole(own, path)
        return PackedFile(path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file that no other process reads, and that need not outlive a power cut.

    Raises:
        CapacityError, ModelError: as ``written``.
    """
    with _write_errors(path, tensors):
        save_file(tensors, path)


@contextlib.contextmanager
def _write_errors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    try:
        make_room(path.parent, num_bytes)
        yield
    except (SafetensorError, OSError) as error:
        if says_no_space(str(error)):
            raise no_space(path.parent, num_bytes) from None
        raise ModelError(
            f"{path}: packed weights cannot be written ({str(error)[:120]}); set MDIQ_CACHE to another directory"
        ) from None
