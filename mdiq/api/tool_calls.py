"""Tool calls in an answer: the parser that finds them. tool_forms.py has the forms in which models write them.

The parser takes one character at a time, so what it finds does not depend on how the text was cut into pieces.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b

from mdiq.api.call_readers import Nesting, Read, Reading, Sink, reader_of
from mdiq.api.tool_forms import FUNCTION, SPACE, ToolForm

_MAX_HEADER = 1_000  # characters before a call's arguments
_MAX_SPACE = 1_000  # before a mark: what is held is looked at with each character


_HEADER = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:'
)

_FIRST_KEY = re.compile(r'\{\s*"(?:type|name|arguments|parameters)"')


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

    names: of the tools; without the mark of the form, a call has one of them. kinds: the JSON types of the parameters
    of each tool, for forms that do not show which values are strings. is_many: False: what follows the first call is
    left out. Text that only looks like a call stays content. num_calls: that have begun. key: the ids of calls follow
    from it; random unless one is given.
    """

    def __init__(
        self,
        form: ToolForm,
        names: Collection[str],
        kinds: Mapping[str, Mapping[str, Collection[str]]] | None = None,
        *,
        is_many: bool = True,
        key: bytes | None = None,
    ) -> None:
        self.names, self.is_many, self.key = frozenset(names), is_many, key or secrets.token_bytes(16)
        self.kinds = kinds or {}
        self._form = form
        self._sink = Sink(self.names, self._is_known, lambda name: self.kinds.get(name, {}), self._begin, self._more)
        self._reader: Reading[Read] | None = None
        self._take: Callable[[str], None] = self._text
        self._out: list[str | CallDelta] = []
        self._held = ""  # text that may be the beginning of a mark
        self._lead = ""  # the mark, and what followed it
        self._raw = ""  # an object, or another call that has not begun yet
        self._nesting = Nesting()
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
        if self._take == self._text and (self._held.strip(SPACE) or not self.num_calls):
            self._say(self._held)
        elif self._take == self._between and not self._block_has_call:
            self._say(self._shown_lead())
        elif self._take in (self._header, self._value, self._whole, self._read):
            self._say(("" if self._block_has_call else self._shown_lead()) + self._raw)
        self._take = self._rest
        return self.push("")

    # What takes the next character

    def _text(self, char: str) -> None:
        if len(self._held) >= _MAX_SPACE and not self._held.strip(SPACE):
            self._say(self._held)
            self._held = ""
        self._held += char
        form = self._form
        while rest := self._held.lstrip(SPACE):
            begins = (form.mark, *form.anywhere, *(form.openings if not self._has_content else ()))
            ends = (form.end, *form.closings) if self.num_calls and form.end else ()
            if rest in begins:
                call = rest if rest in ("{", FUNCTION) else ""  # it begins a call, without a mark before it
                self._has_mark, self._block_has_call = rest in (form.mark, *form.anywhere) and not call, False
                self._lead, self._held = self._held.removesuffix(call), ""
                self._take = self._between
                for each in call:
                    self._take(each)
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
            self._raw, self._nesting, self._take, self._is_doubled = "", Nesting(), self._header, False
            self._header(char)
        elif char in self._form.between:
            self._lead += char
        elif (reader := reader_of(self._form, self._sink)) is not None:
            self._reader, self._raw, self._take = reader, "", self._read
            self._read(char)
        else:
            text = char
            if not self._block_has_call:
                self._say(self._shown_lead())
            elif (at := self._lead.rfind(self._form.mark[0])) >= 0:  # another mark, perhaps
                text = self._lead[at:] + char
            self._take = self._text
            for each in text:
                self._take(each)

    def _read(self, char: str) -> None:
        """Take a character of a call that is not an object, and has not begun yet."""
        self._raw += char
        num_calls = self.num_calls
        self._read_on(char)
        if self._take == self._read and self.num_calls > num_calls:
            self._raw, self._take = "", self._read_on

    def _read_on(self, char: str) -> None:
        assert self._reader is not None
        try:
            self._reader.send(char)
        except StopIteration as ended:
            read: Read = ended.value
            text = read.rest
            if read.is_call:
                self._ended()
            else:
                if not self._block_has_call:
                    self._say(self._shown_lead())
                # The character at which the reader failed may be the beginning of a mark.
                at = self._raw.rfind(self._form.mark[0])
                if at < 0 or self._raw.startswith(FUNCTION, at):
                    at = len(self._raw)
                self._say(self._raw[:at])
                text, self._take, self._lead = self._raw[at:], self._text, ""
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
            self._nesting, self._take = Nesting(), self._arguments
            self._arguments(char)
        else:
            if char not in SPACE:  # a text with JSON in it, perhaps
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
            self._nesting, self._take = Nesting(depth=1), self._tail

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
        self._has_content = self._has_content or bool(text.strip(SPACE))
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


def _loaded(text: str) -> object:
    try:
        loaded: object = json.loads(text)
        return loaded
    except (ValueError, RecursionError):
        return None
