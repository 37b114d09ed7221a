"""The YAML parser's errors, in words for people who have not read its specification."""

import re

import yaml

from mdiq.config.units import shown

_IN_QUOTES = "put the text in quotes"
_CLOSED = {"[": "]", "{": "}"}


def syntax_error(error: yaml.MarkedYAMLError, source: list[str]) -> tuple[int, str]:
    """Return the line and the message of one error."""
    problem, context = error.problem or "", error.context or ""
    here = error.problem_mark or error.context_mark
    before = error.context_mark or here
    line, first = (min(mark.line, len(source) - 1) + 1 if mark else 1 for mark in (here, before))

    def text(number: int) -> str:
        return source[number - 1] if 0 < number <= len(source) else ""

    for number in (line, first):
        if match := re.search(r"public_key:\s*([^\s\"'].*)", text(number)):
            value = match[1].split(" #")[0].rstrip(" }")
            return (
                number,
                f'a key without quotes, and its signs mean something to YAML; write public_key: "{shown(value)}"',
            )
    if "'\\t'" in problem or re.match(r" *\t", text(line)):
        return line, "a tab at the beginning of the line or of a value; YAML allows spaces only; replace it by spaces"
    if "mapping values are not allowed" in problem:
        if len(re.findall(r": ", text(line))) > 1:
            return line, "a second `: ` in the line; put the text with the colon in quotes"
        return line, "the line is indented deeper than the one above; begin it under the first letter of the key above"
    if "could not find expected ':'" in problem:
        return first, "a line without `key: value`; is the colon missing, or the space after it?"
    if "quoted scalar" in context:
        return first, "a quote opens here and never closes; close it"
    if "flow node" in context and "stream end" in problem:  # the parser names neither the bracket nor its line
        first, opened = _open_bracket(source) or (first, "{")
        return first, f"`{opened}` opens here and never closes; add {_CLOSED[opened]}"
    if "flow" in context:
        opened = "[" if "sequence" in context else "{"
        closed = _CLOSED[opened]
        if "expected ','" in problem and "stream end" not in problem:
            return line, f"`{opened}` of line {first} is not closed, or a comma is missing; add {closed} or a comma"
        return first, f"`{opened}` opens here and never closes; add {closed}"
    if "undefined alias" in problem or "alias" in context or "anchor" in context or "tag" in context:
        return line, f"a value that begins with *, & or ! means something else to YAML; {_IN_QUOTES}"
    if "cannot start any token" in problem:
        return line, f"a value cannot begin with this sign; {_IN_QUOTES}"
    if "single document" in context or "single document" in problem:
        return line, "a second document begins here (---); a topology is one document: remove the line"
    if "block scalar" in context:
        return line, f"a value that begins with > or | means something else to YAML; {_IN_QUOTES}"
    if "block" in context or "block" in problem or "document start" in problem:
        return (
            line,
            "the indentation does not fit the lines above; the keys of one node or section begin in the same column",
        )
    return line, f"it is no YAML: {problem}; compare with the examples in configs/"


def _open_bracket(source: list[str]) -> tuple[int, str] | None:
    """Return the line and the sign of the last bracket that is not closed."""
    found: list[tuple[int, str]] = []
    for number, line in enumerate(source, 1):
        for sign in re.findall(r"[\[\]{}]", line):
            if sign in _CLOSED:
                found.append((number, sign))
            elif found:
                found.pop()
    return found[-1] if found else None
