import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdiq.errors import ConfigError
from mdiq.runtime import cpu_quota
from mdiq.runtime.cpu_quota import CpuQuota, Hierarchy, check_quota, find_hierarchies, own_quota
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
    monkeypatch.setattr(cpu_quota, "_hierarchies", lambda: found)
    assert own_quota() == cores
    assert usable_threads() == (usable_cores() if cores is None else max(min(int(cores), usable_cores()), 1))


def test_a_machine_without_the_controller_has_none() -> None:
    assert find_hierarchies("22 1 8:1 / / rw - ext4 /dev/vda rw\n" + V1_MOUNTS, "4:memory:/m\n") == []


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hierarchy of plain folders."""
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(cpu_quota, "_hierarchies", lambda: [Hierarchy(tmp_path, tmp_path / "own", is_version_2=True)])
    return tmp_path


def test_version_2_gets_its_quota_where_the_controller_is_on(root: Path) -> None:
    (root / "own" / "cgroup.subtree_control").write_text("cpuset cpu memory")
    quota = CpuQuota.create("node-1", 0.5)
    assert quota.folder.parent == root / "own"
    assert (quota.folder / "cpu.max").read_text() == "10000 20000"
    quota.add(77)
    assert (quota.folder / "cgroup.procs").read_text() == "77"


def test_a_folder_that_refuses_is_followed_by_the_one_above(root: Path) -> None:
    # No cgroup.subtree_control in the process's own folder: as where the hierarchy lacks the controller.
    (root / "cgroup.subtree_control").write_text("cpu")
    assert CpuQuota.create("node-1", 0.25).folder.parent == root


def test_the_controller_is_switched_on_where_it_is_off(root: Path) -> None:
    (root / "own" / "cgroup.subtree_control").write_text("memory")
    CpuQuota.create("node-1", 1.0)
    assert (root / "own" / "cgroup.subtree_control").read_text() == "+cpu"


def test_version_1_gets_period_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_quota, "_hierarchies", lambda: [Hierarchy(tmp_path, tmp_path, is_version_2=False)])
    folder = CpuQuota.create("node-1", 1.5).folder
    assert (folder / "cpu.cfs_period_us").read_text() == "20000"
    assert (folder / "cpu.cfs_quota_us").read_text() == "30000"


def test_groups_of_processes_that_are_gone_are_swept(root: Path) -> None:
    (root / "own" / "cgroup.subtree_control").write_text("cpu")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left, kept = (root / "own" / f"mdiq-bench-{pid}-node-1" for pid in (gone.stdout.strip(), os.getppid()))
    left.mkdir()
    kept.mkdir()
    CpuQuota.create("node-2", 1.0)
    assert (left.exists(), kept.exists()) == (False, True)


def test_a_machine_that_refuses_says_so_in_one_line(root: Path) -> None:
    with pytest.raises(ConfigError, match="--cpu: this machine does not let .* No such file.*leave --cpu out"):
        CpuQuota.create("node-1", 0.5)


def test_a_machine_without_control_groups_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_quota, "_hierarchies", lambda: [])
    with pytest.raises(ConfigError, match="there is no hierarchy with the controller cpu"):
        check_quota()


def test_a_real_group_limits_and_goes_away() -> None:
    try:
        check_quota()
    except ConfigError as error:
        pytest.skip(str(error))
    home = Path("/proc/self/cgroup").read_text()
    quota = CpuQuota.create("test", 0.5)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        quota.add(child.pid)
        quota.add(os.getpid())
        assert set((quota.folder / "cgroup.procs").read_text().split()) == {str(child.pid), str(os.getpid())}
    finally:
        child.communicate(b"\n")
        quota.close()
    assert not quota.folder.exists()
    assert Path("/proc/self/cgroup").read_text() == home


def test_a_process_that_has_ended_is_left_out() -> None:
    try:
        check_quota()
    except ConfigError as error:
        pytest.skip(str(error))
    quota = CpuQuota.create("test", 0.5)
    try:
        quota.add(2**22)  # no such process: ids end below
        assert (quota.folder / "cgroup.procs").read_text() == ""
    finally:
        quota.close()
