"""Calls of tools in the forms of models: found whole, in whatever pieces the text comes; what is no call stays text."""

import json
import random

import pytest

from mdiq.api.tool_calls import CallDelta, CallParser
from mdiq.api.tool_forms import FORMS, ToolForm, form_of
from mdiq.errors import ConfigError

MISTRAL, MISTRAL_11, HERMES, QWEN_CODER, PYTHON, LLAMA, FUNCTION_GEMMA, GEMMA, DEEPSEEK_31, DEEPSEEK_3 = FORMS
KINDS = {"get": {"a": ["string"], "n": ["integer"], "f": ["boolean", "null"], "m": ["string", "null"], "l": ["array"]}}
Found = tuple[str, list[tuple[str, str]]]


def _found(form: ToolForm, pieces: list[str], *, is_many: bool = True) -> Found:
    """Return the content, and the calls' names and arguments."""
    parser = CallParser(form, ["get", "add"], KINDS, is_many=is_many)
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
    (LLAMA, '<|python_tag|>get.call(a="x")', ("", [("get", '{"a": "x"}')])),
    (LLAMA, '[get(a="x"), add()]', ("", [("get", '{"a": "x"}'), ("add", "{}")])),
    (MISTRAL_11, '[TOOL_CALLS]get[ARGS]{"a": "}{\\"[TOOL_CALLS]"}', ("", [("get", '{"a": "}{\\"[TOOL_CALLS]"}')])),
    (
        MISTRAL_11,
        'Well.[TOOL_CALLS]get[CALL_ID]abcDEF123[ARGS]{"a": {"b": []}}[TOOL_CALLS]add[ARGS]{} Done.',
        ("Well.Done.", [("get", '{"a": {"b": []}}'), ("add", "{}")]),
    ),
    (MISTRAL_11, '[TOOL_CALLS]unknown[ARGS] {"a": 1}', ("", [("unknown", '{"a": 1}')])),
    (MISTRAL_11, '[TOOL_CALLS]get[ARGS]{"a": "x', ("", [("get", '{"a": "x')])),
    (MISTRAL_11, "[TOOL_CALLS]get[ARGS]null", ("[TOOL_CALLS]get[ARGS]null", [])),
    (MISTRAL_11, "[TOOL_CALLS]get[ARG", ("[TOOL_CALLS]get[ARG", [])),
    (MISTRAL_11, "[TOOL_CALLS]get a[ARGS]{}", ("[TOOL_CALLS]get a[ARGS]{}", [])),
    (MISTRAL_11, "[TOOL_CALLS]x[TOOL_CALLS]get[ARGS]{}", ("[TOOL_CALLS]x", [("get", "{}")])),
    (MISTRAL_11, '[TOOL_CALLS]{"name": "get", "arguments": {}}', ("", [("get", "{}")])),
    (
        QWEN_CODER,
        'I look.\n\n<tool_call>\n<function=get>\n<parameter=a>\nif x < 1:\n  "}{"\n\n</parameter>\n<parameter=n>\n 5\n'
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=add>\n</function>\n</tool_call>",
        ("I look.", [("get", '{"a": "if x < 1:\\n  \\"}{\\"\\n", "n": 5}'), ("add", "{}")]),
    ),
    # The schema says which values are strings; without one, JSON is JSON.
    (
        QWEN_CODER,
        "<tool_call><function=get><parameter=a>12</parameter><parameter=f>True</parameter><parameter=m>7</parameter>"
        '<parameter=l>[1, {"b": null}]</parameter><parameter=z>{"c": 1.5}</parameter></function></tool_call> ok',
        (" ok", [("get", '{"a": "12", "f": true, "m": "7", "l": [1, {"b": null}], "z": {"c": 1.5}}')]),
    ),
    (
        QWEN_CODER,
        "<tool_call><function=get><parameter=m>None</parameter><parameter=n>five</parameter><parameter=z>NaN</parameter>"
        '<parameter=y>"q"</parameter></function></tool_call>',
        ("", [("get", '{"m": null, "n": "five", "z": "NaN", "y": "\\"q\\""}')]),
    ),
    # Without its mark a call is one of a tool of the request; with it, of any.
    (QWEN_CODER, "So:\n<function=get>\n</function>\n</tool_call>", ("So:", [("get", "{}")])),
    (QWEN_CODER, "So: <function=Bob>\n</function>", ("So: <function=Bob>\n</function>", [])),
    (QWEN_CODER, "<tool_call><function=Bob></function></tool_call>", ("", [("Bob", "{}")])),
    (QWEN_CODER, "<tool_call>\n<function=get>\n<parameter=a>\nab", ("", [("get", '{"a": "ab')])),
    (QWEN_CODER, "<tool_call>\n<function=get>\n<parameter=n>\n12", ("", [("get", '{"n": ')])),
    (QWEN_CODER, "<tool_call>\n<function=get>\n<param", ("", [("get", "{")])),
    (QWEN_CODER, "<tool_call>\n<function=ge", ("<tool_call>\n<function=ge", [])),
    (QWEN_CODER, "<tool_call>\n<function=get>\n</tool_call> bye", (" bye", [("get", "{}")])),
    (QWEN_CODER, "<tool_call>\nnothing</tool_call>", ("<tool_call>\nnothing</tool_call>", [])),
    (QWEN_CODER, "<tool_call>\n<tool_call>\n<function=get></function>", ("<tool_call>\n", [("get", "{}")])),
    (QWEN_CODER, "<function=<function=get></function>", ("<function=", [("get", "{}")])),
    (QWEN_CODER, '<tool_call>{"name": "get", "arguments": {}}</tool_call>', ("", [("get", "{}")])),
    (
        PYTHON,
        "[get(a='it\\'s', b=[1, -2.5e3, True, None], c={'d': \"x)],\", \"e\": false}), add(), unknown(a=1)] bye",
        (
            "unknown(a=1)] bye",
            [("get", '{"a": "it\'s", "b": [1, -2.5e3, true, null], "c": {"d": "x)],", "e": false}}'), ("add", "{}")],
        ),
    ),
    (
        PYTHON,
        '[get(a="\\ud83d\\ude00\\x41\\n\\d", b=[], c={})]',
        ("", [("get", '{"a": "😀A\\n\\\\d", "b": [], "c": {}}')]),
    ),
    (PYTHON, '[get(a="\\ud83d")]', ('[get(a="\\ud83d")]', [])),
    (PYTHON, "[get(1)]", ("[get(1)]", [])),
    (PYTHON, "[get(a=01)]", ("[get(a=01)]", [])),
    (PYTHON, "[get(a=b)]", ("[get(a=b)]", [])),
    (PYTHON, '[get(a="x', ('[get(a="x', [])),
    (PYTHON, "[1, 2]", ("[1, 2]", [])),
    (PYTHON, "[get](http://a) is a link", ("[get](http://a) is a link", [])),
    (PYTHON, "See [get(a=1)]", ("See [get(a=1)]", [])),
    (PYTHON, "<|python_tag|>[get(a=1)]", ("", [("get", '{"a": 1}')])),
    (
        FUNCTION_GEMMA,
        '<start_function_call>call:get{a:<escape>}{, "x"<escape>,n:5,l:[<escape>b<escape>,{c:true}]}<end_function_call>'
        "<start_function_call>call:add{}<end_function_call><start_function_response>",
        (
            "<start_function_response>",
            [("get", '{"a": "}{, \\"x\\"", "n": 5, "l": ["b", {"c": true}]}'), ("add", "{}")],
        ),
    ),
    (FUNCTION_GEMMA, "Hm.\n<start_function_call>call:get{a:b}", ("Hm.\n<start_function_call>call:get{a:b}", [])),
    (
        FUNCTION_GEMMA,
        "<start_function_call>call:get{a:<escape>x<end_function_call>",
        ("<start_function_call>call:get{a:<escape>x<end_function_call>", []),
    ),
    (
        GEMMA,
        '<|tool_call>call:get{a:<|"|>it\'s "x"<|"|>,b:{c:[]}}<tool_call|> ok',
        (" ok", [("get", '{"a": "it\'s \\"x\\"", "b": {"c": []}}')]),
    ),
    (
        DEEPSEEK_31,
        'I see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{"a": "<}"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("I see.", [("get", '{"a": "<}"}'), ("add", "{}")]),
    ),
    (
        DEEPSEEK_31,
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{"a": {"b": 1}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜> bye",
        (" bye", [("get", '{"a": {"b": 1}')]),
    ),
    (
        DEEPSEEK_3,
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{"a": 1}\n'
        "```<｜tool▁call▁end｜>\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("", [("get", '{"a": 1}'), ("add", "{}")]),
    ),
    (DEEPSEEK_3, "<｜tool▁calls▁begin｜>get()", ("<｜tool▁calls▁begin｜>get()", [])),
]


