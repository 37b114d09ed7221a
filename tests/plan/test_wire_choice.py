"""What travels on a Hop follows from the link, the Stages and what i8 costs."""

import pytest

from mdiq.core.hop_survey import HopLink
from mdiq.core.wire_formats import AUTO
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost
from mdiq.plan.wire_choice import WORTH, WireCosts, choose_wires

MBIT = 1e6 / 8
LOOPBACK = HopLink(1e-4, 1e9)
PACKING = Curve(((1, 5e-5), (64, 2e-4)))


def _costs(
    *, width: int = 2_048, stage_s: float = 0.05, more_s: float = 0.002, cap: int = 4, num_stages: int = 2
) -> WireCosts:
    """Return costs of Stages whose forward takes ``stage_s`` and ``more_s`` for each row behind the first."""
    decode = Curve(((1, stage_s), (2, stage_s + more_s)))
    prompt = Curve(((16, stage_s), (64, stage_s + 48 * more_s)))
    return WireCosts(width, [StageCost(decode, prompt)] * num_stages, cap, PACKING)


def test_a_fast_link_has_bf16() -> None:
    assert choose_wires((AUTO, AUTO), (LOOPBACK, LOOPBACK), _costs()) == ("bf16", "bf16")


def test_a_slow_link_has_i8_and_only_that_one() -> None:
    slow = HopLink(0.001, 1 * MBIT)
    assert choose_wires((AUTO,) * 3, (LOOPBACK, slow, LOOPBACK), _costs()) == ("bf16", "i8", "bf16")


def test_a_delay_alone_is_no_reason_for_i8() -> None:
    assert choose_wires((AUTO, AUTO), (HopLink(0.2, 1e9),) * 2, _costs()) == ("bf16", "bf16")


def test_what_the_operator_wants_is_left_alone() -> None:
    slow = HopLink(0.001, 1 * MBIT)
    assert choose_wires(("f32", AUTO, "i8"), (slow, slow, LOOPBACK), _costs()) == ("f32", "i8", "i8")


def test_a_link_that_was_not_measured_has_bf16() -> None:
    assert choose_wires((AUTO, AUTO), (None, HopLink(0.001, 1 * MBIT)), _costs()) == ("bf16", "i8")


def test_i8_that_failed_its_check_is_not_chosen_but_what_the_operator_wants_stays() -> None:
    slow = HopLink(0.001, 1 * MBIT)
    assert choose_wires((AUTO, "i8"), (slow, slow), _costs(), avoid_small=True) == ("bf16", "i8")


@pytest.mark.parametrize(("share", "wire"), [(WORTH * 0.9, "bf16"), (WORTH * 1.1, "i8")])
def test_a_lone_sequence_has_i8_where_it_saves_a_share_of_the_lap(share: float, wire: str) -> None:
    # A row saves 2,044 bytes, and packing takes 50 us; Stages are so slow that no link holds them up.
    link = HopLink(0.0, 10 * MBIT)
    saved_s = 2_044 / link.bytes_per_s - 5e-5
    costs = _costs(stage_s=saved_s / share / 2, more_s=1.0)
    assert choose_wires((AUTO, AUTO), (link, HopLink(0.0, 1e12)), costs)[0] == wire


@pytest.mark.parametrize(("cap", "wire"), [(8, "bf16"), (32, "i8")])
def test_a_link_that_a_full_micro_batch_keeps_busier_than_a_stage_has_i8(cap: int, wire: str) -> None:
    # 8 rows take 27 ms and 32 take 106 ms; a lone row saves 1.6 ms of a Lap of 400 ms.
    costs = _costs(stage_s=0.1, more_s=1e-5, cap=cap)
    costs = WireCosts(2_048, [StageCost(c.decode, Curve(((64, 9.0),))) for c in costs.stages], cap, PACKING)
    assert choose_wires((AUTO, AUTO), (HopLink(0.1, 10 * MBIT),) * 2, costs) == (wire, wire)


@pytest.mark.parametrize(("mbit", "wire"), [(30, "bf16"), (10, "i8")])
def test_a_link_that_holds_up_a_long_prompt_has_i8(mbit: float, wire: str) -> None:
    # 64 rows take 70 ms at 30 Mb/s and 210 ms at 10 Mb/s.
    costs = _costs(stage_s=0.1, more_s=0.0, cap=1)
    # The last Hop carries one row of a prompt.
    assert choose_wires((AUTO, AUTO), (HopLink(0.1, mbit * MBIT),) * 2, costs) == (wire, "bf16")


def test_packing_that_takes_longer_than_it_saves_is_not_worth_it() -> None:
    # The Stages take no time, so that any link holds them up.
    fast_stages = _costs(stage_s=0.0, more_s=0.0)
    assert choose_wires((AUTO, AUTO), (LOOPBACK, LOOPBACK), fast_stages) == ("bf16", "bf16")
    assert choose_wires((AUTO, AUTO), (HopLink(0.0, 1e6),) * 2, fast_stages) == ("i8", "i8")
