"""Tool calls in an answer: the forms in which models write them, as rows, and the parser that finds them.

The parser takes one character at a time, so what it finds does not depend on how the text was cut into pieces.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b

from mdiq.errors import ConfigError

_SPACE = " \t\r\n"
_MAX_HEADER = 1_000  # characters before a call's arguments


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How a model writes calls: mark, objects with a name and arguments, end.

    says, says_not: texts by which its chat template is known. arguments: the name of their field. between: characters
    between the mark, the objects and the end. before, after: what the model writes around the objects of one mark.
    separator: between the objects; None: a mark has one object, and more calls have marks of their own.
    openings, closings: texts that small models write instead of mark and end, at the beginning of an answer. is_marked:
    False: models leave the mark out there.
    """

    name: str
    says: tuple[str, ...]
    mark: str
    end: str = ""
    says_not: tuple[str, ...] = ()
    arguments: str = "arguments"
    before: str = ""
    after: str = ""
    separator: str | None = None
    between: str = _SPACE
    openings: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
    is_marked: bool = True
    id_length: int = 24


FORMS = (
    # Mistral's own templates ask for ids of nine letters and digits. Its newer form has the name before the object.
    ToolForm(
        "Mistral",
        ("[TOOL_CALLS]",),
        "[TOOL_CALLS]",
        says_not=("[ARGS]",),
        before=" [",
        after="]",
        separator=", ",
        between=_SPACE + "[,]",
        id_length=9,
    ),
    # Qwen 3 Coder's has XML inside the same marks.
    ToolForm(
        "Hermes",
        ("<tool_call>",),
        "<tool_call>",
        "</tool_call>",
        ("<function=",),
        before="\n",
        after="\n",
        openings=("{", "```json\n", "```\n", "<tools>", "<function_call>"),
        closings=("```", "</tools>", "</function_call>"),
    ),
    ToolForm(
        "Llama 3",
        ("<|python_tag|>", "parameters"),
        "<|python_tag|>",
        arguments="parameters",
        between=_SPACE + ";",
        openings=("{",),
        is_marked=False,
    ),
)
_HEADER = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:'
)

_FIRST_KEY = re.compile(r'\{\s*"(?:type|name|arguments|parameters)"')


def form_of(template: str | None) -> ToolForm:
    """Return the form in which the model of a chat template calls tools.

    Raises:
        ConfigError: it does not call any, or in a form that is not known here.
    """
    if template is None or not re.search(r"\btools\b", template):
        raise ConfigError("the model's chat template knows no tools; use a model that was trained to call them")
    for form in FORMS:
        if all(text in template for text in form.says) and not any(text in template for text in form.says_not):
            return form
    known = ", ".join(form.name for form in FORMS)
    raise ConfigError(f"the model calls tools in a form that is not known here; known are those of {known}")


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call: its beginning, with id and name, or more of its arguments.

    index: of the call in its answer.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


