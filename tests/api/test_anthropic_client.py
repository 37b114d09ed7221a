"""Anthropic's own client over real HTTP: whole and streamed, tools, counts, and its error classes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import pytest
from aiohttp.test_utils import TestServer
from anthropic import Anthropic, AsyncAnthropic

from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.core.sequence import FinishReason
from mdiq.errors import RingError
from tests.api.test_app import FakeRing
from tests.api.test_forms import TWO_CALLS, WritingRing

KEY = "k" * 20
HELLO: Any = [{"role": "user", "content": "Hi"}]
ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": HELLO}
TOOLS: Any = [
    {"name": "get", "description": "Gets.", "input_schema": {"type": "object", "properties": {"a": {}}}},
    {"name": "add", "input_schema": {"type": "object"}},
]


@asynccontextmanager
async def _client(ring: FakeRing, key: str = KEY) -> AsyncIterator[AsyncAnthropic]:
    async with (
        TestServer(Api(ring, bare_keys([KEY])).application()) as server,
        AsyncAnthropic(base_url=str(server.make_url("")).rstrip("/"), api_key=key, max_retries=0, timeout=20) as client,
    ):
        yield client


async def test_the_sync_client_gets_a_message() -> None:
    def ask(url: str) -> Any:
        with Anthropic(base_url=url, api_key=KEY, max_retries=0, timeout=20) as client:
            return client.messages.create(**ASK, system="Be kind.", stop_sequences=["x"])

    async with TestServer(Api(WritingRing(), bare_keys([KEY])).application()) as server:
        message = await asyncio.to_thread(ask, str(server.make_url("")).rstrip("/"))
    assert (message.role, message.stop_reason, message.content[0].text) == ("assistant", "end_turn", "Hello.")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 2)


async def test_the_async_client_streams_a_message_as_its_helper_expects() -> None:
    async with _client(WritingRing(text="Hello, you.", reason=FinishReason.LENGTH)) as client:
        async with client.messages.stream(**ASK) as stream:
            texts = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
    assert "".join(texts) == "Hello, you." and len(texts) > 1
    assert (final.content[0].text, final.stop_reason) == ("Hello, you.", "max_tokens")  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_are_used_and_their_results_go_back(stream: bool) -> None:
    ring = WritingRing(text=TWO_CALLS)
    told: list[Any] = []
    ring.chat_ids = lambda messages, *_, **__: told.append(messages) or [1, 2]  # type: ignore[func-returns-value,method-assign]
    async with _client(ring) as client:
        if stream:
            async with client.messages.stream(**ASK, tools=TOOLS) as events:
                message = await events.get_final_message()
        else:
            message = await client.messages.create(**ASK, tools=TOOLS)
        assert message.stop_reason == "tool_use"
        uses: list[Any] = [block for block in message.content if block.type == "tool_use"]
        assert [(use.name, use.input) for use in uses] == [("get", {"a": 1}), ("add", {})]
        ring.text = "Done."
        results: Any = [{"type": "tool_result", "tool_use_id": use.id, "content": "1"} for use in uses]
        turns: Any = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
        last = await client.messages.create(model="tiny", max_tokens=9, messages=turns, tools=TOOLS)
    assert last.content[0].text == "Done."  # type: ignore[union-attr]
    assert [each["role"] for each in told[1]] == ["user", "assistant", "tool", "tool"]


async def test_tokens_are_counted() -> None:
    async with _client(FakeRing()) as client:
        counted = await client.messages.count_tokens(model="tiny", messages=HELLO)
    assert counted.input_tokens == 2


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"max_tokens": 0}, anthropic.BadRequestError),
        ({"model": "large"}, anthropic.NotFoundError),
        ({"messages": [{"role": "user", "content": "x" * 2_000}]}, anthropic.BadRequestError),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError),
    ],
)
async def test_errors_are_the_clients_own_classes(change: dict[str, Any], kind: type[Exception]) -> None:
    async with _client(FakeRing()) as client:
        with pytest.raises(kind):
            await client.messages.create(**{**ASK, **change})


async def test_a_wrong_key_a_full_ring_and_a_ring_that_is_gone_have_their_classes() -> None:
    async with _client(FakeRing(), key="wrong") as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(**ASK)
    async with _client(FakeRing(max_requests=1, num_running=1)) as client:
        with pytest.raises(anthropic.RateLimitError):
            await client.messages.create(**ASK)
    async with _client(FakeRing(is_serving=False)) as client:
        with pytest.raises(anthropic.InternalServerError):
            await client.messages.create(**ASK)

    def fail(i: int) -> None:
        if i == 2:
            raise RingError("pi1 is gone")

    async with _client(FakeRing(before=fail)) as client:
        texts: list[str] = []
        with pytest.raises(anthropic.APIStatusError, match="pi1 is gone"):
            async with client.messages.stream(**ASK) as stream:
                texts += [text async for text in stream.text_stream]
        assert "".join(texts) == " 0 1" or not texts
