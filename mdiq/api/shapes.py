"""Answers as OpenAI's objects, complete and in chunks. No sockets."""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mdiq.api.logprobs import PART_VALUES, AnswerLogprobs, Entry, chat_logprobs, completion_logprobs
from mdiq.core.sequence import FinishReason
from mdiq.errors import RingError
from mdiq.runtime.starter_service import StreamEvent


@dataclass(slots=True)
class Answer:
    """The result of a request so far.

    num_prompt: tokens of its prompt; max_tokens: of the whole answer. text: begins with the prompt if that is repeated.
    logprobs: None if they are not wanted. drops_answer: of the answer nothing is shown.
    """

    num_prompt: int
    max_tokens: int
    num_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    logprobs: AnswerLogprobs | None = None
    drops_answer: bool = False
    num_sent: int = 0

    def add(self, event: StreamEvent) -> None:
        step = event.step
        if not self.drops_answer:
            self.num_tokens += step.token is not None
            self.text += event.text
        if self.logprobs is not None:
            self.logprobs.add(event)
        if step.finish_reason is FinishReason.ERROR:
            raise step.error or RingError("the ring failed")
        if step.finish_reason is not None:
            is_cut = self.drops_answer and step.finish_reason is FinishReason.STOP
            self.finish_reason = str(FinishReason.LENGTH if is_cut else step.finish_reason)

    def parts(self) -> Iterator[tuple[str, Sequence[Entry] | None]]:
        """Yield text that was not sent, with the log-probabilities that belong to it, in parts for chunks."""
        text, self.num_sent = self.text[self.num_sent :], len(self.text)
        while self.logprobs is not None and (entries := self.logprobs.take(PART_VALUES)):
            yield text, entries
            text = ""
        if text:
            yield text, None


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    num_prompt = sum(answer.num_prompt for answer in answers)
    num_tokens = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
    }


class Shape:
    """The form of an answer."""

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

    def text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, text: str, is_first: bool) -> dict[str, Any]:
        raise NotImplementedError


class Chat(Shape):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    has_opening = True

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return chat_logprobs(entries)

    def text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def delta(self, text: str, is_first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""} if is_first else {"content": text} if text else {}}


class Completion(Shape):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return completion_logprobs(entries)

    def text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str, is_first: bool) -> dict[str, Any]:
        return {"text": text}
