from dataclasses import replace

import pytest

from mdiq.report.gates import GateName, Limits, Shown, all_pass, gates

GOOD = Shown(
    users=4,
    equal=4,
    tokens_per_s=8.0,
    predicted_tokens_per_s=10.0,
    token_p95_s=0.4,
    before=7.0,
    min_gain=1.05,
    rss_bytes=900,
    device_bytes=1000,
    recovered=4,
    recovery_s=12.0,
)


def test_a_good_stage_passes_every_gate() -> None:
    found = gates(GOOD, Limits())
    assert [gate.name for gate in found] == [*GateName]
    assert all_pass(found)
    assert {gate.name: gate.value for gate in found} == {
        GateName.ANSWERS: 1.0,
        GateName.PREDICTION: 0.8,
        GateName.THROUGHPUT: 8.0,
        GateName.GAIN: 8 / 7,
        GateName.MEMORY: 900,
        GateName.LATENCY: 0.4,
        GateName.RECOVERY_ANSWERS: 1.0,
        GateName.RECOVERY: 12.0,
    }


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"equal": 3}, GateName.ANSWERS),
        ({"predicted_tokens_per_s": 14.0}, GateName.PREDICTION),  # 8 / 14 = 0.57
        ({"before": 7.7}, GateName.GAIN),  # 1.039
        ({"rss_bytes": 1001}, GateName.MEMORY),
        ({"token_p95_s": 1.1}, GateName.LATENCY),
        ({"recovered": 3}, GateName.RECOVERY_ANSWERS),
        ({"recovery_s": 61.0}, GateName.RECOVERY),
        ({"recovery_s": None}, GateName.RECOVERY),
    ],
)
def test_each_gate_can_fail(change: dict[str, float | None], failing: GateName) -> None:
    found = gates(replace(GOOD, **change), Limits())  # type: ignore[arg-type]
    assert [gate.name for gate in found if not gate.passes] == [failing]
    assert not all_pass(found)


def test_the_users_own_minimum_counts() -> None:
    found = gates(GOOD, Limits(min_tokens_per_s=8.5))
    assert [gate.name for gate in found if not gate.passes] == [GateName.THROUGHPUT]


def test_a_first_stage_without_a_drill_has_fewer_gates() -> None:
    found = gates(replace(GOOD, before=None, recovered=None, predicted_tokens_per_s=None, device_bytes=None), Limits())
    assert [gate.name for gate in found] == [GateName.ANSWERS, GateName.THROUGHPUT, GateName.LATENCY]
