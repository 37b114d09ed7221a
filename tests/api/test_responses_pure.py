"""Requests, objects and events of /v1/responses, and the store of them, without a server."""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from mdiq.api import response_store
from mdiq.api.requests import BadRequest
from mdiq.api.response_requests import parse_response, previous_of
from mdiq.api.response_shapes import Event, ResponseShape, items_of
from mdiq.api.response_store import KEEP_S, MAX_KEPT, ResponseStore, StoredResponse
from mdiq.api.shapes import Answer
from mdiq.api.tool_calls import CallDelta
from mdiq.errors import RingError

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True}
PIECES: Sequence[str | CallDelta] = (
    "Let ",
    "me see.",
    CallDelta(0, "call_a", "add", ""),
    CallDelta(0, None, None, '{"a": '),
    CallDelta(0, None, None, "1}"),
    CallDelta(1, "call_b", "add", '{"a": 2}'),
)


def _messages(body: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()) -> Sequence[Mapping[str, Any]] | None:
    return parse_response(body, history).chat.messages


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ("Hi", [{"role": "user", "content": "Hi"}]),
        ([{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Hi"}]),
        (
            [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be "}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "A"}] * 2},
                {"type": "reasoning", "summary": []},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "B"}]},
                {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
                {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "3"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "4"}]},
            ],
            [
                {"role": "developer", "content": "Be "},
                {"role": "user", "content": "AA"},
                {
                    "role": "assistant",
                    "content": "B",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
                        {"id": "c2", "type": "function", "function": {"name": "add", "arguments": {}}},
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "3"},
                {"role": "tool", "tool_call_id": "c2", "content": "4"},
            ],
        ),
    ],
)
def test_an_input_becomes_the_messages_of_a_chat(given: object, messages: list[Mapping[str, Any]]) -> None:
    assert [dict(message) for message in _messages({"input": given}) or ()] == messages


def test_instructions_come_first_and_are_not_handed_on() -> None:
    before = parse_response({"input": "A", "instructions": "Be old."})
    history = [*before.messages, {"role": "assistant", "content": "B"}]
    after = parse_response({"input": "C", "instructions": "Be new.", "previous_response_id": "resp_1"}, history)
    assert [message["content"] for message in after.chat.messages or ()] == ["Be new.", "A", "B", "C"]
    assert [message["content"] for message in after.messages] == ["A", "B", "C"]


def test_what_a_chat_has_elsewhere_is_found_there() -> None:
    asked = parse_response(
        {
            "input": "Hi",
            "max_output_tokens": 7,
            "temperature": 0.5,
            "top_k": 3,
            "stream": True,
            "model": "m",
            "tools": [TOOL],
            "tool_choice": {"type": "function", "name": "add"},
            "reasoning": {"effort": "low"},
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "include": ["reasoning.encrypted_content"],
        }
    )
    chat = asked.chat
    assert (chat.max_tokens, chat.is_streamed, chat.model) == (7, True, "m")
    assert chat.values["temperature"] == 0.5 and chat.values["top_k"] == 3
    assert chat.template_kwargs == {"reasoning_effort": "low"}
    assert chat.tools is not None and chat.tools.names == ["add"] and chat.tools.must_call
    assert asked.shown["tools"] == [TOOL] and asked.shown["metadata"] == {"a": "b"}
    assert asked.is_stored and not asked.is_background


def test_a_form_of_the_answer_is_that_of_a_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    structure = parse_response({"input": "Hi", "text": {"format": form, "verbosity": "low"}}).chat.structure
    assert structure is not None and structure.grammar.startswith("json_schema:")
    assert parse_response({"input": "Hi", "text": {"format": {"type": "text"}}}).chat.structure is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input"),
        ({"input": [{"type": 5}]}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": [{"role": "pirate", "content": "a"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"instructions": 5}, "instructions"),
        ({"background": 1}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"store": "no"}, "store"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": [{}]}, "messages"),
        ({"n": 2}, "n"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "a"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"metadata": {"a": 5}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].function.name"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice"),
        ({"text": "a"}, "text"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"reasoning": "low"}, "reasoning"),
        ({"reasoning": {"effort": 5}}, "reasoning"),
        ({"suffix": "a"}, "suffix"),
    ],
)
def test_bad_requests_are_refused_by_the_name_of_their_field(body: object, param: str | None) -> None:
    whole = {"input": "Hi", **body} if isinstance(body, dict) and body else body
    with pytest.raises(BadRequest) as refusal:
        parse_response(whole)
    assert refusal.value.body["param"] == param
    if param is not None:
        assert str(refusal.value).startswith(param.partition("[")[0])


