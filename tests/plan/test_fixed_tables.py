"""MDI-LLM's fixed splits."""

import pytest

from mdiq.plan.fixed_tables import mdi_split


@pytest.mark.parametrize(
    ("num_layers", "two", "three"),
    [
        (12, (5, 7), (2, 5, 5)),
        (22, (10, 12), (6, 8, 8)),
        (24, (10, 14), (4, 10, 10)),
        (32, (14, 18), (8, 12, 12)),
        (36, (16, 20), (10, 13, 13)),
        (48, (22, 26), (14, 17, 17)),
    ],
)
def test_the_tables_are_those_of_the_paper(num_layers: int, two: tuple[int, ...], three: tuple[int, ...]) -> None:
    assert mdi_split(num_layers, 2) == two
    assert mdi_split(num_layers, 3) == three


def test_there_is_none_for_other_models_and_rings() -> None:
    assert mdi_split(30, 2) is None
    assert mdi_split(32, 4) is None
