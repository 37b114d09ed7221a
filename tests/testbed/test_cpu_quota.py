import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdiq.errors import ConfigError
from mdiq.runtime.cpu_quota import Hierarchy
from mdiq.testbed import cpu_quota
from mdiq.testbed.cpu_quota import CpuQuota, check_quota
from mdiq.testbed.link_shape import LinkShape
from mdiq.testbed.slow_ring import SlowRing


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hierarchy of plain folders."""
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(cpu_quota, "hierarchies", lambda: [Hierarchy(tmp_path, tmp_path / "own", is_version_2=True)])
    return tmp_path


def test_version_2_gets_its_quota_where_the_controller_is_on(root: Path) -> None:
    (root / "own" / "cgroup.subtree_control").write_text("cpuset cpu memory")
    quota = CpuQuota.create("node-1", 0.5)
    assert quota.folder.parent == root / "own"
    assert (quota.folder / "cpu.max").read_text() == "2500 5000"
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
    monkeypatch.setattr(cpu_quota, "hierarchies", lambda: [Hierarchy(tmp_path, tmp_path, is_version_2=False)])
    folder = CpuQuota.create("node-1", 1.5).folder
    assert (folder / "cpu.cfs_period_us").read_text() == "5000"
    assert (folder / "cpu.cfs_quota_us").read_text() == "7500"


def test_a_small_part_of_a_core_has_a_period_with_a_millisecond_of_it(root: Path) -> None:
    """The kernel takes no quota under that; a longer period than needed would be less like a slow device."""
    (root / "own" / "cgroup.subtree_control").write_text("cpu")
    assert (CpuQuota.create("node-1", 0.2).folder / "cpu.max").read_text() == "1000 5000"
    assert (CpuQuota.create("node-2", 0.05).folder / "cpu.max").read_text() == "1000 20000"


def test_a_quota_may_come_before_other_processes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "own" / "cgroup.subtree_control").write_text("cpu")
    assert (CpuQuota.create("node-1", 0.5, comes_first=True).folder / "cpu.weight").read_text() == "10000"
    assert not (CpuQuota.create("node-2", 0.5).folder / "cpu.weight").exists()
    monkeypatch.setattr(cpu_quota, "hierarchies", lambda: [Hierarchy(root, root, is_version_2=False)])
    assert (CpuQuota.create("node-1", 0.5, comes_first=True).folder / "cpu.shares").read_text() == "262144"
    assert not (CpuQuota.create("node-2", 0.5).folder / "cpu.shares").exists()


def test_nodes_of_a_slow_ring_may_have_unlike_quotas(root: Path) -> None:
    (root / "own" / "cgroup.subtree_control").write_text("cpu")
    ring = SlowRing(cpu={"node-0": 0.5, "node-2": 0.25})
    for number in range(3):
        ring.slow_node(f"node-{number}", 70 + number)
    groups = {folder.name.rpartition("-node-")[2]: folder for folder in (root / "own").glob("mdiq-bench-*")}
    assert {name: (folder / "cpu.max").read_text() for name, folder in groups.items()} == {
        "0": "2500 5000",
        "2": "1250 5000",
    }
    assert (groups["2"] / "cgroup.procs").read_text() == "72"


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
    monkeypatch.setattr(cpu_quota, "hierarchies", lambda: [])
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


async def test_the_relays_of_a_ring_that_comes_first_come_first_too(root: Path) -> None:
    (root / "own" / "cgroup.subtree_control").write_text("cpu")
    ring = SlowRing(LinkShape(delay_s=0.001), comes_first=True)
    try:
        assert len(await ring.slow_hops(["tcp://127.0.0.1:9"])) == 1
        (group,) = (root / "own").glob("mdiq-bench-*-relays")
        assert (group / "cpu.weight").read_text() == "10000" and int((group / "cgroup.procs").read_text()) > 0
        for file in group.iterdir():  # a real group goes with its files
            file.unlink()
    finally:
        await ring.aclose()
    assert not group.exists()
