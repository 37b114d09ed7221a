"""Tools that a request offers: what of them the model is told, and the grammar that its answer follows.

tool_grammars.py has the grammar of one call; tool_calls.py finds the calls in the answer.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mdiq.api.structure import Structure
from mdiq.api.tool_forms import ToolForm
from mdiq.api.tool_grammars import TEXT, CallGrammar, kinds_of
from mdiq.errors import ConfigError

MAX_TOOLS = 128  # OpenAI's limit
CHOICES = ("none", "auto", "required")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. where: its field; parameters: JSON schema of its arguments."""

    name: str
    where: str
    parameters: Mapping[str, Any]
    told: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, at least one. must_call: an answer without a call is not wanted. only: its name, if one
    tool is. is_many: an answer may have several calls."""

    tools: tuple[Tool, ...]
    must_call: bool = False
    only: str | None = None
    is_many: bool = True

    @property
    def names(self) -> list[str]:
        return [tool.name for tool in self.tools]

    @property
    def kinds(self) -> dict[str, dict[str, list[str]]]:
        """The JSON types of the parameters of each tool."""
        return {tool.name: kinds_of(tool.parameters) for tool in self.tools}

    @property
    def told(self) -> list[Mapping[str, Any]]:
        """What the chat template shows to the model."""
        return [tool.told for tool in self.tools]

    def grammar(self, form: ToolForm, content: Structure | None, special_id: Callable[[str], int | None]) -> str | None:
        """Return the grammar of answers with these calls; None: an answer cannot be told from a call before its end.

        content: the form of an answer without calls; None: any text. special_id: of a mark, see Backend.special_id.

        Raises:
            ConfigError: ``content`` is not JSON, and calls are.
        """
        tools = [tool for tool in self.tools if self.only in (None, tool.name)]
        calls = CallGrammar(form, special_id)
        lines = [f"object: {' | '.join(f'tool_{i}' for i in range(len(tools)))}", *calls.shared_rules()]
        for i, tool in enumerate(tools):
            lines += calls.rules(f"tool_{i}", tool.name, tool.parameters)
        objects = "object"
        if form.separator is not None and self.is_many:
            objects = f"object ({calls.quoted(form.separator)} object)*"
        body = f"{calls.quoted(form.before)} {objects} {calls.quoted(form.after + form.end)}"
        mark = calls.quoted(form.mark)
        if self.must_call or content is not None or not form.is_marked:
            lines.append(f"call: {mark if form.is_marked else ''} {body}")
            repeats = self.is_many and form.is_marked and form.separator is None
            # After the last call many a model writes a line's end too.
            gap = json.dumps(form.gap)
            start = (f"call ({gap} call)* {gap}?" if form.gap else "call+") if repeats else "call"
            if not self.must_call:
                if content is None:
                    return None
                kind, _, text = content.grammar.partition(":")
                if kind != "json_schema":
                    raise ConfigError(f"{content.where}: beside tools an answer can have the form of JSON only")
                lines.append(f"content: %json {text}")
                start = f"{start} | content"
        else:  # once a call begins, it follows the grammar
            is_special = special_id(form.mark) is not None
            lines += ["content: TEXT", f"begin: TEXT {mark}" if is_special else f"begin[lazy]: TEXT {mark}"]
            lines.append(f"call: begin {body}")
            start = "call* content" if self.is_many and form.separator is None else "call | content"
        if stops := stops_of(form, special_id):
            start = f"({start}) ({' | '.join(f'<[{token}]>' for token in stops)})?"
        if any("TEXT" in line for line in lines):
            lines.append(TEXT)
        return "lark:" + "\n".join([f"start: {start}", *lines])


def marks_of(form: ToolForm, special_id: Callable[[str], int | None]) -> tuple[int, ...]:
    """Return the marks of a form that are special tokens: the parser needs their text."""
    return _special(special_id, form.mark, form.end, *form.specials)


def stops_of(form: ToolForm, special_id: Callable[[str], int | None]) -> tuple[int, ...]:
    """Return the special tokens at which an answer with calls ends: the results would follow."""
    return _special(special_id, *form.stops)


def _special(special_id: Callable[[str], int | None], *texts: str) -> tuple[int, ...]:
    return tuple(token for text in texts if text and (token := special_id(text)) is not None)


def tools_of(body: Mapping[str, Any]) -> ToolUse | None:
    """Return the tools of a chat; None if it has none, or wants none to be called.

    Raises:
        ConfigError: a field is wrong; the message begins with its name.
    """
    given, choice = body.get("tools") or [], body.get("tool_choice")
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise ConfigError(f"tools: not a list of at most {MAX_TOOLS} tools")
    tools = tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(given))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"tools[{i}].function.name: another tool is called {name} too")
    is_many = body.get("parallel_tool_calls")
    if is_many is not None and not isinstance(is_many, bool):
        raise ConfigError("parallel_tool_calls: not true or false")
    only: str | None = None
    if isinstance(choice, dict):
        function = choice.get("function")
        only = function.get("name") if isinstance(function, dict) else choice.get("name")
        if choice.get("type") != "function" or not isinstance(only, str):
            raise ConfigError('tool_choice: give a text, or {"type": "function", "function": {"name": …}}')
        if only not in names:
            raise ConfigError(f"tool_choice: no tool is called {only[:64]}")
    elif choice is not None and choice not in CHOICES:
        raise ConfigError(f"tool_choice: {str(choice)[:40]}: use one of {', '.join(CHOICES)}, or a function")
    if not tools:
        if choice == "required":
            raise ConfigError("tool_choice: there are no tools; give some, or leave it out")
        return None
    if choice == "none":
        return None
    must_call = choice == "required" or only is not None
    # Where it has to call, a small model calls one tool after the other if it may.
    return ToolUse(tools, must_call, only, is_many=only is None and (not must_call if is_many is None else is_many))


def _tool(given: Any, where: str) -> Tool:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or given.get("type", "function") != "function":
        raise ConfigError(f'{where}: give {{"type": "function", "function": {{"name": …, "parameters": …}}}}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}.function.name: give 1 to 64 letters, digits, dots, dashes or underscores")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise ConfigError(f"{where}.function.description: not a text")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise ConfigError(f"{where}.function.parameters: not the JSON schema of an object")
    told = {"name": name, "description": description or "", "parameters": parameters}
    try:
        json.dumps(told, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        text = "it is nested too deeply, or holds half a surrogate pair"
        raise ConfigError(f"{where}.function: {text}") from None
    parameters = {"type": "object", **parameters}
    return Tool(name, f"{where}.function.parameters", parameters, {"type": "function", "function": told})
