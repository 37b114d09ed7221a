"""Layers of a topology from kept figures."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mdiq.cli.main import app
from mdiq.config.load import LoadedTopology, load_topology
from mdiq.errors import CapacityError, ConfigError, MdiqError, NodeDiedError, PlanError, RingError
from mdiq.plan.measured import MeasuredStage
from mdiq.plan.pace import StageCost
from mdiq.plan.plan import Plan
from mdiq.service.planned import keep_profiles, planned_ring, read_profiles, without
from mdiq.service.topology_rings import TopologyRings
from tests.service.measured_rings import LAYERS, MIB, measured_ring, topology


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))


def test_before_anything_was_measured_the_nodes_measure(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    assert read_profiles(loaded) is None
    planned = planned_ring(loaded, None, LAYERS)
    assert planned.layers is None and planned.is_unmeasured and planned.loaded is loaded


def test_a_slow_node_gets_fewer_layers_the_next_time(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    keep_profiles(loaded, measured_ring(desk=0.002, pi1=0.002, pi2=0.004))
    planned = planned_ring(loaded, read_profiles(loaded), LAYERS)
    assert planned.layers is not None and sum(planned.layers) == 30
    desk, pi1, pi2 = planned.layers
    assert desk > 1.5 * pi2 and pi1 > 1.5 * pi2
    assert planned.notes[0].startswith(f"layers as planned: desk {desk}, pi1 {pi1}, pi2 {pi2}; ")


def test_a_node_that_only_slows_the_ring_down_is_left_out_and_it_is_said(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    keep_profiles(loaded, measured_ring(desk=0.001, pi1=0.001, pi2=0.5))
    planned = planned_ring(loaded, read_profiles(loaded), LAYERS)
    assert [node.name for node in planned.loaded.topology.ring_nodes] == ["desk", "pi1"]
    assert planned.layers is not None and len(planned.layers) == 2
    _, note = planned.notes
    assert re.fullmatch(r"left out: pi2: \d+ % slower with it", note)
    rings = _rings(loaded, [])
    [idle] = rings.options().remote.standing_by  # type: ignore[union-attr]
    assert idle.name == "pi2" and idle.is_left_out and re.search(r": \d+ % slower with it$", idle.reason)


def test_what_was_promised_of_a_node_that_is_drained_is_still_known(tmp_path: Path) -> None:
    loaded = topology(tmp_path, ", noise: {epsilon: 8, delta: 1e-6, clip: 40}")
    keep_profiles(loaded, measured_ring(desk=0.001, pi1=0.001, pi2=0.001))
    options = _rings(loaded, []).options(frozenset(["pi1"]))
    assert options.node_names == ("desk", "pi2") and not any(options.noises)
    assert [*options.promises] == ["pi1"] and options.may_have_noise


def test_a_node_that_was_drained_may_leave_the_file_and_is_drained_still_when_it_is_back(tmp_path: Path) -> None:
    loaded, drained = topology(tmp_path), frozenset(["pi1"])
    keep_profiles(loaded, measured_ring(desk=0.001, pi1=0.001, pi2=0.001))
    rings = _rings(loaded, [])
    assert rings.options(drained).node_names == ("desk", "pi2")
    whole = loaded.file.read_text()
    for text in (
        "".join(line for line in whole.splitlines(True) if "pi1" not in line),
        whole.replace("127.0.0.2", "127.0.0.2, spare: true"),
    ):
        loaded.file.write_text(text)
        for _ in range(2):  # the file may be read as often as one likes
            rings = _rings(load_topology(loaded.file), [], before=rings)
            assert rings.options(drained).node_names == ("desk", "pi2")
        with pytest.raises(ConfigError, match="pi3: the ring has no such node"):
            rings.options(frozenset(["pi1", "pi3"]))
    loaded.file.write_text(whole)
    rings = _rings(load_topology(loaded.file), [], before=rings)
    assert rings.options(drained).node_names == ("desk", "pi2")
    assert rings.options().node_names == ("desk", "pi1", "pi2")


def test_a_plan_over_different_kinds_of_cpu_says_so_in_exact_mode(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    ring = measured_ring(desk=0.001, pi1=0.001, pi2=0.001)
    kinds = ("x86_64 AVX2", "x86_64 AVX2", "aarch64 DEFAULT")
    stages = tuple(replace(stage, cpu=cpu) for stage, cpu in zip(ring.stages, kinds, strict=True))
    keep_profiles(loaded, replace(ring, stages=stages))
    profiles = read_profiles(loaded)
    *_, note = planned_ring(loaded, profiles, LAYERS).notes
    assert note.endswith("may give other tokens: aarch64 DEFAULT: pi2; x86_64 AVX2: desk, pi1")
    fast = loaded.topology.model.model_copy(update={"mode": "fast"})
    fast_loaded = replace(loaded, topology=loaded.topology.model_copy(update={"model": fast}))
    assert len(planned_ring(fast_loaded, profiles, LAYERS).notes) == 1


def test_a_ring_is_planned_for_the_users_and_the_cache_that_the_topology_names(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    keep_profiles(loaded, measured_ring(desk=0.001, pi1=0.001, pi2=0.001))
    profiles = read_profiles(loaded)

    def planned(wishes: str) -> Plan:
        text = loaded.file.read_text().partition("ring:")[0]
        loaded.file.write_text(f"{text}ring: {{{wishes}}}\n")
        plan = planned_ring(load_topology(loaded.file), profiles, LAYERS).plan
        assert plan is not None
        return plan

    for_many, for_one = planned("users: 32"), planned("objective: latency, users: 32")
    assert (for_many.goal.num_users, len(for_many.stages)) == (32, 3)
    # Every hop makes the way of a single token longer.
    assert (for_one.goal.num_users, len(for_one.stages)) == (1, 1)
    roomy = planned("kv_tokens: 30000, objective: latency")
    assert roomy.kv_tokens >= 30_000 and len(roomy.stages) > 1
    with pytest.raises(PlanError, match="do not fit"):
        planned("kv_tokens: 500000")


def test_layers_by_hand_stay_and_a_new_node_waits_for_its_figures(tmp_path: Path) -> None:
    keep_profiles(topology(tmp_path), measured_ring(desk=0.002, pi1=0.002, pi2=0.006))
    by_hand = topology(tmp_path, ", layers: 10-19", ", layers: 20-29", ", layers: 0-9")
    assert planned_ring(by_hand, read_profiles(by_hand), LAYERS).layers is None
    loaded = topology(tmp_path)
    profiles = read_profiles(loaded)
    assert profiles is not None
    known = {name: node for name, node in profiles.nodes.items() if name != "pi2"}
    planned = planned_ring(loaded, replace(profiles, nodes=known), LAYERS)
    assert planned.layers is None and planned.is_unmeasured and "pi2: not measured yet" in planned.notes[0]


def test_a_node_that_becomes_the_starter_waits_for_its_heads_figures(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    keep_profiles(loaded, measured_ring(desk=0.002, pi1=0.002, pi2=0.006))
    text = loaded.file.read_text().replace("name: desk, role: starter", "name: pi1, role: starter")
    loaded.file.write_text(text.replace("{name: pi1, address", "{name: desk, address"))
    swapped = load_topology(loaded.file)
    planned = planned_ring(swapped, read_profiles(swapped), LAYERS)
    assert planned.layers is None and planned.notes[0].startswith("pi1: not measured yet")
    shown = CliRunner().invoke(app, ["plan", str(swapped.file)])
    assert isinstance(shown.exception, ConfigError) and "nothing is known of pi1 yet" in str(shown.exception)


def test_stated_limits_bind_the_plan_and_too_little_memory_is_refused_in_words(tmp_path: Path) -> None:
    figures = measured_ring(desk=0.001, pi1=0.02, pi2=0.02)  # by speed alone the Starter would hold everything
    keep_profiles(topology(tmp_path), figures)
    limited = topology(tmp_path, starter=", memory: 330M")
    planned = planned_ring(limited, read_profiles(limited), LAYERS)
    assert planned.layers is not None and len(planned.layers) >= 2
    assert planned.plan is not None and planned.plan.stages[0].free_bytes >= 0
    tiny = topology(tmp_path, ", memory: 270M", ", memory: 270M", ", memory: 280M")
    with pytest.raises(PlanError, match="do not fit|needs"):
        planned_ring(tiny, read_profiles(tiny), LAYERS)


def test_nodes_are_taken_out_by_name_and_the_starter_is_not(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    assert [node.name for node in without(loaded, {"pi1"}).topology.ring_nodes] == ["desk", "pi2"]
    assert without(loaded, set()) is loaded
    for name, words in (("desk", "Starter"), ("pi7", "no such node; its workers are pi1, pi2")):
        with pytest.raises(ConfigError, match=words):
            without(loaded, {name})
    by_hand = topology(tmp_path, ", layers: 10-19", ", layers: 20-29", ", layers: 0-9")
    with pytest.raises(ConfigError, match="by hand"):
        without(by_hand, {"pi1"})


def test_figures_are_those_of_one_model_in_one_format(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    keep_profiles(loaded, measured_ring(desk=0.002, pi1=0.002, pi2=0.006))
    file = loaded.file
    file.write_text(file.read_text().replace("int8", "int4"))
    assert read_profiles(load_topology(file)) is None


def test_figures_of_another_model_under_the_old_name_are_measured_anew(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    keep_profiles(loaded, measured_ring(desk=0.002, pi1=0.002, pi2=0.004))
    assert planned_ring(loaded, read_profiles(loaded), 22).is_unmeasured
    newer = replace(measured_ring(desk=0.001, pi1=0.001), num_layers=22)
    profiles = keep_profiles(loaded, newer)
    assert profiles is not None and profiles.model.num_layers == 22 and set(profiles.nodes) == {"desk", "pi1"}


class _Config:
    """Of a model: what a split needs to know."""

    num_layers = LAYERS
    head_layers = 2.0


def _rings(
    loaded: LoadedTopology, notes: list[str], *, even_split: bool = False, before: TopologyRings | None = None
) -> TopologyRings:
    config: Any = _Config()
    return TopologyRings(
        loaded,
        Path("m.gguf"),
        config,
        threads=1,
        join_wait_s=1.0,
        even_split=even_split,
        on_note=notes.append,
        before=before,
    )


def test_the_first_ring_is_planned_from_a_survey_of_a_few_layers_each(tmp_path: Path) -> None:
    notes: list[str] = []
    rings = _rings(topology(tmp_path), notes)
    survey = rings.options()
    assert survey.is_survey and survey.kv_tokens is not None
    assert [len(layers) for layers in survey.layers] == [4, 4, 4]
    rings.keep(replace(measured_ring(desk=0.002, pi1=0.002, pi2=0.004), num_layers=LAYERS), is_survey=True)
    planned = rings.options()
    assert not planned.is_survey and planned.kv_tokens is None
    assert sum(len(layers) for layers in planned.layers) == LAYERS
    assert len(planned.layers[2]) < len(planned.layers[1])
    assert "measure" in notes[0] and "layers as planned" in notes[1]


def _serve(rings: TopologyRings, **layer_s: float) -> None:
    """Have the next ring serve, and measure these times of a Layer."""
    options = rings.options()
    ring = measured_ring(**{name: layer_s[name] for name in options.node_names})

    def as_served(stage: MeasuredStage, num_layers: int) -> MeasuredStage:
        time_s = num_layers * layer_s[stage.name]
        cost = StageCost.of(((1, time_s), (8, 6 * time_s)), ((64, 8 * time_s),))
        return replace(
            stage,
            num_layers=num_layers,
            cost=cost,
            weight_bytes=num_layers * 4 * MIB,
            kv_bytes_per_token=num_layers * 1_536,
        )

    stages = (as_served(*pair) for pair in zip(ring.stages, map(len, options.layers), strict=True))
    rings.keep(replace(ring, stages=tuple(stages)))


def test_a_topology_that_is_read_again_gives_the_ring_that_serves(tmp_path: Path) -> None:
    rings = _rings(topology(tmp_path), [])
    rings.keep(measured_ring(desk=0.002, pi1=0.002, pi2=0.004), is_survey=True)
    before = rings.options()
    _serve(rings, desk=0.00242, pi1=0.002, pi2=0.004)
    assert rings.options() == before
    assert _rings(topology(tmp_path), [], before=rings).options() == before
    assert _rings(topology(tmp_path), []).options() != before  # a process that is started anew knows the newer figures


def test_figures_that_are_forgotten_are_measured_anew_at_a_reload(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    rings = _rings(loaded, [])
    rings.keep(measured_ring(desk=0.002, pi1=0.002, pi2=0.004), is_survey=True)
    assert not rings.options().is_survey
    CliRunner().invoke(app, ["plan", str(loaded.file), "--forget"])
    assert _rings(loaded, [], before=rings).options().is_survey


def test_a_much_better_split_by_a_rings_own_figures_is_told_and_taken_up_and_not_for_ever(tmp_path: Path) -> None:
    notes: list[str] = []
    rings = _rings(topology(tmp_path), notes)
    rings.keep(measured_ring(desk=0.002, pi1=0.002, pi2=0.02), is_survey=True)
    first = rings.options()

    _serve(rings, desk=0.02, pi1=0.002, pi2=0.002)
    second = rings.options()
    assert second != first and len(second.layers[0]) < len(first.layers[0])
    assert any(note.startswith("a better split, by what the ring measured of itself: desk ") for note in notes)
    _serve(rings, desk=0.002, pi1=0.02, pi2=0.002)
    third = rings.options()
    _serve(rings, desk=0.02, pi1=0.002, pi2=0.002)
    assert third != second and rings.options() == third
    again = _rings(topology(tmp_path), notes, before=rings)
    assert again.options() == third
    _serve(again, desk=0.02, pi1=0.002, pi2=0.002)
    assert again.options() == third


def _failure(error: MdiqError, node: str | None) -> MdiqError:
    error.node = node
    return error


def test_layers_that_a_nodes_memory_did_not_hold_are_not_planned_for_it_again(tmp_path: Path) -> None:
    notes: list[str] = []
    rings = _rings(topology(tmp_path), notes)
    rings.keep(measured_ring(desk=0.002, pi1=0.002, pi2=0.002), is_survey=True)
    first = rings.options()
    rings.note_failure(first, _failure(RingError("pi1: something else"), "pi1"))
    rings.note_failure(first, _failure(NodeDiedError("pi1: it was started anew"), "pi1"))
    assert rings.options() == first  # it may have been stopped
    rings.note_failure(first, _failure(NodeDiedError("pi1: it was started anew"), "pi1"))
    second = rings.options()
    assert 0 < len(second.layers[1]) < len(first.layers[1])
    assert notes[-2].startswith(
        f"pi1: its memory did not hold {len(first.layers[1])} layers (pi1: it was started anew)"
    )
    assert _rings(topology(tmp_path), notes, before=rings).options() == second
    for _ in range(9):  # it has nearly nothing
        options = rings.options()
        if "pi1" in options.node_names:
            rings.note_failure(options, _failure(CapacityError("pi1: no memory"), "pi1"))
    [idle] = rings.options().remote.standing_by  # type: ignore[union-attr]
    assert idle.name == "pi1" and "memory does not hold a layer" in idle.reason
    for _ in range(20):
        with contextlib.suppress(PlanError):
            rings.note_failure(rings.options(), CapacityError("no memory here"))
    with pytest.raises(PlanError, match="desk"):
        rings.options()


def test_layers_by_hand_stay_whatever_fails(tmp_path: Path) -> None:
    notes: list[str] = []
    rings = _rings(topology(tmp_path), notes)
    rings.keep(measured_ring(desk=0.002, pi1=0.002, pi2=0.002), is_survey=True)
    by_hand = topology(tmp_path, ", layers: 10-19", ", layers: 20-29", ", layers: 0-9")
    rings = _rings(by_hand, notes, before=rings)
    first = rings.options()
    rings.note_failure(first, _failure(CapacityError("pi1: no memory"), "pi1"))
    assert rings.options() == first and not notes


def test_a_node_that_has_no_room_to_measure_is_left_out_before_anything_is_planned(tmp_path: Path) -> None:
    notes: list[str] = []
    rings = _rings(topology(tmp_path), notes)
    error = CapacityError("pi2: KV cache: 0 MiB (of its 256 MiB the process takes 300) are free")
    rings.note_failure(rings.options(), _failure(error, "pi2"))
    survey = rings.options()
    assert survey.is_survey and survey.node_names == ("desk", "pi1")
    [idle] = survey.remote.standing_by  # type: ignore[union-attr]
    assert idle.name == "pi2" and "of its 256 MiB the process takes 300" in idle.reason
    assert notes[-1].startswith("left out: pi2: its memory does not hold 4 layers to measure")
    # What the note says helps, and nothing that it does not say.
    assert notes[-1].endswith("more memory in the topology and reload, or make room there and restart mdiq serve")
    assert _rings(topology(tmp_path), [], before=rings).options().node_names == ("desk", "pi1")
    for changed in (
        _rings(topology(tmp_path, "", ", memory: 512M"), [], before=rings),
        _rings(topology(tmp_path), []),
    ):
        assert changed.options().node_names == ("desk", "pi1", "pi2")


def test_a_first_ring_keeps_to_stated_limits_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    rings = _rings(topology(tmp_path, ", memory: 270M", ", memory: 270M", ", memory: 280M"), [])
    assert rings.options().is_survey
    rings.keep(measured_ring(desk=0.001, pi1=0.02, pi2=0.02), is_survey=True)
    with pytest.raises(PlanError):
        rings.options()


def test_an_even_split_measures_nothing(tmp_path: Path) -> None:
    options = _rings(topology(tmp_path), [], even_split=True).options()
    assert not options.is_survey and sum(len(layers) for layers in options.layers) == LAYERS


def test_a_ring_of_more_nodes_than_layers_is_refused_in_words(tmp_path: Path) -> None:
    rings = _rings(topology(tmp_path), [], even_split=True)
    _Config.num_layers = 2
    try:
        with pytest.raises(PlanError, match="3 nodes and a model of 2 layers"):
            rings.options()
    finally:
        _Config.num_layers = LAYERS


def test_layers_that_are_to_stay_on_the_starter_stay_there_in_every_ring_that_serves(tmp_path: Path) -> None:
    loaded = topology(tmp_path)
    loaded.file.write_text(loaded.file.read_text() + "ring: {min_starter_layers: 20}\n")
    kept = load_topology(loaded.file)
    even = _rings(kept, [], even_split=True).options()
    assert [len(layers) for layers in even.layers] == [20, 5, 5]
    rings = _rings(kept, [])
    assert rings.options().is_survey  # of a few layers each, which serves nobody
    rings.keep(replace(measured_ring(desk=0.02, pi1=0.001, pi2=0.001), num_layers=LAYERS), is_survey=True)
    planned = rings.options()
    assert len(planned.layers[0]) == 20 and sum(map(len, planned.layers)) == LAYERS
    loaded.file.write_text(loaded.file.read_text().replace("min_starter_layers: 20", "min_starter_layers: 31"))
    with pytest.raises(PlanError, match="min_starter_layers: 31 layers are to stay on desk, and the model has 30"):
        planned_ring(load_topology(loaded.file), read_profiles(kept), LAYERS)
