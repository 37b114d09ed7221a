"""Answers as OpenAI's objects, complete and in chunks. No sockets."""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mdiq.api.logprobs import PART_VALUES, AnswerLogprobs, Entry, chat_logprobs, completion_logprobs
from mdiq.api.tool_calls import CallDelta, CallParser
from mdiq.core.sequence import FinishReason
from mdiq.errors import RingError
from mdiq.runtime.starter_service import StreamEvent


@dataclass(slots=True)
class Answer:
    """The result of a request so far. max_tokens: of the whole answer.

    num_prompt: tokens of its prompt; 0 where an earlier choice counts them. text: begins with the prompt if that is
    repeated. parser: finds the tool calls in it; None: there are no tools. logprobs: None if they are not wanted.
    drops_answer: of the answer nothing is shown. stop_text: the stop text that has ended it. num_cached: tokens of its
    prompt that were in the KV cache; 0 where an earlier choice counts the prompt.
    """

    num_prompt: int
    max_tokens: int
    num_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    parser: CallParser | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: AnswerLogprobs | None = None
    drops_answer: bool = False
    stop_text: str | None = None
    num_cached: int = 0
    _unsent: list[str | CallDelta] = field(default_factory=list)

    def repeat(self, prompt: str) -> None:
        """Have the answer begin with its prompt."""
        self._add(prompt)

    def add(self, event: StreamEvent) -> None:
        step = event.step
        self.num_cached = max(min(event.cached_tokens, self.num_prompt), self.num_cached)
        if not self.drops_answer:
            self.num_tokens += step.token is not None
            pieces: list[str | CallDelta] = [event.text] if event.text else []
            if self.parser is not None:
                pieces = self.parser.push(event.text) + (self.parser.finish() if step.finish_reason else [])
            for piece in pieces:
                self._add(piece)
        if self.logprobs is not None:
            self.logprobs.add(event)
        if step.finish_reason is FinishReason.ERROR:
            raise step.error or RingError("the ring failed")
        if step.finish_reason is not None:
            self.stop_text = event.stop_text
            is_cut = self.drops_answer and step.finish_reason is FinishReason.STOP
            has_called = bool(self.tool_calls) and step.finish_reason is FinishReason.STOP
            reason = str(FinishReason.LENGTH if is_cut else step.finish_reason)
            self.finish_reason = "tool_calls" if has_called else reason

    def _add(self, piece: str | CallDelta) -> None:
        if isinstance(piece, str) and self._unsent and isinstance(self._unsent[-1], str):
            self._unsent[-1] += piece
        else:
            self._unsent.append(piece)
        if isinstance(piece, str):
            self.text += piece
        elif piece.name is None:
            self.tool_calls[piece.index]["function"]["arguments"] += piece.arguments
        else:
            self.tool_calls.append(_call(piece))

    def parts(self) -> Iterator[tuple[str | CallDelta, Sequence[Entry] | None]]:
        """Yield what was not sent, with the log-probabilities that came with it, in parts for chunks."""
        unsent, self._unsent = self._unsent, []
        while self.logprobs is not None and (entries := self.logprobs.take(PART_VALUES)):
            first = unsent.pop(0) if unsent and isinstance(unsent[0], str) else ""
            yield first, entries
        for piece in unsent:
            yield piece, None


def _call(piece: CallDelta) -> dict[str, Any]:
    return {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": piece.arguments}}


def _usage(answers: Sequence[Answer]) -> dict[str, Any]:
    num_prompt = sum(answer.num_prompt for answer in answers)
    num_tokens = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(answer.num_cached for answer in answers)},
    }


class Shape:
    """The form of an answer. answers: what it is the form of."""

    answers: Sequence[Answer] = ()
    done = b"data: [DONE]\n\n"  # the end of a stream

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    prefix = ""
    has_opening = False  # whether a first chunk gives the role
    kind = ""
    chunk_kind = ""

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [
            {"index": i, **self.text(answer.text), "logprobs": None, "finish_reason": answer.finish_reason}
            for i, answer in enumerate(answers)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": _usage(answers)}

    def whole_text(self, answers: Sequence[Answer]) -> str:
        """Return ``whole`` as JSON, with log-probabilities. For a thread: no step of it takes long."""
        body = self.whole(answers)
        mark = secrets.token_hex(16)
        for choice in body["choices"]:
            choice["logprobs"] = mark
        first, *others = json.dumps(body).split(f'"{mark}"')
        parts = [first]
        for answer, after in zip(answers, others, strict=True):
            parts += ["null" if answer.logprobs is None else answer.logprobs.text(self.logprobs), after]
        return "".join(parts)

    def chunk(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        *,
        is_first: bool = False,
        entries: Sequence[Entry] | None = None,
    ) -> dict[str, Any]:
        logprobs = None if entries is None else self.logprobs(entries)
        choice = {"index": index, **self.delta(text, is_first), "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": _usage(answers)}

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        raise NotImplementedError

    def encoded(self, value: Mapping[str, Any]) -> bytes:
        """Return a chunk, or an error, as it stands in a stream."""
        return b"data: " + json.dumps(value).encode() + b"\n\n"

    def text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, text: str, is_first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def piece_chunk(self, index: int, piece: str | CallDelta, entries: Sequence[Entry] | None = None) -> dict[str, Any]:
        """Return the chunk of a piece of an answer."""
        assert isinstance(piece, str)  # only chats have tools
        return self.chunk(index, piece, None, entries=entries)


class Chat(Shape):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    has_opening = True

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return chat_logprobs(entries)

    def text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def delta(self, text: str, is_first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""} if is_first else {"content": text} if text else {}}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        whole = super().whole(answers)
        for choice, answer in zip(whole["choices"], answers, strict=True):
            if answer.tool_calls:
                choice["message"] |= {"content": answer.text or None, "tool_calls": answer.tool_calls}
        return whole

    def piece_chunk(self, index: int, piece: str | CallDelta, entries: Sequence[Entry] | None = None) -> dict[str, Any]:
        if isinstance(piece, str):
            return super().piece_chunk(index, piece, entries)
        chunk = self.chunk(index, "", None)
        call = {"function": {"arguments": piece.arguments}} if piece.name is None else _call(piece)
        chunk["choices"][0]["delta"] = {"tool_calls": [{"index": piece.index, **call}]}
        return chunk


class Completion(Shape):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return completion_logprobs(entries)

    def text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str, is_first: bool) -> dict[str, Any]:
        return {"text": text}
