"""What a Ring that has changed costs, by what was measured before."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mdiq.core.types import LayerRange
from mdiq.plan.pace import StageCost
from mdiq.runtime.loaded_ring import LoadedRing

LAYER_S, HEAD_LAYERS = 0.001, 8


def _options(*counts: int) -> Any:
    stops = [sum(counts[: i + 1]) for i in range(len(counts))]
    layers = [LayerRange(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
    return SimpleNamespace(layers=layers, node_names=["desk", "pi1", "pi2"][: len(counts)])


def _cost(num_layers: int, head_layers: int) -> StageCost:
    """Of a prompt only the last row goes to the head, which is left out here."""
    decode_s = (num_layers + head_layers) * LAYER_S
    return StageCost.of(((1, decode_s), (4, 2 * decode_s)), ((64, 20 * num_layers * LAYER_S),))


def test_a_starter_with_more_layers_has_one_head_as_before() -> None:
    stage = SimpleNamespace(runner=SimpleNamespace(config=SimpleNamespace(head_layers=HEAD_LAYERS)))
    costs = [_cost(3, HEAD_LAYERS), _cost(10, 0), _cost(11, 0)]
    ring = LoadedRing(_options(3, 10, 11), cast(Any, stage), [], costs, layer_bytes=1.0)
    for counts in ((8, 16), (24,), (2, 11, 11)):
        after = ring.as_reshaped(_options(*counts), [])
        for i, count in enumerate(counts):
            expected = _cost(count, 0 if i else HEAD_LAYERS)
            for size in (1, 4):
                assert after.costs[i].decode.seconds(size) == pytest.approx(expected.decode.seconds(size))
            assert after.costs[i].prompt.seconds(64) == pytest.approx(expected.prompt.seconds(64))
    assert ring._layer_s == pytest.approx([LAYER_S] * 3)
