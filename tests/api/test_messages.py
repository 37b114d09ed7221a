"""Anthropic's Messages API: its requests as chats, answers and streams in its form, and errors too."""

import json
from typing import Any

import pytest

from mdiq.api.messages import parse_messages
from mdiq.api.requests import BadRequest
from mdiq.core.sequence import FinishReason
from tests.api.test_app import _client
from tests.api.test_forms import TWO_CALLS, WritingRing

BODY = {"model": "tiny", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "get", "description": "Gets.", "input_schema": {"type": "object", "properties": {"a": {}}}}
ADD = {"name": "add", "input_schema": {"type": "object"}}

NO_CACHE = {"cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}


def _events(text: str) -> list[dict[str, Any]]:
    events = []
    for block in text.split("\n\n"):
        if block:
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


async def _post(ring: WritingRing, **fields: Any) -> Any:
    async with _client(ring) as client:
        response = await client.post("/v1/messages", json={**BODY, **fields})
        text = await response.text()
        assert response.status == 200, text
        return _events(text) if fields.get("stream") else json.loads(text)


def test_a_conversation_becomes_a_chat() -> None:
    asked = parse_messages(
        {
            **BODY,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "x"},
                        {"type": "text", "text": "Let me see."},
                        {"type": "tool_use", "id": "t1", "name": "get", "input": {"a": [1]}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "21"}]},
                        {"type": "text", "text": "And now?"},
                    ],
                },
            ],
            "stop_sequences": ["X"],
            "temperature": 0.5,
            "top_k": 3,
            "thinking": {"type": "disabled"},
            "output_config": {"effort": "low"},
            "metadata": {"user_id": "u"},
        }
    )
    call = {"id": "t1", "type": "function", "function": {"name": "get", "arguments": {"a": [1]}}}
    assert asked.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "21"},
        {"role": "user", "content": "And now?"},
    )
    assert asked.template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}
    assert (asked.max_tokens, asked.values["stop"], asked.values["top_k"]) == (50, ["X"], 3)


IMAGE = [{"type": "image", "source": {}}]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"system": IMAGE}, "system: content: not a text"),
        ({"system": "a\ud800"}, "system: it holds half"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages[0]: it holds half"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "a"},
                            {"type": "tool_result", "tool_use_id": "b"},
                            {"type": "text", "text": "c"},
                        ],
                    },
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": IMAGE}]},
                ]
            },
            "messages[1]: content: not a text",
        ),
    ],
)
def test_errors_count_messages_as_the_client_wrote_them(change: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_messages({**BODY, "system": "Be brief.", **change})
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("choice", "must_call", "only", "is_many"),
    [
        (None, False, None, True),
        ({"type": "auto"}, False, None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, None, False),
        ({"type": "any"}, True, None, False),
        ({"type": "any", "disable_parallel_tool_use": False}, True, None, True),
        ({"type": "tool", "name": "get"}, True, "get", False),
    ],
)
def test_choices_of_tools_have_their_own_names(
    choice: object, must_call: bool, only: str | None, is_many: bool
) -> None:
    use = parse_messages({**BODY, "tools": [TOOL], "tool_choice": choice}).tools
    assert use is not None and (use.must_call, use.only, use.is_many) == (must_call, only, is_many)
    assert use.told[0]["function"] == {"name": "get", "description": "Gets.", "parameters": TOOL["input_schema"]}
    assert parse_messages({**BODY, "tools": [TOOL], "tool_choice": {"type": "none"}}).tools is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"max_tokens": None}, "max_tokens: it is missing"),
        ({"model": None}, "model: it is missing"),
        ({"messages": None}, "messages: it is missing"),
        ({"messages": []}, "messages: not a list"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages\\[0\\]: role"),
        ({"messages": [5]}, "messages\\[0\\]: role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages\\[0\\].content: not a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages\\[0\\].content\\[0\\]: not"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "continued"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools\\[0\\]"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools\\[0\\].function.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "all"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "no"}}, "tool_choice"),
        ({"thinking": 5}, "thinking: not an object"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"stop_sequences": 5}, "stop"),
    ],
)
def test_what_cannot_be_served_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        asked = parse_messages({**BODY, **change})
        asked.params(3, 100)
    with pytest.raises(BadRequest, match="not a JSON object"):
        parse_messages([])


async def test_a_whole_message() -> None:
    message = await _post(WritingRing(text="Hello there."))
    assert message.pop("id").startswith("msg-")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hello there."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 4, **NO_CACHE},
    }


