"""The CPU time that control groups, version 2 or 1 of them, leave to this process."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where control groups of this process can be made: from ``own`` up to ``root``, both folders."""

    root: Path
    own: Path
    is_version_2: bool

    def folders(self) -> Iterator[Path]:
        """Yield the folders to try, the process's own first."""
        folder = self.own
        while True:
            yield folder
            if folder == self.root or folder == folder.parent:
                return
            folder = folder.parent


def own_quota() -> float | None:
    """Return the CPU time that this process and its threads get together, in cores; None: nothing limits it."""
    return min((quota for h in hierarchies() for folder in h.folders() if (quota := _quota(folder))), default=None)


def _quota(folder: Path) -> float | None:
    try:
        quota, period = _read_quota(folder)
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no controller here, or "max"
        return None


def _read_quota(folder: Path) -> tuple[str, str]:
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
        return quota, period
    return (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()


def hierarchies() -> list[Hierarchy]:
    """Return the hierarchies that control this process's CPU time."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return []
    return find_hierarchies(mounts, groups)


def find_hierarchies(mounts: str, groups: str) -> list[Hierarchy]:
    """Return the hierarchies that control CPU time, from the texts of /proc/self/mountinfo and /proc/self/cgroup."""
    own: dict[str, str] = {}
    for line in groups.splitlines():
        number, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(",") if number != "0" else [""], path))
    found = []
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        mount_root, mount_point = fields.split(" ")[3:5]
        name = "" if kind == "cgroup2" else "cpu"
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            if name not in own:
                continue
            # Inside a container the mount shows a part of the hierarchy, and the path is given from its top.
            inside = own[name]
            if mount_root != "/" and (inside == mount_root or inside.startswith(mount_root + "/")):
                inside = inside[len(mount_root) :]
            root = Path(mount_point)
            found.append(Hierarchy(root, root / inside.lstrip("/"), is_version_2=kind == "cgroup2"))
    return found
