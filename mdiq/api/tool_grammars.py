"""Grammars of calls in llguidance's Lark, for each syntax: the arguments follow the schema of their tool."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdiq.api.structure import with_guidance
from mdiq.api.tool_forms import FUNCTION, Elements, Literals, Named, ToolForm

TEXT = r"TEXT: /(.|\n)*/"
_VALUE_END = "\n</parameter>\n"
_PLAIN = {"integer", "number", "boolean", "null"}
_MAX_NESTING = 16  # of objects in a schema that are looked into


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """Writes the rules of calls in one form.

    special_id: of a text that is one token, which a grammar has to name by its id; None: it is a text like others.
    """

    form: ToolForm
    special_id: Callable[[str], int | None]

    def quoted(self, text: str) -> str:
        """Return what matches a text, and the special tokens in it."""
        for special in (self.form.mark, self.form.end, *self.form.specials):
            if special and special in text and (token := self.special_id(special)) is not None:
                before, _, after = text.partition(special)
                return " ".join(part for part in (self.quoted(before), f"<[{token}]>", self.quoted(after)) if part)
        return json.dumps(text) if text else ""

    def shared_rules(self) -> list[str]:
        """Return the rules, beside TEXT, to which those of calls refer."""
        match self.form.syntax:
            case Elements():
                # A string ends where the reader ends it, whatever stands before.
                return [f"text_end[lazy]: TEXT {json.dumps(_VALUE_END.strip())}", 'text_value: text_end "\\n"']
            case Literals(quote=quote) as literals if quote:
                is_special = self.special_id(quote) is not None
                end = f"string_end{'' if is_special else '[lazy]'}: TEXT {self.quoted(quote)}"
                key = f"/[A-Za-z0-9_.-]{{1,64}}/ {json.dumps(literals.assigns)}"
                return [
                    end,
                    f"string: {self.quoted(quote)} string_end",
                    f"any: string | {_json({'type': sorted(_PLAIN)})} | any_list | any_object",
                    'any_list: "[" (any ("," any)*)? "]"',
                    f'any_object: "{{" ({key} any ("," {key} any)*)? "}}"',
                ]
        return []

    def rules(self, rule: str, name: str, schema: Mapping[str, Any]) -> list[str]:
        """Return the rules of a call of one tool; ``rule`` is the name of the first, with which others begin.

        schema: of its arguments, which are an object.
        """
        form = self.form
        if form.syntax is None or form.writes_json:
            begin = json.dumps(f'{{"name": {json.dumps(name)}, "{form.arguments}": ')
            return [f'{rule}: {begin} {_json(schema)} "}}"']
        match form.syntax:
            case Named() as named:
                id_length = form.id_length
                call_id = f"({self.quoted(named.call_id)} /[A-Za-z0-9]{{{id_length}}}/)?" if named.call_id else ""
                return [
                    f"{rule}: {self.quoted(named.before + name)} {call_id} {self.quoted(named.after)} {_json(schema)}"
                ]
            case Elements():
                return list(self._elements(rule, name, schema))
            case Literals() as literals:
                return list(self._literals(literals, rule, name, schema))

    def _elements(self, rule: str, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
        parts = []
        for i, (key, part, is_required) in enumerate(_properties(schema)):
            yield f"{rule}_{i}: {json.dumps(f'<parameter={key}>')} {json.dumps(chr(10))} {_element_value(part)}"
            parts.append(f"{rule}_{i}{'' if is_required else '?'}")
        if not parts and _is_open(schema):
            parts = ['("<parameter=" /[^<>\\n]{1,64}/ ">\\n" text_value)*']
        begin = json.dumps(f"{FUNCTION}{name}>\n")
        yield f'{rule}: {begin} {" ".join(parts)} "</function>"'

    def _literals(self, literals: Literals, rule: str, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
        begin, end = json.dumps(literals.before + name + literals.opening), json.dumps(literals.closing)
        if _properties(schema) or not (literals.quote and _is_open(schema)):
            yield from self._fields(literals, f"{rule}_fields", schema, 0)
            yield f"{rule}: {begin} {rule}_fields {end}"
        else:
            yield f"{rule}: {json.dumps(literals.before + name)} any_object"

    def _fields(self, literals: Literals, rule: str, schema: Mapping[str, Any], nesting: int) -> Iterator[str]:
        """Yield the rules of the properties of an object: in their order, and those that are not required may be left
        out, with the comma before them."""
        properties = _properties(schema)
        if literals.quote:  # the templates of Gemma sort them so
            properties = sorted(properties, key=lambda each: each[0].lower())
        comma, num = json.dumps(literals.separator), len(properties)
        yield f"{rule}: {rule}_first_0"
        for i, (key, part, is_required) in enumerate(properties):
            own = f"{rule}_{i}"
            yield from self._value(literals, own, part, nesting)
            field = f"{json.dumps(key + literals.assigns)} {own}"
            skip = ("", "") if is_required else (f" | {rule}_first_{i + 1}", f" | {rule}_next_{i + 1}")
            yield f"{rule}_first_{i}: {field} {rule}_next_{i + 1}{skip[0]}"
            yield f"{rule}_next_{i}: {comma} {field} {rule}_next_{i + 1}{skip[1]}"
        yield f'{rule}_first_{num}: ""'
        yield f'{rule}_next_{num}: ""'

    def _value(self, literals: Literals, rule: str, schema: Mapping[str, Any], nesting: int) -> Iterator[str]:
        """Yield the rules of a value. Python's are JSON; of the others, a part of a schema is followed."""
        kind, choices = schema.get("type"), schema.get("enum")
        if not literals.quote or set() < _kinds(schema, 0) <= _PLAIN:
            yield f"{rule}: {_json(schema)}"
        elif _are_texts(choices):
            quote = literals.quote
            yield f"{rule}: {' | '.join(self.quoted(f'{quote}{each}{quote}') for each in choices or ())}"
        elif kind == "string":
            yield f"{rule}: string"
        elif kind == "array" and isinstance(items := schema.get("items"), dict) and nesting < _MAX_NESTING:
            yield from self._value(literals, f"{rule}_item", _with_definitions(items, schema), nesting + 1)
            yield f'{rule}: "[" ({rule}_item ("," {rule}_item)*)? "]"'
        elif kind == "object" and _properties(schema) and nesting < _MAX_NESTING:
            yield from self._fields(literals, f"{rule}_fields", schema, nesting + 1)
            yield f'{rule}: "{{" {rule}_fields "}}"'
        else:
            yield f"{rule}: {'any_list' if kind == 'array' else 'any_object' if kind == 'object' else 'any'}"


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps(with_guidance(schema))}"


