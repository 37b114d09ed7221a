"""What Stages measured becomes what the planner is told, and a file of it."""

import json
import math
from dataclasses import replace

import pytest

from mdiq.core.hop_survey import HopLink
from mdiq.plan.measured import MeasuredRing, MeasuredStage, differing_kinds, from_json, profiles_of, to_json
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost

MIB = 1 << 20
HEAD = Curve(((1, 0.004), (4, 0.006)))
WIRES = (("bf16", HopLink(0.001, 1e7)), ("i8", HopLink(0.002, None)), ("f32", None))


def _stage(name: str, num_layers: int, *, extra_s: float = 0.0, ends_bytes: int = 0) -> MeasuredStage:
    """A Stage whose Layers take 1 ms for one Segment, 2 ms for four, and 10 ms for 64 tokens of a prompt."""
    decode = ((1, 0.001 * num_layers + extra_s), (4, 0.002 * num_layers + 1.5 * extra_s))
    return MeasuredStage(
        name=name,
        num_layers=num_layers,
        cost=StageCost.of(decode, ((64, 0.010 * num_layers + extra_s),)),
        weight_bytes=num_layers * 3 * MIB + ends_bytes,
        kv_bytes_per_token=num_layers * 100,
        rss_bytes=400 * MIB,
        free_bytes=600 * MIB,
    )


def _ring() -> MeasuredRing:
    stages = (_stage("desk", 4, extra_s=0.004, ends_bytes=60 * MIB), _stage("pi1", 10), _stage("pi2", 16))
    return MeasuredRing(30, stages, HEAD, 64, WIRES)


def test_a_layers_cost_is_its_part_of_a_forward_without_the_head() -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    for node in profiles.nodes.values():
        assert [node.layer_decode.seconds(size) for size in (1, 4)] == pytest.approx([0.001, 0.002])
        assert node.layer_prompt.seconds(64) == pytest.approx(0.010)
        assert node.memory_bytes == 1_000 * MIB
        assert (node.head is not None) == (node.name == "desk")
    assert profiles.nodes["pi1"].process_bytes == 370 * MIB


def test_the_model_weighs_what_its_stages_say() -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    model = profiles.model
    assert (model.num_layers, model.layer_bytes, model.ends_bytes) == (30, 3 * MIB, 60 * MIB)
    assert (model.kv_bytes, model.row_bytes, model.weights) == (100, 256, "int8")


def test_hops_are_kept_with_the_rows_of_their_wire() -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    hops = {ends: (hop.delay_s, hop.bytes_per_s, hop.row_bytes) for ends, hop in profiles.links.hops.items()}
    assert hops == {
        ("desk", "pi1"): (0.001, 1e7, 128),
        ("pi1", "pi2"): (0.002, math.inf, 68),
    }  # i8 has a scale in each row


def test_a_head_that_seems_longer_than_its_forward_leaves_layers_some_time() -> None:
    ring = replace(_ring(), head=Curve(((1, 1.0),)))
    profiles = profiles_of(ring, "int8")
    assert profiles is not None
    assert profiles.nodes["desk"].layer_decode.seconds(1) > 0


def test_what_was_known_before_stays_and_what_is_measured_again_is_new() -> None:
    before = profiles_of(_ring(), "int8")
    assert before is not None
    slow = replace(_stage("pi1", 26), cost=StageCost.of(((1, 2.6),), ((64, 26.0),)))
    shorter = MeasuredRing(30, (_ring().stages[0], slow), HEAD, 64, (("bf16", HopLink(0.5, 1.0)), ("bf16", None)))
    profiles = profiles_of(shorter, "int8", before)
    assert profiles is not None
    assert set(profiles.nodes) == {"desk", "pi1", "pi2"}
    assert profiles.nodes["pi1"].layer_decode.seconds(1) == pytest.approx(0.1)
    assert profiles.links.hops[("desk", "pi1")].delay_s == 0.5  # type: ignore[index]
    assert ("pi1", "pi2") in profiles.links.hops


def test_a_ring_of_one_node_tells_nothing_new() -> None:
    before = profiles_of(_ring(), "int8")
    alone = MeasuredRing(30, (_stage("desk", 30),), HEAD, 64, ())
    assert profiles_of(alone, "int8") is None
    assert profiles_of(alone, "int8", before) is before


def test_profiles_of_some_nodes_keep_to_their_limits() -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    found = profiles.of(["desk", "pi2"], {"desk": None, "pi2": 700 * MIB})
    assert found is not None
    assert [node.memory_bytes for node in found] == [1_000 * MIB, 700 * MIB]
    assert profiles.of(["desk", "pi9"], {}) is None


