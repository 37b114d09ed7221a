"""Rings of real processes measure their hops and choose what travels on them, with the real model."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mdiq.core.sequence import SamplingParams
from mdiq.core.sequence import Sequence as TokenSequence
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_host import RingHost
from mdiq.testbed.link_shape import parse_link
from mdiq.testbed.slow_ring import SlowRing

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

WIDTH = 576
LAYERS = (LayerRange(0, 12), LayerRange(12, 30))


@asynccontextmanager
async def open_ring(model: Path, link: str | None, **changes: object) -> AsyncIterator[RingHost]:
    options = RingOptions(
        model,
        LAYERS,
        wires=("auto",),
        weights=WeightSettings(exact=False),
        kv_tokens=1_024,
        slowdown=None if link is None else SlowRing(parse_link(link)),
        **changes,  # type: ignore[arg-type]
    )
    async with RingHost(options) as ring:
        yield ring


async def answer(ring: RingHost, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return the answer; bytes on the hops are those of its prompt and ``num_tokens - 1`` Laps."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    tokens = [event.step.token async for event in ring.stream(TokenSequence(0, tuple(prompt), params))]
    assert None not in tokens
    return [token for token in tokens if token is not None]


async def test_a_slow_ring_chooses_i8_and_a_token_costs_a_byte_an_element(real_model: Path) -> None:
    async with open_ring(real_model, "delay=20ms,bandwidth=200kbit") as ring:
        hops = ring.hops()
        assert [hop.wire for hop in hops] == ["i8", "i8"]
        for hop in hops:
            assert hop.delay_s is not None and hop.delay_s >= 0.018, "the clocks are known to a millisecond or two"
            assert hop.bytes_per_s is not None and 1e4 < hop.bytes_per_s < 6e4, "25 kB/s, on a machine at work"
        assert ring.wire_check_nats is not None and 0.001 < ring.wire_check_nats < 0.1
        tokens = await answer(ring, [504, 2988, 288, 451], 20)
        assert len(tokens) == 20
        await ring.drain()
        starter, last = ring.figures()
        # A PROBE goes round once a second; else one row a token, and 4 of the prompt in one Frame on the first hop.
        probes = 100 * 60
        assert (starter.bytes_out - probes) / 23 <= WIDTH + 96
        assert (last.bytes_out - probes) / 20 <= WIDTH + 96
        assert starter.bytes_out >= 23 * WIDTH, "they are counted"


async def test_a_fast_ring_chooses_bf16(real_model: Path) -> None:
    async with open_ring(real_model, None) as ring:
        assert [hop.wire for hop in ring.hops()] == ["bf16", "bf16"]
        assert all(hop.bytes_per_s is not None and hop.bytes_per_s > 1e6 for hop in ring.hops())
        assert ring.wire_check_nats is None
        assert len(await answer(ring, [504, 2988], 3)) == 3


async def test_i8_that_costs_more_than_it_may_gives_way_to_bf16(real_model: Path) -> None:
    async with open_ring(real_model, "bandwidth=200kbit", max_divergence_nats=0.0) as ring:
        assert [hop.wire for hop in ring.hops()] == ["bf16", "bf16"]
        assert ring.wire_check_nats is not None and ring.wire_check_nats > 0.0
        assert len(await answer(ring, [504, 2988], 3)) == 3