@pytest.mark.parametrize(("form", "text", "expected"), ANSWERS, ids=lambda value: getattr(value, "name", None))
def test_every_cut_of_an_answer_gives_the_same_content_and_calls(form: ToolForm, text: str, expected: Found) -> None:
    assert _found(form, [text]) == expected
    for cut in range(len(text)):
        assert _found(form, [text[:cut], text[cut:]]) == expected, cut
    for size in range(1, len(text)):
        assert _found(form, [text[i : i + size] for i in range(0, len(text), size)]) == expected, size


SYNTAX = {
    "Mistral from v11": ["[TOOL_CALLS]get[ARGS]", "add"],
    "Qwen 3 Coder": ["<function=get>", "<parameter=a>", "<parameter=n>", "</parameter>", "</function>", "<function=x>"],
    "Python lists": ["[get(", "add(", "a=", "1", "'", ")", "None", "{'b':"],
    "Llama 3": ["[get(", "add(", "a=", "1", "'", ")", "True"],
    "FunctionGemma": ["<start_function_call>call:get{", "a:", "1", ",", "call:"],
    "Gemma 4": ["<|tool_call>call:get{", "a:", "1", "call:"],
    "DeepSeek V3.1": ["get<｜tool▁sep｜>", "<"],
    "DeepSeek V3": ["function<｜tool▁sep｜>get\n```json\n", "<"],
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("seed", range(60))
def test_no_text_breaks_the_parser_and_its_cuts_do_not_show(form: ToolForm, seed: int) -> None:
    rng = random.Random(seed)
    parts = [
        *SYNTAX.get(form.name, ()),
        *form.anywhere,
        *form.specials,
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


def test_endless_white_space_is_told_and_not_held() -> None:
    parser = CallParser(HERMES, ["get"])
    told = "".join(str(piece) for piece in parser.push(" " * 5_000))
    assert 4_000 <= len(told) < 5_000, "what is held is looked at with each character"
    rest = [*parser.push('\n<tool_call>{"name": "get", "arguments": {}}'), *parser.finish()]
    assert parser.num_calls == 1 and not any(isinstance(piece, str) and piece.strip() for piece in rest)


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


# The parts of the models' own templates that say how tools are called.
TEMPLATES = [
    (
        HERMES,
        """{{- "<tools>" }}{{ tool | tojson }}
{{- "a json object within <tool_call></tool_call> tags:\\n<tool_call>\\n{\\"name\\": <name>, \\"arguments\\": " }}""",
    ),
    (MISTRAL, """{{- "[AVAILABLE_TOOLS] [" }}{{- "[TOOL_CALLS] [" }}{%- set out = tool_call.function|tojson %}"""),
    (MISTRAL_11, """{{- "[TOOL_CALLS]" + tool['function']['name'] + "[ARGS]" + arguments }}"""),
    (MISTRAL_11, """{{- '[TOOL_CALLS]' + name + '[CALL_ID]' + tool_call.id + '[ARGS]' + arguments|tojson }}"""),
    (
        QWEN_CODER,
        """{{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}{{- '<parameter=' + args_name + '>\\n' }}""",
    ),
    # Of Llama 3.2, which has no mark, and of 3.1.
    (LLAMA, """{{- "Environment: ipython\\n" }}{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}"""),
    (
        LLAMA,
        """{{- "<|python_tag|>" + name + ".call(" }}{{- '"parameters": ' }}{%- if message.role == "ipython" %}""",
    ),
    (PYTHON, """{{- "Environment: ipython\\n" }}Respond in the format [func_name1(params_name1=params_value1, ...)]"""),
    (FUNCTION_GEMMA, """{{- '<start_function_call>call:' + function['name'] + '{' -}}"""),
    (GEMMA, """{{- '<|tool_call>call:' + function['name'] + '{' -}}{{- '}<tool_call|>' -}}"""),
    (
        DEEPSEEK_31,
        """{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' }}""",
    ),
    (
        DEEPSEEK_3,
        """{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + '\\n```json\\n' }}""",
    ),
]


@pytest.mark.parametrize(("form", "text"), TEMPLATES, ids=lambda value: getattr(value, "name", None))
def test_the_template_says_how_tools_are_called(form: ToolForm, text: str) -> None:
    assert form_of(f"{{% if tools %}}{text}{{% endif %}}") is form


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "knows no tools"),
        ("{{ messages }}", "knows no tools"),
        ("{{ toolset }}<tool_call>", "knows no tools"),
        ("{{ tools }}", "not known here"),
        # GLM's.
        ("{{ tools }}<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key>", "not known here"),
        ("{{ tools }}<function=f>", "not known here"),
    ],
)
def test_a_template_without_a_known_form_is_refused(template: str | None, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        form_of(template)
