"""What the API may expect of a ring, asked of the one that only pretends and of a real one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Protocol

import pytest

from mdiq.core.logprobs import LogprobsWanted
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.types import PLAIN_WEIGHTS, LayerRange
from mdiq.errors import CapacityError, RingError
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_host import RingHost
from mdiq.runtime.ring_keeper import RingKeeper
from mdiq.runtime.starter_service import StreamEvent
from tests.api.test_app import FakeRing
from tests.engine.tiny_models import make_model


class Answers(Protocol):
    """The part of the API's Backend that a ring answers for."""

    @property
    def context_tokens(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def is_serving(self) -> bool: ...
    def answer(
        self, prompt: tuple[int, ...], params: SamplingParams, *, logprobs: LogprobsWanted | None = None
    ) -> AsyncGenerator[StreamEvent, None]: ...


class KeptRing:
    """A tiny model on a ring of two stages in this process, and the keeper that forms it."""

    def __init__(self, keeper: RingKeeper) -> None:
        self._keeper = keeper
        self._numbers = count()

    @property
    def context_tokens(self) -> int:
        assert self._keeper.context_tokens is not None  # it has been formed
        return self._keeper.context_tokens

    @property
    def num_running(self) -> int:
        return self._keeper.num_running

    @property
    def is_serving(self) -> bool:
        return self._keeper.state.is_serving

    def answer(
        self, prompt: tuple[int, ...], params: SamplingParams, *, logprobs: LogprobsWanted | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        return self._keeper.stream(Sequence(next(self._numbers), prompt, params, logprobs=logprobs))


Opened = Callable[[], AbstractAsyncContextManager[Answers]]


@pytest.fixture(params=["fake", "real"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    @asynccontextmanager
    async def fake() -> AsyncIterator[Answers]:
        yield FakeRing()

    @asynccontextmanager
    async def real() -> AsyncIterator[Answers]:
        make_model("llama-gqa-tied").save_pretrained(tmp_path)
        options = RingOptions(
            tmp_path,
            (LayerRange(0, 2), LayerRange(2, 4)),
            weights=PLAIN_WEIGHTS,
            in_process=True,
            kv_tokens=64,
        )
        served = asyncio.Event()
        keeper = RingKeeper(
            lambda: lambda drained: options,
            lambda options, on_loading: RingHost(options, on_loading=on_loading),
            on_state=lambda state: served.set() if state.is_serving else None,
        )
        ring = KeptRing(keeper)
        with pytest.raises(RingError, match="does not serve"):
            await _tokens(ring, (1, 2), 3)
        running = asyncio.create_task(keeper.run(), name="keeper")
        try:
            async with asyncio.timeout(60):
                await served.wait()
            yield ring
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return fake if request.param == "fake" else real


async def _steps(ring: Answers, prompt: tuple[int, ...], max_tokens: int) -> list[StreamEvent]:
    async with aclosing(ring.answer(prompt, SamplingParams(max_tokens=max_tokens))) as events:
        return [event async for event in events]


async def _tokens(ring: Answers, prompt: tuple[int, ...], max_tokens: int) -> int:
    return sum(event.step.token is not None for event in await _steps(ring, prompt, max_tokens))


async def test_an_answer_is_a_row_of_steps_whose_last_one_says_why_it_ends(opened: Opened) -> None:
    async with opened() as ring:
        steps = [event.step for event in await _steps(ring, (5, 6, 7), 4)]
        assert [step.position for step in steps] == [3, 4, 5, 6]
        assert [step.finish_reason for step in steps] == [None, None, None, FinishReason.LENGTH]
        other = [event.step for event in await _steps(ring, (5, 6, 7), 1)]
        assert {step.index for step in steps}.isdisjoint(step.index for step in other)
        assert other[0].token == steps[0].token, "greedy answers repeat themselves"
        assert ring.num_running == 0


async def test_an_answer_is_no_longer_than_the_ring_holds_and_a_prompt_that_fills_it_is_refused(
    opened: Opened,
) -> None:
    async with opened() as ring:
        assert ring.context_tokens == 64
        assert await _tokens(ring, (1,) * 60, 1_000) == 4
        for prompt in ((1,) * 64, (1,) * 65, ()):
            with pytest.raises(CapacityError):
                await _tokens(ring, prompt, 1)
        assert ring.num_running == 0


async def test_leaving_an_answer_gives_its_room_to_the_next_one(opened: Opened) -> None:
    async with opened() as ring:
        for _ in range(3):
            async with aclosing(ring.answer((1,) * 40, SamplingParams(max_tokens=24))) as events:
                await anext(events)
                assert ring.num_running == 1
            assert ring.num_running == 0
        assert await _tokens(ring, (1,) * 40, 24) == 24


async def test_a_ring_that_is_too_small_for_all_at_once_answers_all(opened: Opened) -> None:
    async with opened() as ring:
        counts = await asyncio.gather(*(_tokens(ring, (i, 1, 2), 40) for i in range(4)))
        assert counts == [40] * 4


async def test_a_ring_that_does_not_serve_takes_nothing() -> None:
    with pytest.raises(RingError, match="does not serve"):
        await _tokens(FakeRing(is_serving=False), (1,), 1)


@pytest.mark.parametrize("wanted", [None, LogprobsWanted(), LogprobsWanted(2), LogprobsWanted(1, of_prompt=True)])
async def test_log_probabilities_come_as_they_are_wanted_and_those_of_the_prompt_with_the_first_token(
    opened: Opened, wanted: LogprobsWanted | None
) -> None:
    async with opened() as ring:
        async with aclosing(ring.answer((5, 6, 7), SamplingParams(max_tokens=3), logprobs=wanted)) as answer:
            events = [event async for event in answer]
        found = [event.step.logprob for event in events]
        if wanted is None:
            assert found == [None] * 3
        else:
            assert [each.token for each in found if each] == [event.step.token for event in events]
            assert [len(each.top) for each in found if each] == [wanted.top] * 3
        of_prompt = [list(event.prompt_logprobs or ()) for event in events]
        is_scored = wanted is not None and wanted.of_prompt
        assert [[each.token for each in values] for values in of_prompt] == [[6, 7] if is_scored else [], [], []]
