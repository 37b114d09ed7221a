"""Texts to tokens and back over HTTP, as clients of vLLM and of llama.cpp ask for them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from mdiq.api import answering
from mdiq.api.answering import MAX_OPEN_TEXTS
from mdiq.api.token_routes import MAX_CHARACTERS_PER_TOKEN
from tests.api.test_app import FakeRing, _client, _error

CHAT = [{"role": "user", "content": "aa b"}]


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "aa b"}, [1, 2, 1]),
        ({"prompt": "aa b", "model": "tiny", "add_special_tokens": True}, [1, 2, 1]),
        ({"prompt": "aa b", "add_special_tokens": False}, [2, 1]),
        ({"content": "aa b"}, [2, 1]),
        ({"content": "aa b", "add_special": True, "parse_special": True, "with_pieces": False}, [1, 2, 1]),
        ({"content": ""}, []),
        ({"messages": CHAT}, [1, 2, 1]),
        ({"messages": CHAT, "add_special_tokens": False, "add_generation_prompt": True}, [1, 2, 1]),
        ({"prompt": "a " * 200}, [1] * 201),  # more than the ring holds: that is what clients want to know
        ({"messages": [{"role": "user", "content": "a " * 200}]}, [1] * 201),
    ],
)
async def test_a_text_or_a_chat_becomes_tokens(body: dict[str, Any], tokens: list[int]) -> None:
    async with _client(FakeRing()) as client:
        response = await client.post("/tokenize", json=body)
        assert response.status == 200 and response.content_type == "application/json"
        assert await response.json() == {"tokens": tokens, "count": len(tokens), "max_model_len": 64}


@pytest.mark.parametrize("tokens", [[2, 1], []])
async def test_tokens_become_a_text_under_both_names(tokens: list[int]) -> None:
    async with _client(FakeRing(is_serving=False)) as client:  # no ring is needed
        answer = await (await client.post("/detokenize", json={"tokens": tokens, "model": "tiny"})).json()
    text = "xx x" if tokens else ""
    assert answer == {"prompt": text, "content": text}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", [], 400, None),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "a"}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"content": "\ud800"}, 400, "content"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, 400, "add_special_tokens"),
        ("/tokenize", {"content": "a", "with_pieces": True}, 400, "with_pieces"),
        ("/tokenize", {"content": "a", "parse_special": False}, 400, "parse_special"),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}, 404, "model"),
        ("/tokenize", {"messages": CHAT, "tools": [{}]}, 400, "tools"),
        ("/tokenize", {"messages": CHAT, "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"messages": CHAT, "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": [{"role": "user", "content": "Ahoy"}]}, 400, "messages"),
        ("/tokenize", {"messages": "Hi"}, 400, "messages"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, 400, "tokens"),
        ("/detokenize", {"tokens": [100]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1] * 65}, 400, "tokens"),
    ],
)
async def test_what_cannot_be_converted_is_refused_by_its_field(
    path: str, body: object, status: int, param: str | None
) -> None:
    async with _client(FakeRing()) as client:
        response = await client.post(path, json=body)
        assert response.status == status
        assert (await _error(response))["param"] == param


async def test_a_text_that_is_far_too_long_is_not_counted() -> None:
    class Never(FakeRing):
        def text_ids(self, text: str, *, has_special: bool) -> list[int]:
            raise AssertionError("it is counted")

    text = "x" * (64 * MAX_CHARACTERS_PER_TOKEN + 1)
    async with _client(Never()) as client:
        for body in ({"content": text}, {"messages": [{"role": "user", "content": text}]}):
            error = await _error(await client.post("/tokenize", json=body))
            assert (error["code"], error["param"]) == ("context_length_exceeded", next(iter(body)))


async def test_texts_are_converted_in_the_threads_for_them_and_no_more_are_kept_than_have_a_place() -> None:
    go_on, names = threading.Event(), set()

    class Slow(FakeRing):
        def text_of(self, tokens: Sequence[int]) -> str:
            names.add(threading.current_thread().name.rpartition("_")[0])
            go_on.wait(10)
            return "a"

    async with _client(Slow()) as client:
        asked = [
            asyncio.create_task(client.post("/detokenize", json={"tokens": [1]})) for _ in range(MAX_OPEN_TEXTS + 3)
        ]
        refused = 0
        for response in asyncio.as_completed(asked):
            if (await response).status == 429:
                refused += 1
            if refused == 3:
                go_on.set()
        assert sorted(task.result().status for task in asked) == [200] * MAX_OPEN_TEXTS + [429] * 3
        assert (await client.post("/detokenize", json={"tokens": [1]})).status == 200
    assert names == {"texts"}


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
async def test_one_that_is_refused_may_send_its_body_first(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clients do not see an answer that comes before that, but a connection that breaks."""
    monkeypatch.setattr(answering, "MAX_OPEN_TEXTS", 0)
    sent: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            sent.append(b"x" * 70_000)
            yield sent[-1]
            await asyncio.sleep(0.02)

    async with _client(FakeRing()) as client:
        response = await client.post(path, data=body())
        assert (response.status, len(sent)) == (429, 3)


async def test_both_need_the_key() -> None:
    async with _client(FakeRing(), "k" * 20) as client:
        for path in ("/tokenize", "/detokenize"):
            assert (await client.post(path, json={})).status == 401
