"""Templates render as transformers renders them, in a sandbox, with bounded sizes."""

import asyncio
import threading

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mdiq.engine.text.chat_template import MAX_CHARS, MAX_TEMPLATE_CHARS, ChatTemplate
from mdiq.errors import ConfigError, ModelError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße & <b>90 %</b> 🏳️‍🌈\n  two"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": ""},
]
GROWING = "{%% set ns = namespace(x='aaaa') %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.x }}"
BROKEN = {
    "repeated text": "{{ 'a' * 10**10 }}",
    "repeated list": "{{ [0] * 10**10 }}",
    "repeated twice": "{{ 'a' * 65000 * 65000 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "doubling with +": GROWING % "{% set ns.x = ns.x + ns.x %}",
    "doubling lists with +": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "doubling in a block": GROWING % "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 60000 }}{% endfor %}",
    "much output in a macro": "{% macro m() %}{% for i in range(99999) %}{{ 'a' * 60000 ~ i }}{% endfor %}"
    "{% endmacro %}{{ m() }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep nesting": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "class of a text": "{{ ''.__class__.__mro__ }}",
    "globals of a method": "{{ cycler.__init__.__globals__ }}",
    "format reaching an attribute": "{{ '{0.__class__.__mro__}'.format('') }}",
    "change of a list": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "unfinished": "{{ ",
    "unknown name": "{{ nothing.here }}",
}


def render(source: str, messages=MESSAGES, **tokens: str) -> str:
    return ChatTemplate(source, "model.gguf: tokenizer.chat_template").render(messages, tokens)


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_a_template_that_is_broken_grows_or_leaves_its_sandbox_ends_in_a_typed_error(source):
    with pytest.raises(ModelError, match=r"^model\.gguf: tokenizer\.chat_template: the chat template cannot") as caught:
        render(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {{- '<|' + m.role + '|>\\n' + m['content'] | trim }}\n{% endfor %}\nend",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ loop.index0 ~ m.content }}{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'ä': 1} | tojson(ensure_ascii=True) }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ add_generation_prompt }}{{ tools is none }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
        "{% endfor %}{{ ns.n }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') "
        "| join('; ') | replace('&', '+') }}",
        "{% macro line(m, end='!') %}{{ m.role.upper() }}{{ end }}{% endmacro %}"
        "{{ line(messages[0]) ~ line(messages[1], '?') }}",
        "{{ '%s has %5.1f' % (messages[0].role, 1.25) }}{{ '{:>8}|{}'.format('a', 2) }}"
        "{{ 7 % 4 }}{{ 2 ** 10 }}{{ [1] * 3 }}",
        "{{ messages[1:] | length }}{{ messages[0].get('name', 'none') }}"
        "{{ dict(a=1).items() | list }}{{ 'a,b'.split(',') }}",
        "{%- for m in messages if m.role != 'system' %}{{ bos_token if loop.first }}"
        "{{ m.content | indent(4) }}{% endfor %}",
    ],
)
def test_template_renders_as_in_transformers(source):
    expected, _ = render_jinja_template(
        conversations=[MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(source, bos_token="<s>") == expected[0]


def test_long_documents_pass():
    document = "word " * 1_000_000
    assert render(
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}", [{"role": "user", "content": document}]
    ) == (document.strip())


def test_a_template_that_walks_over_every_character_of_a_long_message_is_rendered():
    document = "ab " * 100_000
    source = "{% for c in messages[0].content %}{% if c == 'a' %}{{ c }}{% endif %}{% endfor %}"
    assert render(source, [{"role": "user", "content": document}]) == "a" * 100_000


def test_a_template_is_told_more_than_the_messages_but_not_other_messages():
    template = ChatTemplate("{{ enable_thinking }}{{ messages | length }}", "here")
    assert template.render(MESSAGES, {}, {"enable_thinking": False, "messages": []}) == f"False{len(MESSAGES)}"


def test_fields_without_a_value_are_left_out():
    assert render("{{ messages[0].name is defined }}", [{"role": "user", "content": "a", "name": None}]) == "False"


def test_messages_that_the_template_refuses_are_the_callers_fault():
    with pytest.raises(ConfigError, match="^messages: .*roles must alternate$"):
        render("{{ raise_exception('roles must\nalternate') }}")


def test_messages_with_other_than_plain_data_are_refused():
    with pytest.raises(ConfigError, match="type object"):
        render("{{ messages }}", [{"role": "user", "content": object()}])


def test_messages_that_are_nested_too_deeply_are_refused():
    deep = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(ConfigError, match="nested too deeply"):
        ChatTemplate("{{ messages }}", "x").render([{"role": "user", "content": "", "tool_calls": deep}], {})


def test_template_that_is_too_long_is_refused():
    with pytest.raises(ModelError, match="is the limit"):
        render("a" * (MAX_TEMPLATE_CHARS + 1))


def test_what_is_written_may_be_as_long_as_the_limit():
    text = "a" * (MAX_CHARS // 4)
    assert len(render("{% for i in range(4) %}{{ messages[0].content }}{% endfor %}", [{"content": text}])) == MAX_CHARS
    with pytest.raises(ModelError, match="grows too large"):
        render("{% for i in range(4) %}{{ messages[0].content }}{% endfor %}.", [{"content": text}])


def test_a_usual_template_renders_a_long_chat_and_does_not_hold_up_the_event_loop():
    source = """{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
    {%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
    {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}
    {%- for message in messages %}{%- set content = message.content %}
    {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}{%- endfor %}"""
    messages = [{"role": "user", "content": "<think>a</think>" + "word " * 1_000} for _ in range(1_000)]
    turns = 0

    async def rendered() -> str:
        nonlocal turns
        rendering = asyncio.create_task(asyncio.to_thread(render, source, messages))
        while not rendering.done():
            await asyncio.sleep(0)
            turns += 1
        return await rendering

    assert len(asyncio.run(rendered())) > 5_000_000
    assert turns > 10


def test_threads_share_a_template():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "here")
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: texts.append(template.render([{"role": "user", "content": str(i)}], {})))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == ["0", "1", "2", "3"]
