"""Grammars of tool calls in every form: calls as models write them fit, wrong ones do not; what fits is found again."""

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from mdiq.api.structure import structure_of
from mdiq.api.tool_calls import CallDelta, CallParser
from mdiq.api.tool_forms import FORMS, ToolForm
from mdiq.api.tool_grammars import kinds_of
from mdiq.api.tools import ToolUse, stops_of, tools_of

MISTRAL, MISTRAL_11, HERMES, QWEN_CODER, PYTHON, LLAMA, FUNCTION_GEMMA, GEMMA, DEEPSEEK_31, DEEPSEEK_3 = FORMS
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "place": {"$ref": "#/$defs/place"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}
GET = {"type": "function", "function": {"name": "get", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
BYTES = LLTokenizer("byte")
# A call with arguments, two calls, one without an argument that is required, and one with a wrong value.
CALLS: dict[str, tuple[str, str, str, str]] = {
    MISTRAL.name: (
        '[TOOL_CALLS] [{"name": "get", "arguments": {"city": "{\\"a}", "days": 2, "unit": "C"}}]',
        '[TOOL_CALLS] [{"name": "get", "arguments": {"city": "a"}}, {"name": "now", "arguments": {}}]',
        '[TOOL_CALLS] [{"name": "get", "arguments": {"days": 2}}]',
        '[TOOL_CALLS] [{"name": "get", "arguments": {"city": 1}}]',
    ),
    MISTRAL_11.name: (
        '[TOOL_CALLS]get[ARGS]{"city": "{\\"a}", "days": 2, "unit": "C"}',
        '[TOOL_CALLS]get[ARGS]{"city": "a"}[TOOL_CALLS]now[ARGS]{}',
        '[TOOL_CALLS]get[ARGS]{"days": 2}',
        '[TOOL_CALLS]get[ARGS]{"city": 1}',
    ),
    HERMES.name: (
        '<tool_call>\n{"name": "get", "arguments": {"city": "{\\"a}", "days": 2, "unit": "C"}}\n</tool_call>',
        '<tool_call>\n{"name": "get", "arguments": {"city": "a"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get", "arguments": {"days": 2}}\n</tool_call>',
        '<tool_call>\n{"name": "get", "arguments": {"city": 1}}\n</tool_call>',
    ),
    QWEN_CODER.name: (
        '<tool_call>\n<function=get>\n<parameter=city>\n{"a}\n</parameter>\n<parameter=days>\n2\n</parameter>\n'
        "<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=get>\n<parameter=city>\na\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "<tool_call>\n<function=get>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=get>\n<parameter=city>\na\n</parameter>\n<parameter=unit>\nK\n</parameter>\n</function>\n"
        "</tool_call>",
    ),
    PYTHON.name: (
        '[get(city="{\\"a}", days=2, unit="C")]',
        '[get(city="a"), now()]',
        "[get(days=2)]",
        "[get(city=1)]",
    ),
    LLAMA.name: (
        '{"name": "get", "parameters": {"city": "{\\"a}", "days": 2, "unit": "C"}}',
        "",
        '{"name": "get", "parameters": {"days": 2}}',
        '{"name": "get", "parameters": {"city": 1}}',
    ),
    FUNCTION_GEMMA.name: (
        '<start_function_call>call:get{city:<escape>{"a}<escape>,days:2,unit:<escape>C<escape>}<end_function_call>',
        "<start_function_call>call:get{city:<escape>a<escape>}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call>",
        "<start_function_call>call:get{days:2}<end_function_call>",
        "<start_function_call>call:get{city:1}<end_function_call>",
    ),
    GEMMA.name: (
        '<|tool_call>call:get{city:<|"|>{"a}<|"|>,days:2,unit:<|"|>C<|"|>}<tool_call|>',
        '<|tool_call>call:get{city:<|"|>a<|"|>}<tool_call|><|tool_call>call:now{}<tool_call|>',
        "<|tool_call>call:get{days:2}<tool_call|>",
        '<|tool_call>call:get{city:<|"|>a<|"|>,unit:<|"|>K<|"|>}<tool_call|>',
    ),
    DEEPSEEK_31.name: (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{"city": "{\\"a}", "days": 2, "unit": "C"}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{"city": "a"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{"days": 2}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{"city": 1}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    DEEPSEEK_3.name: (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n"
        '{"city": "{\\"a}", "days": 2, "unit": "C"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{"city": "a"}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{"days": 2}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{"city": 1}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
}
ARGUMENTS = {"city": '{"a}', "days": 2, "unit": "C"}
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


def _use(**body: Any) -> ToolUse:
    use = tools_of({"tools": [GET, NOW], **body})
    assert use is not None
    return use


def _matcher(grammar: str | None) -> LLMatcher:
    assert grammar is not None
    kind, _, text = grammar.partition(":")
    assert kind == "lark"
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_lark(text))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def _fits(grammar: str | None, text: str) -> bool:
    matcher, tokens = _matcher(grammar), [*text.encode()]
    return (
        int(matcher.validate_tokens(tokens)) == len(tokens)
        and matcher.consume_tokens(tokens)
        and matcher.is_accepting()
    )


def _calls(form: ToolForm, use: ToolUse, text: str) -> list[tuple[str, Any]]:
    parser = CallParser(form, use.names, use.kinds)
    calls: list[list[str]] = []
    for piece in parser.push(text) + parser.finish():
        if isinstance(piece, CallDelta):
            calls += [[piece.name, ""]] if piece.name is not None else []
            calls[piece.index][1] += piece.arguments
        else:
            assert not piece.strip()
    return [(name, json.loads(arguments)) for name, arguments in calls]


@each_form
def test_calls_as_models_write_them_fit_and_wrong_ones_do_not(form: ToolForm) -> None:
    use, none = _use(tool_choice="required", parallel_tool_calls=True), lambda _: None
    grammar = use.grammar(form, None, none)
    good, two, incomplete, wrong = CALLS[form.name]
    assert _fits(grammar, good) and _calls(form, use, good) == [("get", ARGUMENTS)]
    if two:
        assert _fits(grammar, two) and _calls(form, use, two) == [("get", {"city": "a"}), ("now", {})]
    assert not _fits(grammar, incomplete) and not _fits(grammar, wrong) and not _fits(grammar, "")
    assert not _fits(grammar, "Well." + good) and not _fits(grammar, good.replace("get", "put"))
    alone = _use(tool_choice="required").grammar(form, None, none)
    assert _fits(alone, good) and not (two and _fits(alone, two))
    only = _use(tool_choice={"type": "function", "function": {"name": "now"}}).grammar(form, None, none)
    assert not _fits(only, good)


@each_form
def test_where_a_call_may_be_made_a_text_may_be_given_and_the_call_that_has_begun_fits(form: ToolForm) -> None:
    grammar = _use().grammar(form, None, lambda _: None)
    if not form.is_marked:
        assert grammar is None, "a text cannot be told from a call before its end"
        return
    good, two, incomplete, wrong = CALLS[form.name]
    for text in ("Hello <b>.", good, f"Well.\n{good}", two):
        assert _fits(grammar, text), text
    for text in (f"Well.\n{incomplete}", wrong):
        assert not _fits(grammar, text), text


@each_form
def test_beside_calls_an_answer_may_have_the_form_of_json(form: ToolForm) -> None:
    grammar = _use().grammar(form, structure_of({"guided_json": {"type": "integer"}}), lambda _: None)
    assert _fits(grammar, "12") and _fits(grammar, CALLS[form.name][0]) and not _fits(grammar, "ok")


@each_form
def test_texts_that_are_special_tokens_are_named_by_their_ids(form: ToolForm) -> None:
    texts = [text for text in (form.mark, form.end, *form.specials, *form.stops) if text]
    ids = {text: 300 + i for i, text in enumerate(texts)}
    use = _use(tool_choice="required", parallel_tool_calls=True)
    assert stops_of(form, ids.get) == tuple(ids[text] for text in form.stops)
    for body in ({}, {"tool_choice": "required"}):
        grammar = _use(**body).grammar(form, None, ids.get)
        if grammar is None:
            continue
        quoted = re.sub(r"%json .*?\n|<\[\d+\]>", "", grammar)
        assert not [text for text in texts if json.dumps(text)[1:-1] in quoted]
        called = set(texts if form.is_marked else form.stops)
        assert {int(found) for found in re.findall(r"<\[(\d+)\]>", grammar)} == {ids[text] for text in called}
    assert use.names == ["get", "now"]


class BytesAndMarks:
    """A tokenizer of bytes, an end token and the special tokens of a form."""

    def __init__(self, marks: list[str]) -> None:
        self.ids = {mark: 257 + i for i, mark in enumerate(marks)}
        self.tokens = [*(bytes([i]) for i in range(256)), b"<end>", *(mark.encode() for mark in marks)]
        self.special_token_ids = [256, *self.ids.values()]
        self.eos_token_id, self.bos_token_id = 256, None

    def __call__(self, text: bytes) -> list[int]:
        return [*text]

    def split(self, text: str) -> list[int]:
        parts = re.split(f"({'|'.join(map(re.escape, self.ids))})", text)
        return [token for part in parts for token in ([self.ids[part]] if part in self.ids else part.encode())]


@each_form
def test_calls_with_marks_that_are_special_tokens_fit(form: ToolForm) -> None:
    tokens = BytesAndMarks([text for text in (form.mark, form.end, *form.specials, *form.stops) if text])
    tokenizer = LLTokenizer(TokenizerWrapper(tokens), n_vocab=len(tokens.tokens), eos_token=256)
    good, two, incomplete, wrong = CALLS[form.name]
    for body in ({"parallel_tool_calls": True}, {"tool_choice": "required", "parallel_tool_calls": True}):
        grammar = _use(**body).grammar(form, None, tokens.ids.get)
        if grammar is None:
            continue
        for text, fits in ((good, True), (two + "".join(form.stops), bool(two)), (incomplete, False), (wrong, False)):
            matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar.partition(":")[2]))
            taken = tokens.split(text)
            num_valid = matcher.validate_tokens(taken)
            assert (num_valid == len(taken) and matcher.consume_tokens(taken) and matcher.is_accepting()) is fits, text


