"""Forms of answers and tools over HTTP, in front of a ring that writes what the test says."""

import json
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from mdiq.api import structure, tool_grammars
from mdiq.api.forming import parser_of, tools_about
from mdiq.api.tool_calls import CallParser
from mdiq.api.tool_forms import form_of
from mdiq.api.tools import tools_of
from mdiq.core.sequence import FinishReason, SamplingParams, TokenEvent
from mdiq.errors import ConfigError, CostlyFormError
from mdiq.runtime.starter_service import StreamEvent
from tests.api.test_app import FakeRing, _chunks, _client, _error

HI = [{"role": "user", "content": "Hi"}]
GET = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {"a": {}}}}}
ADD = {"type": "function", "function": {"name": "add"}}
TWO_CALLS = (
    'Let me see.\n<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
)


@dataclass
class WritingRing(FakeRing):
    """Writes ``text``, three characters a token. special: ids of its special tokens. bad: grammars with this text in
    them cannot be compiled."""

    text: str = "Hello."
    reason: FinishReason = FinishReason.STOP
    chat_template: str | None = "{{ tools }}<tool_call>"
    bad: str = "%%"
    special: Mapping[str, int] | None = None
    stop_text: str | None = None

    def special_id(self, text: str) -> int | None:
        return (self.special or {}).get(text)

    def check_grammar(self, grammar: str) -> None:
        if self.bad in grammar:
            raise ConfigError(f"it cannot be used: {self.bad}")

    def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any], tools: Sequence[Any] = ()
    ) -> list[int]:
        self.tools = tools
        return [1, 2, 3]

    async def answer(
        self, prompt: tuple[int, ...], params: SamplingParams, **_: Any
    ) -> AsyncGenerator[StreamEvent, None]:
        self.asked.append((prompt, params))
        pieces = [self.text[i : i + 3] for i in range(0, len(self.text), 3)]
        for i, piece in enumerate(pieces):
            reason = self.reason if i == len(pieces) - 1 else None
            yield StreamEvent(TokenEvent(0, i, 3 + i, reason), piece, 0.0, stop_text=self.stop_text if reason else None)


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
async def test_a_large_body_is_read_in_a_thread_so_that_nobodys_tokens_wait_for_its_schema(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    with_guidance = structure.with_guidance

    def watched(schema: Mapping[str, Any]) -> dict[str, Any]:
        names.append(threading.current_thread().name.rpartition("_")[0])
        return with_guidance(schema)

    for module in (structure, tool_grammars):
        monkeypatch.setattr(module, "with_guidance", watched)
    schema = {"type": "object", "properties": {"a": {"enum": ["x" * 70_000]}}}
    form = {"type": "json_schema", "name": "x", "schema": schema}
    given: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": HI, "json_schema": schema, "tools": [GET]},
        "completions": {"prompt": "Hi", "json_schema": schema},
        "responses": {"input": "Hi", "text": {"format": form}},
        "messages": {"model": "tiny", "messages": HI, "max_tokens": 5, "output_config": {"format": form}},
    }
    async with _client(WritingRing(text="{}")) as client:
        response = await client.post(f"/v1/{path}", json=given[path])
        assert response.status == 200, await response.text()
    assert {*names} == {"texts"}


async def _chat(ring: WritingRing, **fields: Any) -> dict[str, Any]:
    async with _client(ring) as client:
        response = await client.post("/v1/chat/completions", json={"messages": HI, **fields})
        assert response.status == 200, await response.text()
        choice: dict[str, Any] = (await response.json())["choices"][0]
        return choice


async def _deltas(ring: WritingRing, **fields: Any) -> list[dict[str, Any]]:
    async with _client(ring) as client:
        response = await client.post("/v1/chat/completions", json={"messages": HI, "stream": True, **fields})
        return [chunk["choices"][0] for chunk in _chunks(await response.text())]


async def test_calls_are_found_in_a_whole_answer() -> None:
    ring = WritingRing(text=TWO_CALLS)
    choice = await _chat(ring, tools=[GET, ADD])
    message = choice["message"]
    assert (message["role"], message["content"], choice["finish_reason"]) == ("assistant", "Let me see.", "tool_calls")
    assert [call["type"] for call in message["tool_calls"]] == ["function"] * 2
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "get", "arguments": '{"a": 1}'},
        {"name": "add", "arguments": "{}"},
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert [tool["function"]["name"] for tool in ring.tools] == ["get", "add"]


