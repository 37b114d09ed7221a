"""A table of requests, good and bad, over HTTP: status, error and effect of each.

Ways to write a value, and refusals that are of one kind, are in test_requests.py too; paths and keys in test_app.py.
"""

import io
import json
from collections.abc import Mapping
from typing import Any

import pytest

from mdiq.core.sequence import SamplingParams
from tests.api.test_app import NO_CACHE, FakeRing, _chunks, _client, _error

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "Hi"}
INVALID = "invalid_request_error"

# What is asked for beside the prompt, and what of it reaches the sampler.
EFFECTS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {"temperature": 1.0, "top_p": 1.0, "min_tokens": 0, "logit_bias": ()}),
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"max_completion_tokens": 5, "max_tokens": 9}, {"max_tokens": 5}),
    ({"max_new_tokens": 5}, {"max_tokens": 5}),
    ({"n_predict": 5}, {"max_tokens": 5}),
    ({"num_predict": 5.0}, {"max_tokens": 5}),
    ({"max_tokens": 10**9}, {"max_tokens": 62}),
    ({"max_tokens": -1}, {"max_tokens": 62}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 2}, {"temperature": 2.0}),
    ({"temperature": None}, {"temperature": 1.0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_k": 40}, {"top_k": 40}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"min_p": 0.05}, {"min_p": 0.05}),
    ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    ({"repeat_penalty": 1.2}, {"repetition_penalty": 1.2}),
    ({"rep_pen": 1.2}, {"repetition_penalty": 1.2}),
    ({"presence_penalty": 2}, {"presence_penalty": 2.0}),
    ({"presence_penalty": -2.0}, {"presence_penalty": -2.0}),
    ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5, "presence_penalty": 0.0}),
    ({"logit_bias": {"7": 100, "8": -100}}, {"logit_bias": ((7, 100.0), (8, -100.0))}),
    ({"logit_bias": [[7, 1.5]]}, {"logit_bias": ((7, 1.5),)}),
    ({"logit_bias": {"99": 1}}, {"logit_bias": ((99, 1.0),)}),
    ({"logit_bias": {}}, {"logit_bias": ()}),
    ({"min_tokens": 3, "max_tokens": 5}, {"min_tokens": 3}),
    ({"min_new_tokens": 3, "max_tokens": 5}, {"min_tokens": 3}),
    ({"stop": "END"}, {"stop": ("END",)}),
    ({"stop": ["a", "\n"]}, {"stop": ("a", "\n")}),
    ({"stop": [" "] * 16}, {"stop": (" ",) * 16}),
    ({"stop_sequences": ["END"]}, {"stop": ("END",)}),
    ({"stop": []}, {"stop": ()}),
    ({"stop_token_ids": [3, 4]}, {"stop_token_ids": (3, 4)}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
    ({"seed": 7}, {"seed": 7}),
    ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
    ({"seed": 3.0}, {"seed": 3}),
    ({"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex"}, {"temperature": 1.0}),
    ({"best_of": 1, "n": 1, "logprobs": None, "echo": False, "suffix": ""}, {"temperature": 1.0}),
    ({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}, {"temperature": 1.0}),
    ({"model": "tiny"}, {"temperature": 1.0}),
    ({"model": None}, {"temperature": 1.0}),
)

# Good requests that differ in their prompts: the path, the body, and the prompts that reach the ring.
PROMPTS: tuple[tuple[str, dict[str, Any], list[tuple[int, ...]]], ...] = (
    (CHAT, {"messages": [USER]}, [(1, 2)]),
    (CHAT, {"messages": [{"role": "system", "content": "a b"}, USER]}, [(1, 1, 1)]),
    (CHAT, {"messages": [{"role": "developer", "content": "a"}, USER]}, [(1, 1)]),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, [(1, 1)]),
    (CHAT, {"messages": [{"role": "user", "content": [{"text": "a"}, {"text": "b c"}]}]}, [(1, 2, 1)]),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": "b"}, USER]}, [(1, 2)]),
    (CHAT, {"messages": [{**USER, "name": "Ada"}]}, [(1, 2)]),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, [(1,)]),
    (CHAT, {"messages": [USER], "n": 2}, [(1, 2)] * 2),
    (TEXT, {"prompt": "a bb"}, [(1, 2)]),
    (TEXT, {"prompt": ["a", "bb"]}, [(1,), (2,)]),
    (TEXT, {"prompt": [5, 6]}, [(5, 6)]),
    (TEXT, {"prompt": [[5], [6, 7]]}, [(5,), (6, 7)]),
    (TEXT, {"prompt": ["a", [6]]}, [(1,), (6,)]),
    (TEXT, {"prompt": [99]}, [(99,)]),
    (TEXT, {"prompt": "a", "n": 3, "best_of": 3}, [(1,)] * 3),
    (TEXT, {"prompt": ["a", "bb"], "n_cmpl": 2}, [(1,), (1,), (2,), (2,)]),
    (TEXT, {"prompt": "a " * 63}, [(1,) * 63]),
    (TEXT, {"prompt": "a", "n": 8.0}, [(1,)] * 8),
)

