"""Requests of /v1/responses, as those of /v1/chat/completions: the same parser reads both. No sockets.

Items of an input become messages, tools and forms go where chats have them, and what else a chat may have may stand
here too. What only OpenAI's own service can do is refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdiq.api.fields import NUM_CHOICES
from mdiq.api.requests import Asked, BadRequest, parse

MAX_METADATA = 16
MAX_METADATA_CHARACTERS = 512
_OWN = frozenset(
    "input instructions max_output_tokens text tools tool_choice previous_response_id background store metadata "
    "reasoning include truncation conversation prompt max_tool_calls service_tier safety_identifier prompt_cache_key "
    "prompt_cache_retention user context_management".split()
)
_OF_CHATS = (
    *("messages", "response_format", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"),
    *(*NUM_CHOICES, "best_of"),
)
_OF_TOOLS = ("type", "name", "description", "parameters", "strict")
_NOTHING: tuple[object, ...] = (None, False, [], {}, "")


@dataclass(frozen=True, slots=True)
class AskedResponse:
    """One request of /v1/responses.

    chat: the same as a chat. messages: of its input, and of the responses before it. shown: fields that a response
    repeats. is_stored: it may be asked for again.
    """

    chat: Asked
    messages: Sequence[Mapping[str, Any]]
    shown: Mapping[str, Any]
    is_background: bool
    is_stored: bool


def previous_of(body: object) -> str | None:
    """Return the id of the response that a request goes on from, or None.

    Raises:
        BadRequest: it is not a text.
    """
    previous = body.get("previous_response_id") if isinstance(body, dict) else None
    if previous is not None and not isinstance(previous, str):
        raise BadRequest("previous_response_id: not a text", "previous_response_id")
    return previous


def parse_response(body: object, history: Sequence[Mapping[str, Any]] = ()) -> AskedResponse:
    """Return the parsed JSON of a request. history: messages of the responses before it.

    Raises:
        BadRequest: a part of it cannot be served.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    _check_own(body)
    is_background, is_stored = _flag(body, "background", default=False), _flag(body, "store", default=True)
    if is_background and not is_stored:
        raise BadRequest("background: such a response is asked for later; leave store out", "background")
    given, given_places = _input(body.get("input"))
    messages = [*history, *given]
    instructions = body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise BadRequest("instructions: not a text", "instructions")
    first = [{"role": "system", "content": instructions}] if instructions else []
    places = ["instructions"] * len(first) + ["previous_response_id"] * len(history) + given_places
    chat = {name: value for name, value in body.items() if name not in _OWN}
    chat |= {
        "messages": first + messages,
        "max_completion_tokens": body.get("max_output_tokens"),
        "tools": _tools(body.get("tools")),
        "tool_choice": _choice(body.get("tool_choice")),
        "response_format": _form(body.get("text")),
    }
    if (effort := _reasoning(body.get("reasoning"))) is not None:
        chat["reasoning_effort"] = effort
    try:
        asked = parse(chat, is_chat=True, places=places)
    except BadRequest as error:
        raise renamed(error) from None
    return AskedResponse(asked, messages, _shown(body), is_background, is_stored)


def _check_own(body: Mapping[str, Any]) -> None:
    for name in _OF_CHATS:
        if body.get(name) not in _NOTHING:
            raise BadRequest(f"{name}: a field of chats; see docs/api.md for its name here", name)
    for name, why in (
        ("conversation", "conversations are not kept; go on with previous_response_id"),
        ("prompt", "there are no stored prompts; send input and instructions"),
        ("context_management", "nothing of a prompt is left out; send what fits"),
    ):
        if body.get(name) not in _NOTHING:
            raise BadRequest(f"{name}: {why}", name)
    if body.get("truncation") not in (None, "disabled"):
        raise BadRequest("truncation: nothing of a prompt is left out; leave it out", "truncation")
    include = body.get("include") or []
    # Reasoning is a part of the text here, and there are no calls of built-in tools to tell more of.
    if not isinstance(include, list) or "message.output_text.logprobs" in include:
        raise BadRequest("include: log probabilities are given by /v1/chat/completions", "include")
    if (user := body.get("user")) is not None and (not isinstance(user, str) or len(user) > MAX_METADATA_CHARACTERS):
        raise BadRequest(f"user: not a text of at most {MAX_METADATA_CHARACTERS} characters", "user")
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA:
        raise BadRequest(f"metadata: not an object of at most {MAX_METADATA} texts", "metadata")
    for name, value in metadata.items():
        if not isinstance(value, str) or max(len(name), len(value)) > MAX_METADATA_CHARACTERS:
            text = f"metadata: {name[:40]}: not a text of at most {MAX_METADATA_CHARACTERS} characters"
            raise BadRequest(text, "metadata")