async def test_an_answer_that_only_calls_has_no_content() -> None:
    text = '\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>\n'
    assert (await _chat(WritingRing(text=text), tools=[ADD]))["message"]["content"] is None


async def test_calls_come_in_pieces_in_a_stream() -> None:
    choices = await _deltas(WritingRing(text=TWO_CALLS), tools=[GET, ADD])
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Let me see."
    pieces = [piece for choice in choices for piece in choice["delta"].get("tool_calls", ())]
    begun = [piece for piece in pieces if "id" in piece]
    assert [(piece["index"], piece["type"], piece["function"]["name"]) for piece in begun] == [
        (0, "function", "get"),
        (1, "function", "add"),
    ]
    assert all(set(piece) == {"index", "function"} and piece["function"] for piece in pieces if "id" not in piece)
    texts = ["".join(p["function"]["arguments"] for p in pieces if p["index"] == i) for i in range(2)]
    assert texts == ['{"a": 1}', "{}"] and len(pieces) > 2
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]
    assert choices[-1]["delta"] == {}


async def test_a_call_that_is_cut_short_says_so() -> None:
    ring = WritingRing(text='<tool_call>\n{"name": "get", "arguments": {"a"', reason=FinishReason.LENGTH)
    choice = await _chat(ring, tools=[GET])
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get", "arguments": '{"a"'}


XML_CALL = "<tool_call>\n<function=get>\n<parameter=a>\n12\n</parameter>\n</function>\n</tool_call>"
XML_TEMPLATE = "{{ tools }}<tool_call><function=example><parameter=example>"


@pytest.mark.parametrize(("kind", "value"), [("string", '"12"'), ("integer", "12"), (None, "12")])
async def test_the_schema_says_which_values_without_quotes_are_strings(kind: str | None, value: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": kind} if kind else {}}}
    tool = {"type": "function", "function": {"name": "get", "parameters": schema}}
    choice = await _chat(WritingRing(text=XML_CALL, chat_template=XML_TEMPLATE), tools=[tool])
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get", "arguments": f'{{"a": {value}}}'}


async def test_a_parser_is_made_again_as_it_was() -> None:
    ring = WritingRing(chat_template=XML_TEMPLATE)
    use = tools_of({"tools": [{"function": {"name": "get", "parameters": {"properties": {"a": {"type": "string"}}}}}]})
    assert use is not None
    parser = CallParser(form_of(XML_TEMPLATE), use.names, use.kinds)
    again = parser_of(json.loads(json.dumps(tools_about(parser))), ring)
    assert again is not None and again.push(XML_CALL) == parser.push(XML_CALL) and again.num_calls == 1


async def test_an_answer_ends_where_the_results_of_its_calls_would_follow() -> None:
    special = {"<start_function_call>": 7, "<end_function_call>": 8, "<escape>": 9, "<start_function_response>": 10}
    ring = WritingRing(special=special, chat_template="{{ tools }}<start_function_call>")
    await _chat(ring, tools=[GET], stop_token_ids=[5])
    params = ring.asked[0][1]
    assert params.stop_token_ids == (5, 10) and params.shown_token_ids == (7, 8, 9) and "<[10]>" in params.grammar


async def test_without_tools_or_with_the_choice_of_none_nothing_is_a_call() -> None:
    for fields in ({}, {"tools": [GET], "tool_choice": "none"}):
        ring = WritingRing(text=TWO_CALLS)
        choice = await _chat(ring, **fields)
        assert choice["message"] == {"role": "assistant", "content": TWO_CALLS} and choice["finish_reason"] == "stop"
        assert not ring.tools and ring.asked[0][1].grammar == ""


async def test_tools_reach_the_sampler_as_a_grammar_and_marks() -> None:
    ring = WritingRing(special={"<tool_call>": 7, "</tool_call>": 8})
    await _chat(ring, tools=[GET], tool_choice="required", temperature=0)
    params = ring.asked[0][1]
    assert params.grammar.startswith("lark:start: call") and "<[7]>" in params.grammar
    assert params.shown_token_ids == (7, 8)


async def test_a_form_reaches_the_sampler_of_chats_and_completions() -> None:
    ring = WritingRing(text='{"a": 1}')
    choice = await _chat(ring, response_format={"type": "json_object"})
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"a": 1}', "stop")
    async with _client(ring) as client:
        body = {"prompt": "a", "guided_regex": "[a-z]"}
        assert (await client.post("/v1/completions", json=body)).status == 200
    assert ring.asked[0][1].grammar.startswith('json_schema:{"type": "object"')
    assert ring.asked[1][1].grammar == "regex:[a-z]"


