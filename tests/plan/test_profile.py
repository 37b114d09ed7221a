"""What the planner is told, and what follows from it."""

import math
from dataclasses import replace

import pytest

from mdiq.core.types import NodeId
from mdiq.core.work import Work
from mdiq.plan.micro_batches import Curve
from mdiq.plan.profile import FRAME_BYTES, SEGMENT_BYTES, UNKNOWN_HOP, HopProfile, Links, ModelShape
from tests.plan.profiles import MIB, MODEL, node

A, B, C, D = (NodeId(name) for name in "abcd")


def test_a_stage_takes_its_layers_its_head_and_what_a_forward_takes() -> None:
    desk = node("desk")
    cost = desk.stage_cost(10, 0, is_starter=True)
    assert cost.decode.seconds(4) == pytest.approx(10 * 0.0035 + 0.0005 + 0.0072)
    assert cost.decode.seconds(32) == pytest.approx(10 * 0.021 + 0.0005 + 0.0184)
    assert cost.prompt.seconds(64) == pytest.approx(10 * 0.026 + 0.0005 + 0.006)
    assert desk.stage_cost(10, 0, is_starter=False).decode.seconds(4) == pytest.approx(10 * 0.0035 + 0.0005)


def test_work_takes_what_its_batches_take_on_average() -> None:
    pi1 = replace(node("pi1"), forward_s=0.0)
    assert pi1.work_s(Work(9.0, 10, 40), 3) == pytest.approx(10 * 3 * 0.0035)
    assert pi1.work_s(Work(9.0, 10, 40, 2, 128), 3) == pytest.approx(10 * 3 * 0.0035 + 2 * 3 * 0.026)
    assert pi1.work_s(Work(), 3) == 0.0


def test_what_handling_takes_from_forwards_is_counted_once() -> None:
    alone_s, desk = 10 * 3 * 0.0035, replace(node("desk"), forward_s=0.002)

    def factor(forwards_s: float) -> float:
        return forwards_s / desk.work_s(Work(forwards_s, 10, 40), 3)

    assert factor(alone_s) == pytest.approx(1.0), "it came between forwards"
    assert factor(alone_s + 0.015) == factor(alone_s + 10 * 0.002) == pytest.approx(1.0), "it ran beside some, or all"
    assert factor(2 * alone_s + 10 * 0.002) == pytest.approx(2.0)
    assert factor(alone_s / 2) == pytest.approx(0.5)


def test_under_load_everything_takes_as_many_times_as_long() -> None:
    once, twice = node("pi1"), replace(node("pi1"), under_load=2.0).as_under_load()
    for is_starter in (False, True):
        costs = [each.stage_cost(5, 100, is_starter=is_starter) for each in (once, twice)]
        assert costs[1].decode.seconds(4) == pytest.approx(2 * costs[0].decode.seconds(4))
        assert costs[1].prompt.seconds(64) == pytest.approx(2 * costs[0].prompt.seconds(64))
    assert once.as_under_load() == once


def test_a_context_costs_each_segment_and_layer_its_share() -> None:
    desk = replace(node("desk"), context_s=1e-6)
    assert desk.layer_s(4, 500) == pytest.approx(0.0035 + 4 * 500e-6)
    assert desk.stage_cost(3, 500, is_starter=False).decode.seconds(6) == pytest.approx(
        3 * desk.layer_s(6, 500) + 0.0005
    )


def test_only_a_node_that_measured_the_head_can_be_the_starter() -> None:
    worker = replace(node("pi1"), head=None)
    assert worker.stage_cost(2, 0, is_starter=False).decode.seconds(1) == pytest.approx(0.0045)
    with pytest.raises(ValueError, match="pi1: the Starter needs the head's cost"):
        worker.stage_cost(2, 0, is_starter=True)


@pytest.mark.parametrize(
    ("memory_mib", "is_starter", "most"),
    # 300 MiB of the process and 60 MiB of activations; embedding and head of 120 MiB; 56 MiB a Layer.
    [
        (359, False, 0),
        (415, False, 0),
        (416, False, 1),
        (535, True, 0),
        (536, True, 1),
        (536, False, 3),
        (9_999, True, 32),
    ],
)
def test_a_node_holds_what_its_memory_leaves_beside_process_activations_and_ends(
    memory_mib: int, is_starter: bool, most: int
) -> None:
    assert node("pi1", memory_mib=memory_mib).max_layers(MODEL, 2_048, is_starter=is_starter) == most


def test_embedding_and_head_are_the_starters() -> None:
    assert MODEL.stage_bytes(2, is_starter=True) == 200 * MIB
    assert MODEL.stage_bytes(2, is_starter=False) == 80 * MIB


def test_a_line_is_busy_for_every_frame_and_row() -> None:
    hop = HopProfile(0.01, 1e6)
    row_bytes = SEGMENT_BYTES + MODEL.row_bytes
    assert hop.send_s(2, 7, MODEL) == pytest.approx((2 * FRAME_BYTES + 7 * row_bytes) / 1e6)
    assert hop.send_curve(MODEL).seconds(9) == pytest.approx(hop.send_s(1, 9, MODEL))
    assert replace(hop, row_bytes=100).send_s(1, 1, MODEL) == pytest.approx((FRAME_BYTES + SEGMENT_BYTES + 100) / 1e6)
    assert HopProfile(0.01).send_s(5, 5, MODEL) == 0


def test_a_hop_that_nobody_measured_is_as_bad_as_the_worse_line_of_its_ends() -> None:
    """The way to b and from it is bad, so it is b's line that is bad, and a and c are near each other."""
    links = Links(
        {
            (A, B): HopProfile(0.05, 1e6),
            (B, C): HopProfile(0.04, 2e6),
            (C, A): HopProfile(0.001, 9e6),
        }
    )
    assert links.between(A, B) == HopProfile(0.05, 1e6)
    assert links.between(A, C) == HopProfile(0.001, 9e6)
    assert links.between(C, B) == HopProfile(0.04, 2e6)
    assert links.between(A, D) == HopProfile(0.001, 9e6)
    assert links.between(D, NodeId("e")) == UNKNOWN_HOP


def test_a_twin_has_hops_as_good_as_its_brothers() -> None:
    links = Links({(A, B): HopProfile(0.05), (B, A): HopProfile(0.04)}).with_twin(B, C)
    assert links.between(A, C) == HopProfile(0.05)
    assert links.between(C, A) == HopProfile(0.04)
    assert links.between(A, B) == HopProfile(0.05)


@pytest.mark.parametrize(("delay_s", "bytes_per_s"), [(-1.0, 1.0), (0.0, 0.0), (0.0, math.nan)])
def test_a_hop_that_cannot_be_is_refused(delay_s: float, bytes_per_s: float) -> None:
    with pytest.raises(ValueError, match="a delay of at least 0 and a rate above 0"):
        HopProfile(delay_s, bytes_per_s)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        ModelShape(0, 1, 1, 1, 1)


def test_a_curve_of_one_point_is_flat_in_a_stage_too() -> None:
    flat = replace(node("pi1"), layer_decode=Curve(((1, 0.01),)), head=None)
    assert flat.stage_cost(2, 0, is_starter=False).decode.seconds(50) == pytest.approx(0.0205)
