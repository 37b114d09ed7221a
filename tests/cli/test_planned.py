"""Layers of a topology from kept figures; mdiq plan."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdiq.cli.main import app
from mdiq.cli.planned import keep_profiles, planned_ring, read_profiles, without
from mdiq.config.load import LoadedTopology, load_topology
from mdiq.core.hop_survey import HopLink
from mdiq.errors import ConfigError, PlanError
from mdiq.plan.measured import MeasuredRing, MeasuredStage
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost

MIB = 1 << 20
NODES = """version: 1
model: {path: smollm2-135m-instruct, weights: int8}
nodes:
- {name: desk, role: starter, address: 127.0.0.1}
- {name: pi1, address: 127.0.0.2%s}
- {name: pi2, address: 127.0.0.3%s}
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))


def _topology(tmp_path: Path, pi1: str = "", pi2: str = "", starter: str = "") -> LoadedTopology:
    file = tmp_path / "topology.yaml"
    file.write_text((NODES % (pi1, pi2)).replace("address: 127.0.0.1", f"address: 127.0.0.1{starter}"))
    return load_topology(file)


def _ring(delay_s: float = 0.0005, **layer_s: float) -> MeasuredRing:
    """A ring of 10 Layers a Node, whose time for one and for eight Segments is given by Node."""

    def stage(name: str) -> MeasuredStage:
        time_s = 10 * layer_s[name]
        cost = StageCost.of(((1, time_s), (8, 6 * time_s)), ((64, 8 * time_s),))
        return MeasuredStage(name, 10, cost, 10 * 4 * MIB, 10 * 1_536, 300 * MIB, 700 * MIB)

    link = HopLink(delay_s, 1e8)
    return MeasuredRing(tuple(map(stage, layer_s)), Curve(((1, 1e-5),)), 576, (("bf16", link),) * len(layer_s))


def test_before_anything_was_measured_layers_are_shared_evenly(tmp_path: Path) -> None:
    loaded = _topology(tmp_path)
    assert read_profiles(loaded) is None
    planned = planned_ring(loaded, None)
    assert planned.layers is None and planned.loaded is loaded


def test_a_slow_node_gets_fewer_layers_the_next_time(tmp_path: Path) -> None:
    loaded = _topology(tmp_path)
    keep_profiles(loaded, _ring(desk=0.002, pi1=0.002, pi2=0.004))
    planned = planned_ring(loaded, read_profiles(loaded))
    assert planned.layers is not None and sum(planned.layers) == 30
    desk, pi1, pi2 = planned.layers
    assert desk > 1.5 * pi2 and pi1 > 1.5 * pi2 and not planned.notes


def test_a_node_that_only_slows_the_ring_down_is_left_out_and_it_is_said(tmp_path: Path) -> None:
    loaded = _topology(tmp_path)
    keep_profiles(loaded, _ring(desk=0.001, pi1=0.001, pi2=0.5))
    planned = planned_ring(loaded, read_profiles(loaded))
    assert [node.name for node in planned.loaded.topology.ring_nodes] == ["desk", "pi1"]
    assert planned.layers is not None and len(planned.layers) == 2
    (note,) = planned.notes
    assert note.startswith("left out: pi2: ")


def test_layers_by_hand_stay_and_a_new_node_waits_for_its_figures(tmp_path: Path) -> None:
    keep_profiles(_topology(tmp_path), _ring(desk=0.002, pi1=0.002, pi2=0.006))
    by_hand = _topology(tmp_path, ", layers: 10-19", ", layers: 20-29", ", layers: 0-9")
    assert planned_ring(by_hand, read_profiles(by_hand)).layers is None
    loaded = _topology(tmp_path)
    profiles = read_profiles(loaded)
    assert profiles is not None
    known = {name: node for name, node in profiles.nodes.items() if name != "pi2"}
    planned = planned_ring(loaded, replace(profiles, nodes=known))
    assert planned.layers is None and "pi2: not measured yet" in planned.notes[0]


