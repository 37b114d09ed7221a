"""What --measure makes of its measurements, and what --check predicts from them; nothing is measured here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mdiq.bench.figures import UserTimes
from mdiq.plan.micro_batches import Curve
from mdiq.report.catalogue import Figure, Mark, MeasuredLayers, read_catalogue
from mdiq.report.simulate_check import Case, Result, cases, check_json, check_text, frozen_s, predict, rate_of_all
from mdiq.report.simulate_measure import Machine, as_yaml, fixed_s
from mdiq.report.simulate_overhead import Overhead, Spent, fitted, with_overhead
from mdiq.testbed.link_shape import LinkShape
from tests.report.devices import BILLION, BOX, BYTES


def measured(value: float) -> Figure:
    return Figure(value, Mark.MEASURED, "by hand")


LAYERS = MeasuredLayers(
    "billion",
    "bytes",
    99_000_000,
    10_000_000,
    Curve(((1, 0.01), (16, 0.16))),
    Curve(((16, 0.16), (64, 0.64))),
    Curve(((1, 0.001), (16, 0.016))),
)
"""Each token takes 10 ms in a layer, in any batch, and 1 ms in the head."""
DEVICE = replace(
    BOX,
    name="this",
    memory_bytes=measured(8 << 30),
    read_bytes_per_s=measured(9.9e9),
    flop_per_s=measured(2e10),
    forward_s=measured(0.0),
    process_bytes=measured(300 << 20),
    idle_w=None,
    load_w=None,
    layers=(LAYERS,),
)
MACHINE = Machine(DEVICE, BILLION, BYTES, "a processor", exact=True)


def test_a_catalogue_that_was_written_is_read_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(as_yaml(MACHINE))
    read = read_catalogue(file).devices["this"]
    (layers,) = read.layers
    assert (layers.model, layers.weights) == ("billion", "bytes")
    assert (layers.layer_params, layers.head_params) == (99_000_000, 10_000_000)
    for name in ("decode", "prompt", "head"):
        for (size, time_s), point in zip(getattr(layers, name).points, getattr(LAYERS, name).points, strict=True):
            assert (size, time_s) == (point[0], pytest.approx(point[1])), name
    for name in ("memory_bytes", "read_bytes_per_s", "flop_per_s", "forward_s", "process_bytes"):
        figure, before = getattr(read, name), getattr(DEVICE, name)
        assert figure.value == pytest.approx(before.value, rel=1e-5), name
        assert (figure.mark, figure.source) == (Mark.MEASURED, "by hand")


def test_very_short_times_are_written_as_they_can_be_read(tmp_path: Path) -> None:
    quick = replace(LAYERS, decode=Curve(((1, 1e-6), (2, 1.17272e-5))), head=Curve(((1, 1e-9),)))
    device = replace(DEVICE, layers=(quick,), forward_s=measured(2e-8))
    file = tmp_path / "mine.yaml"
    file.write_text(as_yaml(replace(MACHINE, device=device)))
    read = read_catalogue(file).devices["this"]
    assert read.layers[0].decode.seconds(2) == pytest.approx(1.17272e-5)
    assert read.forward_s.value == 0.0


def test_what_a_forward_costs_beside_its_layers() -> None:
    # 2 ms and 3 ms a layer.
    assert fixed_s(0.002 + 10 * 0.003, 10, 0.002 + 0.003) == pytest.approx(0.002)
    assert fixed_s(0.03, 10, 0.003) == pytest.approx(0.0)
    assert fixed_s(0.03, 10, 0.002) == 0.0  # noise
    assert fixed_s(0.03, 1, 0.03) == 0.0


def test_forwards_and_rows_follow_from_two_loads() -> None:
    # 1 ms a forward, 0.1 ms a row.
    one, many = Spent(0.001 * 200 + 0.0001 * 200, 200, 200), Spent(0.001 * 400 + 0.0001 * 3_200, 400, 3_200)
    assert fitted(one, many) == pytest.approx((0.001, 0.0001))
    assert fitted(Spent(0.3, 100, 100), Spent(0.3, 100, 100)) == (0.003, 0.0)
    assert fitted(Spent(0.3, 100, 100), Spent(0.1, 100, 900))[1] == 0.0  # noise


def test_what_the_starters_forwards_cost_more_is_in_the_head() -> None:
    machine = with_overhead(MACHINE, Overhead(0.003, 0.0002, 0.001, 0.0001))
    assert machine.device.forward_s.value == pytest.approx(0.0011)
    head = machine.device.layers[0].head
    assert head.seconds(1) == pytest.approx(0.001 + 0.002 + 0.0001)
    assert head.seconds(16) == pytest.approx(0.016 + 0.002 + 0.0016)
    assert machine.device.layers[0].decode == LAYERS.decode


def test_a_frame_waits_for_a_frozen_node() -> None:
    # Of each 5 ms a node with half a core is frozen for 2.5: half of the frames wait 1.25 ms.
    assert frozen_s(0.5) == pytest.approx(0.000625)
    assert frozen_s(1.0) == frozen_s(2.0) == 0.0


def test_the_rings_of_a_check_take_the_cores_that_they_are_given() -> None:
    rings = cases(0.9)
    assert len(rings) == 5 and len({ring.name for ring in rings}) == 5
    assert all(sum(ring.cpus or ()) == pytest.approx(0.9) and len(ring.cpus or ()) == ring.num_nodes for ring in rings)
    assert len({*(rings[4].cpus or ())}) == 3
    assert [ring.link for ring in rings].count(None) == 3


def test_a_node_with_half_a_core_takes_twice_as_long_and_links_add_their_delay() -> None:
    whole = predict(MACHINE, Case("two", 2, 8))
    half = predict(MACHINE, Case("two", 2, 8, (0.5, 0.5)))
    assert sum(whole.layers) == 10 and min(whole.layers) >= 1
    # A token takes 101 ms of computing: two nodes make up to 19.8 of them, less where their parts are unlike.
    assert 15 < whole.rate_tokens_per_s < 20
    assert half.rate_tokens_per_s == pytest.approx(whole.rate_tokens_per_s / 2, rel=0.02)
    assert whole.one_user_tokens_per_s == pytest.approx(1 / 0.1014, rel=0.01)
    far = predict(MACHINE, Case("far", 2, 8, link=LinkShape(delay_s=0.05)))
    assert far.one_user_tokens_per_s == pytest.approx(1 / 0.2014, rel=0.01)
    slow = predict(MACHINE, Case("slow", 2, 8, link=LinkShape(bandwidth_bit_per_s=8e4)))
    # A row of 4,000 bytes and its headers take 0.41 s on a line of 10,000 bytes/s.
    assert slow.one_user_tokens_per_s == pytest.approx(1 / (0.1014 + 2 * 0.4137), rel=0.01)


def test_unlike_nodes_get_layers_by_their_speed() -> None:
    layers = predict(MACHINE, Case("unlike", 2, 16, (0.75, 0.25))).layers
    assert layers[0] > 2 * layers[1]


def test_the_rate_counts_only_while_all_users_decode() -> None:
    # From 3 s on both have tokens, and at 5 s the first one ends: 2 and 4 tokens.
    early, late = UserTimes(0.0, (1.0, 2.0, 3.0, 4.0, 5.0)), UserTimes(0.0, (3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0))
    assert rate_of_all([early, late]) == 3.0
    # Users one after the other: tokens after 9 s, over the time to the last one.
    assert rate_of_all([UserTimes(0.0, (1.0, 2.0)), UserTimes(0.0, (9.0, 9.5, 10.0))]) == 2.0


def test_a_check_says_how_far_off_it_was() -> None:
    case = Case("2 nodes", 2, 8)
    forecast = predict(MACHINE, case)
    good = Result(case, forecast, forecast.rate_tokens_per_s / 1.15, 9.0, 0.5)
    bad = replace(good, rate_tokens_per_s=forecast.rate_tokens_per_s / 0.7)
    assert (good.error, bad.error) == (pytest.approx(0.15), pytest.approx(-0.3))
    assert "largest error 15 %: within 20 %" in check_text(MACHINE, [good])
    text = check_text(MACHINE, [good, bad])
    assert "largest error 30 %: not within 20 %" in text and "+15 %" in text and "-30 %" in text
    rings = json.loads(check_json(MACHINE, [good, bad]))["rings"]
    assert [ring["error"] for ring in rings] == [pytest.approx(0.15), pytest.approx(-0.3)]
    assert rings[0]["forecast"]["rate_tokens_per_s"] == forecast.rate_tokens_per_s
