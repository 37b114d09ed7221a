"""A table of odd requests that clients really send, to all three APIs of chats: what each says to the model.

Requests of one field, and wrong ones, are in test_request_cases.py.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.api.test_app import _client
from tests.api.test_forms import ADD, GET, WritingRing

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
USER = {"role": "user", "content": "Hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
READ_CALL = {**CALL, "function": {"name": "get", "arguments": {"a": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [READ_CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "21"}
TOOL = {"name": "get", "input_schema": GET["function"]["parameters"]}  # type: ignore[index]
CACHED = {"cache_control": {"type": "ephemeral"}}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    MESSAGES: {"model": "tiny", "max_tokens": 50, "messages": [USER]},
    RESPONSES: {"input": "Hi"},
}


def _text(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


# The path, what is asked for, and what the model and the sampler get. "messages" is [USER] where it is left out.
SERVED: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    (CHAT, {"stream_options": {"include_usage": True, "include_obfuscation": False}}, {}),
    (CHAT, {"stream_options": None, "tools": None, "tool_choice": None, "functions": None, "function_call": None}, {}),
    (CHAT, {"parallel_tool_calls": True, "tool_choice": "auto"}, {"tools": []}),
    (CHAT, {"tools": [GET, ADD], "parallel_tool_calls": False}, {"tools": ["get", "add"]}),
    (CHAT, {"tools": [GET], "tool_choice": "none"}, {"tools": [], "grammar": ""}),
    (CHAT, {"max_completion_tokens": 7, "max_tokens": 9, "n": None, "stop": None}, {"max_tokens": 7}),
    (CHAT, {"max_completion_tokens": None, "max_tokens": 9}, {"max_tokens": 9}),
    (CHAT, {"response_format": {"type": "text"}, "logprobs": False, "top_logprobs": None}, {"grammar": ""}),
    (CHAT, {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "user": "u", "safety_identifier": "s"}, {}),
    (CHAT, {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "modalities": ["text"], "audio": None}, {}),
    (CHAT, {"reasoning_effort": "none", "verbosity": "medium"}, {"kwargs": {"reasoning_effort": "none"}}),
    (
        CHAT,
        {
            "messages": [
                {"role": "developer", "content": [_text("Be brief.")]},
                {**USER, "content": [_text("H"), _text("i")]},
            ]
        },
        {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
    ),
    (CHAT, {"messages": [{**USER, "content": [_text("Hi", **CACHED)]}]}, {}),
    *(
        (
            CHAT,
            {"messages": [USER, {"role": "assistant", **empty, "tool_calls": [CALL]}, RESULT]},
            {"messages": [USER, CALLED, RESULT]},
        )
        for empty in ({}, {"content": None}, {"content": ""}, {"content": []})
    ),
    (CHAT, {"messages": [USER, CALLED, {**RESULT, "content": [_text("21")]}]}, {"messages": [USER, CALLED, RESULT]}),
    # A client that gives back the SDK's message has all its fields.
    (
        CHAT,
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "A",
                    "refusal": None,
                    "audio": None,
                    "tool_calls": None,
                    "annotations": [],
                },
                USER,
            ]
        },
        {"messages": [USER, {"role": "assistant", "content": "A"}, USER]},
    ),
    *(
        (
            CHAT,
            {"messages": [USER, {"role": "assistant", **refused}, USER]},
            {"messages": [USER, {"role": "assistant", "content": "No."}, USER]},
        )
        for refused in ({"content": None, "refusal": "No."}, {"content": [{"type": "refusal", "refusal": "No."}]})
    ),
    (MESSAGES, {"stop_sequences": ["END"], "metadata": {"user_id": "u"}, "service_tier": "auto"}, {"stop": ("END",)}),
    (MESSAGES, {"stop_sequences": [], "tools": [], "tool_choice": None, "metadata": None}, {"stop": (), "tools": []}),
    (
        MESSAGES,
        {"system": [_text("Be ", **CACHED), _text("brief.")], "top_k": None, "temperature": None},
        {"messages": [{"role": "system", "content": "Be brief."}, USER], "temperature": 1.0},
    ),
    (MESSAGES, {"system": "", "messages": [{**USER, "content": [_text("Hi", **CACHED)]}]}, {}),
    (MESSAGES, {"system": []}, {}),
    (MESSAGES, {"thinking": {"type": "disabled"}}, {"kwargs": {"enable_thinking": False}}),
    (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"kwargs": {"enable_thinking": True}}),
    (MESSAGES, {"tools": [{**TOOL, **CACHED, "type": "custom"}], "tool_choice": {"type": "auto"}}, {"tools": ["get"]}),
    (
        MESSAGES,
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "get", "input": {"a": 1}}]},
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [_text("21")], **CACHED}],
                },
            ]
        },
        {"messages": [USER, CALLED, RESULT]},
    ),
    (RESPONSES, {"store": False, "include": ["reasoning.encrypted_content"], "truncation": "disabled"}, {}),
    (
        RESPONSES,
        {"reasoning": {"effort": None, "summary": "auto"}, "text": {"format": {"type": "text"}}},
        {"kwargs": {}},
    ),
    (RESPONSES, {"stream_options": {"include_obfuscation": False}, "top_logprobs": 0, "instructions": ""}, {}),
    (
        RESPONSES,
        {"tools": [{"type": "function", "name": "get", "strict": True, "parameters": None}]},
        {"tools": ["get"]},
    ),
)

# A stop text would only cut a call that has to come; a bad one is refused all the same.
SERVED += (
    (CHAT, {"tools": [GET], "tool_choice": "required", "stop": ["a"]}, {"stop": ()}),
    (
        CHAT,
        {"tools": [GET], "tool_choice": {"type": "function", "function": {"name": "get"}}, "stop": "a"},
        {"stop": ()},
    ),
    (CHAT, {"tools": [GET], "tool_choice": "auto", "stop": "a"}, {"stop": ("a",)}),
    (MESSAGES, {"tools": [TOOL], "tool_choice": {"type": "any"}, "stop_sequences": ["a"]}, {"stop": ()}),
    (RESPONSES, {"tools": [{"type": "function", "name": "get"}], "tool_choice": "required", "stop": "a"}, {"stop": ()}),
)

# The path, what is asked for, and how the message of its error begins.
REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    *(
        (
            CHAT,
            {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice: no tool is called no",
        )
        for tools in ([GET], [])
    ),
    (CHAT, {"tools": [GET], "tool_choice": "required", "stop": [""]}, "stop: "),
    (CHAT, {"tool_choice": "required"}, "tool_choice: there are no tools"),
    (CHAT, {"tools": [GET], "parallel_tool_calls": "no"}, "parallel_tool_calls: not true or false"),
    (
        CHAT,
        {"messages": [USER, {"role": "assistant", "content": None, "refusal": 5}]},
        "messages[1]: content: not a text",
    ),
    (CHAT, {"messages": [USER, {**USER, "content": [{"type": "refusal"}]}]}, "messages[1]: content: not a text"),
    (MESSAGES, {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "no"}}, "tool_choice: no tool is called no"),
    (MESSAGES, {"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
    (MESSAGES, {"thinking": {"type": "banana"}}, "thinking: the type is one of"),
    (MESSAGES, {"thinking": {"type": []}}, "thinking: the type is one of"),
    (MESSAGES, {"thinking": {"budget_tokens": 1024}}, "thinking: the type is one of"),
    (RESPONSES, {"tool_choice": {"type": "function", "name": "no"}}, "tool_choice: no tool is called no"),
)


class ToldRing(WritingRing):
    """Keeps what its chat template is given."""

    def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any], tools: Sequence[Any] = ()
    ) -> list[int]:
        self.told.append((messages, template_kwargs))
        return super().chat_ids(messages, template_kwargs, tools)


def _said(path: str, answer: Mapping[str, Any]) -> str:
    if path == CHAT:
        assert answer["choices"][0]["finish_reason"] == "stop"
        return str(answer["choices"][0]["message"]["content"])
    content = answer["content"] if path == MESSAGES else answer["output"][0]["content"]
    return str(content[0]["text"])


def _streamed(path: str, stream: str) -> str:
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    if path == CHAT:
        return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    if path == MESSAGES:
        return "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


@pytest.mark.parametrize(("path", "change", "effect"), SERVED, ids=str)
async def test_an_odd_request_is_answered_and_says_the_right_thing_to_the_model(
    path: str, change: dict[str, Any], effect: dict[str, Any]
) -> None:
    ring = ToldRing()
    async with _client(ring) as client:
        response = await client.post(path, json={**BODIES[path], **change})
        assert response.status == 200, await response.text()
        assert _said(path, await response.json()) == "Hello."
        whole_tools = [tool["function"]["name"] for tool in ring.tools]
        response = await client.post(path, json={**BODIES[path], **change, "stream": True})
        stream = await response.text()
        assert response.status == 200 and _streamed(path, stream) == "Hello."
        wants_usage = bool((change.get("stream_options") or {}).get("include_usage"))
        assert path != CHAT or ('"usage"' in stream) == wants_usage
    expected = {"messages": [USER], **effect}
    for (messages, kwargs), (_, params) in zip(ring.told, ring.asked, strict=True):
        found = {"messages": [*messages], "kwargs": dict(kwargs), "tools": whole_tools}
        for name, value in expected.items():
            assert (found[name] if name in found else getattr(params, name)) == value
    assert len(ring.asked) == 2


@pytest.mark.parametrize(("path", "change", "words"), REFUSED, ids=str)
async def test_an_odd_request_that_cannot_be_served_says_why(path: str, change: dict[str, Any], words: str) -> None:
    ring = ToldRing()
    async with _client(ring) as client:
        for stream in (False, True):
            response = await client.post(path, json={**BODIES[path], **change, "stream": stream})
            error = (await response.json())["error"]
            assert (response.status, error["type"]) == (400, "invalid_request_error")
            assert error["message"].startswith(words)
    assert not ring.asked
