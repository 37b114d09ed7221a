"""Grammars that would end the service, or take all its memory or time, end a process of their own instead."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from mdiq.engine.text import grammar
from mdiq.engine.text.grammar import Grammars
from mdiq.engine.text.grammar_trial import Trial
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import ConfigError, CostlyFormError, EngineError
from tests.engine.text.test_tokenizer import byte_level, byte_level_file

__all__ = ["byte_level"]  # a fixture


def _chain(length: int) -> dict[str, Any]:
    """Return a schema in which each part leads to the next one."""
    parts: dict[str, Any] = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return {"$defs": {**parts, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def _nested(length: int, depth: int) -> str:
    """Return a chain of few parts, each of many levels."""
    opened, closed = '{"items":' * depth, "}" * depth
    parts = [f'"d{i}":{opened}{{"$ref":"#/$defs/d{i + 1}"}}{closed}' for i in range(length)]
    return '{"$defs":{' + ",".join(parts) + f',"d{length}":{{}}' + '},"$ref":"#/$defs/d0"}'


COSTLY = {
    "stack": "json_schema:" + json.dumps(_chain(2_000)),
    "stack, in Lark": "gbnf:start: %json " + _nested(30, 90),
    "memory": "regex:" + "a?" * 30_000,
    "time": "json_schema:" + json.dumps({"allOf": [{"pattern": f"[a-z]{{{i}}}.*"} for i in range(60)]}),
}


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trial]:
    found = Trial(max_cpu_s=1)
    monkeypatch.setattr(grammar, "_TRIAL", found)
    yield found
    found.close()


@pytest.fixture
def grammars(trial: Trial, tmp_path: Path, byte_level: Backend) -> Grammars:
    return Grammars(Tokenizer.load(byte_level_file(tmp_path / "a.gguf", byte_level)))


@pytest.mark.parametrize("what", COSTLY)
def test_a_grammar_that_costs_too_much_is_refused_and_the_next_one_is_taken(grammars: Grammars, what: str) -> None:
    with pytest.raises(CostlyFormError, match="too much time or memory"):
        grammars.check(COSTLY[what])
    grammars.check('choice:["yes", "no"]')


def test_a_schema_of_many_parts_is_taken(grammars: Grammars) -> None:
    grammars.check("json_schema:" + json.dumps(_chain(100)))


def test_tokens_of_the_forms_of_tools_are_not_those_of_the_trial(trial: Trial) -> None:
    trial.check('lark:start: <[151657]> "a" <[151658]>')
    with pytest.raises(ConfigError, match="missing"):
        trial.check("lark:start: <[151657]> missing")


def test_a_process_that_has_ended_by_itself_is_started_again(trial: Trial) -> None:
    trial.check("regex:a")
    child = trial._child
    assert child is not None
    child.kill()
    child.wait()
    trial.check("regex:b")
    assert trial._child is not child


def test_a_process_that_cannot_be_started_is_no_fault_of_the_request(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineError, match="cannot be started"):
        trial.check("regex:a")
