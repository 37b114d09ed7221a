"""Entries of the cache: what there is, what can be forgotten, and room for what is to be written."""

import contextlib
import fcntl
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog

from mdiq.cache.files import LOCK, cache_directory, is_at, megabytes, no_space, try_lock, use, warn_once
from mdiq.errors import CapacityError, ConfigError

log = structlog.get_logger()

LIMIT = "MDIQ_CACHE_GB"
_BLOCK_BYTES = 512  # what st_blocks counts, whatever the file system's own blocks
_NAMES = {
    "models": re.compile(r".+\.joined(-\d+)?|fetch-\w+"),  # and a file that has a lock beside it
    "packed": re.compile(r"[0-9a-f]{16}-[0-9a-f]+-(hot-v\d+\.safetensors|(int[48]|plain)-v\d+)|(measure|write)-\w+"),
    "weights": re.compile(r"[0-9a-f]{64}(-[a-z0-9]{1,8})?"),
    "shapes": re.compile(r".+-q\d_\d-v\d+\.gguf|write-\w+"),
    "hashes": re.compile(r"[0-9a-f]{32}"),
}
_TEMPORARY = re.compile(r"(fetch|measure|write)-\w+")
_OLD = re.compile(r"hashes/.*|weights/[0-9a-f]{64}")  # of an earlier layout: nothing reads it any more


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


@contextlib.contextmanager
def temporary(folder: Path, prefix: str) -> Iterator[Path]:
    """Make a folder in ``folder`` that is gone afterwards; what killed processes left of theirs there goes first.

    Raises:
        OSError: it cannot be made.
    """
    for entry in _entries(folder) if folder.name in _NAMES and root_of(folder) is not None else ():
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
    root = root_of(folder)
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
    held = megabytes(_held_bytes(_on_disk_of(folder, root)))
    why = f"{held} in the cache stay: they are in use, or forgetting them would not do (mdiq cache list)"
    if num_bytes > shutil.disk_usage(folder).free:
        raise CapacityError(f"{no_space(folder, num_bytes)}; {why}")
    limit = f"{LIMIT} is {os.environ[LIMIT]}"
    raise CapacityError(f"no space left in {folder}: {megabytes(num_bytes)} needed, and {limit}; raise it; {why}")


def root_of(folder: Path) -> Path | None:
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
                warn_once("cache_entry_not_removed", entry.path, error.strerror or str(error))


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
        if name.endswith(LOCK):
            continue
        try:
            status = (folder / name).lstat()
        except FileNotFoundError:
            continue
        is_folder = stat.S_ISDIR(status.st_mode)
        has_our_name = _NAMES[folder.name].fullmatch(name) or (folder.name == "models" and name + LOCK in names)
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
    # First what is of no use: what a killed process left (a living one holds the lock), or an earlier layout.
    return not (_TEMPORARY.fullmatch(entry.path.name) or _OLD.fullmatch(entry.name)), entry.used_s


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
        warn_once("cache_never_forgets", entry.path, f"{error.strerror}; nothing tells what is in use; delete by hand")
        return State.UNKNOWN
    if not is_alone:
        return State.IN_USE
    return State.FREE if is_at(handle, entry.path) else State.GONE


def _remove(entry: Entry) -> None:
    if entry.path.is_dir():
        shutil.rmtree(entry.path)
    else:
        entry.path.unlink(missing_ok=True)
    log.info("cache_entry_forgotten", entry=entry.name, num_bytes=entry.num_bytes)
    # The lock that it was fetched or made under goes too, unless that happens again.
    name = entry.path.name.partition(".joined")[0]
    lock = entry.path.with_name(name.removesuffix(".safetensors") + LOCK)
    with contextlib.suppress(OSError), lock.open("rb") as file:
        if try_lock(file.fileno()) and not lock.with_name(name).exists():
            lock.unlink()
