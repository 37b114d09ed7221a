"""Slow devices on a fast machine: control groups that give a process a part of a core, version 2 or 1 of them.

A quota's period is as short as the kernel lets it be: a process runs at full speed until it has used its share of a
period, and waits then until the next one begins. A slow device does neither. With the kernel's default of 100 ms a
forward of 10 ms would take 10 ms, or 60.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

from mdiq.errors import ConfigError
from mdiq.runtime.cpu_quota import Hierarchy, hierarchies

MIN_CPU = 0.05
_PERIOD_US = 5_000  # about a tick of the kernel, which is how long it may take to see that a share is used up
_MIN_QUOTA_US = 1_000  # the kernel takes none under that
_PREFIX = "mdiq-bench-"
_MAX_WEIGHT = 10_000  # of a group against a process beside it, which has 100: version 2
_MAX_SHARES = 262_144  # the same where a process has 1,024: version 1
_REMOVE_TRIES = 50
_REMOVE_WAIT_S = 0.02


def period_us(cpu: float) -> int:
    """Return how long a period is in which a process may have a part of a core, or several."""
    return max(_PERIOD_US, round(_MIN_QUOTA_US / cpu))


class CpuQuota:
    """A control group with a CPU quota; ``close`` removes it when its processes have ended."""

    def __init__(self, folder: Path, home: Path) -> None:
        self._folder = folder
        self._home = home  # where this process was, to go back there

    @classmethod
    def create(cls, name: str, cpu: float, *, comes_first: bool = False) -> "CpuQuota":
        """Return a new control group whose processes get ``cpu`` cores of CPU time together.

        comes_first: they get it before other processes of a busy machine do.

        Raises:
            ConfigError: this machine does not let this process limit CPU time.
        """
        reasons: list[str] = []
        for hierarchy in hierarchies():
            for parent in hierarchy.folders():
                try:
                    return cls(_make(parent, name, cpu, hierarchy, comes_first=comes_first), hierarchy.own)
                except OSError as error:
                    reasons.append(f"{parent}: {error.strerror or error}")
        reason = reasons[0] if reasons else "there is no hierarchy with the controller cpu"
        raise _refused(reason)

    @property
    def folder(self) -> Path:
        return self._folder

    def add(self, pid: int) -> None:
        """Put a process into the group, with all its threads; one that has ended already is left out.

        Raises:
            ConfigError: this process may not move others.
        """
        try:
            (self._folder / "cgroup.procs").write_text(str(pid))
        except ProcessLookupError:
            return
        except OSError as error:
            raise _refused(f"{self._folder}: {error.strerror or error}") from None

    def close(self) -> None:
        """Remove the group; if this process is in it, it goes back where it came from."""
        with contextlib.suppress(OSError):
            if str(os.getpid()) in (self._folder / "cgroup.procs").read_text().split():
                (self._home / "cgroup.procs").write_text(str(os.getpid()))
        _remove(self._folder)


def check_quota() -> None:
    """Make a group, enter and leave it: what a ring will do.

    Raises:
        ConfigError: this machine does not let this process limit CPU time.
    """
    quota = CpuQuota.create("check", 1.0)
    try:
        quota.add(os.getpid())
    finally:
        quota.close()


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        f"--cpu: this machine does not let this process limit CPU time with control groups ({reason}); "
        "run as root outside a container, or leave --cpu out"
    )


def _make(parent: Path, name: str, cpu: float, hierarchy: Hierarchy, *, comes_first: bool) -> Path:
    _sweep(parent)
    if hierarchy.is_version_2:
        control = parent / "cgroup.subtree_control"
        if "cpu" not in control.read_text().split():
            control.write_text("+cpu")
    folder = parent / f"{_PREFIX}{os.getpid()}-{name}"
    folder.mkdir()
    try:
        quota_us = round(cpu * (period := period_us(cpu)))
        if hierarchy.is_version_2:
            (folder / "cpu.max").write_text(f"{quota_us} {period}")
            if comes_first:
                (folder / "cpu.weight").write_text(str(_MAX_WEIGHT))
        else:
            (folder / "cpu.cfs_period_us").write_text(str(period))
            (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
            if comes_first:
                (folder / "cpu.shares").write_text(str(_MAX_SHARES))
    except OSError:
        _remove(folder)
        raise
    return folder


def _sweep(parent: Path) -> None:
    """Remove groups of processes that were killed before they could."""
    for folder in parent.glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _remove(folder: Path, sleep: Callable[[float], None] = time.sleep) -> None:
    """Remove a group. The kernel refuses while a process that was killed is still on its way out."""
    for _ in range(_REMOVE_TRIES):
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY:
                return
            sleep(_REMOVE_WAIT_S)
        else:
            return
