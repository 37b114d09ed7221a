"""Where the cache folder is, its file locks, who uses an Entry, and files that are written whole."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from mdiq.errors import CapacityError, ConfigError

log = structlog.get_logger()

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK = ".lock"
MAX_SMALL_FILES = 512
"""In one folder of small files."""
_warned: set[str] = set()


class Use:
    """A use of an Entry, which nobody forgets until this is closed, or is referred to no more."""

    def __init__(self, handle: int | None) -> None:
        self.close = weakref.finalize(self, _end_use, handle)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.close()


_kept: dict[Path, Use] = {}


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
    while True:
        with path.open("wb") as file:
            is_locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                is_locked = False
                reason = f"{error.strerror}; processes that start together may do the same work twice"
                warn_once("no_file_locks", path, reason)
            if is_locked and not is_at(file.fileno(), path):
                continue  # it was removed with the Entry that it belonged to
            yield is_locked
            return


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


def use(path: Path, make: Callable[[], object] | None = None) -> Use:
    """Keep an Entry from being forgotten, and note the time. make: makes it where it is missing.

    It waits while another process forgets the Entry. What cannot be locked, no process forgets.

    Raises:
        OSError: there is none, and it cannot be made.
    """
    while True:
        if make is not None:
            make()
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            return Use(None)
        except FileNotFoundError:
            if make is None:
                raise
            continue
        in_use = Use(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError:
            return in_use
        if is_at(handle, path):
            _note_use(handle)
            return in_use


def keep(path: Path) -> None:
    """Keep an Entry from being forgotten as long as this process runs; what is missing, or is none, is let be."""
    with contextlib.suppress(OSError, ConfigError):
        if path.parent.parent.samefile(cache_directory()):
            _kept[path] = use(path)  # again, where another file took its place


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
    warn_once("cache_not_writable", folder, f"{reason}; what is made is not kept; set MDIQ_CACHE")
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        raise ConfigError(
            f"{folder}: {reason}, and there is no temporary folder; set MDIQ_CACHE to a folder that can be written"
        ) from None


def put_whole(own: Path, path: Path, *, replaces: bool = True) -> None:
    """Move a file from a name of its own to ``path`` on the same disk, when all of its bytes are on that disk.

    Other processes, and whoever reads it after a power cut, find the whole of it or what was there before.

    Raises:
        OSError: it cannot be done. FileExistsError: without ``replaces``, there is a file already.
    """
    _sync(own)
    if replaces:
        os.replace(own, path)
    else:
        os.link(own, path)
        os.unlink(own)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; others do so by themselves
        _sync(path.parent)


def write_whole(path: Path, content: bytes, *, replaces: bool = True, like: os.stat_result | None = None) -> None:
    """Write a small file, and its folder if need be, as ``put_whole`` does; its owner alone may read it.

    like: whose mode and, where permitted, owner it gets instead.

    Raises:
        OSError: as ``put_whole``; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            if like is not None:
                os.fchmod(handle, like.st_mode & 0o777)
                with contextlib.suppress(PermissionError):
                    os.fchown(handle, like.st_uid, like.st_gid)
            file.write(content)
        put_whole(Path(name), path, replaces=replaces)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def keep_small(path: Path, content: bytes) -> None:
    """Write a small file of the cache whole; of others in its folder, those that were used longest ago go.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, content)
    files = sorted(path.parent.iterdir(), key=_used_s, reverse=True)
    for old in files[MAX_SMALL_FILES:]:
        with contextlib.suppress(OSError):
            old.unlink()


def _used_s(path: Path) -> float:
    try:
        status = path.lstat()
    except FileNotFoundError:  # another process removed it
        return 0.0
    return max(status.st_atime, status.st_mtime)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def no_space(folder: Path, num_bytes: int) -> CapacityError:
    """Return the error of a disk that has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    return CapacityError(
        f"no space left in {folder}: {megabytes(num_bytes)} needed, {free // 10**6} MB free; free some there, "
        "or set MDIQ_CACHE to a directory with more"
    )


def says_no_space(text: str) -> bool:
    """Tell whether the words of a library or of another process say that a disk is full."""
    return any(os.strerror(number) in text for number in NO_SPACE)


def is_at(handle: int, path: Path) -> bool:
    """Tell whether an open file is still the one at ``path``."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _note_use(handle: int) -> None:
    with contextlib.suppress(OSError):  # it is another user's
        status, now_ns = os.fstat(handle), time.time_ns()
        os.utime(handle, ns=(now_ns, now_ns if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns))


def _end_use(handle: int | None) -> None:
    if handle is not None:
        _note_use(handle)
        os.close(handle)


def megabytes(num_bytes: int) -> str:
    return f"{-(-num_bytes // 10**6)} MB"


def warn_once(event: str, path: Path, error: str) -> None:
    if event not in _warned:
        _warned.add(event)
        log.warning(event, path=str(path), error=error)