# Bad requests: the path, what is changed, and the error's param.
REFUSED: tuple[tuple[str, dict[str, Any], str | None], ...] = (
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": {}}, "messages"),
    (CHAT, {"messages": "Hi"}, "messages"),
    (CHAT, {"messages": ["Hi"]}, "messages"),
    (CHAT, {"messages": [{}]}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"content": "Hi"}]}, "messages"),
    (CHAT, {"messages": [{"role": "banana", "content": "Hi"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]"),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": None}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "Ahoy"}]}, "messages"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": {}}, "prompt"),
    (TEXT, {"prompt": 5}, "prompt"),
    (TEXT, {"prompt": [100]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [1.5]}, "prompt"),
    (TEXT, {"prompt": ["a", None]}, "prompt"),
    (TEXT, {"prompt": ["a"] * 65}, "prompt"),
    (TEXT, {"prompt": ["a"] * 9}, "prompt"),
    (TEXT, {"prompt": ["a", ""]}, "prompt"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": -2}, "max_tokens"),
    (CHAT, {"max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"max_completion_tokens": "5"}, "max_completion_tokens"),
    (CHAT, {"temperature": -0.1}, "temperature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"top_p": 1.1}, "top_p"),
    (CHAT, {"top_k": 1.5}, "top_k"),
    (CHAT, {"top_k": -2}, "top_k"),
    (CHAT, {"min_p": 2}, "min_p"),
    (CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
    (CHAT, {"presence_penalty": 2.5}, "presence_penalty"),
    (CHAT, {"presence_penalty": "much"}, "presence_penalty"),
    (CHAT, {"frequency_penalty": -2.5}, "frequency_penalty"),
    (CHAT, {"frequency_penalty": []}, "frequency_penalty"),
    (CHAT, {"logit_bias": {"100": 1}}, "logit_bias"),
    (TEXT, {"logit_bias": {"100": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"7": 101}}, "logit_bias"),
    (CHAT, {"logit_bias": {"seven": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"7": None}}, "logit_bias"),
    (CHAT, {"logit_bias": 7}, "logit_bias"),
    (CHAT, {"logit_bias": {str(i): 0 for i in range(1_025)}}, "logit_bias"),
    (CHAT, {"min_tokens": -1}, "min_tokens"),
    (CHAT, {"min_tokens": "3"}, "min_tokens"),
    (CHAT, {"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    (TEXT, {"min_tokens": 17}, "min_tokens"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": -1}, "n"),
    (CHAT, {"n": 1.5}, "n"),
    (CHAT, {"n": "2"}, "n"),
    (CHAT, {"n": 65}, "n"),
    (CHAT, {"n": 9}, "n"),  # more than this ring takes
    (TEXT, {"prompt": ["a", "b"], "n": 33}, "n"),
    (TEXT, {"best_of": 2}, "best_of"),
    (TEXT, {"best_of": 3, "n": 2}, "best_of"),
    (TEXT, {"best_of": 1, "n": 2}, "best_of"),
    (CHAT, {"stop": 5}, "stop"),
    (CHAT, {"stop": [""]}, "stop"),
    (CHAT, {"stop": ["a"] * 17}, "stop"),
    (CHAT, {"stop": "a\ud800"}, "stop"),
    (CHAT, {"stop": [None]}, "stop"),
    (CHAT, {"stop_token_ids": "3"}, "stop_token_ids"),
    (CHAT, {"stop_token_ids": [1.5]}, "stop_token_ids"),
    (CHAT, {"ignore_eos": "yes"}, "ignore_eos"),
    (CHAT, {"seed": 2**64}, "seed"),
    (CHAT, {"seed": "x"}, "seed"),
    (CHAT, {"stream": "true"}, "stream"),
    (CHAT, {"stream_options": "usage"}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"include_usage": "yes"}}, "include_usage"),
    (CHAT, {"chat_template_kwargs": []}, None),  # as good as nothing
    (CHAT, {"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    (CHAT, {"enable_thinking": "no"}, "enable_thinking"),
    (CHAT, {"reasoning_effort": 3}, "reasoning_effort"),
    (CHAT, {"model": 5}, "model"),
    (CHAT, {"mirostat": 2}, "mirostat"),
    (CHAT, {"typical_p": 0.9}, "typical_p"),
    (CHAT, {"bad_words": ["x"]}, "bad_words"),
    (CHAT, {"do_sample": False}, "do_sample"),
    (CHAT, {"num_beams": 2}, "num_beams"),
    (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
    (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template"),
    (TEXT, {"suffix": "end"}, "suffix"),
    (TEXT, {"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    (TEXT, {"add_special_tokens": False}, "add_special_tokens"),
    (TEXT, {"include_stop_str_in_output": True}, "include_stop_str_in_output"),
)

# Bodies and heads that are no request at all: bytes, status, error type, words.
MALFORMED: tuple[tuple[bytes, int, str, str], ...] = (
    (b"", 400, INVALID, "not JSON"),
    (b"{", 400, INVALID, "not JSON"),
    (b"null", 400, INVALID, "not a JSON object"),
    (b"[]", 400, INVALID, "not a JSON object"),
    (b'"Hi"', 400, INVALID, "not a JSON object"),
    (b"\xff", 400, INVALID, "not JSON"),
    (b'{"prompt": "a"} x', 400, INVALID, "not JSON"),
    (b"1" * 5_000, 400, INVALID, "not JSON"),
    (b'{"a":' * 100_000, 400, INVALID, "nested deeper"),
    (b" " * (3 << 20), 413, INVALID, "Too Large"),
    (json.dumps({"prompt": "a", "model": "huge"}).encode(), 404, "not_found_error", "this ring serves 'tiny'"),
    (json.dumps({"prompt": [1] * 64}).encode(), 400, "exceed_context_size_error", "is too long: 64 tokens"),
    (json.dumps({"prompt": "x" * 2_000}).encode(), 400, "exceed_context_size_error", "is too long: at least 100"),
)


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len(EFFECTS) + len(PROMPTS) + len(REFUSED) + len(MALFORMED) >= 120


def _body(path: str, change: Mapping[str, Any]) -> dict[str, Any]:
    return {**({"messages": [USER]} if path == CHAT else {"prompt": "a"}), **change}


@pytest.mark.parametrize(("change", "effect"), EFFECTS, ids=str)
async def test_a_field_has_its_effect(change: dict[str, Any], effect: dict[str, Any]) -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        response = await client.post(CHAT, json=_body(CHAT, change))
        assert response.status == 200, await response.text()
        usage = (await response.json())["usage"]
    ((prompt, params),) = ring.asked
    assert {name: getattr(params, name) for name in effect} == effect
    untouched = {"max_tokens", "seed", *effect} | ({"min_tokens"} if "min_new_tokens" in change else set())
    usual = SamplingParams(temperature=1.0)
    for name in SamplingParams.__slots__:
        assert name in untouched or getattr(params, name) == getattr(usual, name), f"{name} has changed too"
    assert usage == {
        "prompt_tokens": len(prompt),
        "completion_tokens": params.max_tokens,
        "total_tokens": len(prompt) + params.max_tokens,
        **NO_CACHE,
    }


@pytest.mark.parametrize(("path", "body", "prompts"), PROMPTS, ids=str)
async def test_prompts_reach_the_ring_and_are_answered_whole_and_streamed(
    path: str, body: dict[str, Any], prompts: list[tuple[int, ...]]
) -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        response = await client.post(path, json={**body, "max_tokens": 1})
        assert response.status == 200, await response.text()
        choices = (await response.json())["choices"]
        text = await (await client.post(path, json={**body, "max_tokens": 1, "stream": True})).text()
    assert [prompt for prompt, _ in ring.asked] == prompts * 2
    assert [choice["index"] for choice in choices] == [*range(len(prompts))]
    said = [choice["message"]["content"] if path == CHAT else choice["text"] for choice in choices]
    streamed = [""] * len(prompts)
    for chunk in _chunks(text):
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
    assert said == streamed == [" 0"] * len(prompts)


@pytest.mark.parametrize(("path", "change", "param"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_cannot_be_served_is_refused_by_its_field(
    path: str, change: dict[str, Any], param: str | None
) -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        for stream in ({}, {"stream": True}):
            response = await client.post(path, json={**stream, **_body(path, change)})
            if param is None:
                assert response.status == 200
                continue
            assert response.status == 400
            error = await _error(response)
            assert (error["type"], error["param"], error["code"]) == (INVALID, param, None)
            assert error["message"].startswith((param, "the template")), "it says where"
            assert response.headers["x-should-retry"] == "false" and not ring.asked
        assert (await client.post(path, json=_body(path, {}))).status == 200  # and nothing is broken
    assert ring.num_running == 0


@pytest.mark.parametrize(("body", "status", "kind", "words"), MALFORMED, ids=lambda value: str(value)[:40])
async def test_a_body_that_is_no_request_gets_an_error_in_openais_form(
    body: bytes, status: int, kind: str, words: str
) -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        response = await client.post(TEXT, data=io.BytesIO(body))
        error = await _error(response)
        assert (response.status, error["type"]) == (status, kind)
        assert words in error["message"] and not ring.asked
