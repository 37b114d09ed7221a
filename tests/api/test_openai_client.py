"""OpenAI's own client over real HTTP: whole and streamed, sync and async, and its error classes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from aiohttp.test_utils import TestServer
from openai import AsyncOpenAI, OpenAI

from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.errors import RingError
from tests.api.test_app import FakeRing

KEY = "k" * 20
HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
ASK: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 3}


@asynccontextmanager
async def _served(ring: FakeRing) -> AsyncIterator[str]:
    async with TestServer(Api(ring, bare_keys([KEY])).application()) as server:
        yield str(server.make_url("/v1"))


@asynccontextmanager
async def _client(ring: FakeRing, key: str = KEY, max_retries: int = 0) -> AsyncIterator[AsyncOpenAI]:
    async with (
        _served(ring) as url,
        AsyncOpenAI(base_url=url, api_key=key, max_retries=max_retries, timeout=10) as client,
    ):
        yield client


async def test_the_sync_client_gets_a_chat_and_a_completion_whole_and_streamed() -> None:
    def ask(url: str) -> list[Any]:
        with OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=10) as client:
            chat = client.chat.completions.create(**ASK)
            with client.chat.completions.create(**ASK, stream=True) as stream:
                deltas = [chunk.choices[0].delta.content for chunk in stream]
            completion = client.completions.create(model="tiny", prompt="a", max_tokens=2)
            with client.completions.create(model="tiny", prompt="a", max_tokens=2, stream=True) as pieces:
                texts = [piece.choices[0].text for piece in pieces]
        return [chat, deltas, completion, texts]

    async with _served(FakeRing()) as url:
        chat, deltas, completion, texts = await asyncio.to_thread(ask, url)
    assert (chat.choices[0].message.role, chat.choices[0].message.content) == ("assistant", " 0 1 2")
    assert (chat.choices[0].finish_reason, chat.usage.total_tokens) == ("length", 5)
    assert "".join(delta or "" for delta in deltas) == " 0 1 2"
    assert completion.choices[0].text == "".join(texts) == " 0 1"


async def test_the_async_client_streams_choices_with_their_usage() -> None:
    async with _client(FakeRing()) as client:
        stream = await client.chat.completions.create(**ASK, n=3, stream=True, stream_options={"include_usage": True})
        texts, roles, ends, usage = ["", "", ""], ["", "", ""], [""] * 3, None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                roles[choice.index] += choice.delta.role or ""
                ends[choice.index] += choice.finish_reason or ""
    assert (texts, roles, ends) == ([" 0 1 2"] * 3, ["assistant"] * 3, ["length"] * 3)
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (2, 9)


async def test_the_clients_own_helper_puts_a_stream_of_choices_together() -> None:
    async with (
        _client(FakeRing()) as client,
        client.chat.completions.stream(model="tiny", messages=HELLO, max_tokens=2, n=2) as stream,
    ):
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
        final = stream.current_completion_snapshot  # get_final_completion() refuses answers that max_tokens has cut
    assert sorted(deltas) == ["", "", " 0", " 0", " 1", " 1"]
    assert [choice.message.content for choice in final.choices] == [" 0 1"] * 2


async def test_a_raw_response_has_its_headers_and_a_streamed_one_its_lines() -> None:
    async with _client(FakeRing()) as client:
        raw = await client.chat.completions.with_raw_response.create(**ASK)
        assert raw.status_code == 200 and raw.headers["content-type"].startswith("application/json")
        assert raw.parse().choices[0].message.content == " 0 1 2"
        async with client.chat.completions.with_streaming_response.create(**ASK, stream=True) as response:
            lines = [line async for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a bb", [(1, 2)]),
        (["a", "bb"], [(1,), (2,)]),
        ([7, 8], [(7, 8)]),
        ([[7], [8, 9]], [(7,), (8, 9)]),
        (["a", [7]], [(1,), (7,)]),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
async def test_prompts_of_a_completion_may_be_texts_or_tokens(prompt: Any, expected: list[Any], n: int) -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        done = await client.completions.create(model="tiny", prompt=prompt, n=n, max_tokens=1)
    assert [choice.index for choice in done.choices] == [*range(n * len(expected))]
    assert [asked for asked, _ in ring.asked] == [each for each in expected for _ in range(n)]
    assert done.usage is not None and done.usage.prompt_tokens == sum(map(len, expected))


async def test_every_parameter_of_the_client_that_is_served_arrives() -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        await client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_completion_tokens=5,
            temperature=0.5,
            top_p=0.9,
            presence_penalty=1,
            frequency_penalty=-0.5,
            logit_bias={"5": -100},
            stop=["x"],
            seed=3,
            user="me",
            extra_body={"top_k": 4, "min_p": 0.1, "min_tokens": 2, "repetition_penalty": 1.1},
        )
    ((_, params),) = ring.asked
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (5, 0.5, 0.9, 4, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1.0, -0.5, 1.1)
    assert (params.logit_bias, params.stop, params.seed, params.min_tokens) == (((5, -100.0),), ("x",), 3, 2)


async def test_models_are_listed_and_found() -> None:
    async with _client(FakeRing()) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).owned_by == "mdiq"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("huge")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        ({"temperature": -1}, openai.BadRequestError, ("temperature", None, "invalid_request_error")),
        ({"top_p": 7}, openai.BadRequestError, ("top_p", None, "invalid_request_error")),
        ({"n": 0}, openai.BadRequestError, ("n", None, "invalid_request_error")),
        (
            {"messages": [{"role": "user", "content": "a " * 63}]},
            openai.BadRequestError,
            ("messages", "context_length_exceeded", "exceed_context_size_error"),
        ),
        ({"model": "gpt-9"}, openai.NotFoundError, ("model", "model_not_found", "not_found_error")),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_clients_own_classes(
    change: dict[str, Any], kind: type[openai.APIStatusError], expected: tuple[str, str, str], stream: bool
) -> None:
    async with _client(FakeRing()) as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**{**ASK, **change}, stream=stream)
    assert (caught.value.param, caught.value.code, caught.value.type) == expected
    assert type(caught.value) is kind


async def test_a_wrong_key_a_wrong_path_a_full_ring_and_a_ring_that_is_gone_have_their_classes() -> None:
    async with _client(FakeRing(), key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as no_key:
            await client.chat.completions.create(**ASK)
    assert no_key.value.code == "invalid_api_key"
    ring = FakeRing(num_running=8)
    async with _client(ring) as client:
        with pytest.raises(openai.RateLimitError) as busy:
            await client.chat.completions.create(**ASK)
        assert busy.value.code == "rate_limit_exceeded" and int(busy.value.response.headers["retry-after"]) > 0
        ring.num_running, ring.is_serving = 0, False
        with pytest.raises(openai.InternalServerError) as away:
            await client.chat.completions.create(**ASK)
        assert (away.value.status_code, away.value.type) == (503, "unavailable_error")
        with pytest.raises(openai.NotFoundError) as nowhere:
            await client.embeddings.create(model="tiny", input="a")
        assert nowhere.value.code == "unknown_url" and "no embeddings" in str(nowhere.value)


class _FailsFirst(FakeRing):
    """Fails at its first request with ``error``, and counts them."""

    num_requests = 0
    error: Exception = ValueError("a secret")

    def encode(self, texts: Any) -> Any:
        self.num_requests += 1
        if self.num_requests == 1:
            raise self.error
        return super().encode(texts)


async def test_the_client_does_not_retry_what_would_fail_again() -> None:
    ring = _FailsFirst()
    async with _client(ring, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError, match="mdiq failed at this request") as caught:
            await client.chat.completions.create(**ASK)
    assert caught.value.status_code == 500 and ring.num_requests == 1


async def test_an_error_in_the_middle_of_a_stream_is_raised_after_what_came() -> None:
    async def fails() -> None:
        raise RingError("pi2: it is gone")

    texts = []
    async with _client(FakeRing(before=lambda i: fails() if i == 1 else None)) as client:
        stream = await client.chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.APIError, match="pi2: it is gone"):
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content)
    assert texts == ["", " 0"]


async def test_a_stream_that_is_closed_ends_its_sequences() -> None:
    ring, never = FakeRing(), asyncio.Event()
    ring.before = lambda i: never.wait() if i == 2 else None
    async with _client(ring) as client:
        stream = await client.chat.completions.create(**ASK, n=2, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content == " 1":
                break
        await stream.close()
        async with asyncio.timeout(10):
            await ring.closed.wait()
