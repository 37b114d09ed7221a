"""Histograms of what users notice, observed as events pass."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from mdiq.api.app import Api
from mdiq.api.clients import Client
from mdiq.api.figures import Figures
from mdiq.api.keys import NO_KEY
from mdiq.core.sequence import FinishReason, TokenEvent
from mdiq.errors import RingError
from mdiq.runtime.starter_service import StreamEvent
from tests.api.test_app import CHAT, FakeRing


class Watched:
    """Answers that are watched from 100.0 on, when they are submitted."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.figures = Figures(self.registry, lambda: 100.0)
        self.client = Client(NO_KEY)

    async def watch(self, *events: StreamEvent, num_prompt: int = 7, max_events: int = 99, num_before: int = 0) -> int:
        async def answer() -> AsyncGenerator[StreamEvent, None]:
            for event in events:
                yield event

        num_seen = 0
        async with aclosing(self._watched(answer(), num_prompt, num_before)) as watched:
            async for _ in watched:
                num_seen += 1
                if num_seen == max_events:
                    break
        return num_seen

    def _watched(
        self, events: AsyncGenerator[StreamEvent, None], num_prompt: int, num_before: int
    ) -> AsyncGenerator[StreamEvent, None]:
        return self.figures.watched(events, num_prompt, 99.0, self.client, num_before=num_before)

    def of(self, name: str) -> tuple[float | None, float | None]:
        """Return the count and the sum of a histogram."""
        values = [self.registry.get_sample_value(f"mdiq_{name}_{what}") for what in ("count", "sum")]
        return values[0], values[1]


def _token(i: int, at_s: float, reason: FinishReason | None = None) -> StreamEvent:
    return StreamEvent(TokenEvent(0, 5, 7 + i, reason), "x", at_s, entered_s=100.5)


async def test_an_answer_is_observed_by_the_times_of_its_tokens() -> None:
    watched = Watched()
    assert await watched.watch(_token(0, 102.0), _token(1, 102.25), _token(2, 103.0, FinishReason.STOP)) == 3
    assert watched.of("time_to_first_token_seconds") == (1, 3.0)
    assert watched.of("time_between_tokens_seconds") == (2, 1.0)
    assert watched.of("queue_seconds") == (1, 0.5)
    assert watched.of("request_seconds") == (1, 4.0)
    assert watched.of("request_prompt_tokens") == (1, 7.0)
    assert watched.of("request_answer_tokens") == (1, 3.0)
    assert watched.registry.get_sample_value("mdiq_prompt_tokens_total") == 7
    assert watched.registry.get_sample_value("mdiq_answer_tokens_total") == watched.client.num_answer == 3


async def test_an_answer_that_is_left_or_fails_counts_its_tokens_and_no_whole_time() -> None:
    watched = Watched()
    assert await watched.watch(_token(0, 102.0), _token(1, 103.0), max_events=1) == 1
    failed = StreamEvent(TokenEvent(0, None, 8, FinishReason.ERROR, RingError("gone")), "", 104.0)
    assert await watched.watch(_token(0, 102.0), failed) == 2
    assert watched.of("time_to_first_token_seconds") == (2, 6.0)
    assert watched.of("request_seconds") == watched.of("request_answer_tokens") == (0, 0.0)
    assert watched.registry.get_sample_value("mdiq_answer_tokens_total") == 2


async def test_an_end_without_a_token_is_the_end_of_an_answer() -> None:
    watched = Watched()
    await watched.watch(_token(0, 101.0), StreamEvent(TokenEvent(0, None, 8, FinishReason.DEADLINE), "", 102.0))
    assert watched.of("request_seconds") == (1, 3.0) and watched.of("request_answer_tokens") == (1, 1.0)


async def test_an_answer_that_goes_on_in_another_ring_has_had_its_first_token() -> None:
    watched = Watched()
    await watched.watch(_token(0, 102.0), _token(1, 102.25))
    await watched.watch(_token(2, 150.0), _token(3, 150.5, FinishReason.STOP), num_prompt=0, num_before=2)
    assert watched.of("time_to_first_token_seconds") == (1, 3.0)
    assert watched.of("queue_seconds") == (1, 0.5)
    assert watched.of("time_between_tokens_seconds") == (2, 0.75), "not the time between two rings"
    assert watched.of("request_answer_tokens") == (1, 4.0)
    assert watched.registry.get_sample_value("mdiq_answer_tokens_total") == 4


async def test_further_answers_to_a_prompt_do_not_count_it_again() -> None:
    watched = Watched()
    for num_prompt in (7, 0, 0):
        await watched.watch(_token(0, 101.0, FinishReason.STOP), num_prompt=num_prompt)
    assert watched.of("request_prompt_tokens") == (1, 7.0) and watched.of("request_answer_tokens") == (3, 3.0)


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_over_http_are_in_the_metrics(stream: bool) -> None:
    async with TestClient(TestServer(Api(FakeRing()).application())) as client:
        for _ in range(2):
            await (await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})).text()
        lines = (await (await client.get("/metrics")).text()).splitlines()
    assert {
        "mdiq_time_to_first_token_seconds_count 2.0",
        "mdiq_time_between_tokens_seconds_count 4.0",
        "mdiq_request_seconds_count 2.0",
        "mdiq_request_answer_tokens_sum 6.0",
        "mdiq_prompt_tokens_total 4.0",
        "mdiq_answer_tokens_total 6.0",
    } <= {*lines}