def test_a_node_that_becomes_the_starter_has_yet_to_measure_the_head() -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    assert profiles.unknown(["desk", "pi1", "pi9"]) == ["pi9"]
    assert profiles.unknown(["pi1", "desk"]) == ["pi1"]
    assert profiles.of(["pi1", "desk"], {}) is None


def test_a_file_gives_back_what_was_written() -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    assert from_json(to_json(profiles)) == profiles


@pytest.mark.parametrize("part", ["model", "nodes", "hops"])
def test_a_file_that_is_none_of_ours_is_as_good_as_none(part: str) -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    value = json.loads(to_json(profiles))
    for junk in (None, 5, [5], {"num_layers": 0}, [{"name": "x"}]):
        assert from_json(json.dumps({**value, part: junk})) is None
    assert from_json(json.dumps({**value, "version": 2})) is None
    for text in ("", "{", "[]", "[" * 100_000):
        assert from_json(text) is None


@pytest.mark.parametrize("key", ["num_layers", "layer_bytes", "ends_bytes", "kv_bytes", "row_bytes"])
@pytest.mark.parametrize("junk", [None, "1", 1.5, -1, math.nan, math.inf])
def test_a_file_with_a_size_that_is_no_whole_number_is_as_good_as_none(key: str, junk: object) -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    value = json.loads(to_json(profiles))
    value["model"][key] = junk
    assert from_json(json.dumps(value)) is None


@pytest.mark.parametrize("junk", [-1.0, math.nan, math.inf])
def test_a_file_with_a_time_that_no_clock_gave_is_as_good_as_none(junk: float) -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    for change in ("layer_decode", "layer_prompt", "head"):
        value = json.loads(to_json(profiles))
        value["nodes"][0][change][0][1] = junk
        assert from_json(json.dumps(value)) is None
    value = json.loads(to_json(profiles))
    value["hops"][0]["delay_s"] = junk
    assert from_json(json.dumps(value)) is None


def test_kinds_of_cpu_are_kept_and_those_that_differ_are_named() -> None:
    desk, pi1, pi2 = _ring().stages
    stages = (replace(desk, cpu="x86_64 AVX2"), replace(pi1, cpu="aarch64 DEFAULT"), replace(pi2, cpu="x86_64 AVX2"))
    profiles = profiles_of(replace(_ring(), stages=stages), "int8")
    assert profiles is not None and from_json(to_json(profiles)) == profiles
    cpus = {str(name): node.cpu for name, node in profiles.nodes.items()}
    assert differing_kinds(cpus) == "aarch64 DEFAULT: pi1; x86_64 AVX2: desk, pi2"
    assert differing_kinds(cpus | {"pi1": ""}) == ""


def test_a_file_of_before_kinds_of_cpu_were_kept_is_read() -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    value = json.loads(to_json(profiles))
    for node in value["nodes"]:
        del node["cpu"]
    assert from_json(json.dumps(value)) == profiles


def test_a_process_takes_what_it_took_at_most_while_it_loaded() -> None:
    desk, pi1, pi2 = _ring().stages
    profiles = profiles_of(replace(_ring(), stages=(desk, replace(pi1, peak_bytes=647 * MIB), pi2)), "int8")
    assert profiles is not None
    assert profiles.nodes["pi1"].process_bytes == (647 - 30) * MIB
    assert profiles.nodes["pi2"].process_bytes == (400 - 48) * MIB


def _pi1_measured(*layer_s: float, cpu: str = "") -> float:
    """Return the cost of pi1's Layer as the planner has it, after Rings in which it was measured with these."""
    profiles = None
    for i, time_s in enumerate(layer_s):
        slow = StageCost.of(((1, 10 * time_s), (4, 20 * time_s)), ((64, 100 * time_s),))
        pi1 = replace(_stage("pi1", 10), cost=slow, cpu=cpu if i else "")
        profiles = profiles_of(replace(_ring(), stages=(_ring().stages[0], pi1, _ring().stages[2])), "int8", profiles)
    assert profiles is not None
    node = profiles.nodes["pi1"]
    assert node.layer_prompt.seconds(64) == pytest.approx(10 * node.layer_decode.seconds(1))
    return node.layer_decode.seconds(1)