class CallParser:
    """Divides the text of one answer into content and calls.

    names: of the tools; without the mark of the form, a call has one of them. is_many: False: what follows the first
    call is left out. Text that only looks like a call stays content. num_calls: that have begun. key: the ids of calls
    follow from it; random unless one is given.
    """

    def __init__(
        self, form: ToolForm, names: Collection[str], *, is_many: bool = True, key: bytes | None = None
    ) -> None:
        self.names, self.is_many, self.key = frozenset(names), is_many, key or secrets.token_bytes(16)
        self._form = form
        self._take: Callable[[str], None] = self._text
        self._out: list[str | CallDelta] = []
        self._held = ""  # text that may be the beginning of a mark
        self._lead = ""  # the mark, and what followed it
        self._raw = ""  # an object
        self._nesting = _Nesting()
        self._has_content = self._has_mark = self._block_has_call = self._is_doubled = False
        self.num_calls = 0

    def push(self, text: str) -> list[str | CallDelta]:
        """Add the next piece of the answer; return the content and calls that it certainly has."""
        for char in text:
            self._take(char)
        out, self._out = self._out, []
        return out

    def finish(self) -> list[str | CallDelta]:
        """Return what was held back: the answer has ended."""
        if self._take == self._text and (self._held.strip(_SPACE) or not self.num_calls):
            self._say(self._held)
        elif self._take == self._between and not self._block_has_call:
            self._say(self._shown_lead())
        elif self._take in (self._header, self._value, self._whole):
            self._say(self._shown_lead() + self._raw)
        self._take = self._rest
        return self.push("")

    # What takes the next character

    def _text(self, char: str) -> None:
        self._held += char
        form = self._form
        while rest := self._held.lstrip(_SPACE):
            begins = (form.mark, *(form.openings if not self._has_content else ()))
            ends = (form.end, *form.closings) if self.num_calls and form.end else ()
            if rest in begins:
                is_object = rest == "{"
                self._has_mark, self._block_has_call = rest == form.mark, False
                self._lead, self._held = self._held[: -1 if is_object else None], ""
                self._take = self._between
                if is_object:
                    self._between(rest)
                return
            if rest in ends:
                self._held = ""
            elif any(text.startswith(rest) for text in (*begins, *ends)):
                return
            else:
                cut = len(self._held) - len(rest) + 1
                self._say(self._held[:cut])
                self._held = self._held[cut:]

    def _between(self, char: str) -> None:
        if char == "{":
            self._raw, self._nesting, self._take, self._is_doubled = "", _Nesting(), self._header, False
            self._header(char)
        elif char in self._form.between:
            self._lead += char
        else:
            text = char
            if not self._block_has_call:
                self._say(self._shown_lead())
            elif (at := self._lead.rfind(self._form.mark[0])) >= 0:  # another mark, perhaps
                text = self._lead[at:] + char
            self._take = self._text
            for each in text:
                self._take(each)

    def _header(self, char: str) -> None:
        if char == self._raw == "{":  # JSON never has two; the templates of Qwen 2.5 Coder show calls with them
            self._lead += char
            self._is_doubled = True
            return
        self._whole(char)
        if self._take == self._header and char == ":" and self._nesting.depth == 1 and not self._nesting.in_string:
            found = _HEADER.fullmatch(self._raw) if len(self._raw) < _MAX_HEADER else None
            if found and self._is_known(name := _loaded(found[1])):
                self._name, self._take = name, self._value
            elif not self._has_mark and not _FIRST_KEY.match(self._raw):  # JSON for a reader
                self._no_call()

    def _value(self, char: str) -> None:
        if char == "{":
            self._begin(self._name, "")
            self._nesting, self._take = _Nesting(), self._arguments
            self._arguments(char)
        else:
            if char not in _SPACE:  # a text with JSON in it, perhaps
                self._take = self._whole
            self._whole(char)

    def _whole(self, char: str) -> None:
        """Collect an object that does not begin as calls do; it may be one all the same."""
        self._raw += char
        if self._nesting.push(char):
            return
        value = _loaded(self._raw)
        name = value.get("name") if isinstance(value, dict) else None
        arguments = value.get("arguments", value.get("parameters", {})) if isinstance(value, dict) else None
        if isinstance(arguments, str):
            arguments = _loaded(arguments)
        if self._is_known(name) and isinstance(arguments, dict):
            self._begin(name, json.dumps(arguments, ensure_ascii=False))
            self._ended()
        else:
            self._no_call()

    def _arguments(self, char: str) -> None:
        if self._is_cut_short(char):
            return
        self._more(char)
        if not self._nesting.push(char):
            self._nesting, self._take = _Nesting(depth=1), self._tail

    def _tail(self, char: str) -> None:
        """Leave out what an object has after its arguments."""
        if not self._is_cut_short(char) and not self._nesting.push(char):
            self._ended()

    def _rest(self, char: str) -> None:
        """Leave out everything."""

    # What they share

    def _no_call(self) -> None:
        self._say(self._shown_lead() + self._raw)
        self._take = self._text

    def _is_known(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.names or self._has_mark)

    def _is_cut_short(self, char: str) -> bool:
        """End a call at the end mark where JSON cannot have it: a bracket is missing."""
        if not self._form.end.startswith(char) or self._nesting.in_string:
            return False
        self._ended()
        self._take(char)
        return True

    def _ended(self) -> None:
        self._block_has_call, self._lead = True, ""
        if not self.is_many:
            self._take = self._rest
        else:
            then = self._text if self._form.end else self._between
            self._take = partial(self._brace, then) if self._is_doubled else then

    def _brace(self, then: Callable[[str], None], char: str) -> None:
        """Leave out the second closing brace of an object that began with two."""
        self._take = then
        if char != "}":
            then(char)

    def _shown_lead(self) -> str:
        # Where it may be left out, the mark is a special token, which says nothing to a reader.
        return self._lead if self._form.is_marked else self._lead.replace(self._form.mark, "")

    def _say(self, text: str) -> None:
        if not text:
            return
        self._has_content = self._has_content or bool(text.strip(_SPACE))
        if self._out and isinstance(self._out[-1], str):
            self._out[-1] += text
        else:
            self._out.append(text)

    def _begin(self, name: object, arguments: str) -> None:
        length = self._form.id_length
        made = blake2b(f"{self.num_calls}".encode(), key=self.key, digest_size=16).hexdigest()[:length]
        call_id = made if length < 24 else f"call_{made}"
        self._out.append(CallDelta(self.num_calls, call_id, str(name), arguments))
        self.num_calls += 1

    def _more(self, arguments: str) -> None:
        index = self.num_calls - 1
        last = self._out[-1] if self._out else None
        if isinstance(last, CallDelta) and last.index == index:
            self._out[-1] = replace(last, arguments=last.arguments + arguments)
        else:
            self._out.append(CallDelta(index, None, None, arguments))


class _Nesting:
    """How deep in objects and lists a place in JSON is."""

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.in_string = self._is_escaped = False

    def push(self, char: str) -> bool:
        """Take a character; return whether the value goes on after it."""
        if self.in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self.in_string = False
        elif char == '"':
            self.in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1
        return self.depth > 0 or self.in_string


def _loaded(text: str) -> object:
    try:
        loaded: object = json.loads(text)
        return loaded
    except (ValueError, RecursionError):
        return None
