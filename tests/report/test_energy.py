from pathlib import Path

import pytest

from mdiq.report.energy import Reading, joules, read_energy


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def test_packages_of_rapl_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    write(tmp_path / "intel-rapl:0", name="package-0", energy_uj="5000000", max_energy_range_uj="100000000")
    write(tmp_path / "intel-rapl:0:0", name="core", energy_uj="4000000", max_energy_range_uj="100000000")
    write(tmp_path / "intel-rapl:1", name="package-1", energy_uj="7000000", max_energy_range_uj="100000000")
    # The whole machine, and a package a second time.
    write(tmp_path / "intel-rapl:2", name="psys", energy_uj="20000000", max_energy_range_uj="100000000")
    write(tmp_path / "intel-rapl-mmio:0", name="package-0", energy_uj="5000000", max_energy_range_uj="100000000")
    write(tmp_path / "dtpm")
    reading = read_energy(tmp_path, tmp_path / "none")
    assert reading == Reading("rapl", ((5.0, 100.0), (7.0, 100.0)))


def test_a_counter_that_has_begun_again_is_continued() -> None:
    before, after = Reading("rapl", ((90.0, 100.0), (5.0, 100.0))), Reading("rapl", ((10.0, 100.0), (8.0, 100.0)))
    assert joules(before, after, 2.0) == pytest.approx(20.0 + 3.0)
    assert joules(Reading("rapl", ((90.0, 0.0),)), Reading("rapl", ((10.0, 0.0),)), 2.0) is None


def test_a_battery_counts_only_while_it_is_discharged(tmp_path: Path) -> None:
    write(tmp_path / "BAT0", power_now="12000000", status="Charging")
    assert read_energy(tmp_path / "none", tmp_path) == Reading()
    (tmp_path / "BAT0" / "status").write_text("Discharging\n")
    assert read_energy(tmp_path / "none", tmp_path) == Reading("battery", watts=12.0)
    assert joules(Reading("battery", watts=10.0), Reading("battery", watts=14.0), 3.0) == pytest.approx(36.0)


def test_power_is_current_times_voltage_where_it_is_not_told(tmp_path: Path) -> None:
    write(tmp_path / "BAT0", current_now="1500000", voltage_now="12000000", status="Discharging")
    assert read_energy(tmp_path / "none", tmp_path).watts == pytest.approx(18.0)
    (tmp_path / "BAT0" / "current_now").write_text("-1500000\n")  # so some drivers say that it is discharged
    assert read_energy(tmp_path / "none", tmp_path).watts == pytest.approx(18.0)


def test_a_machine_that_tells_nothing_gives_nothing(tmp_path: Path) -> None:
    write(tmp_path / "intel-rapl:0", name="package-0")  # energy_uj is for root alone
    nothing = read_energy(tmp_path, tmp_path)
    assert nothing == Reading()
    assert joules(nothing, nothing, 1.0) is None
    assert joules(Reading("rapl", ((1.0, 9.0),)), nothing, 1.0) is None
