"""What a Ring that has changed costs, by what was measured before."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mdiq.core.types import LayerRange
from mdiq.plan.pace import StageCost
from mdiq.runtime.loaded_ring import LoadedRing
from mdiq.runtime.options import RemoteNode, RemoteRing, RingOptions

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


def test_a_node_that_is_back_costs_what_it_did_and_not_what_the_others_do() -> None:
    """Not what the Starter does, which went on alone: prompts would come in chunks that are far too long for it."""
    stage = SimpleNamespace(runner=SimpleNamespace(config=SimpleNamespace(head_layers=HEAD_LAYERS)))
    slow = _cost(10, 0)
    slow = StageCost(slow.decode.scaled(7.0), slow.prompt.scaled(7.0))
    ring = LoadedRing(_options(14, 10), cast(Any, stage), [], [_cost(14, HEAD_LAYERS), slow], layer_bytes=1.0)
    alone = ring.as_reshaped(_options(24), [])
    assert alone._able("pi1", alone.options).layer_s == pytest.approx(7 * LAYER_S)
    for counts in ((14, 10), (19, 5)):
        back = alone.as_reshaped(_options(*counts), [])
        share = counts[1] / 10
        assert back.costs[1].decode.seconds(4) == pytest.approx(share * slow.decode.seconds(4))
        assert back.costs[1].prompt.seconds(64) == pytest.approx(share * slow.prompt.seconds(64))


def test_layers_are_handed_on_only_where_nobody_has_to_fetch_more_for_it() -> None:
    nodes = [RemoteNode(name, f"tcp://{name}:7002", name) for name in ("desk", "pi1", "pi2", "pi3")]
    layers = tuple(LayerRange(start, start + 3) for start in range(0, 12, 3))
    options = RingOptions(Path("model"), layers, remote=RemoteRing(tuple(nodes), "tcp://c", "tcp://w"))
    runner = SimpleNamespace(config=SimpleNamespace(head_layers=0.0))
    stage = SimpleNamespace(runner=runner, memory=lambda: (1 << 30, 1))
    ready: Any = SimpleNamespace(free_bytes=1 << 30, rss_bytes=1, weight_bytes=30)
    ring = LoadedRing(options, cast(Any, stage), [ready] * 3, [_cost(3, 0)] * 4)

    def survived(lost: list[str], at_hand: dict[str, set[int]], max_fetch_s: float) -> list[int] | None:
        disks = {name: frozenset(each) for name, each in at_hand.items()}
        found = ring.survived(options, options, lost, max_fetch_s, 10.0, disks)
        return None if found is None else [len(each) for each in found.layers]

    assert survived(["pi3"], {}, 3.0) == [3, 3, 6], "pi2 fetches three layers, pi1 none"
    assert survived(["pi3"], {}, 2.9) is None
    assert survived(["pi3"], {"pi1": {6, 7, 8}, "pi2": {9, 10, 11}}, 0.0) == [4, 4, 4]
    assert survived(["pi2", "pi3"], {"pi1": {*range(6, 12)}}, 0.0) == [6, 6], "the starter has all"
