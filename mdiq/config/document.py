"""YAML text to plain data that knows its lines. What YAML reads otherwise than people do is refused, not guessed.

The file is hostile or careless: its size, its depth and what its aliases grow to are bounded before anything is built,
and no tag makes an object.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from mdiq.config.findings import Finding, Loc, path_of
from mdiq.config.syntax import syntax_error
from mdiq.config.truths import advice_on_truth, truth_of
from mdiq.config.units import shown

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_VALUES = 10_000

_TAG = "tag:yaml.org,2002:"
_PLAIN_TRUTH = ("true", "false", "True", "False", "TRUE", "FALSE")


@dataclass(slots=True)
class Document:
    """What a file holds.

    data: dicts, tuples and scalars; a value that was refused is left out. lines: where each value stands.
    refused: places of the values that are left out, each with a finding. incomplete: places of mappings with a key that
    was left out, likewise. raw: scalars as they are written.
    """

    data: object = None
    lines: dict[Loc, int] = field(default_factory=dict)
    raw: dict[Loc, str] = field(default_factory=dict)
    refused: set[Loc] = field(default_factory=set)
    incomplete: set[Loc] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)
    is_readable: bool = True

    def line_of(self, loc: Loc) -> int:
        """Return the line of a place, or of the nearest one around it."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, 1)


