"""What callers may expect of a Ring, asked of the one that only pretends and of a real one in this process."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from mdiq.bench.shapes import shape_file
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence, TokenEvent
from mdiq.core.types import LayerRange
from mdiq.errors import CapacityError, NodeDiedError, RingError
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_host import RingHost
from tests.fake_ring import FakeRing

CONTEXT_TOKENS = 128
Open = Callable[[int], Any]


@pytest.fixture(params=["fake", "real"])
def open_kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Return a function that opens a ring of so many nodes, which is to be entered."""

    def options(num_nodes: int, model: Path) -> RingOptions:
        bounds = (0, 4) if num_nodes == 1 else (0, 2, 4)
        layers = tuple(LayerRange(*pair) for pair in zip(bounds, bounds[1:], strict=False))
        return RingOptions(model, layers, in_process=True, kv_tokens=CONTEXT_TOKENS)

    def fake(num_nodes: int) -> FakeRing:
        return FakeRing(options(num_nodes, Path("model")), context_tokens=CONTEXT_TOKENS)

    def real(num_nodes: int) -> RingHost:
        monkeypatch.setenv("MDIQ_CACHE", str(tmp_path))
        return RingHost(options(num_nodes, shape_file("tiny", 8, lambda _: None)))

    return fake if request.param == "fake" else real


def _sequence(index: int, num_prompt: int = 3, max_tokens: int = 4) -> Sequence:
    return Sequence(index, (1,) * num_prompt, SamplingParams(max_tokens=max_tokens))


async def _steps(ring: Any, sequence: Sequence) -> list[TokenEvent]:
    async with asyncio.timeout(30):
        return [event.step async for event in ring.stream(sequence)]


async def test_a_stream_is_a_row_of_tokens_whose_last_one_says_why_it_ends(open_kept: Open) -> None:
    async with open_kept(2) as ring:
        steps = await _steps(ring, _sequence(7))
        assert [step.index for step in steps] == [7] * 4
        assert [step.position for step in steps] == [3, 4, 5, 6]
        assert all(isinstance(step.token, int) for step in steps)
        assert [step.finish_reason for step in steps] == [None, None, None, FinishReason.LENGTH]
        assert [step.error for step in steps] == [None] * 4
        times = [event.at_s async for event in ring.stream(_sequence(8))]
        assert times == sorted(times)


async def test_a_stream_ends_where_the_context_does_and_what_can_never_fit_is_refused(open_kept: Open) -> None:
    async with open_kept(2) as ring:
        assert ring.context_tokens == CONTEXT_TOKENS
        assert len(await _steps(ring, _sequence(1, CONTEXT_TOKENS - 5, 1_000))) == 5
        for num_prompt in (CONTEXT_TOKENS, CONTEXT_TOKENS + 1, 0):
            with pytest.raises(CapacityError):
                await _steps(ring, _sequence(2, num_prompt))
        assert len(await _steps(ring, _sequence(3))) == 4


@pytest.mark.parametrize("temperature", [0.0, 0.9])
async def test_a_stream_goes_on_after_tokens_of_an_earlier_ring_as_it_would_have(
    open_kept: Open, temperature: float
) -> None:
    params = SamplingParams(
        max_tokens=9,
        temperature=temperature,
        seed=7,
        repetition_penalty=1.2,
        presence_penalty=1.0,
        frequency_penalty=1.5,
        logit_bias=((3, 2.0), (4, -100.0)),
        min_tokens=7,
    )
    async with open_kept(2) as ring:
        steps = await _steps(ring, Sequence(0, (1, 2, 3), params))
        whole = [step.token for step in steps if step.token is not None]
        assert len(whole) == 9
        for num_known in range(1, 9):
            sequence = Sequence(num_known, (1, 2, 3), params, generated=[*whole[:num_known]])
            steps = await _steps(ring, sequence)
            assert [step.token for step in steps] == whole[num_known:]
            assert [step.position for step in steps] == [*range(3 + num_known, 12)]
            assert sequence.generated == whole
        for full in (Sequence(9, (1,), params, generated=whole), Sequence(10, (1,) * 127, params, generated=[1])):
            [end] = await _steps(ring, full)
            assert end.finish_reason is FinishReason.LENGTH and end.token is None


async def test_a_stream_that_is_left_gives_its_room_to_the_next_one(open_kept: Open) -> None:
    async with open_kept(2) as ring:
        for index in range(3):
            async with aclosing(ring.stream(_sequence(index, 60, CONTEXT_TOKENS - 60))) as events:
                await anext(events)
        assert len(await _steps(ring, _sequence(9, 60, CONTEXT_TOKENS - 60))) == CONTEXT_TOKENS - 60


async def test_streams_of_a_ring_that_is_given_up_end_with_the_reason_and_it_takes_no_more(open_kept: Open) -> None:
    error = NodeDiedError("pi1: it was started anew")
    async with open_kept(2) as ring:
        events = ring.stream(_sequence(1, 3, 100))
        first = await anext(events)
        assert first.step.error is None
        ring.service.fail_all(error)
        ring.service.fail_all(RingError("a later reason"))
        async with asyncio.timeout(30):
            steps = [event.step async for event in events]
        assert steps[-1].finish_reason is FinishReason.ERROR and steps[-1].error is error and steps[-1].token is None
        with pytest.raises(RingError, match="the ring has ended: pi1: it was started anew"):
            await _steps(ring, _sequence(2))


async def test_streams_of_a_ring_that_is_closed_end_with_an_error(open_kept: Open) -> None:
    async with open_kept(2) as ring:
        events = ring.stream(_sequence(1, 3, 100))
        await anext(events)
    async with asyncio.timeout(30):
        last = [event.step async for event in events][-1]
    assert last.finish_reason is FinishReason.ERROR and isinstance(last.error, RingError)


async def test_a_ring_that_serves_misses_no_node_and_waits_for_its_end(open_kept: Open) -> None:
    async with open_kept(2) as ring:
        assert list(ring.missing) == [] and dict(ring.silent(0.0)) == {}
        waiting = [asyncio.create_task(until()) for until in (ring.until_lost, ring.until_leaving)]
        await _steps(ring, _sequence(1))
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        again = asyncio.create_task(ring.until_lost())  # who gives up waiting has not lost the ring
        await asyncio.sleep(0)
        assert not again.done()
        again.cancel()


@pytest.mark.parametrize("num_nodes", [1, 2])
async def test_figures_are_of_every_node_in_ring_order_and_hops_lead_from_node_to_node(
    open_kept: Open, num_nodes: int
) -> None:
    async with open_kept(num_nodes) as ring:
        await _steps(ring, _sequence(1))
        figures = ring.figures()
        assert [node.name for node in figures] == [f"node-{i}" for i in range(num_nodes)]
        assert sum(len(node.layers) for node in figures) == 4
        assert all(node.busy_s > 0 and node.rss_bytes > node.weight_bytes > 0 and not node.dropped for node in figures)
        assert [hop.wire for hop in ring.hops()] in ([], ["f32"] * num_nodes, ["bf16"] * num_nodes)
        assert len(ring.hops()) == (num_nodes if num_nodes > 1 else 0)
        pace = ring.pace()
        assert pace.num_live == 1 and pace.in_flight >= 1 and pace.cap >= 1
        assert all(isinstance(count, int) for count in ring.service.ring.counts.values())
