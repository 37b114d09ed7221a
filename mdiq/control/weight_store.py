"""A Node's files of Layers on disk: what is there, what is on its way, and what has changed. No sockets.

In a folder of one model in one format, which the caller names:

    lock                                  held while files are fetched
    layer-003-<sha256>.safetensors        the whole file of a Layer, named by its bytes
    layer-003-<sha256>.part               the beginning of one; its length is all that is known of it

A file gets its name when all of its bytes have that hash, and are on the disk. It also gets a time that follows from
the hash: a file with another time was touched since, and is hashed again before it is used.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from mdiq import cache
from mdiq.core.weights import LayerFile
from mdiq.errors import CapacityError, ModelError

_READ_BYTES = 2**20


@contextlib.contextmanager
def file_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in cache.NO_SPACE:
            raise CapacityError(
                f"{folder}: no space left for weights; free some there, or set MDIQ_CACHE to a directory with more"
            ) from None
        raise ModelError(
            f"{folder}: weights cannot be kept there ({error.strerror}); make it writable, or set MDIQ_CACHE"
        ) from None


def try_lock(folder: Path) -> int | None:
    """Return a handle that keeps other processes away from the folder until it is closed; None while one is there.

    Raises:
        ModelError, CapacityError: the folder cannot be written.
    """
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    is_ours = False
    try:
        is_ours = cache.try_lock(handle)
    except OSError as error:
        # Two processes that append to one file would spoil it.
        raise ModelError(
            f"{folder}: no file locks there ({error.strerror}); set MDIQ_CACHE to a directory of a local disk"
        ) from None
    finally:
        if not is_ours:
            os.close(handle)
    return handle if is_ours else None


def path_of(folder: Path, file: LayerFile) -> Path:
    """Return where the whole file of a Layer is, or is to be."""
    return folder / f"layer-{file.layer:03}-{file.sha256.hex()}.safetensors"


def stored_layers(folder: Path) -> tuple[int, ...]:
    """Return the Layers of which whole files are there, as far as their names tell."""
    names = [path.name.split("-")[1] for path in folder.glob("layer-*.safetensors")]
    return tuple(sorted({int(name) for name in names if name.isdecimal()}))


class StoredFile:
    """The file of a Layer in ``folder``: whole, or as much of it as has come. The caller holds the folder's lock.

    path: of the whole file. num_bytes: how much is there. is_whole: whether it is all there, and right.
    was_mended: whether a whole file was found changed on the disk, and removed.
    """

    def __init__(self, folder: Path, file: LayerFile) -> None:
        """Look at what is there, and hash it where that is needed.

        Raises:
            ModelError, CapacityError: the folder cannot be used.
        """
        self.file = file
        self.path = path_of(folder, file)
        self.was_mended = False
        self._folder = folder
        self._part = self.path.with_suffix(".part")
        self._handle: int | None = None
        self._hash = hashlib.sha256()
        with file_errors(folder):
            self.is_whole = self._is_whole()
            self.num_bytes = file.num_bytes if self.is_whole else self._open_part()
        if self.num_bytes == file.num_bytes and not self.is_whole:
            self.finish()  # a process was killed just before it did

    def put(self, data: bytes | bytearray) -> None:
        """Append bytes that came.

        Raises:
            CapacityError: the disk is full. ModelError: it cannot be written.
        """
        assert self._handle is not None  # it is not whole
        with file_errors(self._folder):
            view = memoryview(data)
            while view:
                view = view[os.write(self._handle, view) :]
        self._hash.update(data)
        self.num_bytes += len(data)

    def finish(self) -> bool:
        """Give a file of which all has come its name; return False, and begin anew, if its bytes are wrong.

        Raises:
            CapacityError: the disk is full. ModelError: it cannot be written.
        """
        assert self._handle is not None  # it is not whole
        with file_errors(self._folder):
            if self._hash.digest() != self.file.sha256:
                os.ftruncate(self._handle, 0)
                self._hash, self.num_bytes = hashlib.sha256(), 0
                return False
            os.utime(self._handle, (self._time_s, self._time_s))
            cache.put_whole(self._part, self.path)
            # What the Starter had for this Layer before is of no use any more. Who computes with it has it mapped.
            for old in self._folder.glob(f"layer-{self.file.layer:03}-*"):
                if old != self.path:
                    old.unlink(missing_ok=True)
        self.close()
        self.is_whole = True
        return True

    def close(self) -> None:
        """Close the file; what is there of it stays."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @property
    def _time_s(self) -> int:
        """The time of a file that was verified: even, for FAT, and before 2038."""
        return int.from_bytes(self.file.sha256[:4]) >> 2 << 1

    def _is_whole(self) -> bool:
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return False
        if status.st_size == self.file.num_bytes:
            if int(status.st_mtime) == self._time_s:
                return True
            with self.path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").digest() == self.file.sha256:
                    os.utime(file.fileno(), (self._time_s, self._time_s))
                    return True
        self.path.unlink()
        self.was_mended = True
        return False

    def _open_part(self) -> int:
        """Return how many bytes of the file have come before; hash them."""
        # A link that somebody put there must not lead elsewhere.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._handle = os.open(self._part, flags, 0o644)
        num_bytes = os.fstat(self._handle).st_size
        if num_bytes > self.file.num_bytes:
            os.ftruncate(self._handle, num_bytes := 0)
        for at in range(0, num_bytes, _READ_BYTES):
            self._hash.update(os.pread(self._handle, _READ_BYTES, at))
        return num_bytes
