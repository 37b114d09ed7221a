"""Readers of calls that are not JSON objects: they take a call's text and write its arguments as JSON.

A reader is a generator. It is sent one character after the other, until it returns a Read. A text that is not a call
never begins one. The arguments of Named and Elements come while they are written, those of Literals all at once.
"""

import json
import re
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from mdiq.api.tool_forms import FUNCTION, SPACE, Elements, Literals, Named, ToolForm

MAX_NAME = 64
_MAX_KEY = 256
_MAX_NESTING = 64
_NAME = re.compile(r"[\w.-]")
_ELEMENT = re.compile(r"<parameter=([^<>\n]+)>$")
_VALUE_END = "</parameter>"
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {
    **{"true": "true", "false": "false", "null": "null"},
    **{"True": "true", "False": "false", "None": "null", "none": "null"},
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""} | {each: each for each in "\\'\"/"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_KINDS = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}
T = TypeVar("T")
Reading = Generator[None, str, T]


@dataclass(frozen=True, slots=True)
class Read:
    """The end of a reader. is_call: False: the text was not a call. rest: characters that belong to what follows."""

    is_call: bool
    rest: str = ""


@dataclass(frozen=True, slots=True)
class Sink:
    """What a reader asks, and where it writes to.

    names: of the tools. is_known: whether there may be a call of this tool. kinds: the JSON types of a tool's
    parameters; those without a known type are missing or empty. begin: a call, with its name and arguments so far.
    more: arguments of that call.
    """

    names: Collection[str]
    is_known: Callable[[object], bool]
    kinds: Callable[[str], Mapping[str, Collection[str]]]
    begin: Callable[[str, str], None]
    more: Callable[[str], None]


class Nesting:
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


def reader_of(form: ToolForm, sink: Sink) -> Reading[Read] | None:
    """Return a reader that waits for the first character of a call; None: the form's calls are JSON objects only."""
    match form.syntax:
        case None:
            return None
        case Named() as named:
            reading = _named(named, form, sink)
        case Elements():
            reading = _elements(form, sink)
        case Literals() as literals:
            reading = _literals(literals, sink)
    reader = _guarded(reading)
    next(reader)
    return reader


class _NotACallError(Exception):
    """The text is not a call."""


def _guarded(reading: Reading[Read]) -> Reading[Read]:
    try:
        return (yield from reading)
    except _NotACallError:
        return Read(is_call=False)


def _fail() -> NoReturn:
    raise _NotACallError


# Parts of texts: each takes its first character, and returns the one that follows it


def _skip(char: str) -> Reading[str]:
    while char in SPACE:
        char = yield
    return char


def _literal(text: str, char: str) -> Reading[str]:
    for each in text:
        if char != each:
            _fail()
        char = yield
    return char


def _name(char: str) -> Reading[tuple[str, str]]:
    name = ""
    while _NAME.match(char) and len(name) < MAX_NAME:
        name += char
        char = yield
    if not name:
        _fail()
    return name, char


# A name and JSON


def _named(named: Named, form: ToolForm, sink: Sink) -> Reading[Read]:
    char = yield
    if form.before and char == form.before[0]:
        char = yield from _literal(form.before, char)
    if named.before:
        char = yield from _literal(named.before, char)
    name, char = yield from _name(char)
    if named.call_id:
        text = char
        while text not in (named.call_id, named.after):
            if not (named.call_id.startswith(text) or named.after.startswith(text)):
                _fail()
            text += yield
        char = yield
        if text == named.call_id:
            _, char = yield from _name(char)
            char = yield from _literal(named.after, char)
    else:
        char = yield from _literal(named.after, char)
    char = yield from _skip(char)
    if char != "{" or not sink.is_known(name):
        _fail()
    sink.begin(name, char)
    nesting = Nesting()
    while nesting.push(char):
        char = yield
        if char == form.end[:1] and not nesting.in_string:
            return Read(is_call=True, rest=char)  # a bracket is missing
        sink.more(char)
    return Read(is_call=True)


# Elements


