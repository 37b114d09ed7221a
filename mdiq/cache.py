"""This machine's cache folder: where it is, its file locks, whether there is room, and what is forgotten to make some.

models/    model files that were fetched              packed/  weights in 8 and 4 bits, by model and format
weights/   layers that a Node has from its Starter    shapes/  files of random weights
profiles/, kernels.json, code/, costs/                what was measured or compiled once; small, stays

An Entry is a file or folder directly in one of the first four. Its users hold a shared lock on it (``use``), so only
what nobody uses is forgotten. It carries the time of its last use: a folder as its time of change, a file as its time
of access, since what is packed from a model is named after the model's time of change.
"""

import contextlib
import errno
import fcntl
import math
import os
import re
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog

from mdiq.errors import CapacityError, ConfigError

log = structlog.get_logger()

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LIMIT = "MDIQ_CACHE_GB"
_LOCK = ".lock"
_BLOCK_BYTES = 512  # what st_blocks counts, whatever the file system's own blocks
_NAMES = {
    "models": re.compile(r".+\.joined(-\d+)?|fetch-\w+"),  # and a file that has a lock beside it
    "packed": re.compile(r"[0-9a-f]{16}-[0-9a-f]+-(hot-v\d+\.safetensors|(int[48]|plain)-v\d+)|measure-\w+"),
    "weights": re.compile(r"[0-9a-f]{64}(-[a-z0-9]{1,8})?"),
    "shapes": re.compile(r".+-q\d_\d-v\d+\.gguf|write-\w+"),
}
_TEMPORARY = re.compile(r"(fetch|measure|write)-\w+")
_warned: set[str] = set()


class State(StrEnum):
    """Whether an Entry can be forgotten."""

    FREE = "free"
    IN_USE = "in use"
    UNKNOWN = "unknown"  # its file system has no locks, or this user may not open it
    FOREIGN = "foreign"  # mdiq did not put it there
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Entry:
    """Something directly in a folder of the cache. used_s: when it was last used, in seconds since 1970."""

    path: Path
    num_bytes: int
    used_s: float
    device: int
    is_ours: bool

    @property
    def name(self) -> str:
        """Return what the command line calls it."""
        return f"{self.path.parent.name}/{self.path.name}"


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
                _warn("no_file_locks", path, reason)
            if is_locked and not _is_at(file.fileno(), path):
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
        if _is_at(handle, path):
            _note_use(handle)
            return in_use


def keep(path: Path) -> None:
    """Keep an Entry from being forgotten as long as this process runs; what is missing, or is none, is let be."""
    with contextlib.suppress(OSError, ConfigError):
        if path.parent.parent.samefile(cache_directory()):
            _kept[path] = use(path)  # again, where another file took its place


@contextlib.contextmanager
def temporary(folder: Path, prefix: str) -> Iterator[Path]:
    """Make a folder in ``folder`` that is gone afterwards; what killed processes left of theirs there goes first.

    Raises:
        OSError: it cannot be made.
    """
    for entry in _entries(folder) if folder.name in _NAMES and _root_of(folder) is not None else ():
        if _TEMPORARY.fullmatch(entry.path.name):
            with contextlib.suppress(OSError):
                forget(entry)
    while True:
        with ExitStack() as made:
            name = made.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=folder))
            try:
                made.enter_context(use(Path(name)))
            except FileNotFoundError:
                continue  # another process made room just now
            yield Path(name)
            return


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


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file, and its folder if need be, so that other processes see the whole of it or what was before.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, own = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(own, path)
    except OSError:
        os.unlink(own)
        raise


def entries(root: Path) -> list[Entry]:
    """Return what is in a cache folder, in the order in which it is forgotten; nothing where there is no such folder.

    Raises:
        OSError: it cannot be read.
    """
    return sorted((entry for kind in _NAMES for entry in _entries(root / kind)), key=_order)


