"""This machine's cache folder: where it is, its file locks, and whether there is room.

models/    model files that were fetched              packed/  weights in 8 and 4 bits, by model and format
weights/   a Node's copies of its Starter's model     shapes/  files of random weights
hashes/, profiles/, kernels.json, code/               what was measured, computed or compiled once; small
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import structlog

from mdiq.errors import CapacityError, ConfigError

log = structlog.get_logger()

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_warned: set[str] = set()


def cache_directory() -> Path:
    """Return the cache folder: $MDIQ_CACHE, else mdiq under $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ConfigError: none is named, and this user has no home.
    """
    if own := os.environ.get("MDIQ_CACHE"):
        return Path(os.path.expanduser(own))
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is to be ignored, says the XDG base directory specification.
    if not os.path.isabs(shared):
        shared = os.path.expanduser("~/.cache")
    if not os.path.isabs(shared):
        raise ConfigError("no folder for models and packed weights: there is no home directory; set MDIQ_CACHE to one")
    return Path(shared) / "mdiq"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file at ``path``, waiting for it; it goes with the process, however that ends.

    Yields False, with a warning, where the file system has no locks. So the lock may only save work: what is written
    below it has a name of its own until it is renamed.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        is_locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            is_locked = False
            _warn("no_file_locks", path, f"{error.strerror}; processes that start together may do the same work twice")
        yield is_locked


def try_lock(handle: int) -> bool:
    """Take the lock of an open file, or return False while another process has it.

    Raises:
        OSError: its file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def scratch_directory(folder: Path) -> Path:
    """Return ``folder`` if files can be written there, else the system's folder for temporary ones.

    Raises:
        ConfigError: neither can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        reason = os.strerror(errno.EACCES)
    except OSError as error:
        reason = error.strerror or str(error)
    _warn("cache_not_writable", folder, f"{reason}; what is made is not kept; set MDIQ_CACHE")
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        raise ConfigError(
            f"{folder}: {reason}, and there is no temporary folder; set MDIQ_CACHE to a folder that can be written"
        ) from None


def make_room(folder: Path, num_bytes: int) -> None:
    """See that ``folder`` has room for so many bytes, before they are written.

    Raises:
        CapacityError: it has not.
        OSError: there is no such folder.
    """
    if num_bytes > shutil.disk_usage(folder).free:
        raise no_space(folder, num_bytes)


def no_space(folder: Path, num_bytes: int) -> CapacityError:
    """Return the error of a disk that has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    return CapacityError(
        f"no space left in {folder}: {-(-num_bytes // 10**6)} MB needed, {free // 10**6} MB free; free some there, "
        "or set MDIQ_CACHE to a directory with more"
    )


def says_no_space(text: str) -> bool:
    """Tell whether the words of a library or of another process say that a disk is full."""
    return any(os.strerror(number) in text for number in NO_SPACE)


def _warn(event: str, path: Path, error: str) -> None:
    if event not in _warned:
        _warned.add(event)
        log.warning(event, path=str(path), error=error)
