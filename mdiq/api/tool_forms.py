"""The forms in which models write calls of tools: a table of rows, and which row a chat template asks for."""

import re
from dataclasses import dataclass

from mdiq.errors import ConfigError

SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Named:
    """A call is a name, followed by a JSON object of arguments.

    before, after: texts around the name. call_id: text before an id, which may follow the name.
    """

    before: str = ""
    after: str = ""
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Elements:
    """A call is `<function=NAME>`, a `<parameter=KEY>` around each value, and `</function>`. Strings are not quoted."""


@dataclass(frozen=True, slots=True)
class Literals:
    """A call is a name and its arguments, whose values are literals: `NAME(KEY=VALUE, …)` in Python.

    before: text before the name. opening, closing: around the arguments. assigns: between key and value. separator:
    between arguments. quote: around strings; "": quotation marks, as in Python and JSON.
    """

    before: str = ""
    opening: str = "("
    assigns: str = "="
    separator: str = ", "
    closing: str = ")"
    quote: str = ""


Syntax = Named | Elements | Literals


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How a model writes calls: a mark, one call or several, an end.

    says, says_not: texts by which its chat template is known. syntax: of a call; None: a JSON object with a name and
    arguments, which is understood in every form. writes_json: a call that has to follow a grammar is such an object,
    in spite of the syntax. arguments: the name of their field in such an object. between: characters between the mark,
    the calls and the end. before, after: texts around the calls of one mark. separator: between them; None: a mark has
    one call, and the next call has a mark of its own, with ``gap`` between them. openings, closings: texts that small
    models write instead of mark and end, at the beginning of an answer. anywhere: further marks. is_marked: False:
    models leave the mark out. specials: texts in a call that may be special tokens, beside mark and end. stops: special
    tokens at which the answer ends.
    """

    name: str
    says: tuple[str, ...]
    mark: str
    end: str = ""
    says_not: tuple[str, ...] = ()
    syntax: Syntax | None = None
    writes_json: bool = False
    arguments: str = "arguments"
    before: str = ""
    after: str = ""
    separator: str | None = None
    gap: str = ""
    between: str = SPACE
    openings: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
    anywhere: tuple[str, ...] = ()
    is_marked: bool = True
    specials: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    id_length: int = 24


FUNCTION = "<function="  # the beginning of a call of Elements
_PYTHON = Literals()
_DEEPSEEK_CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_DEEPSEEK_NAME_END = "<｜tool▁sep｜>"

# The sources of these facts are the models' chat templates, mistral-common's documentation of its tokenizers
# (v3 to v13) and Google's "FunctionGemma formatting and best practices".
FORMS = (
    # Mistral's templates ask for ids of nine letters and digits.
    ToolForm(
        "Mistral to v7",
        ("[TOOL_CALLS]",),
        "[TOOL_CALLS]",
        says_not=("[ARGS]",),
        before=" [",
        after="]",
        separator=", ",
        between=SPACE + "[,]",
        id_length=9,
    ),
    ToolForm(
        "Mistral from v11",
        ("[TOOL_CALLS]", "[ARGS]"),
        "[TOOL_CALLS]",
        syntax=Named(after="[ARGS]", call_id="[CALL_ID]"),
        specials=("[ARGS]", "[CALL_ID]"),
        id_length=9,
    ),
    # Qwen 3 Coder and GLM have other texts inside the same marks.
    ToolForm(
        "Hermes",
        ("<tool_call>",),
        "<tool_call>",
        "</tool_call>",
        (FUNCTION, "<arg_key>"),
        before="\n",
        after="\n",
        gap="\n",
        openings=("{", "```json\n", "```\n", "<tools>", "<function_call>"),
        closings=("```", "</tools>", "</function_call>"),
    ),
    # Qwen 3 Coder leaves the mark out at times.
    ToolForm(
        "Qwen 3 Coder",
        ("<tool_call>", FUNCTION, "<parameter="),
        "<tool_call>",
        "</tool_call>",
        syntax=Elements(),
        before="\n",
        after="\n",
        gap="\n",
        anywhere=(FUNCTION,),
    ),
    # The templates that ask for Python's lists show this name in their example.
    ToolForm(
        "Python lists",
        ("func_name1(",),
        "<|python_tag|>",
        syntax=_PYTHON,
        arguments="parameters",
        before="[",
        after="]",
        separator=", ",
        between=SPACE + "[,];",
        openings=("[", "{"),
        is_marked=False,
    ),
    # Llama 3.2 writes a list of Python at times, and 3.1 a call of Python after the mark.
    ToolForm(
        "Llama 3",
        ("ipython", '"parameters"'),
        "<|python_tag|>",
        syntax=_PYTHON,
        writes_json=True,
        arguments="parameters",
        between=SPACE + "[,];",
        openings=("{", "["),
        is_marked=False,
    ),
    ToolForm(
        "FunctionGemma",
        ("<start_function_call>",),
        "<start_function_call>",
        "<end_function_call>",
        syntax=Literals("call:", "{", ":", ",", "}", "<escape>"),
        specials=("<escape>",),
        stops=("<start_function_response>",),
    ),
    ToolForm(
        "Gemma 4",
        ("<|tool_call>",),
        "<|tool_call>",
        "<tool_call|>",
        syntax=Literals("call:", "{", ":", ",", "}", '<|"|>'),
        specials=('<|"|>',),
        stops=("<|tool_response>",),
    ),
    ToolForm(
        "DeepSeek V3.1",
        ("<｜tool▁calls▁begin｜>",),
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        says_not=("```json",),
        syntax=Named(after=_DEEPSEEK_NAME_END),
        before=_DEEPSEEK_CALL[0],
        after=_DEEPSEEK_CALL[1],
        separator="".join(reversed(_DEEPSEEK_CALL)),
        closings=_DEEPSEEK_CALL[1:],
        anywhere=_DEEPSEEK_CALL[:1],
        specials=(*_DEEPSEEK_CALL, _DEEPSEEK_NAME_END),
    ),
    ToolForm(
        "DeepSeek V3",
        ("<｜tool▁calls▁begin｜>", "```json"),
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        syntax=Named(f"function{_DEEPSEEK_NAME_END}", "\n```json\n"),
        before=_DEEPSEEK_CALL[0],
        after=f"\n```{_DEEPSEEK_CALL[1]}",
        separator=f"\n```{_DEEPSEEK_CALL[1]}\n{_DEEPSEEK_CALL[0]}",
        closings=("```", _DEEPSEEK_CALL[1]),
        anywhere=_DEEPSEEK_CALL[:1],
        specials=(*_DEEPSEEK_CALL, _DEEPSEEK_NAME_END),
    ),
)


def form_of(template: str | None) -> ToolForm:
    """Return the form in which the model of a chat template calls tools.

    Raises:
        ConfigError: it does not call any, or in a form that is not known here.
    """
    if template is None or not re.search(r"\btools\b", template):
        raise ConfigError("the model's chat template knows no tools; use a model that was trained to call them")
    for form in FORMS:
        if all(text in template for text in form.says) and not any(text in template for text in form.says_not):
            return form
    known = ", ".join(form.name for form in FORMS)
    raise ConfigError(f"the model calls tools in a form that is not known here; known are those of {known}")