@pytest.mark.parametrize(
    ("change", "text", "param"),
    [
        ({"instructions": "a\ud800"}, "instructions: it holds half", "instructions"),
        ({"input": "a\ud800"}, "input: it holds half", "input"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "banana"}]}, "input[1]: role 'banana'", "input"),
        ({"input": [{"role": "messages", "content": "a"}]}, "input[0]: role 'messages'", "input"),
        (
            {
                "input": [
                    {"type": "reasoning"},
                    {"role": "assistant", "content": "a"},
                    {"type": "function_call", "name": "b", "call_id": "c", "arguments": "{}"},
                    {"role": "user", "content": 5},
                ]
            },
            "input[3]: content: not a text",
            "input",
        ),
        (
            {"input": [{"role": "assistant", "content": "a"}, {"type": "function_call", "call_id": "c"}]},
            "input[1]: name: not a text",
            "input",
        ),
    ],
)
def test_errors_count_items_as_the_client_wrote_them(change: dict[str, Any], text: str, param: str) -> None:
    history = ({"role": "user", "content": "A"}, {"role": "assistant", "content": "B"})
    with pytest.raises(BadRequest) as caught:
        parse_response({"instructions": "Be brief.", "previous_response_id": "resp_1", "input": "a", **change}, history)
    assert str(caught.value).startswith(text) and caught.value.body["param"] == param


def test_the_id_of_a_response_before_is_a_text() -> None:
    assert previous_of({"previous_response_id": "resp_1"}) == "resp_1"
    assert previous_of({}) is previous_of([]) is None
    with pytest.raises(BadRequest, match="previous_response_id"):
        previous_of({"previous_response_id": 5})


def _answer(*, reason: str = "stop", pieces: Sequence[str | CallDelta] = PIECES) -> Answer:
    answer = Answer(11, 100, num_tokens=9, finish_reason=reason)
    for piece in pieces:
        answer._add(piece)
    return answer


def _run(shape: ResponseShape, answer: Answer, pieces: Sequence[str | CallDelta]) -> list[Event]:
    events = shape.begin()
    for piece in pieces:
        events += shape.add([piece])
    return events + shape.end(answer)


def _shape(**body: Any) -> ResponseShape:
    return ResponseShape("m", parse_response({"input": "Hi", **body}).shown)


@pytest.mark.parametrize("pieces", [PIECES, PIECES[:2], PIECES[2:], ()])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_events_add_up_to_the_response(pieces: Sequence[str | CallDelta], reason: str) -> None:
    """As OpenAI's own client adds them up: items by their places, texts and arguments by their pieces."""
    shape = _shape(tools=[TOOL])
    events = _run(shape, _answer(reason=reason, pieces=pieces), pieces)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items: list[dict[str, Any]] = []
    for event in events:
        EVENTS.validate_python(event)
        match event["type"]:
            case "response.output_item.added":
                assert event["output_index"] == len(items)
                items.append(dict(event["item"]))
            case "response.content_part.added":
                items[event["output_index"]]["content"] = [dict(event["part"])]
            case "response.output_text.delta":
                items[event["output_index"]]["content"][0]["text"] += event["delta"]
            case "response.function_call_arguments.delta":
                items[event["output_index"]]["arguments"] += event["delta"]
            case "response.output_item.done":
                items[event["output_index"]]["status"] = event["item"]["status"]
                assert items[event["output_index"]] == event["item"]
    last = events[-1]
    assert last["type"] == ("response.completed" if reason == "stop" else "response.incomplete")
    assert last["response"] == shape.whole() and last["response"]["output"] == items
    response = Response.model_validate(shape.whole())
    assert response.output_text == "".join(piece for piece in pieces if isinstance(piece, str))
    assert response.usage is not None and response.usage.total_tokens == 20
    assert (response.incomplete_details is None) == (reason == "stop")
    calls = [item for item in items if item["type"] == "function_call"]
    num_calls = len({piece.index for piece in pieces if isinstance(piece, CallDelta)})
    assert [call["arguments"] for call in calls] == ['{"a": 1}', '{"a": 2}'][:num_calls]


