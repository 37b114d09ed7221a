"""mdiq plan, from kept figures."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdiq.cli.main import app
from mdiq.errors import ConfigError
from mdiq.service.planned import keep_profiles, planned_ring, read_profiles
from tests.service.measured_rings import LAYERS, measured_ring, topology


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))


def test_mdiq_plan_takes_goal_and_users_from_the_topology_unless_they_are_given(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    keep_profiles(loaded, measured_ring(desk=0.001, pi1=0.001, pi2=0.001))
    loaded.file.write_text(f"{loaded.file.read_text()}ring: {{objective: latency, users: 5}}\n")

    def goal(*options: str) -> tuple[str, int]:
        shown = CliRunner().invoke(app, ["plan", str(loaded.file), "--json", *options])
        assert shown.exit_code == 0, shown.output
        found = json.loads(shown.stdout)["plan"]["goal"]
        return found["objective"], found["num_users"]

    assert goal() == ("latency", 1)
    assert goal("--objective", "throughput") == ("throughput", 5)
    assert goal("--users", "7") == ("throughput", 7)


def test_figures_are_forgotten_on_demand(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    keep_profiles(loaded, measured_ring(desk=0.001, pi1=0.001, pi2=0.001))
    told = [CliRunner().invoke(app, ["plan", str(loaded.file), "--forget"]).stdout for _ in range(2)]
    assert told[0].startswith("forgotten") and told[1].startswith("nothing was kept")
    assert planned_ring(loaded, read_profiles(loaded), LAYERS).is_unmeasured


def test_mdiq_plan_says_what_to_do_first_and_then_shows_the_plan(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    run = CliRunner()
    nothing = run.invoke(app, ["plan", str(loaded.file)])
    assert isinstance(nothing.exception, ConfigError) and "mdiq run --topology" in str(nothing.exception)
    keep_profiles(loaded, measured_ring(desk=0.002, pi1=0.002, pi2=0.006))
    short = run.invoke(app, ["plan", str(loaded.file)])
    assert short.exit_code == 0 and "predicted" in short.output and "with one more device" not in short.output
    long = run.invoke(app, ["plan", str(loaded.file), "--explain", "--objective", "latency"])
    assert "several rings or copies" not in long.output  # one user has one ring, and the planned one is the fastest
    many = run.invoke(app, ["plan", str(loaded.file), "--explain"])
    assert "several rings or copies at one address" in many.output
    assert "with one more device like" in long.output and "one user's" in long.output
    assert run.invoke(app, ["plan", str(loaded.file), "--json"]).output.startswith("{")


def test_mdiq_plan_compares_layers_by_hand_with_its_own(tmp_path: Path) -> None:
    keep_profiles(topology(tmp_path), measured_ring(desk=0.002, pi1=0.002, pi2=0.006))
    by_hand = topology(tmp_path, ", layers: 10-19", ", layers: 20-29", ", layers: 0-9")
    shown = CliRunner().invoke(app, ["plan", str(by_hand.file)])
    assert shown.exit_code == 0, shown.exception
    assert "by hand 10,10,10: " in shown.output


def test_mdiq_plan_tells_what_trusted_layers_cost(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    keep_profiles(loaded, measured_ring(desk=0.006, pi1=0.001, pi2=0.001))
    free = json.loads(CliRunner().invoke(app, ["plan", str(loaded.file), "--json"]).stdout)
    flag = ["--min-starter-layers", "20"]
    kept = json.loads(CliRunner().invoke(app, ["plan", str(loaded.file), "--json", *flag]).stdout)
    assert free["free_rate"] is None and kept["free_rate"] == pytest.approx(free["plan"]["rate"])
    assert kept["plan"]["rate"] < 0.9 * kept["free_rate"]
    loaded.file.write_text(loaded.file.read_text() + "ring: {min_starter_layers: 20}\n")
    shown = CliRunner().invoke(app, ["plan", str(loaded.file)]).stdout
    assert "trusted      the first 20 layers stay on desk: " in shown


@pytest.mark.parametrize(
    ("pi1", "flags"), [("", ["--min-starter-layers", "2"]), (", noise: {epsilon: 8, delta: 1e-6, clip: 40}", [])]
)
def test_nodes_that_are_not_trusted_are_not_proposed_as_starters(tmp_path: Path, pi1: str, flags: list[str]) -> None:
    keep_profiles(topology(tmp_path), measured_ring(desk=0.001, pi1=0.001, pi2=0.001, delay_s=0.1))
    assert "copy of pi1" in CliRunner().invoke(app, ["plan", str(topology(tmp_path).file), "--explain"]).stdout
    file = topology(tmp_path, pi1).file
    keep_profiles(topology(tmp_path, pi1), measured_ring(desk=0.001, pi1=0.001, pi2=0.001, delay_s=0.1))
    shown = CliRunner().invoke(app, ["plan", str(file), "--explain", *flags]).stdout
    assert "copy of" not in shown and "each has a starter, which sees whole prompts" in shown
    as_json = CliRunner().invoke(app, ["plan", str(file), "--explain", "--json", *flags]).stdout
    assert json.loads(as_json)["layouts"] == []
