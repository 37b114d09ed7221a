"""Streams that go on at another server: events in, events out."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdiq.route.events import (
    Dialect,
    Event,
    EventReader,
    MessagesDialect,
    ResponsesDialect,
    StreamError,
    encoded,
    reason_of,
)
from mdiq.route.splice import DiffersError, Splice, renamed


def _chat(an_id: str, words: list[tuple[int, str]], created: int = 1) -> list[Event]:
    """Return a stream of a chat: (choice, text) in the order in which they come."""
    head = {"id": an_id, "created": created, "model": "m"}
    values: list[dict[str, Any]] = [
        {**head, "choices": [{"index": index, "delta": {"content": word}, "finish_reason": None}]}
        for index, word in words
    ]
    usage = {**head, "choices": [], "usage": {"prompt_tokens": created}}
    raw = b"".join(encoded(value) for value in [*values, usage]) + b"data: [DONE]\n\n"
    return EventReader().push(raw)


def _passed(splice: Splice, events: list[Event]) -> list[Any]:
    out = [splice.take(event) for event in events]
    return [json.loads(data[6:]) for data in out if data is not None and b"[DONE]" not in data]


WORDS = st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3)), max_size=12)


@given(WORDS, st.data())
def test_however_often_a_stream_moves_its_client_sees_one_stream(words: list[tuple[int, str]], data: Any) -> None:
    splice = Splice(Dialect())
    seen: list[Any] = []
    for number in range(data.draw(st.integers(0, 4))):
        # Choices of one request mix in another order each time.
        mixed = sorted(words, key=lambda word: word[0]) if number % 2 else words
        cut = data.draw(st.integers(0, len(words)))
        splice.begin()
        seen += _passed(splice, _chat(f"chatcmpl-{number}", mixed, number)[:cut])
    splice.begin()
    seen += _passed(splice, _chat("chatcmpl-9", words, 9))
    for index in range(3):
        own = [
            each["choices"][0]["delta"]["content"]
            for each in seen
            if each["choices"] and each["choices"][0]["index"] == index
        ]
        assert own == [word for choice, word in words if choice == index]
    assert len({each["id"] for each in seen}) == 1 and len({each["created"] for each in seen}) == 1
    assert sum(not each["choices"] for each in seen) == 1


def test_a_first_stream_passes_as_it_is() -> None:
    events = _chat("chatcmpl-1", [(0, "a"), (0, "b")])
    splice = Splice(Dialect())
    splice.begin()
    assert [splice.take(event) for event in events] == [event.raw for event in events]
    assert splice.num_events == 3 and splice.is_even


@pytest.mark.parametrize("words", [[(0, "a"), (0, "x"), (0, "c")], [(0, "a")], [(1, "a"), (1, "b")]])
def test_a_stream_that_differs_is_noticed_before_anything_of_it_is_passed(words: list[tuple[int, str]]) -> None:
    splice = Splice(Dialect())
    splice.begin()
    _passed(splice, _chat("chatcmpl-1", [(0, "a"), (0, "b"), (0, "c")])[:2])
    splice.begin()
    with pytest.raises(DiffersError):
        for event in _chat("chatcmpl-2", words):
            data = splice.take(event)
            assert data is None or words[0][0] == 1 or b'"choices": []' in data


def test_ids_of_calls_and_of_later_items_are_those_that_the_client_knows() -> None:
    def response(mark: str) -> list[Event]:
        whole = {"id": f"resp_{mark}", "created_at": len(mark), "usage": None}
        item = {"id": f"fc_{mark}", "call_id": f"call_{mark}"}
        values: list[dict[str, Any]] = [
            {"type": "response.created", "sequence_number": 0, "response": whole},
            {"type": "response.output_item.added", "sequence_number": 1, "item": item},
            {
                "type": "response.function_call_arguments.delta",
                "sequence_number": 2,
                "item_id": f"fc_{mark}",
                "delta": "1",
            },
            {"type": "response.output_item.added", "sequence_number": 3, "item": {"id": f"msg_{mark}"}},
            {"type": "response.completed", "sequence_number": 4, "response": {**whole, "output": [item]}},
        ]
        return EventReader().push(b"".join(map(encoded, values)))

    splice = Splice(ResponsesDialect())
    splice.begin()
    first = [splice.take(event) for event in response("one")[:2]]
    splice.begin()
    rest = [splice.take(event) for event in response("second")]
    assert first == [event.raw for event in response("one")[:2]] and rest[:2] == [None, None]
    delta, added, completed = [
        event.value or {} for event in EventReader().push(b"".join(data or b"" for data in rest))
    ]
    assert delta["item_id"] == "fc_one" and added["item"]["id"] == "msg_second"
    assert completed["response"]["id"] == "resp_one" and completed["response"]["created_at"] == 3
    assert completed["response"]["output"] == [{"id": "fc_one", "call_id": "call_one"}]
    assert list(splice.ids) == ["resp_one", "fc_one", "call_one", "msg_second"]


def test_counts_of_a_cache_are_no_difference() -> None:
    def message(an_id: str, cached: int) -> list[Event]:
        usage = {"input_tokens": 9 - cached, "cache_read_input_tokens": cached}
        start = {"type": "message_start", "message": {"id": an_id, "usage": usage}}
        end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {**usage, "output_tokens": 1}}
        return EventReader().push(b"".join(map(encoded, [start, end, {"type": "message_stop"}])))

    splice, dialect = Splice(MessagesDialect()), MessagesDialect()
    splice.begin()
    splice.take(message("msg_1", 0)[0])
    splice.begin()
    start, end, stop = message("msg_2", 4)
    assert splice.take(start) is None and splice.take(end) == encoded(end.value or {})
    assert dialect.ends(stop) and not dialect.ends(end)
    assert dialect.usage(end.value or {}) == (9, 1) and dialect.usage(start.value or {}) is None


@given(st.lists(st.integers(1, 40), max_size=20))
def test_events_are_the_same_however_they_are_cut(sizes: list[int]) -> None:
    raw = b": keep-alive\n\n" + b"".join(event.raw for event in _chat("chatcmpl-1", [(0, "a\n\nb"), (1, "ü")]))
    reader, events, at = EventReader(), list[Event](), 0
    for size in [*sizes, len(raw)]:
        events += reader.push(raw[at : at + size])
        at += size
    assert b"".join(event.raw for event in events) == raw
    assert events[0].is_comment and events[-1].is_done and len(events) == 5


@pytest.mark.parametrize("raw", [b"data: {\n\n", b"data: [1]\n\n", b"data: " + b"[" * 90_000 + b"\n\n"])
def test_what_is_not_an_event_is_refused(raw: bytes) -> None:
    with pytest.raises(StreamError):
        EventReader().push(raw)


def test_an_event_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdiq.route.events.MAX_EVENT_BYTES", 100)
    reader = EventReader()
    reader.push(b"data: " + b"x" * 90)
    with pytest.raises(StreamError, match="100 bytes"):
        reader.push(b"x" * 10)


def test_failures_that_another_server_may_not_have_are_told_from_those_of_the_request() -> None:
    def error(kind: str) -> dict[str, Any]:
        return {"error": {"type": kind, "message": "why"}}

    assert Dialect().failure(error("unavailable_error")) == "why"
    assert Dialect().failure(error("internal_error")) is None
    assert MessagesDialect().failure({"type": "error", **error("overloaded_error")}) == "why"
    failed = {"type": "response.failed", "response": {"error": {"code": "server_error", "message": "why"}}}
    assert ResponsesDialect().failure(failed) == "why"
    assert ResponsesDialect().failure({"type": "response.completed", "response": {"error": None}}) is None


def test_why_an_answer_has_ended_is_read_in_every_form() -> None:
    assert reason_of({"choices": [{"finish_reason": "stop"}]}) == "stop"
    assert reason_of({"type": "message_delta", "delta": {"stop_reason": "max_tokens"}}) == "max_tokens"
    assert reason_of({"response": {"status": "completed", "output": []}}) == "completed"
    assert reason_of({"choices": []}) == reason_of({"delta": "x"}) == "none"


def test_only_ids_are_renamed() -> None:
    value = {"id": "a", "text": "a", "list": [{"item_id": "a", "created": 1}]}
    assert renamed(value, {"a": "b"}, {"created": 7}) == {
        "id": "b",
        "text": "a",
        "list": [{"item_id": "b", "created": 7}],
    }
