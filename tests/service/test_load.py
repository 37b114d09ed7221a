"""What load shows of a topology's nodes: kept, planned with, and given up where a ring could not change to the plan."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mdiq.cli.main import app
from mdiq.config.load import LoadedTopology
from mdiq.core.hop_survey import HopLink
from mdiq.core.types import NodeId
from mdiq.plan.measured import Profiles
from mdiq.service.planned import profiles_path, read_profiles
from mdiq.service.topology_rings import TopologyRings
from tests.service.measured_rings import LAYERS, measured_ring, topology


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))


class _Config:
    """Of a model: what a split needs to know."""

    num_layers = LAYERS
    head_layers = 2.0


def _rings(loaded: LoadedTopology, notes: list[str], before: TopologyRings | None = None) -> TopologyRings:
    config: Any = _Config()
    rings = TopologyRings(
        loaded,
        Path("m.gguf"),
        config,
        threads=1,
        join_wait_s=1.0,
        even_split=False,
        on_note=notes.append,
        before=before,
    )
    if before is None and rings.measured is None:
        rings.keep(measured_ring(desk=0.002, pi1=0.002, pi2=0.002), is_survey=True)
    return rings


def _measured(rings: TopologyRings) -> Profiles:
    assert rings.measured is not None
    return rings.measured


def _split(rings: TopologyRings) -> dict[str, int]:
    options = rings.options()
    return dict(zip(options.node_names, map(len, options.layers), strict=True))


def test_figures_under_load_give_another_plan_only_when_they_are_taken_up(tmp_path: Path) -> None:
    notes: list[str] = []
    rings = _rings(topology(tmp_path), notes)
    first = _split(rings)
    slow = _measured(rings).under_load({"desk": 1.0, "pi1": 1.0, "pi2": 2.0})
    better = rings.best(slow)
    assert better is not None and better["pi2"] < first["pi2"]
    value, present = rings.value(slow, better), rings.value(slow, first)
    assert value is not None and present is not None and value > 1.15 * present
    rings.keep_load(slow)
    assert _split(rings) == first, "a reload changes nothing"
    assert rings.under_load() == {"desk": 1.0, "pi1": 1.0, "pi2": 2.0}
    rings.take_up(slow, "under load pi2 is slow")
    assert _split(rings) == better and "under load pi2 is slow" in notes
    again = _rings(topology(tmp_path), notes, before=rings)
    assert _split(again) == better and again.under_load() == rings.under_load()
    assert _split(_rings(topology(tmp_path), notes)) == better, "a process that is started anew plans with them too"


def test_a_split_to_which_a_ring_could_not_change_is_not_planned_again(tmp_path: Path) -> None:
    rings = _rings(topology(tmp_path), [])
    first = _split(rings)
    slow = _measured(rings).under_load({"pi2": 2.0})
    rings.take_up(slow, "why")
    wanted = rings.options()
    rings.note_not_changed(wanted)
    assert _split(rings) == first and rings.best(slow) is None
    again = _rings(topology(tmp_path), [], before=rings)
    assert _split(again) == first and again.best(slow) is None
    again.keep(measured_ring(desk=0.002, pi1=0.002, pi2=0.004))  # the same figures, of the ring itself
    assert _split(again) == first


def test_factors_are_written_when_they_are_news_and_not_after_they_were_forgotten(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    rings = _rings(loaded, [])
    rings.options()

    def written() -> float | None:
        profiles = read_profiles(loaded)
        assert profiles is not None
        return profiles.nodes["pi2"].under_load

    assert written() is None
    for factor, kept in ((1.5, 1.5), (1.53, 1.5), (1.56, 1.5), (1.59, 1.59), (1.4, 1.4)):
        rings.keep_load(_measured(rings).under_load({"pi2": factor}))
        assert written() == kept
    for handling_s, kept in ((0.002, 0.002), (0.0021, 0.002), (0.004, 0.004)):
        rings.keep_load(_measured(rings).with_handling({"desk": handling_s}))
        profiles = read_profiles(loaded)
        assert profiles is not None and profiles.nodes["desk"].forward_s == kept
    seen = _measured(rings).with_hops(["desk", "pi1", "pi2"], [HopLink(0.25, 1e4), None, None])
    rings.keep_load(seen)
    profiles = read_profiles(loaded)
    assert profiles is not None and profiles.links == seen.links
    assert profiles.links.hops[NodeId("desk"), NodeId("pi1")].delay_s == 0.25
    CliRunner().invoke(app, ["plan", str(loaded.file), "--forget"])
    rings.keep_load(_measured(rings).under_load({"pi2": 3.0}))
    assert not profiles_path(loaded).exists()
    assert _rings(loaded, [], before=rings).options().is_survey


def test_figures_say_nothing_of_splits_that_cannot_be_and_of_layers_by_hand(tmp_path: Path) -> None:
    rings = _rings(topology(tmp_path), [])
    measured = _measured(rings)
    assert rings.value(measured, {"desk": 10, "pi9": 20}) is None
    by_hand = topology(tmp_path, ", layers: 10-19", ", layers: 20-29", ", layers: 0-9")
    assert _rings(by_hand, [], before=rings).best(measured) is None


def test_the_plan_says_which_nodes_take_longer_under_load(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    rings = _rings(loaded, [])
    rings.options()
    before = CliRunner().invoke(app, ["plan", str(loaded.file)]).output
    assert "under load" not in before
    rings.keep_load(_measured(rings).under_load({"desk": 1.2, "pi2": 1.94}))
    shown = CliRunner().invoke(app, ["plan", str(loaded.file)]).output
    assert shown.splitlines()[-1] == "under load   pi2 takes 1.9 times as long as measured alone; the plan counts on it"
    as_json = CliRunner().invoke(app, ["plan", str(loaded.file), "--json"]).output
    assert '"under_load": {"desk": 1.2, "pi2": 1.94}' in as_json
