"""The small values and their invariants."""

import pytest

from mdiq.core.types import LayerRange, RingSpec


def test_a_layer_range_is_half_open() -> None:
    layers = LayerRange(8, 16)
    assert (len(layers), list(layers)[0], list(layers)[-1], str(layers)) == (8, 8, 15, "8-15")


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 3), (4, 2)])
def test_a_layer_range_without_layers_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="needs 0 <= start < stop"):
        LayerRange(start, stop)


@pytest.mark.parametrize(("num_live", "cap"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (99, 4)])
def test_the_last_cap_holds_for_more_sequences(num_live: int, cap: int) -> None:
    assert RingSpec(2, 10, 10, caps=(1, 2, 4)).cap(num_live) == cap


def test_a_ring_spec_with_counts_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every count"):
        RingSpec(0, 10, 10)
    for caps in ((), (1, 0)):
        with pytest.raises(ValueError, match="caps"):
            RingSpec(2, 10, 10, caps=caps)
        with pytest.raises(ValueError, match="shared_chunks"):
            RingSpec(2, 10, 10, shared_chunks=caps)


def test_the_last_shared_chunk_holds_for_more_sequences() -> None:
    spec = RingSpec(2, 10, 10, shared_chunks=(64, 32))
    assert [spec.shared_chunk(num_live) for num_live in (0, 1, 2, 9)] == [64, 64, 32, 32]
