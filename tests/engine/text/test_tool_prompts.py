"""Chats with tool calls and their results render as in transformers, byte for byte, in the forms of many models.

The templates are short ones of our own, with the parts of the models' that concern tools; one is a model's own.
"""

import copy
import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mdiq.api.requests import messages_of
from mdiq.api.tool_calls import CallDelta, CallParser
from mdiq.api.tool_forms import form_of
from mdiq.api.tools import tools_of
from mdiq.core.known_models import QWEN_CODER_0_5B
from mdiq.engine.text.chat_template import ChatTemplate
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import ModelError
from tests.real_models import fetched

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "default": None}, "n": {"type": "number"}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "It's <b>90 %</b>.", "parameters": PARAMETERS}}
]
ARGUMENTS = {
    "city": 'Zürich & "Bern" }</tool_call>\n',
    "n": 1.50,
    "none": None,
    "l": [None, True, {"x": None}],
    "o": {},
}


def _call(number: int, arguments: object) -> dict[str, Any]:
    function = {"name": "get", "arguments": json.dumps(arguments)}
    return {"id": f"abcDEF12{number}", "type": "function", "function": function}


CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": None, "tool_calls": [_call(1, ARGUMENTS), _call(2, {"city": "Ulm"})]},
    {"role": "tool", "tool_call_id": "abcDEF121", "content": '{"t": 12}'},
    {"role": "tool", "tool_call_id": "abcDEF122", "content": "rain\n"},
    {"role": "assistant", "content": "Once more.", "tool_calls": [_call(3, {})]},
    {"role": "tool", "tool_call_id": "abcDEF123", "content": ""},
]
LOOP = "{%- for m in messages %}{%- if m.role == 'tool' %}"
CALLS = "{%- elif m.tool_calls %}"
CALL = "{%- for call in m.tool_calls %}{%- set f = call.function %}"
END = "{%- endfor %}{{- eos_token }}{%- else %}{{- '<|' + m.role + '|>' + m.content }}{%- endif %}{%- endfor %}"
TEMPLATES = {
    "Hermes": "{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    + LOOP
    + "{%- if loop.previtem.role != 'tool' %}{{- '<|user|>' }}{%- endif %}{{- '<tool_response>\\n' + m.content }}"
    + CALLS
    + "{{- '<|assistant|>' + (m.content or '') }}"
    + CALL
    + '{{- \'\\n<tool_call>\\n{"name": "\' + f.name + \'", "arguments": \' + f.arguments | tojson }}'
    "{{- '}\\n</tool_call>' }}" + END,
    "Qwen 3 Coder": "{%- for tool in tools %}{%- for name, fields in tool.function.parameters.properties | items %}"
    "{{- '\\n<name>' ~ name ~ '</name>' ~ fields.type }}{%- endfor %}{%- endfor %}"
    + LOOP
    + "{{- '<tool_response>\\n' + m.content }}"
    + CALLS
    + "{%- if m.content is string and m.content | trim %}{{- '\\n' + m.content | trim + '\\n' }}{%- endif %}"
    + CALL
    + "{{- '<tool_call>\\n<function=' + f.name + '>\\n' }}{%- for key, value in f.arguments | items %}"
    "{{- '<parameter=' + key + '>\\n' }}{%- set value = value | tojson | safe if value is mapping or "
    "(value is sequence and value is not string) else value | string %}{{- value }}{{- '\\n</parameter>\\n' }}"
    "{%- endfor %}{{- '</function>\\n</tool_call>' }}" + END,
    "Mistral to v7": "{{- '[AVAILABLE_TOOLS] [' }}"
    "{%- for tool in tools %}{%- for key, value in tool.function.items() %}"
    "{{- '\"' + key + '\": ' }}{{- value | tojson }}{%- endfor %}{%- endfor %}"
    + LOOP
    + "{{- '[TOOL_RESULTS] {\"content\": ' + m.content | string + ', \"call_id\": \"' + m.tool_call_id[-9:] + '\"}' }}"
    + CALLS
    + "{{- '[TOOL_CALLS] [' }}"
    + CALL
    + "{{- (f | tojson)[:-1] + ', \"id\": \"' + call.id[-9:] + '\"}' }}{{- ', ' if not loop.last else ']' }}"
    + END,
    "Mistral from v11": "{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}"
    + LOOP
    + "{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    + CALLS
    + "{%- if m.content is string %}{{- m.content }}{%- endif %}"
    + CALL
    + "{%- set arguments = f.arguments if f.arguments is string else f.arguments | tojson %}"
    "{{- '[TOOL_CALLS]' + f.name + '[CALL_ID]' + call.id + '[ARGS]' + arguments }}" + END,
    "Llama 3": "{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}"
    + LOOP
    + "{{- 'ipython\\n\\n' }}{{- {'output': m.content} | tojson }}"
    + CALLS
    + CALL
    + '{{- \'{"name": "\' + f.name + \'", "parameters": \' }}{{- f.arguments | tojson }}{{- "}" }}'
    + END,
    "Python lists": "{{- tools | tojson(indent=4) }}{{- '[func_name1(params_name1=params_value1...)]' }}"
    + LOOP
    + "{{- m.content | tojson }}"
    + CALLS
    + "{{- '[' }}"
    + CALL
    + "{{- f.name + '(' }}{%- for key, value in f.arguments.items() %}{{- key + '=' + value | tojson }}"
    "{{- ', ' if not loop.last }}{%- endfor %}{{- ')' }}" + END,
    "Gemma 4": "{%- macro argument(value) %}{%- if value is string %}{{- '<|\"|>' + value + '<|\"|>' }}"
    "{%- elif value is mapping %}{{- '{' }}{%- for key, each in value | dictsort %}{{- key }}:{{- argument(each) }}"
    "{{- ',' if not loop.last }}{%- endfor %}{{- '}' }}{%- elif value is boolean %}{{- 'true' if value else 'false' }}"
    "{%- else %}{{- value }}{%- endif %}{%- endmacro %}"
    "{%- for tool in tools %}{{- '<|tool>' + tool.function.name + argument(tool.function.parameters) }}{%- endfor %}"
    + LOOP
    + "{{- '<|tool_response>' + argument(m.content) }}"
    + CALLS
    + CALL
    + "{{- '<|tool_call>call:' + f.name + argument(f.arguments) + '<tool_call|>' }}"
    + END,
}


