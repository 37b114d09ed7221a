"""Words that the code has given up, by the table in CONTRIBUTING.md: in names everywhere, in texts in most rooms."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mdiq

HOUSE = Path(mdiq.__file__).parent
ROOMS = "api bench cli config control core engine plan report route service telemetry testbed transport".split()
NAMES = re.compile(r"_{0,2}(most|least)_", re.IGNORECASE)
TEXTS = re.compile(r"\bbehind\b|\btold \(")
KEPT = {"most_live", "most_nats"}  # a field of the status and one of a log line: programs read them


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


@pytest.mark.parametrize("code", ["MOST_PEERS = 3", "def f(*, least_s: float): ...", "room._most_bytes", "f(most_s=1)"])
def test_a_limit_by_its_old_name_is_found(code: str) -> None:
    assert [name for name in _names(ast.parse(code)) if NAMES.match(name)]


def test_limits_are_max_and_min_and_what_was_seen_is_peak() -> None:
    found = {
        f"{file.relative_to(HOUSE)}: {name}"
        for file in HOUSE.rglob("*.py")
        for name in _names(ast.parse(file.read_text()))
        if NAMES.match(name) and name not in KEPT
    }
    assert found == set()


@pytest.mark.parametrize("text", ["torch comes behind it", "on_loss: told (node, error)"])
def test_a_word_that_was_given_up_is_found(text: str) -> None:
    assert TEXTS.search(text)


@pytest.mark.parametrize("room", ROOMS)
def test_texts_do_without_words_that_were_given_up(room: str) -> None:
    found = [
        f"{file.relative_to(HOUSE)}:{number}: {line.strip()}"
        for file in (HOUSE / room).rglob("*.py")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if TEXTS.search(line)
    ]
    assert found == []


def test_a_span_is_part_of_a_trace_and_nothing_else() -> None:
    owners = {
        str(file.relative_to(HOUSE))
        for file in HOUSE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and "span" in node.name.lower()
    }
    assert owners == {"telemetry/trace.py"}