def read_document(data: bytes, schema_of: Callable[[Loc], Mapping[str, Any]] = lambda _: {}) -> Document:
    """Return what a YAML file holds. A file that is not YAML gives one finding and no data.

    schema_of: returns the JSON schema of a place, for advice; empty where there is none.
    """
    document = Document()
    try:
        text = _decode(data)
        _check_bounds(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise _Unreadable(1, "the file is empty; `mdiq init` writes one, and configs/ has examples")
        _Builder(document, text.splitlines(), schema_of).build(root)
        return document
    except _Unreadable as error:
        line, message = error.args
    except yaml.MarkedYAMLError as error:
        line, message = syntax_error(error, text.splitlines())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"a control character (U+{int(error.character):04X}); remove it"
    return Document(findings=[Finding(line, "", message)], is_readable=False)


class _Unreadable(Exception):
    """The file as a whole is refused: a line, and why."""


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise _Unreadable(1, f"the file is larger than {MAX_BYTES // 1024} KiB; is it a topology at all?")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _Unreadable(1, "the file is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _Unreadable(line, "a character that is not UTF-8; save the file as UTF-8, or retype that word") from None


def _check_bounds(text: str) -> None:
    """Refuse what would take long or deep to build; the parser's events come one by one, without recursion."""
    depth = num_values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        num_values += isinstance(event, yaml.NodeEvent)
        line = event.start_mark.line + 1 if event.start_mark else 1
        if depth > MAX_DEPTH:
            raise _Unreadable(line, f"more than {MAX_DEPTH} levels deep; is it a topology at all?")
        if num_values > MAX_VALUES:
            raise _Unreadable(line, f"more than {MAX_VALUES} values; is it a topology at all?")


class _Builder:
    """Makes plain data of YAML nodes."""

    def __init__(self, document: Document, source: list[str], schema_of: Callable[[Loc], Mapping[str, Any]]) -> None:
        self._document = document
        self._source = source
        self._schema_of = schema_of
        self._resolver = yaml.SafeLoader("")
        self._num_values = 0
        self._open: set[int] = set()  # ids of the nodes that are being built: an alias to one has no end

    def build(self, root: yaml.Node) -> None:
        self._document.lines[()] = root.start_mark.line + 1
        self._document.data = self._value(root, ())

    def _value(self, node: yaml.Node, loc: Loc) -> object:
        line = node.start_mark.line + 1
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise _Unreadable(line, f"its aliases (*) grow to more than {MAX_VALUES} values; write them out")
        if id(node) in self._open:
            raise _Unreadable(line, "an anchor (&) that holds its own alias (*); write the values out")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, loc)
        if len(self._open) >= MAX_DEPTH:
            raise _Unreadable(line, f"its aliases (*) go more than {MAX_DEPTH} levels deep; write the values out")
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            return self._refuse(loc, f"the tag {shown(_tag_text(node.tag))} is not read here; remove it")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return tuple(self._items(node, loc))
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, loc)
        finally:
            self._open.remove(id(node))

    def _items(self, node: yaml.SequenceNode, loc: Loc) -> Iterator[object]:
        for i, item in enumerate(node.value):
            self._document.lines[*loc, i] = item.start_mark.line + 1
            yield self._value(item, (*loc, i))  # a refused item keeps its place: the later ones keep their numbers

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, object]:
        values: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._key(key_node, loc, line)
            if key is None:
                continue
            place = (*loc, key)
            if key in values or place in self._document.refused:
                first = self._document.lines[place]
                self._find(line, place, f"it stands here twice, first in line {first}; remove one of them")
                continue
            self._document.lines[place] = line
            value = self._value(value_node, place)
            if place not in self._document.refused:
                values[key] = value
        return values

    def _key(self, node: yaml.Node, loc: Loc, line: int) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            message = "a {...} or [...] stands where a key should; is it a template that was not filled in?"
        elif node.tag == _TAG + "str":
            return str(node.value)
        elif node.tag == _TAG + "merge":
            message = "`<<` is not read here; write the keys out at each place"
        else:
            message = f"YAML reads the key {shown(node.value)} as {_kind(node)}; a key is text, see configs/README.md"
        self._find(line, loc, message)
        self._document.incomplete.add(loc)  # what the key would bring is not missing
        return None

    def _scalar(self, node: yaml.ScalarNode, loc: Loc) -> object:
        self._document.raw[loc] = raw = node.value
        kind = node.tag.removeprefix(_TAG)
        is_plain = node.style is None
        implied = self._resolver.resolve(yaml.ScalarNode, raw, (is_plain, not is_plain))  # type: ignore[no-untyped-call]
        if node.tag != implied:
            return self._refuse(loc, f"the tag {shown(_tag_text(node.tag))} is not read here; remove it")
        if kind == "null":
            source = self._source[node.start_mark.line] if node.start_mark.line < len(self._source) else ""
            if not raw and re.search(r":\s+#", source) and "public_key" in source:
                return self._refuse(loc, "what follows # is a comment; put the value in quotes")
            return None
        if kind == "str":
            return raw
        if kind == "bool":
            if raw in _PLAIN_TRUTH:
                return raw.lower() == "true"
            return self._refuse(
                loc, f"YAML reads {raw} as {truth_of(raw)}; {advice_on_truth(raw, self._schema_of(loc))}"
            )
        if kind in ("int", "float"):
            return self._number(raw, kind, loc)
        if kind == "timestamp":
            return self._refuse(loc, f'YAML reads {shown(raw)} as a date; put it in quotes: "{shown(raw)}"')
        return self._refuse(loc, f"a lone {shown(raw)} is not a value; remove it, or put it in quotes")  # = and <<

    def _number(self, raw: str, kind: str, loc: Loc) -> object:
        if kind == "float":
            if re.fullmatch(r"[-+]?\d+\.\d*(e[-+]\d+)?", raw):  # 1e-6 without a point is a text in YAML
                return float(raw)
            return self._refuse(
                loc,
                f'YAML reads {shown(raw)} as a number; write it plainly, or "{shown(raw)}" in quotes if it is a text',
            )
        if re.fullmatch(r"[-+]?(0|[1-9]\d{0,17})", raw):
            return int(raw)
        quoted = f'or "{shown(raw)}" in quotes if it is a text'
        if len(raw) > 18:
            return self._refuse(loc, f"{shown(raw)} is larger than any number here; write a smaller one, {quoted}")
        if ":" in raw:
            number = 0
            for part in raw.lstrip("+-").replace("_", "").split(":"):
                number = number * 60 + int(part)
            return self._refuse(
                loc,
                f"YAML reads {shown(raw)} as {shown(number)}, a number to the base of 60; write the number, {quoted}",
            )
        digits = raw.replace("_", "")
        if re.fullmatch(r"[-+]?0[0-7]+", digits):
            number = int(digits, 8)
            return self._refuse(
                loc, f"YAML reads {shown(raw)} as {number}, an octal number; write {int(digits)}, {quoted}"
            )
        number = int(digits, 0)  # 0x and 0b
        return self._refuse(loc, f"YAML reads {shown(raw)} as {number}; write {number}, {quoted}")

    def _refuse(self, loc: Loc, message: str) -> object:
        """Add a finding of a refused value, and return what stands for the value."""
        self._document.refused.add(loc)
        self._find(self._document.line_of(loc), loc, message)
        return None

    def _find(self, line: int, loc: Loc, message: str) -> None:
        self._document.findings.append(Finding(line, path_of(loc), message))


def _kind(node: yaml.ScalarNode) -> str:
    kind = node.tag.removeprefix(_TAG)
    if kind == "bool":
        return truth_of(node.value)
    return {"int": "a number", "float": "a number", "null": "nothing", "timestamp": "a date"}.get(
        kind, "something else"
    )


def _tag_text(tag: str) -> str:
    return tag.replace(_TAG, "!!")