def test_the_next_response_sees_the_answer_as_a_chat_has_it() -> None:
    shape = _shape(tools=[TOOL])
    _run(shape, _answer(), PIECES)
    (message,) = shape.messages
    assert message["content"] == "Let me see." and [call["id"] for call in message["tool_calls"]] == [
        "call_a",
        "call_b",
    ]
    again = parse_response(
        {
            "input": [
                {"type": "function_call_output", "call_id": "call_a", "output": "1"},
                {"type": "function_call_output", "call_id": "call_b", "output": "2"},
            ]
        },
        [{"role": "user", "content": "Hi"}, *shape.messages],
    )
    assert [message["role"] for message in again.chat.messages or ()] == ["user", "assistant", "tool", "tool"]


def test_a_response_that_fails_or_is_cancelled_says_so_and_ends_what_it_has_begun() -> None:
    failed, cancelled = _shape(), _shape(background=True)
    events = [*failed.begin(), *failed.add(["Half"]), *failed.fail(RingError("pi1 is gone"))]
    assert [event["type"] for event in events][-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.failed",
    ]
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "pi1 is gone"}
    assert (failed.status, failed.is_ended) == ("failed", True)
    queued = cancelled.begin()
    assert [event["type"] for event in queued] == ["response.created", "response.queued", "response.in_progress"]
    assert cancelled.status == "in_progress" and not cancelled.is_ended
    assert cancelled.cancel()[-1]["response"]["status"] == "cancelled" and cancelled.is_ended
    for event in [*events, *queued]:
        EVENTS.validate_python(event)


@pytest.fixture
def now() -> Iterator[list[float]]:
    yield [0.0]


def _stored(owner: str = "", *, is_kept: bool = True, is_background: bool = False) -> StoredResponse:
    return StoredResponse(_shape(), owner, (), is_background, is_kept)


async def _read(response: StoredResponse, after: int = -1, limit: int | None = None) -> list[int]:
    numbers: list[int] = []
    events = response.read(after, silence_s=20.0)
    with response.reader():
        async for event in events:
            assert event is not None
            numbers.append(json.loads(event.partition(b"data: ")[2])["sequence_number"])
            if limit is not None and len(numbers) == limit:
                break
    await events.aclose()
    return numbers


async def test_a_stream_can_be_read_anew_from_any_event_while_it_runs_and_after_it() -> None:
    response = _stored()
    response.note(response.shape.begin())
    readers = [asyncio.create_task(_read(response, after)) for after in (-1, 0, 3)]
    left = asyncio.create_task(_read(response, limit=4))
    for piece in ("a", "b", "c"):
        await asyncio.sleep(0)
        response.note(response.shape.add([piece]))
    assert await left == [0, 1, 2, 3]
    response.note(response.shape.end(_answer(pieces=("a", "b", "c"))))
    num = response.shape._num_events
    assert [await reader for reader in readers] == [list(range(num)), list(range(1, num)), list(range(4, num))]
    assert await _read(response, after=4) == list(range(5, num))
    assert await _read(response, after=num - 1) == await _read(response, after=num + 5) == []


async def test_silence_is_told_of_and_costs_no_event() -> None:
    response = _stored()
    events = response.read(silence_s=0.001)
    assert [await anext(events) for _ in range(3)] == [None] * 3
    response.note(response.shape.begin())
    assert await anext(events) is not None
    await events.aclose()


@pytest.mark.parametrize(
    ("is_kept", "is_background", "goes_on_s"), [(True, False, 0.05), (False, False, 0.0), (True, True, None)]
)
async def test_a_response_without_a_reader_goes_on_for_a_while(
    monkeypatch: pytest.MonkeyPatch, is_kept: bool, is_background: bool, goes_on_s: float | None
) -> None:
    monkeypatch.setattr(response_store, "ALONE_S", 0.05)
    response = _stored(is_kept=is_kept, is_background=is_background)
    response.task = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
    response.note(response.shape.begin())
    await _read(response, limit=1)
    if goes_on_s:  # a reader that comes back in time
        assert not response.task.cancelling()
        again = asyncio.create_task(_read(response))
        await asyncio.sleep(2 * goes_on_s)
        assert response.is_wanted
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)
    if goes_on_s is None:
        await asyncio.sleep(0.1)
        assert response.is_wanted
        response.cancel()
    async with asyncio.timeout(20):
        await asyncio.wait({response.task})
    assert not response.is_wanted and response.task.cancelled()