def _elements(form: ToolForm, sink: Sink) -> Reading[Read]:
    char = yield
    char = yield from _literal(FUNCTION, char)
    name, char = yield from _name(char)
    if char != ">" or not sink.is_known(name):
        _fail()
    sink.begin(name, "{")
    kinds, separator = sink.kinds(name), ""
    ends = ("</function>", form.end)
    while True:
        text = yield
        while not (found := _ELEMENT.search(text)):
            if text.endswith(ends):
                sink.more("}")
                return Read(is_call=True, rest=form.end if text.endswith(form.end) else "")
            text = text[-_MAX_KEY:] + (yield)
        key = found[1]
        sink.more(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        separator = ", "
        yield from _element_value(kinds.get(key, ()), sink)


def _element_value(kinds: Collection[str], sink: Sink) -> Reading[None]:
    """Read a value; the lines' ends after its beginning and before its end are not part of it."""
    is_text, value = {*kinds} == {"string"}, ""
    if is_text:
        sink.more('"')
    is_first = True
    while not value.endswith(_VALUE_END):
        if is_text:
            num_held = next((n for n in range(len(value), 0, -1) if _may_end(value[-n:])), 0)
            sink.more(_escaped(value[: len(value) - num_held]))
            value = value[len(value) - num_held :]
        char = yield
        if not (is_first and char == "\n"):
            value += char
        is_first = False
    value = value.removesuffix(_VALUE_END).removesuffix("\n")
    sink.more(f'{_escaped(value)}"' if is_text else _json_of(value, kinds))


def _may_end(text: str) -> bool:
    """Return whether the end of a value may begin with a text."""
    return _VALUE_END.startswith(text.removeprefix("\n"))


def _json_of(text: str, kinds: Collection[str]) -> str:
    """Return a value of one of these types as JSON; no types: of any. What is not JSON is a string."""
    literal = _WORDS.get(text.strip(), text.strip())
    try:
        value: object = json.loads(literal, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return f'"{_escaped(text)}"'
    kind = _KINDS.get(type(value), "string")
    is_fitting = kind in kinds or (kind == "integer" and "number" in kinds) or "string" not in kinds
    return literal if kind != "string" and is_fitting else f'"{_escaped(text)}"'


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # JSON has no NaN


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


# Literals


def _literals(form: Literals, sink: Sink) -> Reading[Read]:
    char = yield
    if form.before:
        char = yield from _literal(form.before, char)
    name, char = yield from _name(char)
    if name not in sink.names:
        name = name.removesuffix(".call")  # which Llama 3.1 writes after the names of its own tools
    if char != form.opening or not sink.is_known(name):
        _fail()
    found: list[str] = []
    char = yield from _skip((yield))
    while char != form.closing:
        key, char = yield from _key(char, form.quote)
        char = yield from _skip(char)
        if char != form.assigns:
            _fail()
        value, char = yield from _value((yield), form.quote, 0)
        found.append(f'"{_escaped(key)}": {value}')
        char = yield from _next(char, form.closing)
    sink.begin(name, f"{{{', '.join(found)}}}")
    return Read(is_call=True)


def _next(char: str, closing: str) -> Reading[str]:
    """Return the first character of the next item, or the closing one."""
    char = yield from _skip(char)
    if char == ",":
        char = yield from _skip((yield))
    elif char != closing:
        _fail()
    return char


def _key(char: str, quote: str) -> Reading[tuple[str, str]]:
    if char in "'\"" or quote[:1] == char:
        return (yield from _string(char, quote))
    key = ""
    while char not in ":=,(){}[]\n":
        key += char
        if len(key) > _MAX_KEY:
            _fail()
        char = yield
    if not key.strip():
        _fail()
    return key.strip(), char


def _value(char: str, quote: str, nesting: int) -> Reading[tuple[str, str]]:
    """Return the JSON of a literal, and the character after it."""
    char = yield from _skip(char)
    if nesting > _MAX_NESTING:
        _fail()
    if char in "'\"" or quote[:1] == char:
        text, char = yield from _string(char, quote)
        return f'"{_escaped(text)}"', char
    if char in "[{":
        is_list = char == "["
        closing, found = ("]", []) if is_list else ("}", [])
        char = yield from _skip((yield))
        while char != closing:
            key = ""
            if not is_list:
                key, char = yield from _key(char, quote)
                char = yield from _skip(char)
                if char != ":":
                    _fail()
                key, char = f'"{_escaped(key)}": ', (yield)
            value, char = yield from _value(char, quote, nesting + 1)
            found.append(key + value)
            char = yield from _next(char, closing)
        joined = ", ".join(found)
        return f"[{joined}]" if is_list else f"{{{joined}}}", (yield)
    word = ""
    while char not in ",)]}" + SPACE:
        word += char
        if len(word) > _MAX_KEY:
            _fail()
        char = yield
    if word not in _WORDS and not _NUMBER.fullmatch(word):
        _fail()
    return _WORDS.get(word, word), char


def _string(char: str, quote: str) -> Reading[tuple[str, str]]:
    if quote[:1] == char != "":
        text = yield from _literal(quote, char)
        while not text.endswith(quote):
            text += yield
        return text.removesuffix(quote), (yield)
    opened, parts = char, []
    while (char := (yield)) != opened:
        if char != "\\":
            parts.append(char)
        elif (char := (yield)) in _HEX_DIGITS:
            digits = ""
            for _ in range(_HEX_DIGITS[char]):
                digits += yield
            try:
                parts.append(chr(int(digits, 16)))
            except (ValueError, OverflowError):
                _fail()
        else:
            parts.append(_ESCAPES.get(char, "\\" + char))
    text = "".join(parts)
    try:  # two escapes may be the halves of one character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeError:
        _fail()
    return text, (yield)
