"""Log-probabilities in requests and in answers, in OpenAI's two shapes. No sockets.

They are the model's own: before temperature, penalties and filters.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdiq.api.fields import MAX_TOKENS
from mdiq.core.logprobs import MAX_TOP, Logprobs, LogprobsWanted, TokenLogprob
from mdiq.errors import ConfigError
from mdiq.runtime.starter_service import StreamEvent

MAX_PROMPT_VALUES = 1 << 18
"""Of the prompts of one request: 2 MB here, some 10 MB as JSON."""
PART_VALUES = 1_024
"""Made in one step, and sent in one chunk of a stream: some milliseconds of work."""

Spell = Callable[[int], tuple[bytes, bool]]
"""Returns a token's bytes, and whether they are text of an answer: those of a special token are its name."""


@dataclass(frozen=True, slots=True)
class AskedLogprobs:
    """What a request asks for beside its answer.

    wanted: log-probabilities; None: none. echo: the prompt comes before the answer. drops_answer: only the prompt is
    wanted (max_tokens is 0): one token is drawn, since every request goes round the Ring, and is not shown.
    """

    wanted: LogprobsWanted | None = None
    echo: bool = False
    drops_answer: bool = False

    def check_size(self, num_prompt_tokens: int) -> None:
        """Refuse to score more tokens of prompts than an answer can hold.

        Raises:
            ConfigError: it is too many; the message begins with the field's name.
        """
        if self.wanted is None or not self.wanted.of_prompt:
            return
        if (num_values := num_prompt_tokens * (1 + self.wanted.top)) > MAX_PROMPT_VALUES:
            raise ConfigError(
                f"logprobs: {num_prompt_tokens} prompt tokens with {self.wanted.top} alternatives are {num_values} "
                f"values; the maximum is {MAX_PROMPT_VALUES}: give fewer prompts per request, or lower logprobs"
            )


def take_logprobs(given: Mapping[str, Any], *, is_chat: bool) -> tuple[dict[str, Any], AskedLogprobs]:
    """Return a request without the fields of this module, and what they ask for.

    Raises:
        ConfigError: a value cannot be served; the message begins with the field's name.
    """
    rest = dict(given)
    if is_chat:
        is_wanted = _flag("logprobs", rest.pop("logprobs", None))
        top = _count("top_logprobs", rest.pop("top_logprobs", None))
        if top and not is_wanted:
            raise ConfigError('top_logprobs: it counts with "logprobs": true only; set that as well')
        return rest, AskedLogprobs(LogprobsWanted(top or 0) if is_wanted else None)
    count = rest.pop("logprobs", None)
    top = None if count is False else _count("logprobs", count)
    echo = _flag("echo", rest.pop("echo", None))
    drops_answer = False
    limit = next((field for field in MAX_TOKENS if rest.get(field) is not None), None)
    if echo and limit is not None and rest[limit] == 0 and not isinstance(rest[limit], bool):
        drops_answer = True
        rest[limit] = 1
    return rest, AskedLogprobs(None if top is None else LogprobsWanted(top, of_prompt=echo), echo, drops_answer)


