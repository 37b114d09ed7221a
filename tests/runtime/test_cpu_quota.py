from pathlib import Path

import pytest

from mdiq.runtime import cpu_quota
from mdiq.runtime.cpu_quota import Hierarchy, find_hierarchies, own_quota
from mdiq.runtime.placement import usable_cores, usable_threads

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def test_version_2_is_found_with_every_folder_up_to_its_root() -> None:
    (hierarchy,) = find_hierarchies(V2_MOUNT, "0::/user.slice/a.scope\n")
    assert hierarchy.is_version_2
    root = Path("/sys/fs/cgroup")
    assert list(hierarchy.folders()) == [root / "user.slice/a.scope", root / "user.slice", root]


def test_version_1_is_found_where_its_controller_is_mounted() -> None:
    (hierarchy,) = find_hierarchies(V1_MOUNTS, "4:memory:/m\n3:cpu,cpuacct:/jobs\n")
    cpu = Path("/sys/fs/cgroup/cpu,cpuacct")
    assert hierarchy == Hierarchy(cpu, cpu / "jobs", is_version_2=False)


def test_a_container_sees_its_own_part_only() -> None:
    mounts = V1_MOUNTS.replace("0:27 / ", "0:27 /docker/abc ")
    (hierarchy,) = find_hierarchies(mounts, "3:cpu,cpuacct:/docker/abc/x\n")
    assert hierarchy.own == hierarchy.root / "x"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_quota_is_read_in_both_versions(
    files: dict[str, str], cores: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    for name, text in files.items():  # a limit of the group above binds, too
        (tmp_path / name).write_text(text)
    found = [Hierarchy(tmp_path, tmp_path / "own", is_version_2=False)]
    monkeypatch.setattr(cpu_quota, "hierarchies", lambda: found)
    assert own_quota() == cores
    assert usable_threads() == (usable_cores() if cores is None else max(min(int(cores), usable_cores()), 1))


def test_a_machine_without_the_controller_has_none() -> None:
    assert find_hierarchies("22 1 8:1 / / rw - ext4 /dev/vda rw\n" + V1_MOUNTS, "4:memory:/m\n") == []
