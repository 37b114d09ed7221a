"""The form that a request wants of its answer: fields of OpenAI, vLLM, SGLang and llama.cpp become one grammar.

engine/text/grammar.py compiles it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mdiq.errors import ConfigError

FORMATS = ("text", "json_object", "json_schema")
# Small models fill an answer with spaces if they may: this is one, or a line's end with an indentation.
_GUIDANCE = {"whitespace_pattern": r"(\x20|\n[\x20\t]{0,20})"}
_MIN_STEP = 1e-9  # of numbers, for the same reason: others have no last digit
_ENDLESS_FORMATS, _MAX_FORMAT = ("time", "date-time", "duration"), 40  # characters; a second may have any fraction
_SCHEMAS = ("items", "additionalProperties", "contains", "anyOf", "oneOf", "prefixItems")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
MAX_PARTS = 8  # of a wrong schema that are looked at
_MAX_NESTING = 200  # llguidance refuses such schemas
_NOTHING: tuple[object, ...] = (None, False, [], {}, "")


@dataclass(frozen=True, slots=True)
class Structure:
    """A form. where: the field that asks for it; grammar: as SamplingParams has it."""

    where: str
    grammar: str


def structure_of(given: Mapping[str, Any]) -> Structure | None:
    """Return the form that a request asks for, if any.

    Raises:
        ConfigError: a field is wrong, or several ask for a form; the message begins with the field.
    """
    found: list[Structure] = []
    for field, read in _FIELDS.items():
        if (value := given.get(field)) not in _NOTHING and (structure := read(value, field)):
            found.append(structure)
    if len(found) > 1:
        others = " and ".join(each.where for each in found[1:])
        raise ConfigError(f"{found[0].where}: {others} asks for a form of the answer too; send one of them")
    return found[0] if found else None


def schema_grammar(schema: object, where: str) -> str:
    """Return the grammar of JSON that follows a schema.

    Raises:
        ConfigError: it is not a schema; the message begins with ``where``.
    """
    if isinstance(schema, str):  # vLLM and SGLang take it as text too
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise ConfigError(f"{where}: not JSON; give a JSON schema") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"{where}: not a JSON schema, which is an object")
    return f"json_schema:{_dumped(with_guidance(schema), where)}"


def with_guidance(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema of answers that come to an end, with what llguidance is told beside it."""
    return {**_with_last_digits(schema, 0), "x-guidance": _GUIDANCE}


def _with_last_digits(schema: Any, nesting: int) -> Any:
    """Return a schema whose numbers and times have a last digit."""
    if isinstance(schema, list):
        return [_with_last_digits(each, nesting + 1) for each in schema]
    if not isinstance(schema, dict) or nesting > _MAX_NESTING:
        return schema
    found = dict(schema)
    for name in _SCHEMAS:
        if name in found:
            found[name] = _with_last_digits(found[name], nesting + 1)
    for name in _NAMED_SCHEMAS:
        if isinstance(named := found.get(name), dict):
            found[name] = {each: _with_last_digits(value, nesting + 1) for each, value in named.items()}
    kinds = found.get("type")
    is_number = kinds == "number" or (isinstance(kinds, list) and "number" in kinds)
    if is_number and not found.keys() & {"multipleOf", "enum", "const"}:
        found["multipleOf"] = _MIN_STEP
    if found.get("format") in _ENDLESS_FORMATS:
        found.setdefault("maxLength", _MAX_FORMAT)
    return found