@each_form
@pytest.mark.parametrize("seed", range(5))
def test_what_is_drawn_of_the_allowed_bytes_is_a_call_with_arguments_of_the_schema(form: ToolForm, seed: int) -> None:
    number, flag = {"type": "integer", "minimum": -5, "maximum": 99}, {"type": ["boolean", "null"]}
    schema = {
        "type": "object",
        "properties": {
            "b": number,
            "a": {"enum": ["x", 'y "}'], "type": "string"},
            "l": {"type": "array", "items": number, "maxItems": 3},
            "o": {"type": "object", "properties": {"n": number, "f": flag}, "additionalProperties": False},
            "f": flag,
        },
        "required": ["a", "f"],
        "additionalProperties": False,
    }
    use = tools_of({"tools": [{"function": {"name": "get", "parameters": schema}}], "tool_choice": "required"})
    assert use is not None
    matcher, rng, taken = _matcher(use.grammar(form, None, lambda _: None)), random.Random(seed), bytearray()
    while not matcher.is_stopped() and not (matcher.is_accepting() and rng.random() < 0.5):
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        token = rng.choice([int(token) for token in np.flatnonzero(mask[:256])])
        assert matcher.consume_token(token)
        taken.append(token)
        assert len(taken) < 2_000
    ((name, arguments),) = _calls(form, use, taken.decode())
    jsonschema.validate(arguments, schema)
    assert name == "get"


