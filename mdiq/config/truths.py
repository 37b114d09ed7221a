"""Advice on yes, no, on and off, which YAML takes for true and false, by what belongs at their place. Pure."""

import re
from collections.abc import Mapping
from typing import Any

_TRUE = ("yes", "on", "true", "y")


def truth_of(raw: str) -> str:
    """Return what YAML reads such a word as: true or false."""
    return "true" if raw.lower() in _TRUE else "false"


def advice_on_truth(raw: str, schema: Mapping[str, Any]) -> str:
    """Return what to write in place of such a word. schema: the JSON schema of its place; empty: it is not known."""
    truth, quoted = truth_of(raw), f'"{raw}"'
    if not schema:
        return f"write {truth}, or {quoted} in quotes if it is a text"
    choices = [schema, *schema.get("anyOf", ())]
    if any("boolean" in _kinds(each) for each in choices):
        return f"write {truth}"
    if any(_takes(each, raw) for each in choices):
        if truth == "false" and any("null" in _kinds(each) for each in choices):
            return f"write null, or {quoted} in quotes if it is a text"
        return f"put it in quotes if it is meant: {quoted}"
    named = [str(value) for value in schema.get("enum", [])]
    if named:
        return f"write one of {', '.join(named)}"
    if "minimum" in schema:
        return f"write {schema['minimum']} to {schema['maximum']}"
    if "x-values" in schema:
        return f"write {schema['x-values']}".replace("`", "")
    if "const" in schema:
        return f"write {schema['const']}"
    return "write a list, such as []" if "array" in _kinds(schema) else "remove the line, or write keys below it"


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _takes(schema: Mapping[str, Any], text: str) -> bool:
    """Return whether a place takes this text."""
    if "string" not in _kinds(schema) or "enum" in schema or "const" in schema:
        return False
    return "pattern" not in schema or re.search(schema["pattern"], text) is not None
