"""Log-probabilities over HTTP, in both of OpenAI's shapes: whole and in streams."""

from typing import Any

import pytest

from mdiq.api import logprobs
from mdiq.api.logprobs import AnswerLogprobs, completion_logprobs
from mdiq.api.shapes import Answer
from mdiq.core.logprobs import TokenLogprob
from mdiq.core.sequence import FinishReason, TokenEvent
from mdiq.runtime.starter_service import StreamEvent
from tests.api.test_app import CHAT, HALF, NO_CACHE, FakeRing, _chunks, _client, _error

PROMPT = {"prompt": [5, 6], "max_tokens": 2}
OF_ANSWER: dict[str, Any] = {
    "tokens": [" 0", " 1"],
    "token_logprobs": [0.0, -0.25],
    "top_logprobs": [{" 0": 0.0}, {" 0": 0.0, " 1": -0.25}],
    "text_offset": [0, 2],
}
OF_BOTH: dict[str, Any] = {
    "tokens": [" 5", " 6", " 0", " 1"],
    "token_logprobs": [None, -3.0, 0.0, -0.25],
    "top_logprobs": [None, {" 7": -0.5, " 6": -3.0}, {" 0": 0.0}, {" 0": 0.0, " 1": -0.25}],
    "text_offset": [0, 2, 4, 6],
}


async def _choice(body: dict[str, Any], path: str = "completions", ring: FakeRing | None = None) -> dict[str, Any]:
    async with _client(ring or FakeRing()) as client:
        response = await client.post(f"/v1/{path}", json=body)
        assert response.status == 200, await response.text()
        answer = await response.json()
    assert len(answer["choices"]) == 1
    choice: dict[str, Any] = answer["choices"][0]
    return {**choice, "usage": answer["usage"]}


async def _streamed(body: dict[str, Any], path: str = "completions") -> list[dict[str, Any]]:
    async with _client(FakeRing()) as client:
        response = await client.post(f"/v1/{path}", json={**body, "stream": True})
        return [chunk["choices"][0] for chunk in _chunks(await response.text())]


def _joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    found = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    return {name: [value for each in found for value in each[name]] for name in found[0]}


async def test_a_completion_without_them_has_none() -> None:
    assert (await _choice(PROMPT))["logprobs"] is None
    assert [chunk["logprobs"] for chunk in await _streamed(PROMPT)] == [None] * 3
    assert (await _choice(CHAT, "chat/completions"))["logprobs"] is None


async def test_a_completion_gives_those_of_its_answer() -> None:
    choice = await _choice({**PROMPT, "logprobs": 1})
    assert choice["text"] == " 0 1" and choice["logprobs"] == OF_ANSWER
    assert (await _choice({**PROMPT, "logprobs": 0}))["logprobs"] == {
        **OF_ANSWER,
        "top_logprobs": [{" 0": 0.0}, {" 1": -0.25}],
    }