def _flag(body: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadRequest(f"{name}: {str(value)[:40]} is not true or false", name)
    return value


def _input(given: object) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return the messages of a chat, and the item at which each begins."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}], ["input"]
    if not isinstance(given, list) or not given:
        raise BadRequest("input: not a text, and not a list with at least one item", "input")
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    for i, item in enumerate(given):
        _add(messages, item, f"input[{i}]")
        places += [f"input[{i}]"] * (len(messages) - len(places))
    if not messages:
        raise BadRequest("input: no item of it is a message", "input")
    return [*messages], places


def _add(messages: list[dict[str, Any]], item: object, where: str) -> None:
    """Add an item of an input to the messages of a chat."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(kind, str):
        raise BadRequest(f"{where}: not an item with a type", "input")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": _content(item.get("content"), where)})
    elif kind == "function_call":
        if not isinstance(item.get("name"), str):
            raise BadRequest(f"{where}: name: not a text", "input")
        function = {"name": item.get("name"), "arguments": item.get("arguments", "")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        # Calls of one answer are one message of a chat, with the text before them.
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        if not isinstance(item.get("call_id"), str):
            raise BadRequest(f"{where}: call_id: not a text", "input")
        output = _content(item.get("output"), where)
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
    elif kind != "reasoning":  # a model's own thinking is not told to it again
        known = "message, function_call, function_call_output"
        raise BadRequest(f"{where}: type {kind[:40]!r} is not served; use one of {known}", "input")


def _content(given: object, where: str) -> object:
    """Return the content of a chat's message: texts and refusals are texts there."""
    if not isinstance(given, list):
        return given
    parts: list[dict[str, Any]] = []
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text", "refusal") or not isinstance(text, str):
            raise BadRequest(f"{where}: content: not a text; images, sound and files are not supported", "input")
        parts.append({"type": "text", "text": text})
    return parts


def _tools(given: object) -> object:
    """Return tools as chats have them: a function's fields stand in an object of their own there."""
    if not isinstance(given, list):
        return given
    tools: list[object] = []
    for i, tool in enumerate(given):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise BadRequest(f"tools[{i}]: {kind[:40]}: there are no built-in tools; give functions", "tools")
        if isinstance(tool, dict) and "function" not in tool:
            tool = {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
        tools.append(tool)
    return tools


def _choice(given: object) -> object:
    if isinstance(given, dict) and given.get("type") not in (None, "function"):
        text = f"tool_choice: {str(given['type'])[:40]}: give none, auto, required or a function"
        raise BadRequest(text, "tool_choice")
    return given


def _form(given: object) -> object:
    """Return what a chat has as response_format."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise BadRequest("text: not an object", "text")
    form = given.get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: each for name, each in form.items() if name != "type"}}
    return form


def _reasoning(given: object) -> object:
    if given is not None and not isinstance(given, dict):
        raise BadRequest("reasoning: not an object", "reasoning")
    return given.get("effort") if given else None


_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def renamed(error: BadRequest) -> BadRequest:
    """Return an error of a chat with the names that its fields have here."""
    param, text = error.body["param"], str(error)
    for name, here in _NAMES.items():
        if isinstance(param, str) and param.startswith(name):
            body = {key: value for key, value in error.body.items() if key not in ("message", "type", "param")}
            return BadRequest(text.replace(name, here, 1), here.partition(".")[0], str(error.body["type"]), **body)
    return error


def _shown(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields that a response repeats."""
    choice, parallel = body.get("tool_choice"), body.get("parallel_tool_calls")
    return {
        "background": body.get("background") is True,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": True if parallel is None else parallel,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": (body.get("reasoning") or {}).get("effort"), "summary": None},
        "store": body.get("store") is not False,
        "temperature": 1.0 if body.get("temperature") is None else body["temperature"],
        "text": {"format": (body.get("text") or {}).get("format") or {"type": "text"}},
        "tool_choice": "auto" if choice is None else choice,
        "tools": [_shown_tool(tool) for tool in body.get("tools") or []],
        "top_p": 1.0 if body.get("top_p") is None else body["top_p"],
        "truncation": "disabled",
        "user": body.get("user"),
    }


def _shown_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    whole = {**tool, **(tool.get("function") or {})}  # some write it as chats do
    return {name: whole[name] for name in _OF_TOOLS if name in whole}