def state_of(entry: Entry) -> State:
    """Tell whether an Entry can be forgotten now."""
    with ExitStack() as held:
        return _lock_alone(entry, held)


def forget(entry: Entry) -> State:
    """Remove an Entry that is FREE; return what it was.

    Raises:
        OSError: a part of it cannot be removed.
    """
    with ExitStack() as held:
        state = _lock_alone(entry, held)
        if state is State.FREE:
            _remove(entry)
        return state


def limit_bytes(folder: Path, held_bytes: int) -> tuple[int, bool]:
    """Return the most bytes that a cache should hold which holds so many now, and whether the user said so.

    It is $MDIQ_CACHE_GB, else half of what the cache has and its disk has left.

    Raises:
        ConfigError: $MDIQ_CACHE_GB is not a number above 0.
        OSError: there is no such folder.
    """
    if given := os.environ.get(LIMIT, ""):
        try:
            most = float(given)
        except ValueError:
            most = math.nan
        if not 0 < most < math.inf:
            raise ConfigError(f"{LIMIT}={given}: not a number above 0; write how many GB the cache may hold")
        return int(most * 10**9), True
    return (held_bytes + shutil.disk_usage(folder).free) // 2, False


def make_room(folder: Path, num_bytes: int) -> None:
    """See that ``folder`` has room for so many bytes, before they are written.

    In the cache, what was used longest ago is forgotten: as much as disk and limit need, and nothing if that would not
    do. Where all is in use, only a limit that the user gave is a reason to refuse.

    Raises:
        CapacityError: there is no room.
        ConfigError: $MDIQ_CACHE_GB is not a number above 0.
        OSError: there is no such folder.
    """
    root = _root_of(folder)
    if root is not None and max(_excess_bytes(root, folder, num_bytes)) > 0:
        handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Two processes that make room at once would forget too much. Without locks, neither forgets anything.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            _forget_oldest(root, folder, num_bytes)
        finally:
            os.close(handle)
    if _excess_bytes(root, folder, num_bytes)[0] <= 0:
        return
    if root is None:
        raise no_space(folder, num_bytes)
    held = _megabytes(_held_bytes(_on_disk_of(folder, root)))
    why = f"{held} in the cache stay: they are in use, or forgetting them would not do (mdiq cache list)"
    if num_bytes > shutil.disk_usage(folder).free:
        raise CapacityError(f"{no_space(folder, num_bytes)}; {why}")
    limit = f"{LIMIT} is {os.environ[LIMIT]}"
    raise CapacityError(f"no space left in {folder}: {_megabytes(num_bytes)} needed, and {limit}; raise it; {why}")


def no_space(folder: Path, num_bytes: int) -> CapacityError:
    """Return the error of a disk that has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    return CapacityError(
        f"no space left in {folder}: {_megabytes(num_bytes)} needed, {free // 10**6} MB free; free some there, "
        "or set MDIQ_CACHE to a directory with more"
    )


def says_no_space(text: str) -> bool:
    """Tell whether the words of a library or of another process say that a disk is full."""
    return any(os.strerror(number) in text for number in NO_SPACE)


def _root_of(folder: Path) -> Path | None:
    """Return the cache folder if ``folder`` is in it."""
    try:
        root = cache_directory()
    except ConfigError:
        return None
    return root if folder.is_relative_to(root) else None


def _excess_bytes(root: Path | None, folder: Path, num_bytes: int) -> tuple[int, int]:
    """Return how many bytes must be forgotten before so many are written, and how many should be."""
    must = num_bytes - shutil.disk_usage(folder).free
    if root is None:
        return must, must
    held = _held_bytes(_on_disk_of(folder, root))
    most, is_given = limit_bytes(folder, held)
    should = held + num_bytes - most
    return max(must, should) if is_given else must, should


def _forget_oldest(root: Path, folder: Path, num_bytes: int) -> None:
    must, should = _excess_bytes(root, folder, num_bytes)
    chosen: list[Entry] = []
    with ExitStack() as held:
        for entry in _on_disk_of(folder, root):
            if max(must, should) <= 0:
                break
            if _lock_alone(entry, held) is State.FREE:
                chosen.append(entry)
                must, should = must - entry.num_bytes, should - entry.num_bytes
        for entry in chosen if must <= 0 else ():
            try:
                _remove(entry)
            except OSError as error:
                _warn("cache_entry_not_removed", entry.path, error.strerror or str(error))


def _on_disk_of(folder: Path, root: Path) -> list[Entry]:
    """Return mdiq's Entries on the disk of ``folder``, as they are forgotten; what cannot be read is none."""
    device = folder.stat().st_dev
    found: list[Entry] = []
    for kind in _NAMES:
        with contextlib.suppress(OSError):
            found += _entries(root / kind)
    return sorted((entry for entry in found if entry.is_ours and entry.device == device), key=_order)


