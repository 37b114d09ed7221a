"""Fields that ask for a form of the answer, those of every server, become one grammar."""

import json
from typing import Any

import pytest

from mdiq.api.structure import Structure, structure_of
from mdiq.api.tool_forms import FORMS
from mdiq.api.tools import tools_of
from mdiq.errors import ConfigError

MISTRAL, MISTRAL_11, HERMES, QWEN_CODER, PYTHON, LLAMA, FUNCTION_GEMMA, GEMMA, DEEPSEEK_31, DEEPSEEK_3 = FORMS
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def _schema_of(given: dict[str, Any]) -> tuple[str, Any]:
    """Return the field, and the schema that was made of it, without what llguidance is told."""
    structure = structure_of(given)
    assert structure is not None
    kind, _, text = structure.grammar.partition(":")
    schema = json.loads(text)
    assert kind == "json_schema" and schema.pop("x-guidance").keys() == {"whitespace_pattern"}
    return structure.where, schema


@pytest.mark.parametrize(
    ("given", "where"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": SCHEMA},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema"),
        ({"guided_json": SCHEMA}, "guided_json"),
        ({"guided_json": json.dumps(SCHEMA)}, "guided_json"),
        ({"json_schema": SCHEMA}, "json_schema"),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json"),
    ],
)
def test_a_schema_has_the_names_of_all_servers(given: dict[str, Any], where: str) -> None:
    assert _schema_of(given) == (where, SCHEMA)


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"guided_regex": "[a-z]+"}, "regex:[a-z]+"),
        ({"regex": "a:b"}, "regex:a:b"),
        ({"structured_outputs": {"regex": "a"}}, "regex:a"),
        ({"guided_choice": ["é", 'a"b']}, 'choice:["é", "a\\"b"]'),
        ({"structured_outputs": {"choice": ["a"], "json": None}}, 'choice:["a"]'),
        ({"grammar": 'root ::= "a"'}, 'gbnf:root ::= "a"'),
        ({"guided_grammar": 'root ::= "a"'}, 'gbnf:root ::= "a"'),
        ({"ebnf": 'root ::= "a"'}, 'gbnf:root ::= "a"'),
        ({"structured_outputs": {"grammar": 'root ::= "a"', "backend": "auto"}}, 'gbnf:root ::= "a"'),
    ],
)
def test_other_forms_have_the_names_of_all_servers(given: dict[str, Any], grammar: str) -> None:
    assert (structure := structure_of(given)) is not None and structure.grammar == grammar


def test_any_json_object_is_a_form() -> None:
    for given in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        assert _schema_of(given)[1] == {"type": "object"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"response_format": None, "guided_json": {}, "grammar": "", "guided_choice": [], "json_schema": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"json_object": False}},
    ],
)
def test_nothing_is_no_form(given: dict[str, Any]) -> None:
    assert structure_of(given) is None


def test_numbers_and_times_get_a_last_digit_wherever_a_schema_may_have_them() -> None:
    number = {"type": "number"}
    schema = {
        "type": "object",
        "properties": {
            "type": {"type": ["number", "null"]},
            "list": {"type": "array", "items": {"anyOf": [number, {"type": "string"}]}},
            "half": {"type": "number", "multipleOf": 0.5},
            "third": {"type": "number", "enum": [0.3333333333333333]},
            "whole": {"type": "integer"},
            "at": {"type": "string", "format": "date-time"},
            "day": {"type": "string", "format": "date"},
        },
        "$defs": {"a": {"prefixItems": [number], "additionalProperties": number}},
        "enum": [{"type": "number"}],
    }
    step = {"multipleOf": 1e-9}
    expected = json.loads(json.dumps(schema))
    expected["properties"]["type"] |= step
    expected["properties"]["at"]["maxLength"] = 40
    expected["properties"]["list"]["items"]["anyOf"][0] |= step
    expected["$defs"]["a"] = {"prefixItems": [number | step], "additionalProperties": number | step}
    assert _schema_of({"guided_json": schema})[1] == expected


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5_000):
        schema = {"items": schema}
    with pytest.raises(ConfigError, match="^guided_json: it is nested too deeply"):
        structure_of({"guided_json": schema})


WEATHER = {"function": {"name": "get", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "now", "description": "The time.", "strict": True}}


def _grammar(body: dict[str, Any], form: Any = HERMES, content: Structure | None = None, **special: int) -> str | None:
    use = tools_of({"tools": [WEATHER, TIME], **body})
    assert use is not None
    return use.grammar(form, content, lambda text: special.get("mark") if text == form.mark else None)


def test_the_template_is_told_the_tools_in_openais_form() -> None:
    use = tools_of({"tools": [WEATHER, TIME]})
    assert use is not None and use.told == [
        {"type": "function", "function": {"name": "get", "description": "", "parameters": SCHEMA}},
        {
            "type": "function",
            "function": {
                "name": "now",
                "description": "The time.",
                "parameters": {"type": "object", "properties": {}},
            },
        },
    ]


def test_no_tools_are_told_where_none_is_to_be_called() -> None:
    assert tools_of({"tools": [WEATHER], "tool_choice": "none"}) is None
    assert tools_of({"tools": [], "tool_choice": "auto"}) is tools_of({"tools": None}) is tools_of({}) is None


def test_which_calls_a_grammar_allows_is_what_the_request_says() -> None:
    one = {"tool_choice": {"type": "function", "function": {"name": "now"}}}
    starts = [
        ({}, "call* content"),
        ({"parallel_tool_calls": False}, "call | content"),
        ({"tool_choice": "required", "parallel_tool_calls": True}, 'call ("\\n" call)* "\\n"?'),
        ({"tool_choice": "required"}, "call"),
        ({"tool_choice": "required", "parallel_tool_calls": False}, "call"),
        (one, "call"),
    ]
    for body, start in starts:
        grammar = _grammar(body)
        assert grammar is not None and grammar.startswith(f"lark:start: {start}\n")
        assert ("get" in grammar) == (body is not one) and "now" in grammar
        assert grammar.count("%json") == (1 if body is one else 2)


def test_a_mark_that_is_a_special_token_is_named_by_its_id() -> None:
    for body in ({}, {"tool_choice": "required"}):
        grammar = _grammar(body, MISTRAL, mark=9)
        assert grammar is not None and "<[9]>" in grammar and "TOOL_CALLS" not in grammar
        plain = _grammar(body, MISTRAL)
        assert plain is not None and "<[9]>" not in plain and '"[TOOL_CALLS]"' in plain


def test_calls_that_cannot_be_told_from_text_are_not_constrained() -> None:
    assert _grammar({}, LLAMA) is None
    grammar = _grammar({"tool_choice": "required"}, LLAMA)
    assert grammar is not None and "python_tag" not in grammar and '\\"parameters\\": ' in grammar


def test_beside_tools_an_answer_may_have_the_form_of_json_alone() -> None:
    grammar = _grammar({}, content=structure_of({"guided_json": SCHEMA}))
    assert grammar is not None and grammar.startswith('lark:start: call ("\\n" call)* "\\n"? | content\n')
    with pytest.raises(ConfigError, match="^regex: beside tools"):
        _grammar({}, content=structure_of({"regex": "a"}))