def test_costs_that_are_measured_again_go_halfway_unless_the_device_has_changed() -> None:
    assert _pi1_measured(0.001, 0.001) == pytest.approx(0.001)
    assert _pi1_measured(0.001, 0.0016) == pytest.approx(0.001 * 1.6**0.5)
    # An error of once fades; a device that became slower is known as that before long.
    assert _pi1_measured(0.0016, 0.001, 0.001, 0.001, 0.001) == pytest.approx(0.001, rel=0.03)
    assert _pi1_measured(0.001, 0.0016, 0.0016, 0.0016, 0.0016) == pytest.approx(0.0016, rel=0.03)
    # It has changed.
    assert _pi1_measured(0.001, 0.0021) == pytest.approx(0.0021)
    assert _pi1_measured(0.001, 0.0004) == pytest.approx(0.0004)
    assert _pi1_measured(0.001, 0.0016, cpu="aarch64") == pytest.approx(0.0016)


def test_the_head_goes_halfway_too_and_other_sizes_are_new() -> None:
    before = profiles_of(_ring(), "int8")
    slower = Curve(tuple((size, 1.44 * time_s) for size, time_s in HEAD.points))
    profiles = profiles_of(replace(_ring(), head=slower), "int8", before)
    assert profiles is not None and profiles.nodes["desk"].head is not None
    assert profiles.nodes["desk"].head.seconds(1) == pytest.approx(1.2 * HEAD.seconds(1))
    other = profiles_of(replace(_ring(), head=Curve(((2, 1.0),))), "int8", before)
    assert other is not None and other.nodes["desk"].head == Curve(((2, 1.0),))


def test_what_load_has_shown_is_kept_and_planned_with() -> None:
    measured = profiles_of(_ring(), "int8")
    assert measured is not None and measured.nodes["pi1"].under_load is None
    profiles = from_json(to_json(measured.under_load({"pi1": 1.9})))
    assert profiles is not None
    assert {name: node.under_load for name, node in profiles.nodes.items()} == {"desk": None, "pi1": 1.9, "pi2": None}
    assert profiles.nodes["pi1"].layer_decode == measured.nodes["pi1"].layer_decode
    planned = profiles.of(["desk", "pi1"], {})
    assert planned is not None
    assert [node.layer_decode.seconds(1) for node in planned] == pytest.approx([0.001, 0.0019])


def test_what_forwards_cost_the_event_loops_is_kept_and_planned_with_also_when_layers_are_measured_again() -> None:
    measured = profiles_of(_ring(), "int8")
    assert measured is not None
    kept = from_json(to_json(measured.with_handling({"desk": 0.002})))
    assert kept is not None
    for profiles in (kept, profiles_of(_ring(), "int8", kept)):
        assert profiles is not None
        planned = profiles.of(["desk", "pi1"], {})
        assert planned is not None and [node.forward_s for node in planned] == [0.002, 0.0]


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan, "much"])
def test_a_file_with_a_factor_that_is_none_is_as_good_as_none(factor: object) -> None:
    profiles = profiles_of(_ring(), "int8")
    assert profiles is not None
    value = json.loads(to_json(profiles))
    value["nodes"][0]["under_load"] = factor
    assert from_json(json.dumps(value)) is None


@pytest.mark.parametrize(
    ("under_load", "layer_s", "left"),
    [
        (1.9, 0.001, 1.9),  # it is slow only while it serves
        (1.9, 0.0019, 1.9 / math.sqrt(1.9)),  # it is slow for good, and the costs have gone halfway
        (1.9, 0.0025, 1.0),  # the same, and all of it
        (1.9, 0.0008, 1.9),  # faster alone: load has to show that
        (0.5, 0.0004, 1.0),  # it was busy when it measured itself
        (0.5, 0.001, 0.5),
    ],
)
def test_what_a_new_measurement_explains_does_not_count_twice(under_load: float, layer_s: float, left: float) -> None:
    before = profiles_of(_ring(), "int8")
    assert before is not None
    stage = _stage("pi1", 10)
    factor = layer_s / 0.001
    cost = StageCost(stage.cost.decode.scaled(factor), stage.cost.prompt.scaled(factor))
    ring = replace(_ring(), stages=(_ring().stages[0], replace(stage, cost=cost), _ring().stages[2]))
    after = profiles_of(ring, "int8", before.under_load({"pi1": under_load}))
    assert after is not None and after.nodes["pi1"].under_load == pytest.approx(left)
    assert after.nodes["desk"].under_load is None


def test_another_processor_has_not_been_seen_under_load() -> None:
    before = profiles_of(_ring(), "int8")
    assert before is not None
    ring = replace(_ring(), stages=tuple(replace(stage, cpu="another") for stage in _ring().stages))
    after = profiles_of(ring, "int8", before.under_load({"pi1": 1.9}))
    assert after is not None and after.nodes["pi1"].under_load is None
