"""Splits of layers, by hand and even."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core.types import LayerRange
from mdiq.errors import PlanError
from mdiq.plan.split import check_split, split_layers


def test_a_split_by_hand_becomes_ranges() -> None:
    assert check_split([10, 12, 8], 30) == (LayerRange(0, 10), LayerRange(10, 22), LayerRange(22, 30))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ([10, 12], "--layers 10,12: these cover 22 layers and the model has 30; add 8"),
        ([20, 12], "--layers 20,12: these cover 32 layers and the model has 30; take 2 away"),
        ([30, 0], "--layers 30,0: every node needs at least 1 layer; write for example 15,15"),
        ([40, -10], "--layers 40,-10: every node needs at least 1 layer; write for example 15,15"),
        ([], "--layers : every node needs at least 1 layer; write for example 15,15"),
    ],
)
def test_a_split_that_does_not_fit_says_what_to_do(split: list[int], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_split(split, 30)
    assert str(caught.value) == message


def test_the_later_stages_get_what_is_left_over() -> None:
    assert [len(layers) for layers in split_layers(30, 4)] == [7, 7, 8, 8]
    assert [len(layers) for layers in split_layers(30, 3)] == [10, 10, 10]


@pytest.mark.parametrize("num_nodes", [0, -1, 31])
def test_a_number_of_nodes_that_cannot_be_says_what_can(num_nodes: int) -> None:
    with pytest.raises(PlanError, match=rf"--nodes {num_nodes}: the model has 30 layers .* use 1 to 30"):
        split_layers(30, num_nodes)


@settings(deadline=None)
@given(st.integers(1, 200), st.data())
def test_an_even_split_covers_the_model_once(num_layers: int, data: st.DataObject) -> None:
    num_nodes = data.draw(st.integers(1, num_layers))
    ranges = split_layers(num_layers, num_nodes)
    assert len(ranges) == num_nodes
    assert [layer for layers in ranges for layer in layers] == list(range(num_layers))
    sizes = [len(layers) for layers in ranges]
    assert sizes == sorted(sizes) and sizes[-1] - sizes[0] <= 1
    assert check_split(sizes, num_layers) == ranges


def test_the_head_is_charged_to_the_starter() -> None:
    """SmolLM2-135M: the head weighs as much as 8 of its 30 layers."""
    assert [len(layers) for layers in split_layers(30, 2, 8.0)] == [11, 19]
    assert [len(layers) for layers in split_layers(30, 3, 8.0)] == [5, 12, 13]
    assert [len(layers) for layers in split_layers(30, 5, 8.0)] == [1, 7, 7, 7, 8]
    assert [len(layers) for layers in split_layers(30, 1, 8.0)] == [30]
    assert [len(layers) for layers in split_layers(3, 3, 8.0)] == [1, 1, 1]


def test_the_starter_keeps_the_layers_that_are_to_stay_there() -> None:
    assert [len(layers) for layers in split_layers(30, 3, min_first=16)] == [16, 7, 7]
    assert split_layers(30, 3, min_first=10) == split_layers(30, 3)
    with pytest.raises(PlanError, match=r"29 layers on the starter leave 1 of 30 for 2 other nodes.* write 28 or less"):
        split_layers(30, 3, min_first=29)
    with pytest.raises(PlanError, match="31 layers on the starter leave 0 of 30"):
        split_layers(30, 1, min_first=31)
    assert check_split([12, 18], 30, min_first=12)
    with pytest.raises(PlanError, match="--layers 11,19: 12 layers are to stay on the starter"):
        check_split([11, 19], 30, min_first=12)
