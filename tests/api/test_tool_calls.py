"""Calls of tools in the forms of models: found whole, in whatever pieces the text comes; what is no call stays text."""

import json
import random

import pytest

from mdiq.api.tool_calls import FORMS, CallDelta, CallParser, ToolForm, form_of
from mdiq.errors import ConfigError

MISTRAL, HERMES, LLAMA = FORMS
Found = tuple[str, list[tuple[str, str]]]


def _found(form: ToolForm, pieces: list[str], *, is_many: bool = True) -> Found:
    """Return the content, and the calls' names and arguments."""
    parser = CallParser(form, ["get", "add"], is_many=is_many)
    out = [piece for text in pieces for piece in parser.push(text)] + parser.finish()
    calls: list[list[str]] = []
    for piece in out:
        if isinstance(piece, CallDelta):
            if piece.name is not None:
                assert piece.id and piece.index == len(calls)
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
    assert parser.num_calls == len(calls) and parser.push("more") == parser.finish() == []
    return "".join(piece for piece in out if isinstance(piece, str)), [(name, text) for name, text in calls]


ANSWERS: list[tuple[ToolForm, str, Found]] = [
    (HERMES, "Hello <b>there</b>.\n", ("Hello <b>there</b>.\n", [])),
    (
        HERMES,
        'Let me see.\n<tool_call>\n{"name": "get", "arguments": {"a": "}{\\"</tool_call>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"b": [1, {"c": 2}]}}\n</tool_call>',
        ("Let me see.", [("get", '{"a": "}{\\"</tool_call>"}'), ("add", '{"b": [1, {"c": 2}]}')]),
    ),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "get"}</tool_call>', ("", [("get", '{"a": 1}')])),
    (HERMES, '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("get", '{"a": 1}')])),
    (HERMES, '<tool_call>{"name": "get"}</tool_call> done', (" done", [("get", "{}")])),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', ("", [("unknown", "{}")])),
    (HERMES, '<tool_call>{"name": "g\\u0065t", "arguments": {}}</tool_call>', ("", [("get", "{}")])),
    # A bracket is missing, an answer is cut short, and what only looks like a call.
    (HERMES, '<tool_call>\n{"name": "get", "arguments": {"a": 1}\n</tool_call> bye', (" bye", [("get", '{"a": 1}')])),
    (HERMES, '<tool_call>{"name": "get", "arguments": {"a": "x', ("", [("get", '{"a": "x')])),
    (HERMES, '<tool_call>\n{"name": "get", "argu', ('<tool_call>\n{"name": "get", "argu', [])),
    (HERMES, "a <tool_call> is a mark, <tool", ("a <tool_call> is a mark, <tool", [])),
    (HERMES, '<tool_call>{"no": 1}</tool_call>', ('<tool_call>{"no": 1}</tool_call>', [])),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}} x', ('<tool_call>{"name": 5, "arguments": {}} x', [])),
    # What small models write instead.
    (HERMES, '```json\n{\n "name": "get",\n "arguments": {"a": 1}\n}\n```', ("", [("get", '{"a": 1}')])),
    (
        HERMES,
        '{"name": "get", "arguments": {}}\n{"name": "add", "arguments": {}}',
        ("", [("get", "{}"), ("add", "{}")]),
    ),
    (HERMES, '<tools>{"name": "get", "arguments": {}}</tools>', ("", [("get", "{}")])),
    # As the templates of Qwen 2.5 Coder show a call: with two braces.
    (HERMES, '{{"name": "get", "arguments": {"a": 1}}}', ("", [("get", '{"a": 1}')])),
    (HERMES, '{{"name": "get", "arguments": {"a": 1}}', ("", [("get", '{"a": 1}')])),
    (HERMES, '<tool_call>\n{{"arguments": {}, "name": "get"}}\n</tool_call> ok', (" ok", [("get", "{}")])),
    (
        HERMES,
        '{{"name": "get", "arguments": {}}}\n{{"name": "add", "arguments": {}}}',
        ("", [("get", "{}"), ("add", "{}")]),
    ),
    (HERMES, '{{"name": "Bob", "arguments": {}}}', ('{{"name": "Bob", "arguments": {}}}', [])),
    (HERMES, "{{ name }} is filled in", ("{{ name }} is filled in", [])),
    (HERMES, "{{", ("{{", [])),
    (HERMES, '{"name": "Bob", "arguments": {}}', ('{"name": "Bob", "arguments": {}}', [])),
    (HERMES, '```json\n{"city": {"name": "get"}}\n```', ('```json\n{"city": {"name": "get"}}\n```', [])),
    (HERMES, "```python\nget()\n```", ("```python\nget()\n```", [])),
    (HERMES, 'So: {"name": "get", "arguments": {}}', ('So: {"name": "get", "arguments": {}}', [])),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "get", "arguments": {"a": 1}, "id": "abc123def"}, {"name": "add", "arguments": {}}]',
        ("", [("get", '{"a": 1}'), ("add", "{}")]),
    ),
    (MISTRAL, 'Yes.[TOOL_CALLS][{"name": "get", "arguments": {"a": "]["}}]', ("Yes.", [("get", '{"a": "]["}')])),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "get", "arguments": {}}] [TOOL_CALLS] [{"name": "add", "arguments": {}}] ok',
        ("ok", [("get", "{}"), ("add", "{}")]),
    ),
    (MISTRAL, "[TOOL_CALLS] nothing", ("[TOOL_CALLS] nothing", [])),
    (MISTRAL, "a list: [1] [TOOL", ("a list: [1] [TOOL", [])),
    (LLAMA, '{"name": "get", "parameters": {"a": 1}}', ("", [("get", '{"a": 1}')])),
    (LLAMA, '{"type": "function", "name": "get", "parameters": {}}', ("", [("get", "{}")])),
    (
        LLAMA,
        '<|python_tag|>{"name": "get", "parameters": {}}; {"name": "add", "parameters": {"a": 1}}',
        ("", [("get", "{}"), ("add", '{"a": 1}')]),
    ),
    (LLAMA, '{"name": "Bob", "parameters": {}}', ('{"name": "Bob", "parameters": {}}', [])),
    (LLAMA, '{"name": "get", "parameters": {}} Done.', ("Done.", [("get", "{}")])),
    (LLAMA, "<|python_tag|>print(1)", ("print(1)", [])),
    (LLAMA, '\n {"na', ('\n {"na', [])),
]


