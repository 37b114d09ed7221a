"""What `mdiq perplexity` lets packed weights cost."""

import math

import pytest
import torch

from mdiq.service.perplexity import Row, compared, max_ratio


@pytest.mark.parametrize(
    ("weights", "best", "expected"),
    [
        ("plain", "int8", None),
        ("int8", "int8", 1.005),
        ("int8", "int4", 1.005),
        ("int4", "int4", 1.01),
        ("int4", "int8", 1.04),
    ],
)
def test_four_bits_may_cost_little_where_the_file_has_no_more(weights: str, best: str, expected: float | None) -> None:
    assert max_ratio(weights, best) == expected


def test_ratios_come_with_what_chance_may_add() -> None:
    plain = torch.arange(100, dtype=torch.float64)
    more = torch.tensor([0.0, 0.02], dtype=torch.float64).repeat(50)
    ratio, error = compared(plain + more, plain)
    assert ratio == pytest.approx(math.exp(0.01))
    assert error == pytest.approx(ratio * 0.001)
    assert compared(plain, plain) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("ratio", "error", "most", "expected"),
    [(1.004, 0.003, 1.005, True), (1.01, 0.003, 1.005, True), (1.012, 0.003, 1.005, False), (9.0, 0.0, None, True)],
)
def test_a_bound_is_missed_where_chance_does_not_explain_it(
    ratio: float, error: float, most: float | None, expected: bool
) -> None:
    assert Row("int8", "exact", 15.0, ratio, error, most, 1).is_within == expected
