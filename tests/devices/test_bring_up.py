"""An operator brings up devices with nodes/provision.py, and systemd keeps the node's service alive on them.

The tests go in this order, each from where the one before left the devices. What runs in the unit is
notify_program.py by a drop-in: it lives as `mdiq node` does and computes nothing.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mdiq
from tests.devices.conftest import HERE, ROOT, Operator, Shelf, must, run

NAMES = ("pi1", "pi2", "jet")
STATE = "/var/lib/mdiq"
NEXT_VERSION = "9.0.0"
DROP_IN = """[Service]
ExecStart=
ExecStart=/opt/mdiq/current/bin/python /srv/notify_program.py ${MDIQ_NAME}
WatchdogSec=4
"""


@pytest.fixture(scope="module")
def operator(shelf: Shelf, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    for name, cpu, memory in zip(NAMES, (1.0, 0.5, 0.5), ("2G", "1G", "700M"), strict=True):
        shelf.up(name, cpu, memory)
        shelf.write(name, "/srv/notify_program.py", (HERE / "notify_program.py").read_bytes())
        shelf.write(name, "/etc/systemd/system/mdiq-node.service.d/50-test.conf", DROP_IN.encode())
    operator = Operator(shelf, tmp_path_factory.mktemp("operator"), wheels)
    operator.welcome(NAMES)
    return operator


@pytest.fixture(scope="module")
def next_wheels(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels of the next version: only that of mdiq is another."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("next")
    for name in ("mdiq", "pyproject.toml", "README.md", "LICENSE"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    init = source / "mdiq" / "__init__.py"
    init.write_text(init.read_text().replace(mdiq.__version__, NEXT_VERSION))
    for wheel in wheels.glob("*.whl"):
        if not wheel.name.startswith("mdiq-"):
            (folder / wheel.name).hardlink_to(wheel)
    must(run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source))
    return folder


def _lines(done: subprocess.CompletedProcess[str], device: str, stage: str) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.split()[:2] == [device, stage]]


def _place(done: subprocess.CompletedProcess[str], device: str, stage: str) -> int:
    """Return where in the output a device's last line of a stage is."""
    lines = done.stdout.splitlines()
    return max(i for i, line in enumerate(lines) if line.split()[:2] == [device, stage])


def _version(shelf: Shelf, name: str) -> str:
    return shelf.sh(name, "/opt/mdiq/current/bin/mdiq --version").strip()