def _entries(folder: Path) -> Iterator[Entry]:
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        return
    for name in names:
        if name.endswith(_LOCK):
            continue
        try:
            status = (folder / name).lstat()
        except FileNotFoundError:
            continue
        is_folder = stat.S_ISDIR(status.st_mode)
        has_our_name = _NAMES[folder.name].fullmatch(name) or (folder.name == "models" and name + _LOCK in names)
        yield Entry(
            path=folder / name,
            num_bytes=_BLOCK_BYTES * (status.st_blocks + (_num_blocks(folder / name) if is_folder else 0)),
            used_s=status.st_mtime if is_folder else status.st_atime,
            device=status.st_dev,
            is_ours=bool(has_our_name) and (is_folder or stat.S_ISREG(status.st_mode)),
        )


def _num_blocks(folder: Path) -> int:
    """Return what lies in a folder, in blocks; holes take none."""
    total = 0
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(OSError):  # it went meanwhile
                total += os.lstat(os.path.join(where, name)).st_blocks
    return total


def _order(entry: Entry) -> tuple[bool, float]:
    # First what a killed process left: a living one holds the lock.
    return not _TEMPORARY.fullmatch(entry.path.name), entry.used_s


def _held_bytes(found: Iterable[Entry]) -> int:
    return sum(entry.num_bytes for entry in found)


def _lock_alone(entry: Entry, held: ExitStack) -> State:
    """Tell whether an Entry can be forgotten; if so, it is locked until ``held`` ends."""
    if not entry.is_ours:
        return State.FOREIGN
    try:
        handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return State.GONE
    except OSError:
        return State.UNKNOWN
    held.callback(os.close, handle)
    try:
        is_alone = try_lock(handle)
    except OSError as error:
        _warn("cache_never_forgets", entry.path, f"{error.strerror}; nothing tells what is in use; delete by hand")
        return State.UNKNOWN
    if not is_alone:
        return State.IN_USE
    return State.FREE if _is_at(handle, entry.path) else State.GONE


def _remove(entry: Entry) -> None:
    if entry.path.is_dir():
        shutil.rmtree(entry.path)
    else:
        entry.path.unlink(missing_ok=True)
    log.info("cache_entry_forgotten", entry=entry.name, num_bytes=entry.num_bytes)
    # The lock that it was fetched or made under goes too, unless that happens again.
    name = entry.path.name.partition(".joined")[0]
    lock = entry.path.with_name(name.removesuffix(".safetensors") + _LOCK)
    with contextlib.suppress(OSError), lock.open("rb") as file:
        if try_lock(file.fileno()) and not lock.with_name(name).exists():
            lock.unlink()


def _is_at(handle: int, path: Path) -> bool:
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


def _megabytes(num_bytes: int) -> str:
    return f"{-(-num_bytes // 10**6)} MB"


def _warn(event: str, path: Path, error: str) -> None:
    if event not in _warned:
        _warned.add(event)
        log.warning(event, path=str(path), error=error)