async def test_a_message_that_uses_tools() -> None:
    ring = WritingRing(text=TWO_CALLS)
    message = await _post(ring, tools=[TOOL, ADD])
    text, first, second = message["content"]
    assert text == {"type": "text", "text": "Let me see."} and message["stop_reason"] == "tool_use"
    assert (first["type"], first["name"], first["input"]) == ("tool_use", "get", {"a": 1})
    assert (second["name"], second["input"]) == ("add", {}) and first["id"] != second["id"]


async def test_a_stream_has_blocks_that_begin_grow_and_end() -> None:
    events = await _post(WritingRing(text=TWO_CALLS), tools=[TOOL, ADD], stream=True)
    assert events[0]["type"] == "message_start"
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"] == {"input_tokens": 3, "output_tokens": 0, **NO_CACHE}
    begun = [event for event in events if event["type"] == "content_block_start"]
    assert [event["content_block"]["type"] for event in begun] == ["text", "tool_use", "tool_use"]
    assert [event["index"] for event in begun] == [0, 1, 2]
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1, 2]
    grown = ["", "", ""]
    open_blocks: list[int] = []
    for event in events:
        if event["type"] == "content_block_start":
            open_blocks.append(event["index"])
        elif event["type"] == "content_block_stop":
            assert open_blocks.pop() == event["index"]
        elif event["type"] == "content_block_delta":
            assert open_blocks == [event["index"]], "a delta outside its block"
            delta = event["delta"]
            kind = "text" if event["index"] == 0 else "partial_json"
            assert delta["type"] == ("text_delta" if event["index"] == 0 else "input_json_delta")
            grown[event["index"]] += delta[kind]
    assert grown == ["Let me see.", '{"a": 1}', "{}"]
    assert events[-2]["type"] == "message_delta" and events[-1] == {"type": "message_stop"}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == -(-len(TWO_CALLS) // 3)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_why_an_answer_ended_has_its_own_words(is_streamed: bool) -> None:
    for ring, reason, stop in (
        (WritingRing(), "end_turn", None),
        (WritingRing(reason=FinishReason.LENGTH), "max_tokens", None),
        (WritingRing(stop_text="5"), "stop_sequence", "5"),
    ):
        found = await _post(ring, stream=is_streamed)
        found = found[-2]["delta"] if is_streamed else found
        assert (found["stop_reason"], found["stop_sequence"]) == (reason, stop)


async def test_tokens_are_counted_and_nothing_is_asked() -> None:
    ring = WritingRing()
    async with _client(ring) as client:
        body = {"model": "tiny", "messages": BODY["messages"], "tools": [TOOL]}
        response = await client.post("/v1/messages/count_tokens", json=body)
        assert await response.json() == {"input_tokens": 3}
    assert not ring.asked and len(ring.tools) == 1


async def test_errors_and_keys_are_anthropics() -> None:
    key = "k" * 20
    async with _client(WritingRing(), key) as client:
        for headers, body, status, kind in (
            ({}, BODY, 401, "authentication_error"),
            ({"x-api-key": "wrong"}, BODY, 401, "authentication_error"),
            ({"x-api-key": key}, {**BODY, "model": "other"}, 404, "not_found_error"),
            ({"x-api-key": key}, {**BODY, "messages": []}, 400, "invalid_request_error"),
            ({"Authorization": f"Bearer {key}"}, [], 400, "invalid_request_error"),
        ):
            response = await client.post("/v1/messages", json=body, headers=headers)
            found = await response.json()
            assert response.status == status and found["type"] == "error"
            assert found["error"]["type"] == kind and found["error"]["message"] and set(found) == {"type", "error"}
        assert (await client.post("/v1/messages", json=BODY, headers={"x-api-key": key})).status == 200
        response = await client.post("/v1/chat/completions", json={}, headers={"x-api-key": key})
        assert "code" in (await response.json())["error"], "OpenAI's form has changed"


async def test_a_ring_that_does_not_serve_is_overloaded() -> None:
    async with _client(WritingRing(is_serving=False)) as client:
        response = await client.post("/v1/messages", json=BODY)
        assert response.status == 503 and (await response.json())["error"]["type"] == "overloaded_error"


async def test_an_error_in_a_stream_is_an_event() -> None:
    ring = WritingRing(reason=FinishReason.ERROR)
    events = await _post(ring, stream=True)
    assert events[-1]["type"] == "error" and events[-1]["error"]["type"] == "overloaded_error"


def test_a_seed_makes_a_message_that_can_be_asked_for_again() -> None:
    body = {"model": "m", "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}], "seed": 7}
    assert parse_messages(body).params(1, 64).seed == 7