def kinds_of(schema: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the JSON types of the properties of an object; none for one whose schema does not say them."""
    return {key: sorted(_kinds(part, 0)) for key, part, _ in _properties(schema)}


def _kinds(schema: Any, nesting: int) -> set[str]:
    if not isinstance(schema, dict) or nesting > _MAX_NESTING:
        return set()
    given = schema.get("type")
    if isinstance(given, str | list):
        return {each for each in ([given] if isinstance(given, str) else given) if isinstance(each, str)}
    if _are_texts(schema.get("enum")) or isinstance(schema.get("const"), str):
        return {"string"}
    if isinstance(name := schema.get("$ref"), str):
        group, _, key = name.removeprefix("#/").partition("/")
        named = schema.get(group)
        return _kinds(named.get(key), nesting + 1) if isinstance(named, dict) else set()
    for name in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(name), list) and parts:
            found = [_kinds(_with_definitions(part, schema), nesting + 1) for part in parts]
            return set().union(*found) if all(found) else set()
    return set()


def _element_value(schema: Mapping[str, Any]) -> str:
    """Return the rule of a value, up to its end. Strings are not quoted, so of their schemas only a choice counts."""
    kinds = _kinds(schema, 0)
    if _are_texts(choices := schema.get("enum")):
        return f"({' | '.join(json.dumps(each + _VALUE_END) for each in choices or ())})"
    if not kinds or "string" in kinds:
        return "text_value"
    return f"{_json(schema)} {json.dumps(_VALUE_END)}"


def _properties(schema: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """Return the name and the schema of each property, and whether it is required."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return []
    needed: Sequence[Any] = required if isinstance(required, list) else ()
    parts = ((key, _with_definitions(part, schema)) for key, part in properties.items())
    return [(key, part, key in needed) for key, part in parts]


def _with_definitions(part: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of a schema, with the definitions if it refers to any."""
    if not isinstance(part, dict):
        return {}
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    return {**shared, **part} if shared and '"$ref"' in json.dumps(part) else part


def _is_open(schema: Mapping[str, Any]) -> bool:
    """Return whether an object may have properties that its schema does not name."""
    return schema.get("additionalProperties") is not False and not isinstance(schema.get("properties"), dict)


def _are_texts(choices: object) -> bool:
    return isinstance(choices, list) and bool(choices) and all(isinstance(each, str) for each in choices)
