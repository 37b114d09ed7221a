"""A response of /v1/responses as it grows: OpenAI's object and its numbered events. No sockets."""

import copy
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from mdiq.api.shapes import Answer
from mdiq.api.tool_calls import CallDelta
from mdiq.errors import MdiqError

Event = Mapping[str, Any]


def new_id(prefix: str) -> str:
    """Return an id that nobody can guess: who has that of a response may ask for it."""
    return f"{prefix}_{secrets.token_hex(24)}"


class ResponseShape:
    """One response. shown: fields of its request that it repeats; messages: its answer, as messages of a chat.

    response_id, created_at: of one that another process has begun. Its events follow from these and from its tokens, so
    they are the same there.
    """

    def __init__(
        self, model: str, shown: Mapping[str, Any], *, response_id: str | None = None, created_at: int | None = None
    ) -> None:
        self.id = response_id or new_id("resp")
        self.messages: list[Mapping[str, Any]] = []
        self._output: list[dict[str, Any]] = []
        self._fields = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()) if created_at is None else created_at,
            "status": "queued" if shown.get("background") else "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": model,
            **shown,
            "usage": None,
        }
        self._num_events = 0
        self._is_open = False  # the newest item

    @classmethod
    def ended(cls, whole: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> "ResponseShape":
        """Return one that has ended, from its object and its answer."""
        shape = cls("", {}, response_id=whole["id"])
        shape._fields = {name: value for name, value in whole.items() if name != "output"}
        shape._output = [dict(item) for item in whole["output"]]
        shape.messages = [*messages]
        return shape

    def forked(self) -> "ResponseShape":
        """Return a copy, which goes its own way."""
        fork = copy.copy(self)
        fork._fields, fork._output = {**self._fields}, copy.deepcopy(self._output)
        return fork

    @property
    def created_at(self) -> int:
        """Unix time."""
        return int(self._fields["created_at"])

    @property
    def model(self) -> str:
        return str(self._fields["model"])

    @property
    def status(self) -> str:
        """OpenAI's word for how far it is."""
        return str(self._fields["status"])

    @property
    def is_ended(self) -> bool:
        """Whether nothing more comes."""
        return self.status not in ("queued", "in_progress")

    def whole(self) -> dict[str, Any]:
        """Return the object."""
        return {**self._fields, "output": [dict(item) for item in self._output]}

    def begin(self) -> list[Event]:
        """Return the first events."""
        created = self._event("response.created", response=self.whole())
        queued = [self._event("response.queued", response=self.whole())] if self.status == "queued" else []
        self._fields["status"] = "in_progress"
        return [created, *queued, self._event("response.in_progress", response=self.whole())]

    def add(self, pieces: Sequence[str | CallDelta]) -> list[Event]:
        """Take in what an answer has brought; return its events."""
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, str):
                events += self._text(piece)
            else:
                events += self._call(piece)
        return events

    def end(self, answer: Answer) -> list[Event]:
        """Return the last events: the answer is complete."""
        is_cut = answer.finish_reason == "length"
        events = self._close("incomplete" if is_cut else "completed")
        if not self._output:  # an answer without a character is a message too
            events = [*self._open_message(), *self._close("incomplete" if is_cut else "completed")]
        self._fields |= {
            "status": "incomplete" if is_cut else "completed",
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": _usage(answer),
        }
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.tool_calls:
            message |= {"content": answer.text or None, "tool_calls": answer.tool_calls}
        self.messages = [message]
        return [*events, self._event(f"response.{self.status}", response=self.whole())]

    def fail(self, error: MdiqError | str) -> list[Event]:
        """Return the last events of a response that the ring failed to give."""
        events = self._close("incomplete")
        self._fields |= {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        return [*events, self._event("response.failed", response=self.whole())]

    def cancel(self) -> list[Event]:
        """Return the last events of a response that was cancelled; OpenAI has no event of its own for that."""
        events = self._close("incomplete")
        self._fields["status"] = "cancelled"
        return [*events, self._event("response.incomplete", response=self.whole())]

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _text(self, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._is_open or self._output[-1]["type"] != "message":
            events = [*self._close("completed"), *self._open_message()]
        item = self._output[-1]
        item["content"][0]["text"] += text
        place = {"item_id": item["id"], "output_index": len(self._output) - 1, "content_index": 0}
        return [*events, self._event("response.output_text.delta", **place, delta=text, logprobs=[])]

    def _call(self, piece: CallDelta) -> list[Event]:
        events: list[Event] = []
        if piece.name is not None:
            events = self._close("completed")
            item = {
                "id": self._item_id("fc"),
                "type": "function_call",
                "status": "in_progress",
                "call_id": piece.id,
                "name": piece.name,
                "arguments": "",
            }
            events.append(self._add_item(item))
        if piece.arguments:
            self._output[-1]["arguments"] += piece.arguments
            place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
            events.append(self._event("response.function_call_arguments.delta", **place, delta=piece.arguments))
        return events

    def _open_message(self) -> list[Event]:
        item = {
            "id": self._item_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        added = self._add_item(item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        place = {"item_id": item["id"], "output_index": len(self._output) - 1, "content_index": 0}
        self._output[-1]["content"] = [part]
        return [added, self._event("response.content_part.added", **place, part=dict(part))]

    def _item_id(self, prefix: str) -> str:
        """Return the id of the next item, which is always the same one."""
        return f"{prefix}_{blake2b(f'{self.id} {len(self._output)}'.encode(), digest_size=24).hexdigest()}"

    def _add_item(self, item: dict[str, Any]) -> Event:
        self._output.append(dict(item))
        self._is_open = True
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(item))

    def _close(self, status: str) -> list[Event]:
        """End the newest item, if it is open."""
        if not self._is_open:
            return []
        self._is_open = False
        item, index = self._output[-1], len(self._output) - 1
        item["status"] = status
        place = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            (part,) = item["content"]
            events = [
                self._event("response.output_text.done", **place, content_index=0, text=part["text"], logprobs=[]),
                self._event("response.content_part.done", **place, content_index=0, part=dict(part)),
            ]
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **place, **done)]
        return [*events, self._event("response.output_item.done", output_index=index, item=dict(item))]


def items_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages of a chat as items of an input, each with an id that is always the same."""
    items: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if role == "tool":
            output = {"type": "function_call_output", "call_id": message.get("tool_call_id", ""), "output": content}
            items.append({**output, "status": "completed"})
            continue
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        if content:
            part = {"type": "input_text", "text": content}
            if role == "assistant":
                part = {"type": "output_text", "text": content, "annotations": []}
            items.append({"type": "message", "role": role, "content": [part], "status": "completed"})
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = function["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            found = {"call_id": call.get("id", ""), "name": function["name"], "arguments": arguments}
            items.append({"type": "function_call", **found, "status": "completed"})
    return [{"id": f"item_{i}", **item} for i, item in enumerate(items)]


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.num_prompt,
        "input_tokens_details": {"cached_tokens": answer.num_cached, "cache_write_tokens": 0},
        "output_tokens": answer.num_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.num_prompt + answer.num_tokens,
    }
