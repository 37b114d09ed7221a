"""JSON that is nested deeply is refused as a whole, whatever field it stands in: never a 500."""

import json
from typing import Any

import pytest

from mdiq.api.nesting import MAX_NESTING, TooDeepError, loads
from mdiq.api.requests import parse
from tests.api.test_app import _client
from tests.api.test_forms import HI, WritingRing


def _nested(depth: int, inner: Any = 1) -> Any:
    for i in range(depth):
        inner = {"a": inner} if i % 2 else [inner]
    return inner


@pytest.mark.parametrize("depth", [MAX_NESTING + 1, 400, 900, 5_000, 100_000])
def test_json_beyond_the_limit_is_not_read(depth: int) -> None:
    text = "[" * depth + "]" * depth
    for given in (text, text.encode(), f'["{"[" * 300}", {text[1:-1]}]'):
        with pytest.raises(TooDeepError, match=f"deeper than {MAX_NESTING} levels"):
            loads(given)


def test_json_within_the_limit_is_read_however_many_brackets_it_has() -> None:
    for value in (_nested(MAX_NESTING), [[i] for i in range(5_000)], ["[" * 5_000], "{" * 5_000, 3):
        assert loads(json.dumps(value)) == loads(json.dumps(value).encode()) == value


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DEEP = _nested(600)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}]},
        ),
        ("/v1/chat/completions", {"messages": HI, "unknown": DEEP}),
        ("/v1/responses", {"input": "Hi", "text": {"format": {"type": "text", "x": DEEP}}}),
        ("/v1/responses", {"input": "Hi", "tools": [{"type": "function", "name": "f", "strict": DEEP}]}),
        ("/v1/messages", {"model": "tiny", "max_tokens": 3, "messages": HI, "tools": [{"input_schema": DEEP}]}),
        ("/tokenize", {"messages": DEEP}),
    ],
)
async def test_a_body_beyond_the_limit_is_a_400(path: str, body: Any) -> None:
    async with _client(WritingRing()) as client:
        response = await client.post(path, json=body)
        assert response.status == 400
        assert "nested deeper than" in (await response.json())["error"]["message"]


def test_arguments_of_a_call_that_are_nested_deeply_stay_a_text() -> None:
    text = json.dumps(_nested(600))
    call = {**CALL, "function": {"name": "f", "arguments": text}}
    asked = parse({"messages": [*HI, {"role": "assistant", "tool_calls": [call]}]}, is_chat=True)
    assert asked.messages is not None
    assert asked.messages[1]["tool_calls"][0]["function"]["arguments"] == text
