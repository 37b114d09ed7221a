"""Where Hops of another format come in, what runs ends first: it would go on with other tokens."""

import asyncio

import pytest

from tests.runtime.test_ring_changes import FORMED_S, TAKEN_S, TOLERANCE_S, asked, has_layers, layers, live
from tests.virtual.house import NUM_LAYERS, House


@pytest.mark.parametrize("wires", [("bf16",), ("f32", "bf16", "f32")])
def test_another_format_counts_from_the_reload_on(wires: tuple[str, ...]) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        house.wires = wires
        house.reload()
        await house.answered(60.0)
        await asyncio.sleep(1.0)
        await house.serving(20.0)
        assert [hop.wire for hop in house.rings[-1].hops()] == [wires[i % len(wires)] for i in range(3)]
        assert [answer.error for answer in house.answers] == [None] * 3 and len(house.rings) == 2

    live(act, is_kept=False)


def test_a_starter_alone_takes_a_node_in_again_over_hops_that_round_when_nothing_runs() -> None:
    async def act(house: House) -> None:
        house.wires = ("bf16",)
        await house.serving(FORMED_S)
        await house.crash("pi1")
        await has_layers(house, {"desk": NUM_LAYERS}, TOLERANCE_S + TAKEN_S + 5.0)
        house.layer_s = dict.fromkeys(("desk", "pi1"), lambda _: 0.02)
        answer = house.ask(max_tokens=200)
        await asyncio.sleep(1.0)
        house.start_node("pi1")
        await house.answered(60.0)
        assert answer.ended_s - answer.asked_s > 20.0 and layers(house) == {"desk": NUM_LAYERS}
        await has_layers(house, {"desk": 3, "pi1": 3}, 60.0)

    live(act, num_nodes=1)
