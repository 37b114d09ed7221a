"""This process's memory and this machine's, as the system counts them. Torch is not needed for that."""

import contextlib
import ctypes
import gc
import mmap
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def machine_free_bytes() -> int:
    """Return the free bytes, within the limits of the machine and the cgroup."""
    return max(min(psutil.virtual_memory().available, _cgroup_free_bytes()), 0)


def return_free_memory(*, collect: bool = False) -> None:
    """Return freed memory to the system; the C library keeps small blocks otherwise.

    collect: run the garbage collector first, for reference cycles such as tasks and callbacks of a Ring that has ended.
    """
    if collect:
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def drop_pages(tensor: "torch.Tensor") -> None:
    """Drop the resident pages of a tensor in a mapped file; the next access reads them from the file again."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    count = (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if count > 0:
        _drop(first, count)


def drop_library(name: str) -> None:
    """Drop the unmodified pages of a shared library that is no longer used; an access reads them again."""
    with contextlib.suppress(OSError):
        found: tuple[int, int] | None = None
        for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
            if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)", line):
                start, stop, rights, path = mapping.groups()
                is_its = Path(path).name.startswith(name) and "w" not in rights
                found = (int(start, 16), int(stop, 16)) if is_its else None
            # Relocations, which the loader wrote and then made read-only, are not in the file.
            elif found is not None and re.fullmatch(r"Private_Dirty: +0 kB", line):
                _drop(found[0], found[1] - found[0])


def _drop(first: int, count: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(count), mmap.MADV_DONTNEED)


_last_rss_bytes = 0


def rss_bytes() -> int:
    """Return this process's resident memory, or the last known value if it cannot be read (out of descriptors)."""
    global _last_rss_bytes
    with contextlib.suppress(OSError):
        _last_rss_bytes = psutil.Process(os.getpid()).memory_info().rss
    return _last_rss_bytes


_earlier_peak_bytes = 0


def reset_peak(earlier_bytes: int = 0) -> bool:
    """Reset ``peak_bytes``; return whether the kernel permits that.

    earlier_bytes: an earlier peak, which goes on to count.
    """
    global _earlier_peak_bytes
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    _earlier_peak_bytes = earlier_bytes
    return True


def peak_bytes() -> int:
    """Return this process's peak resident memory since ``reset_peak``."""
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return max(int(found[1]) * 1024, _earlier_peak_bytes)
    return max(rss_bytes(), _earlier_peak_bytes)


def _cgroup_free_bytes() -> int:
    """Return the bytes free within this process's cgroup limits; a very large number without a limit."""
    free = 1 << 62
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.lstrip("/")
        # A limit applies to all groups below it.
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            try:
                limit = (folder / names[0]).read_text().strip()
                if limit != "max":
                    free = min(free, int(limit) - int((folder / names[1]).read_text()) + _cache_bytes(folder))
            except (OSError, ValueError):
                continue
    return free


def _cache_bytes(folder: Path) -> int:
    """Return the page cache of a cgroup: it counts as used, but the kernel reclaims it when memory is needed."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("inactive_file", fields.get("total_inactive_file", "0")))