def test_a_node_that_becomes_the_starter_waits_for_its_heads_figures(tmp_path: Path) -> None:
    loaded = _topology(tmp_path)
    keep_profiles(loaded, _ring(desk=0.002, pi1=0.002, pi2=0.006))
    text = loaded.file.read_text().replace("name: desk, role: starter", "name: pi1, role: starter")
    loaded.file.write_text(text.replace("{name: pi1, address", "{name: desk, address"))
    swapped = load_topology(loaded.file)
    planned = planned_ring(swapped, read_profiles(swapped))
    assert planned.layers is None and planned.notes[0].startswith("pi1: not measured yet")
    shown = CliRunner().invoke(app, ["plan", str(swapped.file)])
    assert isinstance(shown.exception, ConfigError) and "nothing is known of pi1 yet" in str(shown.exception)


def test_stated_limits_bind_the_plan_and_too_little_memory_is_refused_in_words(tmp_path: Path) -> None:
    figures = _ring(desk=0.001, pi1=0.02, pi2=0.02)  # by speed alone the Starter would hold everything
    keep_profiles(_topology(tmp_path), figures)
    limited = _topology(tmp_path, starter=", memory: 330M")
    planned = planned_ring(limited, read_profiles(limited))
    assert planned.layers is not None and len(planned.layers) >= 2
    assert planned.plan is not None and planned.plan.stages[0].free_bytes >= 0
    tiny = _topology(tmp_path, ", memory: 270M", ", memory: 270M", ", memory: 280M")
    with pytest.raises(PlanError, match="do not fit|needs"):
        planned_ring(tiny, read_profiles(tiny))


def test_nodes_are_taken_out_by_name_and_the_starter_is_not(tmp_path: Path) -> None:
    loaded = _topology(tmp_path)
    assert [node.name for node in without(loaded, {"pi1"}).topology.ring_nodes] == ["desk", "pi2"]
    assert without(loaded, set()) is loaded
    for name, words in (("desk", "Starter"), ("pi7", "no such node; its workers are pi1, pi2")):
        with pytest.raises(ConfigError, match=words):
            without(loaded, {name})
    by_hand = _topology(tmp_path, ", layers: 10-19", ", layers: 20-29", ", layers: 0-9")
    with pytest.raises(ConfigError, match="by hand"):
        without(by_hand, {"pi1"})


def test_figures_are_those_of_one_model_in_one_format(tmp_path: Path) -> None:
    loaded = _topology(tmp_path)
    keep_profiles(loaded, _ring(desk=0.002, pi1=0.002, pi2=0.006))
    file = loaded.file
    file.write_text(file.read_text().replace("int8", "int4"))
    assert read_profiles(load_topology(file)) is None


def test_mdiq_plan_says_what_to_do_first_and_then_shows_the_plan(tmp_path: Path) -> None:
    loaded = _topology(tmp_path)
    run = CliRunner()
    nothing = run.invoke(app, ["plan", str(loaded.file)])
    assert isinstance(nothing.exception, ConfigError) and "mdiq run --topology" in str(nothing.exception)
    keep_profiles(loaded, _ring(desk=0.002, pi1=0.002, pi2=0.006))
    short = run.invoke(app, ["plan", str(loaded.file)])
    assert short.exit_code == 0 and "predicted" in short.output and "with one more device" not in short.output
    long = run.invoke(app, ["plan", str(loaded.file), "--explain", "--objective", "latency"])
    assert "with one more device like" in long.output and "one user's" in long.output
    assert run.invoke(app, ["plan", str(loaded.file), "--json"]).output.startswith("{")


def test_mdiq_plan_compares_layers_by_hand_with_its_own(tmp_path: Path) -> None:
    keep_profiles(_topology(tmp_path), _ring(desk=0.002, pi1=0.002, pi2=0.006))
    by_hand = _topology(tmp_path, ", layers: 10-19", ", layers: 20-29", ", layers: 0-9")
    shown = CliRunner().invoke(app, ["plan", str(by_hand.file)])
    assert shown.exit_code == 0, shown.exception
    assert "by hand 10,10,10: " in shown.output
