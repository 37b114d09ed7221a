"""Remembers the hashes of a model's chunks at the Starter, so that each file is hashed once. A small file for each."""

import hashlib
from pathlib import Path

from mdiq.core.weights import SHA256_BYTES, WeightMap
from mdiq.errors import ModelError

_UNKNOWN = bytes(SHA256_BYTES)


class ChunkHashes:
    """The hashes of one model, kept in ``folder`` under its files' paths, sizes and times.

    A file there: SHA-256 of what follows, then that of each chunk, zeros where it was not needed yet.
    """

    def __init__(self, folder: Path, path: Path, weights: WeightMap) -> None:
        self._files: list[Path] = []
        self._hashes: list[bytearray] = []
        self._is_changed = False
        for name, num_bytes, mtime_ns in weights.files:
            source = (path / name if weights.is_directory else path).resolve()
            key = hashlib.sha256(f"{source}\0{num_bytes} {mtime_ns} {weights.chunk_bytes}".encode()).hexdigest()
            self._files.append(folder / key[:32])
            size = -(-num_bytes // weights.chunk_bytes) * SHA256_BYTES
            self._hashes.append(_load(self._files[-1], size) or bytearray(size))

    def get(self, file: int, chunk: int) -> bytes | None:
        """Return the hash of a chunk, or None when it is not known."""
        sha256 = bytes(self._hashes[file][chunk * SHA256_BYTES :][:SHA256_BYTES])
        return None if sha256 == _UNKNOWN else sha256

    def put(self, file: int, chunk: int, sha256: bytes) -> None:
        """Remember the hash of a chunk."""
        self._hashes[file][chunk * SHA256_BYTES : (chunk + 1) * SHA256_BYTES] = sha256
        self._is_changed = True

    def save(self) -> None:
        """Write down what is new.

        Raises:
            ModelError: the folder cannot be written; the hashes are then found again at the next start.
        """
        if not self._is_changed:
            return
        self._is_changed = False
        for path, hashes in zip(self._files, self._hashes, strict=True):
            new = path.with_suffix(".new")
            content = bytes(hashes)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                new.write_bytes(hashlib.sha256(content).digest() + content)
                new.replace(path)
            except OSError as error:
                raise ModelError(f"{path}: hashes cannot be kept ({error.strerror}); set MDIQ_CACHE") from None


def _load(path: Path, size: int) -> bytearray | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content = data[SHA256_BYTES:]
    is_right = len(content) == size and hashlib.sha256(content).digest() == data[:SHA256_BYTES]
    return bytearray(content) if is_right else None