def _rendered(template: str, chat: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the prompt of a request, and that of transformers, whose users give arguments as objects."""
    use = tools_of({"tools": TOOLS})
    assert use is not None
    ours = ChatTemplate(template, "here").render(messages_of(chat), SPECIAL, tools=use.told)
    theirs = copy.deepcopy(chat)
    for message in theirs:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    rendered, _ = render_jinja_template(
        conversations=[theirs], tools=TOOLS, chat_template=template, add_generation_prompt=True, **SPECIAL
    )
    return ours, rendered[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_and_results_are_shown_to_a_model_as_transformers_shows_them(name: str) -> None:
    assert form_of(TEMPLATES[name]).name == name
    for num_messages in range(2, len(CHAT) + 1):
        ours, theirs = _rendered(TEMPLATES[name], CHAT[:num_messages])
        assert ours == theirs


@pytest.mark.timeout(120)
def test_calls_and_results_are_shown_to_a_real_model_as_transformers_shows_them() -> None:
    template = Tokenizer.load(fetched(QWEN_CODER_0_5B)).chat_template
    assert template is not None
    for chat in (CHAT, CHAT[1:], CHAT[:3]):
        ours, theirs = _rendered(template, chat)
        assert ours == theirs and '"none": null' in ours and ours.count("</tool_call>\n<") <= 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_that_a_template_shows_are_found_as_they_were(name: str) -> None:
    source = TEMPLATES[name]
    use, message = tools_of({"tools": TOOLS}), {**CHAT[2], "content": ""}
    assert use is not None
    macros = source.partition("{%- for tool in tools %}")[0] if "macro" in source else ""
    turns = macros + LOOP + source.partition(LOOP)[2]
    text = ChatTemplate(turns, "here").render(messages_of([message]), {"eos_token": ""})
    parser = CallParser(form_of(source), use.names, use.kinds)
    found: list[str] = []
    for piece in parser.push(text.removeprefix("<|assistant|>")) + parser.finish():
        if isinstance(piece, CallDelta):
            found += [""] if piece.name is not None else []
            found[-1] += piece.arguments
    assert [json.loads(arguments) for arguments in found] == [ARGUMENTS, {"city": "Ulm"}]


DEEPSEEK = (
    "{{- tools | tojson }}"
    + LOOP
    + "{{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}"
    + CALLS
    + "{{- m['content'] + '<｜tool▁calls▁begin｜>' }}"
    + CALL
    + "{{- '<｜tool▁call▁begin｜>' + f['name'] + '<｜tool▁sep｜>' + f['arguments'] + '<｜tool▁call▁end｜>' }}"
    + END
)


def test_templates_that_want_arguments_as_text_are_given_them_so() -> None:
    render = ChatTemplate(DEEPSEEK, "here").render
    ours = render(messages_of(CHAT), SPECIAL, tools=TOOLS)
    # transformers' users give such templates the texts.
    theirs = [{**message, "content": message["content"] or ""} for message in copy.deepcopy(CHAT)]
    for message in theirs:
        for call in message.get("tool_calls", ()):
            arguments = json.loads(call["function"]["arguments"])
            call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    rendered, _ = render_jinja_template(
        conversations=[theirs], tools=TOOLS, chat_template=DEEPSEEK, add_generation_prompt=True, **SPECIAL
    )
    assert ours == rendered[0] and '<｜tool▁sep｜>{"city": "Ulm"}<｜tool▁call▁end｜>' in ours
    with pytest.raises(ModelError, match="cannot be rendered"):  # what is wrong in both forms stays wrong
        ChatTemplate(DEEPSEEK + "{{ nothing.here }}", "here").render(messages_of(CHAT), SPECIAL, tools=TOOLS)


def test_null_is_a_value_in_arguments_and_none_elsewhere() -> None:
    chat = [{**CHAT[2], "name": None, "content": ""}]
    text = "{{ messages[0].name is defined }}{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert (
        ChatTemplate(text, "here").render(messages_of(chat), {}) == f"False{json.dumps(ARGUMENTS, ensure_ascii=False)}"
    )