def _flag(field: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{field}: {str(value)[:40]} is not true or false")
    return value is True


def _count(field: str, value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():  # the JSON of some languages has no other numbers
        value = int(value)
    if value is not None and (type(value) is not int or not 0 <= value <= MAX_TOP):
        raise ConfigError(f"{field}: {str(value)[:40]} is not a number of tokens; give 0 to {MAX_TOP}")
    return value


@dataclass(frozen=True, slots=True)
class Entry:
    """One token of an answer, or of a prompt before it.

    offset: characters of the text before it. value: None for the first token of a prompt. top: bytes of the
    alternatives, in their order.
    """

    data: bytes
    offset: int
    value: TokenLogprob | None
    top: tuple[bytes, ...]


class AnswerLogprobs:
    """The log-probabilities of one answer. prompt: tokens that are repeated before it. drops_answer: see above."""

    def __init__(self, spell: Spell, prompt: Sequence[int] = (), *, drops_answer: bool = False) -> None:
        self._spell = spell
        self._prompt = prompt
        self._drops_answer = drops_answer
        self._of_prompt: Logprobs | None = None
        self._drawn = Logprobs()
        self._num_taken = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, event: StreamEvent) -> None:
        """Note what an event brings."""
        if self._prompt and event.prompt_logprobs is not None:
            self._of_prompt = event.prompt_logprobs
        if event.step.logprob is not None and not self._drops_answer:
            self._drawn.extend([event.step.logprob])

    def take(self, max_values: int | None = None) -> list[Entry]:
        """Return the tokens that have not been returned yet, the oldest first: all, or as many as hold so many values.

        Called in any thread, after the last ``add`` or between two.
        """
        taken: list[Entry] = []
        num_values = 0
        for token, value in self._from(self._num_taken):
            if max_values is not None and num_values >= max_values:
                break
            data, is_text = self._spell(token)
            top = () if value is None else tuple(self._spell(each)[0] for each, _ in value.top)
            taken.append(Entry(data, self._offset, value, top))
            if is_text:
                self._offset += len(self._decoder.decode(data))
            num_values += 1 + len(top)
        self._num_taken += len(taken)
        return taken

    def text(self, shaped: Callable[[Sequence[Entry]], Mapping[str, Any]]) -> str:
        """Return all that was not taken as JSON of this shape, whose lists are made part by part."""
        lists: dict[str, list[str]] = {}
        others = {name: json.dumps(value) for name, value in shaped([]).items() if not isinstance(value, list)}
        while True:
            # Objects of all tokens at once would be millions, and Python's search for garbage would take long.
            entries = self.take(PART_VALUES)
            for name, value in shaped(entries).items():
                if name not in others:
                    lists.setdefault(name, []).extend([json.dumps(value)[1:-1]] if value else [])
            if not entries:
                break
        made = {name: f"[{', '.join(parts)}]" for name, parts in lists.items()}
        return f"{{{', '.join(f'{json.dumps(name)}: {text}' for name, text in {**made, **others}.items())}}}"

    def _from(self, first: int) -> Iterator[tuple[int, TokenLogprob | None]]:
        num_prompt = 0 if self._of_prompt is None else len(self._prompt)
        for i in range(first, num_prompt + len(self._drawn)):
            if i >= num_prompt:
                value = self._drawn[i - num_prompt]
                yield value.token, value
            else:
                assert self._of_prompt is not None
                yield self._prompt[i], self._of_prompt[i - 1] if i else None


def completion_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return them as /v1/completions has them: columns, with the alternatives by their texts."""
    return {
        "tokens": [_text(entry.data) for entry in entries],
        "token_logprobs": [None if entry.value is None else entry.value.logprob for entry in entries],
        "top_logprobs": [_top_by_text(entry) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def chat_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return them as /v1/chat/completions has them: an object for each token."""
    content = []
    for entry in entries:
        assert entry.value is not None  # the prompt of a chat is not repeated
        top = [_described(data, logprob) for data, (_, logprob) in zip(entry.top, entry.value.top, strict=True)]
        content.append({**_described(entry.data, entry.value.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _described(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def _top_by_text(entry: Entry) -> dict[str, float] | None:
    """Return the alternatives and the token itself; OpenAI's shape gives the latter too, so there may be one more."""
    if entry.value is None:
        return None
    found: dict[str, float] = {}
    for data, (_, logprob) in zip(entry.top, entry.value.top, strict=True):
        found.setdefault(_text(data), logprob)
    found.setdefault(_text(entry.data), entry.value.logprob)
    return found


def _text(data: bytes) -> str:
    """Return a token as text; parts of characters as OpenAI writes them, so that they stay apart: bytes:\\xe2\\x82."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