def test_only_its_owner_finds_a_response_and_only_for_a_while(now: list[float]) -> None:
    store = ResponseStore(lambda: now[0])
    mine, passing = _stored("me"), _stored("me", is_kept=False)
    store.add(mine)
    store.add(passing)
    assert store.find(mine.shape.id, "me") is mine
    assert store.find(mine.shape.id, "you") is store.find("resp_1", "me") is store.find(passing.shape.id, "me") is None
    now[0] = 2 * KEEP_S
    assert store.find(mine.shape.id, "me") is mine, "it runs"
    store.ended(mine)
    now[0] += KEEP_S - 1
    assert store.find(mine.shape.id, "me") is mine
    now[0] += 1
    assert store.find(mine.shape.id, "me") is None


def test_too_many_or_too_large_ones_are_let_go_of_the_oldest_first(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_store, "MAX_BYTES", 10_000)
    store = ResponseStore(lambda: now[0])
    all_of_them = [_stored() for _ in range(MAX_KEPT + 2)]
    for response in all_of_them:
        now[0] += 1
        store.add(response)
        store.ended(response)
    kept = [store.find(response.shape.id, "") is not None for response in all_of_them]
    assert kept == [False] * 2 + [True] * MAX_KEPT
    all_of_them[-1].num_bytes = 9_999
    all_of_them[-2].num_bytes = 2
    now[0] += 1
    found = [store.find(response.shape.id, "") is not None for response in all_of_them[-2:]]
    assert found == [False, True]
    store.forget(all_of_them[-1])
    assert store.find(all_of_them[-1].shape.id, "") is None


def test_where_there_are_too_many_who_has_the_most_loses_the_oldest(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_store, "MAX_BYTES", 1_000)
    store = ResponseStore(lambda: now[0])
    held: list[StoredResponse] = []
    for owner, num_bytes in (("few", 100), ("many", 300), ("many", 300), ("many", 200)):
        response = _stored(owner)
        response.num_bytes = num_bytes
        held.append(response)
        now[0] += 1
        store.add(response)
        store.ended(response)
    more = _stored("many")  # it runs, and counts
    more.num_bytes = 400
    store.add(more)
    found = [store.find(response.shape.id, response.owner) is not None for response in held]
    assert found == [True, False, True, True] and store.find(more.shape.id, "many") is more


def test_what_runs_is_no_reason_to_let_go_of_what_others_have(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_store, "MAX_BYTES", 1_000)
    store = ResponseStore(lambda: now[0])
    mine, running = _stored("few"), _stored("many")
    store.add(mine)
    store.ended(mine)
    mine.num_bytes, running.num_bytes = 100, 5_000
    store.add(running)
    assert store.find(mine.shape.id, "few") is mine and store.find(running.shape.id, "many") is running


def test_no_client_sees_the_end_of_a_line_within_an_event() -> None:
    shape = _shape(instructions="a\u2028b\x85c\u2029d")
    for event in [*shape.begin(), *shape.add(["x\u2028y ä"])]:
        lines = response_store.as_sse(event).decode().splitlines()
        assert len(lines) == 3 and not lines[2]
        assert json.loads(lines[1].removeprefix("data: ")) == event


def test_items_of_an_input_are_those_of_a_chat() -> None:
    given = [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
        {"role": "assistant", "content": "Done."},
    ]
    items = items_of(parse_response({"input": given}).chat.messages or ())
    assert [item["type"] for item in items] == ["message", "function_call", "function_call_output", "message"]
    assert items[1] == {
        "id": "item_1",
        "type": "function_call",
        "call_id": "c1",
        "name": "add",
        "arguments": '{"a": 1}',
        "status": "completed",
    }
    assert items[2]["output"] == "3" and items[3]["content"][0]["type"] == "output_text"
    again = parse_response({"input": items}).chat.messages
    assert again == parse_response({"input": given}).chat.messages
