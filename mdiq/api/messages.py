"""Anthropic's Messages API over the same internals: its requests become chats, and chats' answers its messages."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

from mdiq.api.logprobs import Entry
from mdiq.api.requests import Asked, BadRequest, parse
from mdiq.api.shapes import Answer, Shape
from mdiq.api.tool_calls import CallDelta

PATH = "/v1/messages"
_SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stream")
_NOT_SERVED = ("container", "mcp_servers", "context_management")
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = ("enabled", "adaptive", "disabled")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def parse_messages(body: object, *, is_count: bool = False) -> Asked:
    """Return the parsed JSON of a request. is_count: its tokens are only counted.

    Raises:
        BadRequest: a part of it cannot be served.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    for field in ("model", "messages") if is_count else ("model", "max_tokens", "messages"):
        if body.get(field) is None:
            raise BadRequest(f"{field}: it is missing", field)
    for field in _NOT_SERVED:
        if body.get(field):
            raise BadRequest(f"{field}: not served; leave it out", field)
    chat: dict[str, Any] = {field: body[field] for field in _SAME if field in body}
    messages, places = _chat(body)
    chat |= {"stop": body.get("stop_sequences"), "messages": messages}
    if (tools := body.get("tools")) is not None:
        chat["tools"] = _tools(tools)
    chat |= _tool_choice(body.get("tool_choice"))
    if thinking := _object(body.get("thinking"), "thinking"):
        if thinking.get("type") not in _THINKING:
            raise BadRequest(f"thinking: the type is one of {', '.join(_THINKING)}", "thinking")
        chat["enable_thinking"] = thinking["type"] != "disabled"
    output = _object(body.get("output_config"), "output_config")
    form = _object(output.get("format") or body.get("output_format"), "output_config.format")
    if form:
        if form.get("type") != "json_schema":
            raise BadRequest("output_config.format: the type is json_schema", "output_config")
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
    if output.get("effort") is not None:
        chat["reasoning_effort"] = output["effort"]
    return parse(chat, is_chat=True, places=places)