@pytest.mark.parametrize(("form", "text", "expected"), ANSWERS, ids=lambda value: getattr(value, "name", None))
def test_every_cut_of_an_answer_gives_the_same_content_and_calls(form: ToolForm, text: str, expected: Found) -> None:
    assert _found(form, [text]) == expected
    for cut in range(len(text)):
        assert _found(form, [text[:cut], text[cut:]]) == expected, cut
    for size in range(1, len(text)):
        assert _found(form, [text[i : i + size] for i in range(0, len(text), size)]) == expected, size


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("seed", range(30))
def test_no_text_breaks_the_parser_and_its_cuts_do_not_show(form: ToolForm, seed: int) -> None:
    rng = random.Random(seed)
    parts = [
        form.mark,
        form.end,
        '{"name": "get", ',
        f'"{form.arguments}": ',
        '{"a": 1}',
        "}",
        "{",
        "[",
        '"',
        "\\",
        ",",
    ]
    text = "".join(rng.choice([*parts, " ", "\n", "x", "é", "]", ";", "```json\n", "```"]) for _ in range(40))
    whole = _found(form, [text])
    assert _found(form, list(text)) == whole
    if not whole[1]:
        # Llama's mark is a special token; where no call follows, it may be left out.
        shown = [each if form.is_marked else each.replace(form.mark, "") for each in (whole[0], text)]
        assert shown[0] == shown[1], "text was lost"


@pytest.mark.parametrize(("form", "text"), [(row[0], row[1]) for row in ANSWERS if len(row[2][1]) > 1])
def test_only_the_first_call_is_left_where_one_is_wanted(form: ToolForm, text: str) -> None:
    content, calls = _found(form, [text], is_many=False)
    assert calls == _found(form, [text])[1][:1]


def test_arguments_come_while_they_are_written() -> None:
    parser = CallParser(HERMES, ["get"])
    assert parser.push("Well.") == ["Well."]
    assert parser.push('\n<tool_call>\n{"name": "ge') == []
    assert parser.push('t", "arguments":') == []
    (first,) = parser.push(' {"a"')
    assert isinstance(first, CallDelta) and (first.index, first.name, first.arguments) == (0, "get", '{"a"')
    assert parser.push(": 1}") == [CallDelta(0, None, None, ": 1}")]
    assert parser.push("}\n</tool_call>") == parser.finish() == []


def test_ids_are_of_the_length_that_templates_ask_for_and_differ() -> None:
    ids = []
    for form in (MISTRAL, HERMES):
        parser = CallParser(form, ["get"])
        for _ in range(2):
            call = json.dumps({"name": "get", form.arguments: {}})
            ids += [piece.id for piece in parser.push(f"{form.mark}{call}{form.end}") if isinstance(piece, CallDelta)]
    assert [len(each or "") for each in ids] == [9, 9, 29, 29] and len({*ids}) == 4
    assert str(ids[0]).isalnum() and str(ids[2]).startswith("call_")


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]", MISTRAL),
        ('{{ tools }}<|python_tag|> {"name": function name, "parameters": dictionary}', LLAMA),
    ],
)
def test_the_template_says_how_tools_are_called(template: str, form: ToolForm) -> None:
    assert form_of(template) is form


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "knows no tools"),
        ("{{ messages }}", "knows no tools"),
        ("{{ toolset }}<tool_call>", "knows no tools"),
        ("{{ tools }}", "not known here"),
        ("{{ tools }}<tool_call><function=f>", "not known here"),
        ("{{ tools }}[TOOL_CALLS]f[ARGS]{}", "not known here"),
    ],
)
def test_a_template_without_a_known_form_is_refused(template: str | None, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        form_of(template)
