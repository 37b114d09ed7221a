"""Several answers to one prompt: their numbers, seeds, places and counts."""

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from mdiq.api.app import Api
from mdiq.api.shapes import Answer, Chat
from mdiq.core.sequence import TokenEvent
from mdiq.runtime.starter_service import StreamEvent
from tests.api.test_app import CHAT, NO_CACHE, FakeRing, _chunks, _client, _error


async def test_choices_of_a_prompt_follow_each_other() -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        body = {"prompt": ["a", "bb"], "n": 3, "max_tokens": 2, "seed": 5}
        answer = await (await client.post("/v1/completions", json=body)).json()
        assert [choice["index"] for choice in answer["choices"]] == [*range(6)]
        assert [prompt for prompt, _ in ring.asked] == [(1,)] * 3 + [(2,)] * 3
        # A prompt counts once, whatever is made of it.
        assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14, **NO_CACHE}
        seeds = [params.seed for _, params in ring.asked]
        assert seeds[:3] == seeds[3:] and len({*seeds}) == 3
        ring.asked.clear()
        await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "seed": 5})
        assert [params.seed for _, params in ring.asked] == seeds[:1], "the first choice is what one request gets"


async def test_choices_without_a_seed_differ_from_each_other_and_from_those_of_the_next_request() -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        for _ in range(2):
            assert (await client.post("/v1/chat/completions", json={**CHAT, "n": 4})).status == 200
    assert len({params.seed for _, params in ring.asked}) == 8


async def test_choices_of_a_chat_in_a_stream_have_a_role_a_text_and_an_end_each() -> None:
    async with _client(FakeRing()) as client:
        body = {**CHAT, "n": 3, "stream": True, "stream_options": {"include_usage": True}}
        *chunks, usage = _chunks(await (await client.post("/v1/chat/completions", json=body)).text())
    for index in range(3):
        own: list[Any] = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == " 0 1 2"
        assert [choice["finish_reason"] for choice in own] == [None] * 4 + ["length"]
    assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11, **NO_CACHE}


async def test_each_choice_takes_a_place() -> None:
    ring = FakeRing(max_requests=4)
    async with _client(ring) as client:
        error = await _error(await client.post("/v1/chat/completions", json={**CHAT, "n": 5}))
        assert error["param"] == "n" and "5 answers; this ring takes 4 at once" in error["message"]
        body = {"prompt": ["a"] * 5, "n": 2}
        error = await _error(await client.post("/v1/completions", json=body))
        assert error["param"] == "prompt" and "5 prompts" in error["message"], "a lower n would not help"
        ring.num_running = 2
        response = await client.post("/v1/chat/completions", json={**CHAT, "n": 3})
        assert response.status == 429 and not ring.asked
        assert (await client.post("/v1/chat/completions", json={**CHAT, "n": 2})).status == 200
        ring.num_running = 0
        assert (await client.post("/v1/chat/completions", json={**CHAT, "n": 4})).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_all_its_choices(stream: bool) -> None:
    all_began, never = asyncio.Event(), asyncio.Event()

    async def hangs(i: int) -> None:
        if i:
            if ring.num_running == 3:
                all_began.set()
            await never.wait()

    ring = FakeRing(before=hangs)
    runner = web.AppRunner(Api(ring).application(), handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/chat/completions"
    async with aiohttp.ClientSession() as session, asyncio.timeout(10):
        asking = asyncio.create_task(session.post(url, json={**CHAT, "n": 3, "stream": stream}))
        await all_began.wait()
        asking.cancel()
        response = (await asyncio.gather(asking, return_exceptions=True))[0]
        if isinstance(response, aiohttp.ClientResponse):
            response.close()
        while ring.num_running:
            await ring.closed.wait()
            ring.closed.clear()
    await runner.cleanup()


def test_what_of_a_prompt_was_in_the_kv_cache_is_told_of_where_the_prompt_is_counted() -> None:
    answers = [Answer(40, 9), Answer(0, 9)]
    for answer in answers:
        for i, cached in enumerate((32, 32, 0)):
            answer.add(StreamEvent(TokenEvent(0, i, 40 + i), "x", 0.0, cached_tokens=cached))
    usage = Chat("tiny").usage(answers)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32} and usage["prompt_tokens"] == 40
