"""The unit files, as files: what systemd itself thinks of them where it is installed, and that the two agree."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mdiq.errors import ConfigError

NODES = Path(__file__).parent.parent.parent / "nodes"
UNITS = sorted((NODES / "systemd").glob("*.service"))
TIMERS = sorted((NODES / "systemd").glob("*.timer"))
DIFFERENT = ("Description=", "EnvironmentFile=", "ExecStart=", "Also=", "WantedBy=", "LoadCredential=")
DIFFERENT += ("RuntimeDirectory=",)
"""Settings that may differ between the units of a node, of the Starter and of a router."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def _settings(unit: Path) -> list[str]:
    return [line for line in unit.read_text().splitlines() if line and not line.startswith("#")]


def _with_programs(folder: Path) -> list[Path]:
    """Copy all units, with a program that exists on every machine: verify looks for it."""
    copies = []
    for unit in [*UNITS, *TIMERS]:
        copies.append(folder / unit.name)
        copies[-1].write_text(unit.read_text().replace("/opt/mdiq/current/bin/mdiq ", "/bin/true "))
    return copies


def test_there_is_a_unit_and_a_timer_for_each_role_and_a_unit_for_a_router() -> None:
    assert [timer.stem for timer in TIMERS] == ["mdiq-node", "mdiq-starter"]
    assert [unit.stem for unit in UNITS] == ["mdiq-node", "mdiq-route", "mdiq-starter"]


@needs_systemd
def test_systemd_finds_no_fault_in_the_units(tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *_with_programs(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_systemd_finds_a_fault_where_there_is_one(tmp_path: Path) -> None:
    unit = _with_programs(tmp_path)[0]
    unit.write_text(unit.read_text().replace("Type=notify", "Type=notice"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert "notice" in done.stderr


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_exposed_no_more_than_2_of_10(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@needs_systemd
def test_a_unit_without_its_sandbox_is_over_that_limit(tmp_path: Path) -> None:
    unit = tmp_path / "mdiq-node.service"
    text = UNITS[0].read_text()
    unit.write_text(text[: text.index("# Only where root")] + text[text.index("[Install]") :])
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit], capture_output=True
    )
    assert done.returncode != 0


def test_all_live_in_the_same_sandbox() -> None:
    node, router, starter = ([line for line in _settings(unit) if not line.startswith(DIFFERENT)] for unit in UNITS)
    assert node == starter == router


def test_the_readme_explains_every_setting_of_the_units() -> None:
    table = (NODES / "README.md").read_text()
    explained = set(re.findall(r"`([A-Z][A-Za-z]+)=", table))
    used = {line.split("=")[0] for unit in [*UNITS, *TIMERS] for line in _settings(unit) if "=" in line}
    assert used - explained == set()
    assert explained >= {"WatchdogSec", "DynamicUser"}, "it tests too little"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_bad_configuration_is_not_tried_again(unit: Path) -> None:
    assert f"RestartPreventExitStatus={ConfigError.exit_code}" in _settings(unit)


@pytest.mark.parametrize("unit", ["mdiq-node.service", "mdiq-starter.service", "mdiq-route.service"])
def test_a_thousand_connections_of_strangers_do_not_take_all_descriptors(unit: str) -> None:
    lines = (Path(__file__).parents[2] / "nodes" / "systemd" / unit).read_text(encoding="utf-8").splitlines()
    assert "LimitNOFILE=65536" in lines