def _object(given: object, where: str) -> Mapping[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise BadRequest(f"{where}: not an object", where)
    return given or {}


def _tools(given: object) -> list[dict[str, Any]]:
    tools: list[dict[str, Any]] = []
    for i, tool in enumerate(given if isinstance(given, list) else [None]):
        if not isinstance(tool, dict) or tool.get("type", "custom") not in ("custom", None):
            raise BadRequest(f'tools[{i}]: give {{"name": …, "input_schema": …}}; no tools are run here', "tools")
        function = {name: tool.get(name) for name in ("name", "description")}
        tools.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema")}})
    return tools


def _tool_choice(given: object) -> dict[str, Any]:
    choice = _object(given, "tool_choice")
    if not choice:
        return {}
    kind = choice.get("type")
    wanted: Any = {"type": "function", "function": {"name": choice.get("name")}}
    if kind != "tool":
        wanted = _CHOICES.get(kind) if isinstance(kind, str) else None
        if wanted is None:
            raise BadRequest(f"tool_choice: the type is one of {', '.join(_CHOICES)}, tool", "tool_choice")
    is_single = choice.get("disable_parallel_tool_use")
    return {"tool_choice": wanted, "parallel_tool_calls": not is_single if isinstance(is_single, bool) else None}


def _chat(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the messages of a chat, and where each of them stands in the request."""
    given, system = body["messages"], body.get("system")
    if not isinstance(given, list) or not given:
        raise BadRequest("messages: not a list with at least one message", "messages")
    chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    places = ["system"] if system else []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant"):
            raise BadRequest(f"{where}: role is user or assistant; the system's text stands in `system`", "messages")
        turns = _turns(role, message.get("content"), where)
        chat += turns
        places += [where] * len(turns)
    if given[-1]["role"] == "assistant":
        raise BadRequest("messages: the last one is the assistant's, whose text cannot be continued here", "messages")
    return chat, places


def _turns(role: str, content: object, where: str) -> list[dict[str, Any]]:
    """Return a message as messages of a chat: results of tools are messages of their own there."""
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts: list[str] = []
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for j, block in enumerate(blocks):
        inside = f"{where}.content[{j}]" if blocks is content else f"{where}.content"
        match block if isinstance(block, dict) else {}:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "tool_result", "tool_use_id": str(call_id)} if role == "user":
                result = block.get("content")
                results.append({"role": "tool", "tool_call_id": call_id, "content": "" if result is None else result})
            case {"type": "tool_use", "id": str(call_id), "name": str(name)} if role == "assistant":
                function = {"name": name, "arguments": block.get("input") or {}}
                calls.append({"id": call_id, "type": "function", "function": function})
            case {"type": "thinking" | "redacted_thinking"} if role == "assistant":
                pass  # templates leave it out of earlier turns
            case _:
                raise BadRequest(f"{inside}: not a text, a tool's use or its result", "messages")
    if role == "assistant":
        return [{"role": role, "content": "".join(texts), **({"tool_calls": calls} if calls else {})}]
    return [*results, *([{"role": role, "content": "".join(texts)}] if texts or not results else [])]


class Messages(Shape):
    """Anthropic's form of an answer; in a stream, blocks that begin, grow and end."""

    prefix, has_opening, done = "msg", True, b""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._num_blocks, self._open = 0, ""  # the kind of the block that has begun and not ended

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        (answer,) = answers
        content: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text else []
        for call in answer.tool_calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            content.append({"type": "tool_use", "id": call["id"], "name": name, "input": _input(arguments)})
        return {**self._message(answer), "content": content, **_stop(answer), "usage": _usage(answer)}

    def chunk(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        *,
        is_first: bool = False,
        entries: Sequence[Entry] | None = None,
    ) -> dict[str, Any]:
        answer = self.answers[index]
        if is_first:
            nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
            usage = {**_usage(answer), "output_tokens": 0}
            return _events({"type": "message_start", "message": {**self._message(answer), **nothing, "usage": usage}})
        delta = {"type": "message_delta", "delta": _stop(answer), "usage": _usage(answer)}
        return _events(*self._end_block(), delta, {"type": "message_stop"})

    def piece_chunk(self, index: int, piece: str | CallDelta, entries: Sequence[Entry] | None = None) -> dict[str, Any]:
        if isinstance(piece, str):
            begun = [] if self._open == "text" else self._begin_block({"type": "text", "text": ""})
            return _events(*begun, self._delta({"type": "text_delta", "text": piece}))
        begun = []
        if piece.name is not None:
            begun = self._begin_block({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
        return _events(*begun, self._delta({"type": "input_json_delta", "partial_json": piece.arguments}))

    def encoded(self, value: Mapping[str, Any]) -> bytes:
        if "error" in value:
            value = _events({"type": "error", "error": _error(value["error"], 503)})
        lines = (f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in value["events"])
        return "".join(lines).encode()

    def _message(self, answer: Answer) -> dict[str, Any]:
        return {"id": self._head["id"], "type": "message", "role": "assistant", "model": self._head["model"]}

    def _begin_block(self, block: Mapping[str, Any]) -> list[dict[str, Any]]:
        ended = self._end_block()
        self._open = block["type"]
        self._num_blocks += 1
        return [*ended, {"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block}]

    def _end_block(self) -> list[dict[str, Any]]:
        if not self._open:
            return []
        self._open = ""
        return [{"type": "content_block_stop", "index": self._num_blocks - 1}]

    def _delta(self, delta: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}


def _events(*events: Mapping[str, Any]) -> dict[str, Any]:
    return {"events": events}


def _stop(answer: Answer) -> dict[str, Any]:
    if answer.stop_text is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_text}
    return {"stop_reason": _STOP_REASONS.get(answer.finish_reason or "", "end_turn"), "stop_sequence": None}


def _usage(answer: Answer) -> dict[str, int]:
    # Anthropic counts what was cached apart from the rest of a prompt.
    cached = {"cache_read_input_tokens": answer.num_cached, "cache_creation_input_tokens": 0}
    return {"input_tokens": answer.num_prompt - answer.num_cached, "output_tokens": answer.num_tokens, **cached}


def _input(arguments: str) -> object:
    try:
        value: object = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None  # it was cut short
    return value if isinstance(value, dict) else {}


def _error(error: Mapping[str, Any], status: int) -> dict[str, Any]:
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    code = {"code": error["code"]} if error.get("code") else {}  # Anthropic has none; mdiq route needs it
    return {"type": kind, "message": error["message"], **code}


@web.middleware
async def errors_in_their_form(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give errors of this API Anthropic's form."""
    response = await handler(request)
    if response.status >= 400 and request.path.startswith(PATH) and isinstance(response, web.Response):
        error = json.loads(response.text or "{}").get("error")
        if isinstance(error, dict):
            response.text = json.dumps({"type": "error", "error": _error(error, response.status)})
    return response
