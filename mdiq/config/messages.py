"""Messages about one value: pydantic's errors and unknown keys, in plain words with advice."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from mdiq.config.findings import Loc, path_of
from mdiq.config.topology import (
    VERSION,
    Api,
    HopWire,
    Links,
    ModelChoice,
    Node,
    Noise,
    RingWishes,
    Security,
    Topology,
)
from mdiq.config.truths import advice_on_truth
from mdiq.config.units import shown

SECTIONS: dict[Loc, type[BaseModel]] = {
    (): Topology,
    ("model",): ModelChoice,
    ("nodes",): Node,
    ("nodes", "noise"): Noise,
    ("links",): Links,
    ("links", "hops"): HopWire,
    ("security",): Security,
    ("api",): Api,
    ("ring",): RingWishes,
}
"""Keys without list indices -> the model that reads what stands there."""

_NOUNS: dict[Loc, str] = {(): "the file", ("nodes",): "a node", ("links", "hops"): "a hop"}
_SECRETS = {
    **dict.fromkeys(("private_key", "secret_key", "secret"), "make a new key with `mdiq keys`"),
    **dict.fromkeys(("api_key", "token"), "write it into the file that api.keys_file names"),
    "api_keys": "write them into the file that api.keys_file names",
    "password": "see security in configs/README.md",
}
_WRITTEN = {
    "address": "ip host hostname",
    "data_port": "port",
    "memory": "mem ram memory_limit",
    "device": "gpu",
    "threads": "cores cpus",
    "role": "starter type",
    "name": "id",
    "public_key": "key pubkey",
    "nodes": "hosts devices",
    "transfer_limit": "bandwidth",
    "weights": "quantization",
    "path": "file",
}
_MEANT = {written: meant for meant, words in _WRITTEN.items() for written in words.split()}
"""What people write -> the key that they mean, where that is one of the section."""


def without_indices(loc: Loc) -> Loc:
    """Return the keys of a place, as SECTIONS names it."""
    return tuple(part for part in loc if isinstance(part, str))


def value_message(details: ErrorDetails, raw: str | None) -> str:
    """Return what is wrong and what to do, for one error of pydantic."""
    loc: Loc = details["loc"]
    value, context = details["input"], details.get("ctx", {})
    match details["type"]:
        case "missing":
            return f"it is missing; {_example(loc)}"
        case "extra_forbidden":
            return _unknown_key(loc)
        case "value_error":
            return str(context["error"])
        case _ if value is None:
            return f"it has no value; {_example(loc)}"
        case "literal_error":
            return _not_one_of(loc, value)
        case "model_type" | "model_attributes_type" | "dict_type":
            return _no_section(loc, value)
        case "tuple_type":
            return _no_list(loc, value)
        case "greater_than_equal" | "less_than_equal":
            return f"{shown(value)} is out of range; write {_range(loc)}"
        case "int_type" | "bool_type" | "string_type" | "int_from_float":
            return _wrong_kind(loc, value, details["type"], raw)
        case _:
            return f"{details['msg']}; {_example(loc)}"


def _wrong_kind(loc: Loc, value: object, kind: str, raw: str | None) -> str:
    if isinstance(value, dict | tuple):
        wanted = {"string_type": "a text", "bool_type": "true or false"}.get(kind, "a number")
        return f"it is {noun_of(value)}, and {wanted} belongs here; {_example(loc)}"
    text = shown(raw if raw is not None else value)
    if kind == "string_type" and isinstance(value, bool):
        return f"{text} is not a text; {advice_on_truth(text, place_schema(loc))}"
    if kind == "string_type":
        return f'YAML reads {text} as {noun_of(value)}; put it in quotes if it is meant: "{text}"'
    if kind == "bool_type":
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return f"it is a text because of the quotes; write {value.lower()}"
        return f"{text} is neither true nor false; write one of them"
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return f"it is a text because of the quotes; write {value}"
    return f"{text} is not a whole number; write {_range(loc)}"


def _not_one_of(loc: Loc, value: object) -> str:
    if loc == ("version",):
        return (
            f"{shown(value)} is a version that this mdiq does not read; write {VERSION}, or use the mdiq that it is for"
        )
    choices = [str(choice) for choice in _schema_of(loc).get("enum", [_schema_of(loc).get("const")])]
    text = shown(value)
    close = get_close_matches(str(value).lower(), choices, n=1)
    advice = f"did you mean {close[0]}?" if close else f"write one of {', '.join(choices)}"
    return f"{text} is none of {', '.join(choices)}; {advice}" if close else f"{text} is not known here; {advice}"


def _no_section(loc: Loc, value: object) -> str:
    example = _example(loc)
    if isinstance(value, str) and ":" in value and " " not in value.partition(":")[2][:1]:
        key, _, rest = value.partition(":")
        return f"the space after the colon is missing; write {shown(key)}: {shown(rest)}"
    if without_indices(loc) == ("nodes",):
        return f"{noun_of(value)} stands where a node should; begin it with `- name: ...` and its other keys below that"
    return f"{noun_of(value)} stands where keys should; {example}"


def _no_list(loc: Loc, value: object) -> str:
    if loc == ("nodes",):
        if isinstance(value, dict) and not any(key in value for key in ("name", "address")):
            return "it is a mapping, and nodes is a list; write each as `- name: ...` and its other keys below that"
        return f"it is {noun_of(value)}, and nodes is a list; begin each node with a dash: `- name: ...`"
    return f"it is {noun_of(value)}, and a list belongs here; {_example(loc)}"


def meant_by(loc: Loc) -> Loc | None:
    """Return the key that an unknown one likely means, in the same section."""
    *parents, last = loc
    key = str(last).lower().replace("-", "_")
    known = _keys_of(without_indices(tuple(parents)))
    if (meant := _MEANT.get(key)) in known:
        return (*parents, str(meant))
    close = get_close_matches(key, known, n=1)
    return (*parents, close[0]) if close else None


def _unknown_key(loc: Loc) -> str:
    *parents, last = loc
    if (secret := str(last).lower()) in _SECRETS:
        return f"a secret does not belong into this file, which others read; remove it, and {_SECRETS[secret]}"
    inside = without_indices(tuple(parents))
    key = str(last)
    known = _keys_of(inside)
    noun = _NOUNS.get(inside, ".".join(map(str, inside)))
    if (meant := meant_by(loc)) is not None:
        return f"it is not a key of {noun}; did you mean {meant[-1]}?"
    places = [
        path_of(section) or "the file itself" for section in SECTIONS if key in _keys_of(section) and section != inside
    ]
    if places:
        return f"it is not a key of {noun}; it belongs to {places[0]}"
    return f"it is not a key of {noun}; remove it, or use one of {', '.join(known)}"


def _keys_of(inside: Loc) -> list[str]:
    return [field.alias or name for name, field in SECTIONS[inside].model_fields.items()] if inside in SECTIONS else []


def _schema_of(loc: Loc) -> dict[str, Any]:
    """Return the JSON schema of a key, or nothing for what is no key."""
    keys = without_indices(loc)
    if not keys or keys[:-1] not in SECTIONS:
        return {}
    properties = SECTIONS[keys[:-1]].model_json_schema()["properties"]
    found: dict[str, Any] = properties.get(keys[-1], {})
    return found


def place_schema(loc: Loc) -> Mapping[str, Any]:
    """Return the JSON schema of a place: of a key, or of an item of a list."""
    found: Mapping[str, Any] = _schema_of(loc)
    if loc and isinstance(loc[-1], int):
        found = found.get("items", {})
    return found


def _range(loc: Loc) -> str:
    schema = _schema_of(loc)
    if "minimum" in schema:
        return f"{schema['minimum']} to {schema['maximum']}"
    return str(schema.get("x-values", "another value")).replace("`", "")


def _example(loc: Loc) -> str:
    """Return advice: how the key may look."""
    if loc == ("nodes",):
        return "write `nodes:`, and below it each device as `- name: ...` (`mdiq init` writes such a file)"
    schema, key = _schema_of(loc), loc[-1] if loc else ""
    if "examples" in schema:
        return f"write for example `{key}: {schema['examples'][0]}`"
    if "default" in schema and not isinstance(schema["default"], dict):
        default = schema["default"]
        text = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        return f"remove the line, or write for example `{key}: {text}`"
    return "remove the line, or write the keys below it (see configs/README.md)"


def noun_of(value: object) -> str:
    """Return what kind of value it is, in a word."""
    if isinstance(value, bool):
        return str(value).lower()
    match value:
        case None:
            return "nothing"
        case str():
            return "a text"
        case int() | float():
            return "a number"
        case dict():
            return "a mapping"
        case _:
            return "a list"