def test_elements_of_a_tool_without_known_parameters_are_free() -> None:
    for parameters, fits in (({"type": "object"}, True), ({"type": "object", "properties": {}}, False)):
        use = tools_of({"tools": [{"function": {"name": "f", "parameters": parameters}}], "tool_choice": "required"})
        assert use is not None
        for form, text in (
            (QWEN_CODER, "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"),
            (GEMMA, '<|tool_call>call:f{a:[1,{b:<|"|>x<|"|>}]}<tool_call|>'),
        ):
            assert _fits(use.grammar(form, None, lambda _: None), text) is fits


def test_definitions_are_repeated_where_they_are_needed_alone() -> None:
    for form in (QWEN_CODER, PYTHON, GEMMA):
        grammar = _use(tool_choice="required").grammar(form, None, lambda _: None)
        assert grammar is not None and grammar.count('"$defs"') == (form is not GEMMA), "place alone refers to them"


def test_a_call_of_mistral_may_have_an_id() -> None:
    for body in ({}, {"tool_choice": "required"}):
        grammar, call = _use(**body).grammar(MISTRAL_11, None, lambda _: None), '[ARGS]{"city": "a"}'
        for call_id, fits in (("", True), ("[CALL_ID]abcDEF123", True), ("[CALL_ID]", False), ("[CALL_ID]a-b", False)):
            assert _fits(grammar, f"[TOOL_CALLS]get{call_id}{call}") is fits


def test_a_string_without_quotes_has_no_end_inside() -> None:
    use = tools_of({"tools": [GET], "tool_choice": "required"})
    assert use is not None
    for text, fits in (("a<b>", True), ("a</parameter", True), ("a</parameter>b", False)):
        call = f"<tool_call>\n<function=get>\n<parameter=city>\n{text}\n</parameter>\n</function>\n</tool_call>"
        assert _fits(use.grammar(QWEN_CODER, None, lambda _: None), call) is fits
        assert not fits or _calls(QWEN_CODER, use, call) == [("get", {"city": text})]


def test_the_types_of_parameters_are_read_from_every_form_of_schema() -> None:
    schema = {
        "properties": {
            "a": {"type": "string"},
            "b": {"type": ["integer", "null"]},
            "c": {"enum": ["x"]},
            "d": {"$ref": "#/$defs/text"},
            "e": {"anyOf": [{"$ref": "#/$defs/text"}, {"type": "null"}]},
            "f": {"anyOf": [{"type": "null"}, {}]},
            "g": {"$ref": "#/$defs/loop"},
            "h": True,
        },
        "$defs": {"text": {"const": "y"}, "loop": {"$ref": "#/$defs/loop"}},
    }
    kinds = {
        "a": "string",
        "b": "integer null",
        "c": "string",
        "d": "string",
        "e": "null string",
        "f": "",
        "g": "",
        "h": "",
    }
    assert kinds_of(schema) == {name: found.split() for name, found in kinds.items()}
