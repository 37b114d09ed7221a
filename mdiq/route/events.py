"""Server-sent events: bytes to events and back, and what an event of each kind of stream means. No sockets."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_EVENT_BYTES = 16 << 20
"""The last event of a response holds all of it once more."""
CHARACTERS_PER_TOKEN = 4
"""Of English text, roughly; a router has no tokenizer."""
_TRANSIENT = ("unavailable_error", "overloaded_error")
_RESPONSE_ENDS = ("response.completed", "response.incomplete", "response.failed")


class StreamError(Exception):
    """A server sent what is not a stream of events."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event. raw: its bytes with the empty line; value: its JSON; None of a comment, and of [DONE]."""

    raw: bytes
    value: Mapping[str, Any] | None = None
    is_done: bool = False

    @property
    def is_comment(self) -> bool:
        """Whether it only keeps the connection open."""
        return self.value is None and not self.is_done


class EventReader:
    """Divides what comes into events."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._seen = 0  # of it, without an end of an event

    def push(self, data: bytes) -> list[Event]:
        """Add bytes; return the events that they complete.

        Raises:
            StreamError: that is not a stream of events, or one of them is too large.
        """
        self._held += data
        events: list[Event] = []
        while (end := self._held.find(b"\n\n", max(self._seen - 1, 0))) >= 0:
            events.append(_event(bytes(self._held[: end + 2])))
            del self._held[: end + 2]
            self._seen = 0
        self._seen = len(self._held)
        if len(self._held) > MAX_EVENT_BYTES:
            raise StreamError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return events


def _event(raw: bytes) -> Event:
    lines = [line.removeprefix(b"data:").strip() for line in raw.split(b"\n") if line.startswith(b"data:")]
    if not lines:
        return Event(raw)
    data = b"\n".join(lines)
    if data == b"[DONE]":
        return Event(raw, is_done=True)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise StreamError("an event is not JSON") from None
    if not isinstance(value, dict):
        raise StreamError("an event is not an object")
    return Event(raw, value)


def encoded(value: Mapping[str, Any]) -> bytes:
    """Return an event as it stands in a stream. Kinds of streams whose events have a type name it in a line too."""
    kind = value.get("type")
    name = f"event: {kind}\n" if isinstance(kind, str) else ""
    return f"{name}data: {json.dumps(value)}\n\n".encode()


class Dialect:
    """What events mean in one kind of stream: of OpenAI's chats and completions."""

    def lane(self, value: Mapping[str, Any]) -> int:
        """Return whose event it is: events of one lane come in one order, those of several may mix."""
        choices = value.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            index = choices[0].get("index")
            return index if isinstance(index, int) else 0
        return -1  # of all together: the counts of tokens

    def ends(self, event: Event) -> bool:
        """Whether nothing comes after it."""
        return event.is_done

    def failure(self, value: Mapping[str, Any]) -> str | None:
        """Return why the server cannot go on, if the event says so and another server may; None else."""
        error = value.get("error")
        if isinstance(error, dict) and error.get("type") in _TRANSIENT:
            return str(error.get("message"))[:300]
        return None

    def is_closing(self, value: Mapping[str, Any]) -> bool:
        """Whether the event may only say that the answer breaks off here: the next one tells."""
        return False

    def usage(self, value: Mapping[str, Any]) -> tuple[int, int] | None:
        """Return tokens of prompt and answer, if the event tells all of them."""
        return counts_of(value.get("usage"), "prompt_tokens", "completion_tokens")

    def error(self, message: str, num_events: int) -> bytes:
        """Return the last event of a stream that cannot go on. num_events: that the client has."""
        body = {"message": message, "type": "unavailable_error", "param": None, "code": None}
        return encoded({"error": body})


class MessagesDialect(Dialect):
    """Of Anthropic's messages."""

    def lane(self, value: Mapping[str, Any]) -> int:
        return 0

    def ends(self, event: Event) -> bool:
        return event.value is not None and event.value.get("type") == "message_stop"

    def usage(self, value: Mapping[str, Any]) -> tuple[int, int] | None:
        usage = value.get("usage") if value.get("type") == "message_delta" else None
        counts = counts_of(usage, "input_tokens", "output_tokens")
        cached = counts_of(usage, "cache_read_input_tokens", "output_tokens")
        return counts if counts is None or cached is None else (counts[0] + cached[0], counts[1])

    def error(self, message: str, num_events: int) -> bytes:
        return encoded({"type": "error", "error": {"type": "overloaded_error", "message": message}})


class ResponsesDialect(Dialect):
    """Of OpenAI's responses."""

    def lane(self, value: Mapping[str, Any]) -> int:
        return 0

    def ends(self, event: Event) -> bool:
        return event.value is not None and event.value.get("type") in _RESPONSE_ENDS

    def failure(self, value: Mapping[str, Any]) -> str | None:
        response = value.get("response") if value.get("type") == "response.failed" else None
        error = response.get("error") if isinstance(response, dict) else None
        return str(error.get("message"))[:300] if isinstance(error, dict) else None

    def is_closing(self, value: Mapping[str, Any]) -> bool:
        return str(value.get("type")).endswith(".done")

    def usage(self, value: Mapping[str, Any]) -> tuple[int, int] | None:
        response = value.get("response")
        usage = response.get("usage") if isinstance(response, dict) else None
        return counts_of(usage, "input_tokens", "output_tokens")

    def error(self, message: str, num_events: int) -> bytes:
        body = {"code": "server_error", "message": message, "param": None}
        return encoded({"type": "error", "sequence_number": num_events, **body})


def counts_of(usage: object, *names: str) -> tuple[int, int] | None:
    """Return two counts of a usage, or None if there are none."""
    if not isinstance(usage, dict):
        return None
    first, second = (usage.get(name) for name in names)
    return (first, second) if isinstance(first, int) and isinstance(second, int) else None


def num_tokens_of(response: Mapping[str, Any]) -> int:
    """Return how many tokens the answer in a response has, roughly."""
    num_characters = 0
    for item in response.get("output") or ():
        texts = [part.get("text") for part in item.get("content") or ()]
        num_characters += sum(len(text) for text in (*texts, item.get("arguments")) if text)
    return num_characters // CHARACTERS_PER_TOKEN


def response_id_of(value: Mapping[str, Any] | None) -> str:
    """Return the id of the response that an event tells of, or "" if it tells of none."""
    response = value.get("response") if value is not None else None
    found = response.get("id") if isinstance(response, dict) else None
    return found if isinstance(found, str) else ""


def reason_of(value: Mapping[str, Any]) -> str:
    """Return why an answer has ended, of an event or of a whole answer; "none" if it does not say."""
    choices, delta, response = value.get("choices"), value.get("delta"), value.get("response", value)
    choice = choices[-1] if isinstance(choices, list) and choices else None
    found = [
        choice.get("finish_reason") if isinstance(choice, dict) else None,
        delta.get("stop_reason") if isinstance(delta, dict) else None,
        value.get("stop_reason"),
        response.get("status") if isinstance(response, dict) and "output" in response else None,
    ]
    return next((reason[:40] for reason in found if isinstance(reason, str)), "none")
