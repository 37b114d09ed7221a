from dataclasses import replace

import pytest

from mdiq.report.rules import Facts, RuleName, Verdict, recommend

GIB = 1 << 30
LARGE = Facts(
    passed=(True, True, True),
    num_stages=3,
    answers_equal=True,
    recovered=True,
    one_device_bytes=8 * GIB,
    device_bytes=4 * GIB,
    copies_tokens_per_s=30.0,
    ring_tokens_per_s=10.0,
)


def test_a_model_too_large_for_one_device_is_for_the_ring() -> None:
    found = recommend(LARGE)
    assert (found.verdict, found.by, found.stage) == (Verdict.RING, RuleName.ALL, 2)


def test_a_model_that_fits_one_device_is_better_served_by_whole_copies() -> None:
    found = recommend(replace(LARGE, device_bytes=9 * GIB))
    assert (found.verdict, found.by, found.stage) == (Verdict.COPIES, RuleName.FITS, None)
    rule = next(rule for rule in found.rules if rule.name is RuleName.FITS)
    assert (rule.holds, rule.value, rule.limit) == (True, 30.0, 10.0)


@pytest.mark.parametrize(
    "change",
    [
        {"device_bytes": int(8.7 * GIB)},  # less than a tenth more than the model takes
        {"device_bytes": 9 * GIB, "copies_tokens_per_s": 9.9},
    ],
)
def test_copies_need_room_and_must_not_be_slower(change: dict[str, float]) -> None:
    assert recommend(replace(LARGE, **change)).verdict is Verdict.RING  # type: ignore[arg-type]


def test_wrong_answers_and_a_failed_drill_come_first() -> None:
    fits = replace(LARGE, device_bytes=9 * GIB)
    assert recommend(replace(fits, answers_equal=False, recovered=False)).by is RuleName.ANSWERS
    found = recommend(replace(fits, recovered=False))
    assert (found.verdict, found.by) == (Verdict.STOP, RuleName.RECOVERY)
    assert recommend(replace(fits, recovered=None)).verdict is Verdict.COPIES


@pytest.mark.parametrize(
    ("passed", "verdict", "stage"),
    [
        ((True, True, False), Verdict.STAY, 1),
        ((True, False, True), Verdict.STAY, 0),
        ((True,), Verdict.STAY, 0),
        ((False, True, True), Verdict.STOP, None),
        ((False,), Verdict.STOP, None),
    ],
)
def test_the_ring_grows_as_far_as_the_gates_passed(
    passed: tuple[bool, ...], verdict: Verdict, stage: int | None
) -> None:
    found = recommend(replace(LARGE, passed=passed))
    assert (found.verdict, found.stage) == (verdict, stage)


def test_price_and_one_more_device_are_advice() -> None:
    found = recommend(replace(LARGE, cost_per_million=2.0, price_per_million=1.5, one_more_gain=1.2, num_left_out=1))
    holds = {rule.name: rule.holds for rule in found.rules}
    assert found.verdict is Verdict.RING
    assert (holds[RuleName.PRICE], holds[RuleName.ONE_MORE], holds[RuleName.LEFT_OUT]) == (True, True, True)
    unknown = {rule.name: rule.holds for rule in recommend(LARGE).rules}
    assert (unknown[RuleName.PRICE], unknown[RuleName.ONE_MORE]) == (None, None)
    cheaper = recommend(replace(LARGE, cost_per_million=1.0, price_per_million=1.5, one_more_gain=1.04))
    holds = {rule.name: rule.holds for rule in cheaper.rules}
    assert (holds[RuleName.PRICE], holds[RuleName.ONE_MORE]) == (False, False)