BAD = {"type": "object", "properties": {"a": {"type": "%%"}}}


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"guided_json": BAD}, "guided_json", "guided_json.properties.a: it cannot be used: %%"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": BAD}}},
            "response_format",
            "response_format.json_schema.schema.properties.a: it cannot be used",
        ),
        (
            {"tools": [GET, {"function": {"name": "bad", "parameters": BAD}}]},
            "tools[1].function.parameters",
            "tools[1].function.parameters.properties.a: it cannot be used",
        ),
        ({"guided_json": {"maximum": "%%", "items": {}}}, "guided_json", "guided_json: it cannot be used"),
        (
            {"guided_json": {"properties": {**{f"p{i}": {} for i in range(70)}, "bad": {"type": "%%"}}}},
            "guided_json",
            "guided_json: it cannot be used",  # too many parts to look at
        ),
        ({"tools": [GET], "regex": "a", "tool_choice": "auto"}, "regex", "regex: beside tools"),
    ],
)
async def test_what_cannot_be_compiled_is_refused_and_named(fields: dict[str, Any], param: str, text: str) -> None:
    ring = WritingRing()
    async with _client(ring) as client:
        response = await client.post("/v1/chat/completions", json={"messages": HI, **fields})
        error = await _error(response)
    assert (response.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith(text) and not ring.asked


@pytest.mark.parametrize("template", [None, "{{ messages }}", "{{ tools }}"])
async def test_a_model_that_cannot_call_tools_says_so(template: str | None) -> None:
    ring = WritingRing(chat_template=template)
    async with _client(ring) as client:
        response = await client.post("/v1/chat/completions", json={"messages": HI, "tools": [GET]})
        error = await _error(response)
        assert (response.status, error["param"]) == (400, "tools") and "tools" in error["message"]
        body = {"messages": HI, "tools": [GET], "tool_choice": "none"}
        assert (await client.post("/v1/chat/completions", json=body)).status == 200


async def test_completions_have_no_tools() -> None:
    async with _client(WritingRing()) as client:
        response = await client.post("/v1/completions", json={"prompt": "a", "tools": [GET]})
        assert response.status == 400 and (await _error(response))["param"] == "tools"


async def test_a_form_is_compiled_beside_the_event_loop() -> None:
    threads: list[str] = []

    class Ring(WritingRing):
        def check_grammar(self, grammar: str) -> None:
            threads.append(threading.current_thread().name)

    await _chat(Ring(), guided_json=json.dumps(BAD))
    assert threads and threads[0].startswith("texts")


@pytest.mark.parametrize(("num_wrong", "num_tried"), [(0, 1), (2, 3)])
async def test_nothing_more_is_compiled_once_a_form_was_too_costly(
    num_wrong: int, num_tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def check(grammar: str) -> None:
        tried.append(grammar)
        raise ConfigError("wrong") if len(tried) <= num_wrong else CostlyFormError("it takes too much time")

    ring = WritingRing()
    monkeypatch.setattr(ring, "check_grammar", check)
    schema = {"properties": {name: {"type": "string"} for name in "abcd"}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    async with _client(ring) as client:
        response = await client.post("/v1/chat/completions", json={"messages": HI, "response_format": form})
        error = await _error(response)
    assert response.status == 400 and len(tried) == num_tried
    assert error["param"] == "response_format"
    assert error["message"] == "response_format.json_schema.schema: it takes too much time"