def wrong_part(schema: Mapping[str, Any], where: str, is_usable: Callable[[str], bool]) -> str:
    """Return where in a schema that cannot be used the smallest part is that cannot.

    is_usable: whether a grammar is; it is asked about MAX_PARTS parts at most.
    """
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    num_left, found = MAX_PARTS, True
    while found:
        found = False
        for name, part in _parts(schema):
            num_left -= 1
            if num_left < 0:
                return where
            # A part that others refer to is looked at by itself, and is no reason to look at all who do.
            others = {} if name.startswith(tuple(shared)) else shared
            if isinstance(part, dict) and not is_usable(schema_grammar({**others, **part}, where)):
                schema, where, found = part, f"{where}.{name}", True
                break
    return where


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("$defs", "definitions", "properties", "patternProperties"):
        if isinstance(named := schema.get(name), dict):
            yield from ((f"{name}.{each}", part) for each, part in named.items())
    for name in (*_SCHEMAS, "allOf"):
        given = schema.get(name)
        if isinstance(given, list):
            yield from ((f"{name}[{i}]", part) for i, part in enumerate(given))
        else:
            yield name, given


def _dumped(value: object, where: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        raise ConfigError(f"{where}: it is nested too deeply, or holds half a surrogate pair") from None
    return text


def _schema(value: object, where: str) -> Structure:
    return Structure(where, schema_grammar(value, where))


def _response_format(value: Any, where: str) -> Structure | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in FORMATS:
        raise ConfigError(f'{where}: give {{"type": …}} with one of {", ".join(FORMATS)}')
    if kind == "json_schema":
        named = value.get("json_schema")
        inside = f"{where}.json_schema"
        if not isinstance(named, dict):
            raise ConfigError(f'{inside}: give {{"name": …, "schema": …}}')
        return _schema(named.get("schema"), f"{inside}.schema")
    if kind == "json_object":
        if value.get("schema") is not None:  # llama.cpp's
            return _schema(value["schema"], f"{where}.schema")
        return Structure(where, _ANY_OBJECT)
    return None


def _choice(value: Any, where: str) -> Structure:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise ConfigError(f"{where}: not a list of texts to choose from")
    return Structure(where, f"choice:{_dumped(value, where)}")


def _text(kind: str) -> Callable[[Any, str], Structure | None]:
    def read(value: Any, where: str) -> Structure | None:
        if not isinstance(value, str):
            raise ConfigError(f"{where}: not a text")
        _dumped(value, where)
        return Structure(where, f"{kind}:{value}") if value else None

    return read


def _structured_outputs(value: Any, where: str) -> Structure | None:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: not an object; give one of {', '.join(_INSIDE)}")
    if unknown := sorted(value.keys() - _INSIDE.keys() - _HARMLESS):
        raise ConfigError(f"{where}: {unknown[0][:40]} is not served; give one of {', '.join(_INSIDE)}")
    found = [
        Structure(f"{where}.{each.where}", each.grammar)
        for name, read in _INSIDE.items()
        if value.get(name) is not None and (each := read(value[name], name)) is not None
    ]
    if len(found) > 1:
        raise ConfigError(f"{found[0].where}: {found[1].where} asks for a form of the answer too; send one of them")
    return found[0] if found else None


def _json_object(value: Any, where: str) -> Structure | None:
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: not true or false")
    return Structure(where, _ANY_OBJECT) if value else None


_ANY_OBJECT = schema_grammar({"type": "object"}, "")
# vLLM's; the rest of it says how to compile.
_INSIDE: Mapping[str, Callable[[Any, str], Structure | None]] = {
    "json": _schema,
    "regex": _text("regex"),
    "choice": _choice,
    "grammar": _text("gbnf"),
    "json_object": _json_object,
}
_HARMLESS = {"backend", "disable_fallback", "whitespace_pattern", "disable_any_whitespace"}
_FIELDS: Mapping[str, Callable[[Any, str], Structure | None]] = {
    "response_format": _response_format,
    "json_schema": _schema,
    "guided_json": _schema,
    "guided_regex": _text("regex"),
    "regex": _text("regex"),
    "guided_choice": _choice,
    "guided_grammar": _text("gbnf"),
    "grammar": _text("gbnf"),
    "ebnf": _text("gbnf"),
    "structured_outputs": _structured_outputs,
}