async def test_a_completion_repeats_its_prompt() -> None:
    choice = await _choice({**PROMPT, "echo": True, "logprobs": 1})
    assert choice["text"] == "<5><6> 0 1", "token ids are decoded"
    assert choice["logprobs"] == OF_BOTH
    assert choice["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, **NO_CACHE}
    choice = await _choice({"prompt": "two words", "echo": True, "max_tokens": 1})
    assert choice["text"] == "two words 0" and choice["logprobs"] is None, "a text is given back as it came"


async def test_with_max_tokens_0_the_prompt_is_all_there_is() -> None:
    body = {**PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0}
    choice = await _choice(body)
    assert choice["text"] == "<5><6>" and choice["finish_reason"] == "length"
    assert choice["logprobs"] == {name: values[:2] for name, values in OF_BOTH.items()}
    assert choice["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2, **NO_CACHE}
    chunks = await _streamed(body)
    assert "".join(chunk["text"] for chunk in chunks) == "<5><6>"
    assert _joined(chunks) == choice["logprobs"]
    assert (await _choice({**body, "logprobs": None}))["text"] == "<5><6>"


@pytest.mark.parametrize("echo", [False, True])
async def test_a_stream_gives_the_same_in_parts(echo: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {**PROMPT, "logprobs": 1, "echo": echo}
    chunks = await _streamed(body)
    assert [chunk["logprobs"] is None for chunk in chunks] == [False, False, True], "the last one has the reason alone"
    whole = await _choice(body)
    assert _joined(chunks) == whole["logprobs"] == (OF_BOTH if echo else OF_ANSWER)
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    monkeypatch.setattr("mdiq.api.shapes.PART_VALUES", 1)
    parts = await _streamed(body)
    assert len(parts) == (5 if echo else 3)
    assert _joined(parts) == whole["logprobs"]
    assert "".join(chunk["text"] for chunk in parts) == whole["text"]


async def test_each_prompt_of_a_request_has_its_own() -> None:
    async with _client(FakeRing()) as client:
        body = {"prompt": [[5, 6], [7], [8, 9, 10]], "echo": True, "logprobs": 1, "max_tokens": 1}
        answer = await (await client.post("/v1/completions", json=body)).json()
    assert [choice["logprobs"]["tokens"] for choice in answer["choices"]] == [
        [" 5", " 6", " 0"],
        [" 7", " 0"],
        [" 8", " 9", " 10", " 0"],
    ]
    assert [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]] == [
        [None, -3.0, 0.0],
        [None, 0.0],
        [None, -4.5, -5.0, 0.0],
    ]


async def test_a_chat_gives_bytes_and_alternatives() -> None:
    body = {**CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    zero = {"token": " 0", "logprob": 0.0, "bytes": [32, 48]}
    one = {"token": " 1", "logprob": -0.25, "bytes": [32, 49]}
    right = [{**zero, "top_logprobs": [zero, one]}, {**one, "top_logprobs": [zero, one]}]
    choice = await _choice(body, "chat/completions")
    assert choice["logprobs"] == {"content": right, "refusal": None}
    chunks = await _streamed(body, "chat/completions")
    assert [chunk["logprobs"] for chunk in chunks] == [
        None,
        {"content": right[:1], "refusal": None},
        {"content": right[1:], "refusal": None},
        None,
    ]
    plain = await _choice({**body, "top_logprobs": None}, "chat/completions")
    assert [entry["top_logprobs"] for entry in plain["logprobs"]["content"]] == [[], []]


async def test_more_of_prompts_than_an_answer_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "MAX_PROMPT_VALUES", 12)
    ring = FakeRing()
    async with _client(ring) as client:
        body = {"prompt": [[5, 6, 7], [8, 9, 10]], "echo": True, "logprobs": 1, "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body)).status == 200
        response = await client.post("/v1/completions", json={**body, "logprobs": 2})
        assert response.status == 400
        error = await _error(response)
        assert error["param"] == "logprobs" and "6 prompt tokens with 2 alternatives are 18 values" in error["message"]
        assert (await client.post("/v1/completions", json={**body, "logprobs": 2, "echo": False})).status == 200


def test_parts_of_a_character_stay_apart_and_count_when_it_is_whole() -> None:
    euro = "€".encode()
    letters = {1: euro[:1], 2: euro[1:2], 3: euro[2:], 4: b"x", 5: b"<s>"}
    found = AnswerLogprobs(lambda token: (letters[token], token != 5))
    for position, token in enumerate((5, 4, 1, 2, 3, 4)):
        value = TokenLogprob(token, -1.0, ((1, -0.5), (2, -0.75)))
        found.add(StreamEvent(TokenEvent(0, token, position, logprob=value), "", 0.0))
    shown = completion_logprobs(found.take())
    assert shown["tokens"] == ["<s>", "x", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac", "x"]
    assert shown["text_offset"] == [0, 0, 1, 1, 1, 2]
    assert shown["top_logprobs"][1] == {r"bytes:\xe2": -0.5, r"bytes:\x82": -0.75, "x": -1.0}
    assert shown["top_logprobs"][2] == {r"bytes:\xe2": -0.5, r"bytes:\x82": -0.75}, "it is one of the likeliest"


async def test_half_a_character_in_a_prompt_has_its_bytes() -> None:
    choice = await _choice({"prompt": [5, HALF], "echo": True, "logprobs": 0, "max_tokens": 1})
    assert choice["logprobs"]["tokens"] == [" 5", r"bytes:\xe2\x82", " 0"]


@pytest.mark.parametrize(("drops_answer", "reason"), [(False, "stop"), (True, "length")])
def test_a_token_that_is_not_shown_does_not_say_why_the_answer_ends(drops_answer: bool, reason: str) -> None:
    answer = Answer(2, 1, drops_answer=drops_answer)
    answer.add(StreamEvent(TokenEvent(0, 2, 2, FinishReason.STOP), "", 0.0))
    assert answer.finish_reason == reason