def test_a_host_key_that_is_not_known_stops_the_run_with_advice(operator: Operator, tmp_path: Path) -> None:
    done = operator.provision("--known-hosts", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "compare the fingerprint" in _lines(done, "pi1", "reach")[0]


def test_a_device_that_does_not_answer_is_named_and_no_device_is_changed(operator: Operator, shelf: Shelf) -> None:
    operator.write_topology({**{name: shelf.addresses[name] for name in NAMES}, "ghost": "10.77.0.250"})
    operator.key("ghost").write_text("x" * 40)
    operator.key("ghost").chmod(0o600)
    done = operator.provision()
    operator.write_topology({name: shelf.addresses[name] for name in NAMES})
    assert done.returncode == 1
    assert "is it on" in _lines(done, "ghost", "reach")[0]
    assert done.stderr.startswith("provision.py: stopped at reach: it failed on ghost")
    for name in NAMES:
        shelf.sh(name, "test ! -e /opt/mdiq")


def test_a_dry_run_says_what_would_be_sent_and_changes_nothing(operator: Operator, shelf: Shelf) -> None:
    done = operator.provision("--dry-run", "--canary", "pi1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would send" in _lines(done, "jet", "push")[0]
    for name in NAMES:
        shelf.sh(name, "test ! -e /opt/mdiq -a ! -e /etc/mdiq")


def test_a_canary_that_does_not_come_up_keeps_the_others_as_they_were(operator: Operator, shelf: Shelf) -> None:
    broken = DROP_IN.replace("/opt/mdiq/current/bin/python", "/bin/false")
    shelf.write("pi1", "/etc/systemd/system/mdiq-node.service.d/50-test.conf", broken.encode())
    done = operator.provision("--canary", "pi1")
    shelf.write("pi1", "/etc/systemd/system/mdiq-node.service.d/50-test.conf", DROP_IN.encode())
    shelf.sh("pi1", "systemctl daemon-reload")
    assert done.returncode == 1
    assert "FAILED: mdiq-node does not come up" in _lines(done, "pi1", "check")[0]
    assert "status=1/FAILURE" in done.stdout, "the journal's end is shown"
    for name in NAMES[1:]:
        shelf.sh(name, "test ! -e /opt/mdiq")


def test_the_canary_passes_all_stages_before_the_others_begin(operator: Operator, shelf: Shelf) -> None:
    done = operator.provision("--canary", "pi1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of" in _lines(done, "pi1", "push")[0], "what the canary got before is not sent again"
    for name in NAMES[1:]:
        assert _place(done, "pi1", "check") < _place(done, name, "reach")
        # Stage by stage: nobody switches before all have the release.
        assert max(_place(done, other, "prepare") for other in NAMES[1:]) < _place(done, name, "switch")
    for name in NAMES:
        assert "loading layers 0-11" in _lines(done, name, "check")[0]
        assert _version(shelf, name) == f"mdiq {mdiq.__version__}"


def test_each_device_has_its_own_key_alone_and_root_alone_reads_it(operator: Operator, shelf: Shelf) -> None:
    for name in NAMES:
        assert shelf.sh(name, "cat /etc/mdiq/node.key") == operator.key(name).read_text()
        assert shelf.sh(name, "stat -c '%a %U' /etc/mdiq/node.key") == "600 root\n"
        for owner in NAMES:
            places = shelf.try_sh(name, f"grep -rlF '{operator.key(owner).read_text()}' /opt/mdiq/push /etc /var /tmp")
            assert places.stdout.split() == (["/etc/mdiq/node.key"] if owner == name else [])


def test_the_output_of_a_run_holds_no_key(operator: Operator) -> None:
    done = operator.provision()
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        assert operator.key(name).read_text() not in done.stdout + done.stderr


def test_a_second_run_sends_nothing_and_restarts_nothing(operator: Operator, shelf: Shelf) -> None:
    before = [shelf.unit(name, "MainPID") for name in NAMES]
    done = operator.provision()
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        assert "0 of" in _lines(done, name, "push")[0]
        assert "nothing that it reads has changed" in _lines(done, name, "switch")[0]
    assert [shelf.unit(name, "MainPID") for name in NAMES] == before


def test_a_change_of_the_topology_is_all_that_is_sent_then(operator: Operator, shelf: Shelf) -> None:
    with operator.topology.open("a") as file:
        file.write("# a remark\n")
    done = operator.provision()
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        assert " 1 of" in _lines(done, name, "push")[0]
        assert shelf.sh(name, "tail -n 1 /etc/mdiq/topology.yaml") == "# a remark\n"


def test_systemd_finds_no_fault_in_the_units_and_little_exposure(operator: Operator, shelf: Shelf) -> None:
    units = "/opt/mdiq/current/nodes/systemd/mdiq-node.service /opt/mdiq/current/nodes/systemd/mdiq-starter.service"
    done = shelf.try_sh("pi2", f"systemd-analyze verify --man=no {units}")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    shelf.sh("pi2", f"for unit in {units}; do systemd-analyze security --offline=true --threshold=20 $unit; done")
    shelf.sh("pi2", "systemd-analyze security --threshold=20 mdiq-node")


def test_the_service_runs_as_nobody_known_with_its_key_and_its_folders(operator: Operator, shelf: Shelf) -> None:
    uid, key_bytes, cache, home = shelf.sh("pi2", f"cat {STATE}/facts").split()
    assert int(uid) > 0
    assert shelf.try_sh("pi2", "grep ^mdiq: /etc/passwd").stdout == ""
    assert int(key_bytes) == operator.key("pi2").stat().st_size
    assert (cache, home) == ("/var/cache/mdiq", STATE)


def test_the_status_shows_progress_and_readiness_comes_when_the_service_says_so(
    operator: Operator, shelf: Shelf
) -> None:
    assert shelf.unit("pi2", "ActiveState", "StatusText") == ["activating", "loading layers 0-11: 62 %"]
    assert 'Status: "loading layers 0-11: 62 %"' in shelf.try_sh("pi2", "systemctl status --no-pager mdiq-node").stdout
    shelf.sh("pi2", f"touch {STATE}/ready")
    shelf.wait("pi2", "systemctl is-active --quiet mdiq-node")
    assert shelf.unit("pi2", "StatusText") == ["serving layers 0-11"]


def test_a_reload_reaches_the_service_and_it_goes_on(operator: Operator, shelf: Shelf) -> None:
    before = shelf.unit("pi2", "MainPID")
    shelf.sh("pi2", "systemctl reload mdiq-node")
    shelf.sh("pi2", f"test -e {STATE}/reloaded")
    assert shelf.unit("pi2", "MainPID", "ActiveState") == [*before, "active"]


def test_the_watchdog_restarts_a_process_that_was_stopped(operator: Operator, shelf: Shelf) -> None:
    (before,) = shelf.unit("pi2", "MainPID")
    shelf.sh("pi2", f"kill -STOP {before}")
    shelf.wait("pi2", f"systemctl is-active --quiet mdiq-node && ! test -e /proc/{before}")
    assert "Watchdog timeout" in shelf.journal("pi2")


def test_the_watchdog_restarts_a_service_whose_compute_loop_stands_still(operator: Operator, shelf: Shelf) -> None:
    (before,) = shelf.unit("pi2", "MainPID")
    shelf.sh("pi2", f"touch {STATE}/stuck")
    shelf.wait("pi2", f"! test -e /proc/{before}")
    shelf.sh("pi2", f"rm {STATE}/stuck")
    shelf.wait("pi2", "systemctl is-active --quiet mdiq-node")
    assert "compute_loop_late" in shelf.journal("pi2")


def test_a_device_that_lost_its_power_boots_and_its_service_waits_for_the_ring(
    operator: Operator, shelf: Shelf
) -> None:
    shelf.sh("pi2", f"rm {STATE}/ready")
    shelf.off("pi2")
    shelf.up("pi2", 0.5, "1G")
    shelf.wait("pi2", "systemctl show -p StatusText mdiq-node | grep -q loading")
    # A ring that is not there must not hold up the boot.
    assert shelf.sh("pi2", "systemctl is-system-running").strip() == "running"
    shelf.sh("pi2", f"touch {STATE}/ready")
    shelf.wait("pi2", "systemctl is-active --quiet mdiq-node")


def test_the_unit_starts_with_the_drop_in_for_accelerators(operator: Operator, shelf: Shelf) -> None:
    target = "/etc/systemd/system/mdiq-node.service.d/accelerator.conf"
    shelf.sh("pi2", f"install -D -m 0644 /opt/mdiq/current/nodes/systemd/accelerator.conf {target}")
    shelf.sh("pi2", "systemctl daemon-reload && systemctl restart --no-block mdiq-node")
    shelf.wait("pi2", "systemctl is-active --quiet mdiq-node")
    assert shelf.unit("pi2", "PrivateDevices", "DevicePolicy") == ["no", "closed"]


def test_a_stop_drains_and_is_no_failure(operator: Operator, shelf: Shelf) -> None:
    shelf.sh("pi2", "systemctl stop mdiq-node")
    assert shelf.unit("pi2", "ActiveState", "Result", "ExecMainStatus") == ["inactive", "success", "0"]
    assert "drain_ended" in shelf.journal("pi2")


def test_the_next_version_goes_everywhere_and_only_its_wheel_travels(
    operator: Operator, shelf: Shelf, next_wheels: Path
) -> None:
    done = operator.provision("--canary", "jet", wheels=next_wheels)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        assert " 1 of" in _lines(done, name, "push")[-1]
        assert _version(shelf, name) == f"mdiq {NEXT_VERSION}"


def test_a_rollback_brings_the_version_before_back_and_keeps_key_and_topology(operator: Operator, shelf: Shelf) -> None:
    done = operator.provision("--rollback", "--canary", "pi1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert _place(done, "pi1", "check") < _place(done, "jet", "rollback")
    for name in NAMES:
        assert _version(shelf, name) == f"mdiq {mdiq.__version__}"
        assert shelf.sh(name, "cat /etc/mdiq/node.key") == operator.key(name).read_text()
        assert shelf.sh(name, "tail -n 1 /etc/mdiq/topology.yaml") == "# a remark\n"


def test_no_journal_holds_a_key(operator: Operator, shelf: Shelf) -> None:
    for name in NAMES:
        journal = shelf.sh(name, "journalctl --no-pager")
        assert "Started mdiq-node" in journal or "Starting mdiq-node" in journal
        assert operator.key(name).read_text() not in journal
