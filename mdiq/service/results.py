"""The file of results, held by one run at a time: whole lines, each of which is on the disk before the next step."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mdiq.cache import NO_SPACE, try_lock
from mdiq.errors import CapacityError, ConfigError


class ResultsFile:
    """Lines are added at its end. is_regular: it is on a disk, and no terminal, pipe or device."""

    def __init__(self, path: Path) -> None:
        """Open or make the file.

        Raises:
            ConfigError: it cannot be written, or another process writes it.
        """
        self.path = path
        try:
            with contextlib.ExitStack() as opened:
                is_new = not path.exists()
                self._file = opened.enter_context(path.open("ab", buffering=0))
                self.is_regular = path.is_file()
                if self.is_regular:
                    self._lock()
                if is_new:
                    _sync_folder(path.parent)
                opened.pop_all()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; --out must be a file that can be written") from None

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def append(self, lines: Sequence[str]) -> None:
        """Add lines, all or none; they are on the disk when this returns.

        Raises:
            CapacityError: the disk is full.
            OSError: they cannot be written; the error names the file.
        """
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        end = self.num_bytes
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            if self.is_regular:
                os.fsync(self._file.fileno())
        except OSError as error:
            if self.is_regular:
                with contextlib.suppress(OSError):  # half a line is removed by the run that goes on
                    self._file.truncate(end)
            if error.errno in NO_SPACE:
                raise CapacityError(
                    f"{self.path}: {error.strerror}; free some, then go on with --resume: all results in it are whole"
                ) from None
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def drop_cut_line(self) -> None:
        """Remove a last line without its end: a crash cut it off, and its request runs again."""
        data = self.path.read_bytes() if self.is_regular else b""
        if data and not data.endswith(b"\n"):
            self._file.truncate(data.rfind(b"\n") + 1)

    def _lock(self) -> None:
        """Keep other runs out; the lock goes with the process, however that ends."""
        with contextlib.suppress(OSError):  # a file system without locks: the journal has one of its own
            if not try_lock(self._file.fileno()):
                raise ConfigError(f"{self.path}: another mdiq run writes it; wait for that one, or give another --out")


def _sync_folder(folder: Path) -> None:
    """Bring a new file's name to the disk, where folders can be read, and their file system does that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
