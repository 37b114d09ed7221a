"""Parse requests: from JSON of OpenAI's API to a prompt and SamplingParams, naming every mistake. No sockets."""

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mdiq.api.fields import MAX_CHOICES, NO_LIMIT, check_served, num_choices, sampling_values
from mdiq.api.logprobs import AskedLogprobs, take_logprobs
from mdiq.api.nesting import loads
from mdiq.api.structure import Structure, structure_of
from mdiq.api.tools import ToolUse, tools_of
from mdiq.core.sequence import SamplingParams
from mdiq.errors import ConfigError

MAX_BODY_BYTES = 2 << 20  # a context of 128,000 tokens is half of it; larger JSON would hold up others' tokens
MAX_STOPS = 16  # each costs time at every token
MAX_STOP_CHARACTERS = 1_000  # what is held back is compared with each beginning of it
MAX_PROMPTS = 64
MAX_ERROR_CHARACTERS = 300
COMPLETION_TOKENS = 16  # OpenAI's default for completions
ROLES = ("system", "developer", "user", "assistant", "tool")
_OF_CHATS = ("tools", "tool_choice")
_TEMPLATE_NAMES = frozenset(
    # What templates are given beside, and what they can call: another value would break them.
    "messages tools documents add_generation_prompt bos_token eos_token namespace range dict lipsum cycler joiner "
    "raise_exception strftime_now".split()
)
_INVALID = "invalid_request_error"
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}
_TOO_LONG = "context_length_exceeded"
_CODES = {401: "invalid_api_key", 404: "unknown_url", 429: "rate_limit_exceeded"}
_REASONS = {401: "no_key", 408: "too_slow", 413: "too_large", 429: "busy", 503: "unavailable"}
REASONS = ("busy", "unavailable", "too_long", "invalid", "no_key", "too_slow", "too_large", "key_limit")
"""Why requests are refused, as the metrics name it."""


class ApiError(Exception):
    """An error as the answer to a request.

    kind: OpenAI's type of error; param: the wrong field; retry_after_s: when it may be asked again; reason: one of
    REASONS, where status and code do not tell; more: further fields of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str | None = None,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        reason: str | None = None,
        **more: object,
    ) -> None:
        super().__init__(message)
        self.status = status
        self._own_reason = reason
        self.retry_after_s = retry_after_s
        self.body: dict[str, object] = {
            "message": message if len(message) <= MAX_ERROR_CHARACTERS else f"{message[:MAX_ERROR_CHARACTERS]}…",
            "type": kind or _KINDS.get(status, _INVALID),
            "param": param,
            "code": _CODES.get(status),
            **more,
        }

    @property
    def reason(self) -> str:
        """One of REASONS."""
        if self._own_reason is not None:
            return self._own_reason
        return "too_long" if self.body["code"] == _TOO_LONG else _REASONS.get(self.status, "invalid")


class BadRequest(ApiError):
    """A request that cannot be served as it is."""

    def __init__(self, message: str, param: str | None = None, kind: str | None = None, **more: object) -> None:
        super().__init__(400, message, kind, param=param, retry_after_s=None, reason=None, **more)


def broke() -> ApiError:
    """Return the error of a fault of mdiq; it must not show our internals."""
    return ApiError(500, "mdiq failed at this request; see its log", "internal_error")


def too_long(text: str, context_tokens: int, param: str | None = None, **more: object) -> BadRequest:
    """Return the error of a prompt that does not fit, with the words and the code that clients recognize.

    litellm looks for the first words of the message, langchain-openai for "prompt is too long" or the code.
    """
    return BadRequest(
        f"This model's maximum context length is {context_tokens} tokens, and the prompt is too long: "
        f"{text.removeprefix('prompt: ')}",
        param,
        "exceed_context_size_error",
        code=_TOO_LONG,
        n_ctx=context_tokens,
        **more,
    )


def too_many(num_answers: int, num_choices: int, limit: int, allowed: str) -> BadRequest:
    """Return the error of a request for more answers at once than will ever be allowed.

    num_choices: answers to each of its prompts. limit: of answers; ``allowed`` says it in words.
    """
    if num_choices > 1 and num_answers // num_choices <= limit:
        return BadRequest(f"n: {num_answers} answers; {allowed}, so ask for fewer", "n")
    text = f"prompt: {num_answers // num_choices} prompts; {allowed}, so give fewer per request"
    return BadRequest(text, "prompt")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: ``messages`` of a chat, or ``prompts``, each a text or token ids.

    values: of SamplingParams, not yet checked. max_tokens: None: as many as there is room for.
    template_kwargs: variables of the chat template beside the messages. num_choices: answers to each prompt.
    structure: the form of the answer, which is in the values too. tools: those that may be called.
    """

    is_chat: bool
    values: Mapping[str, Any]
    max_tokens: int | None
    is_streamed: bool
    wants_usage: bool
    model: str | None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    num_choices: int = 1
    structure: Structure | None = None
    tools: ToolUse | None = None
    logprobs: AskedLogprobs = AskedLogprobs()

    @property
    def num_answers(self) -> int:
        """Answers that are wanted: the choices of prompt i are number i * num_choices and the following ones."""
        return max(len(self.prompts), 1) * self.num_choices

    def params(self, num_prompt_tokens: int, context_tokens: int) -> SamplingParams:
        """Return how to sample, for a prompt of that length; see ``all_params``."""
        return self.all_params([num_prompt_tokens], context_tokens)[0]

    def all_params(self, nums_prompt_tokens: Sequence[int], context_tokens: int) -> list[SamplingParams]:
        """Return how to sample, for prompts of these lengths; answers are limited to the room that is left.

        Raises:
            BadRequest: a prompt leaves no room for an answer, or a value is out of range.
        """
        for num_tokens in nums_prompt_tokens:
            if num_tokens >= context_tokens:
                text = f"{num_tokens} tokens leave no room for an answer; shorten it"
                field = "messages" if self.is_chat else "prompt"
                raise too_long(text, context_tokens, field, n_prompt_tokens=num_tokens)
        try:
            wanted = SamplingParams(temperature=1.0).replaced(
                {**self.values, "max_tokens": self.max_tokens or NO_LIMIT}, "request"
            )
        except ConfigError as error:
            text = str(error).removeprefix("request: ")
            raise BadRequest(text, text.partition(":")[0]) from None
        if self.tools is not None and self.tools.must_call:
            wanted = replace(wanted, stop=())  # all of the answer is a call, and half of one is of no use
        return [
            replace(
                wanted,
                max_tokens=min(wanted.max_tokens, context_tokens - num_tokens),
                min_tokens=min(wanted.min_tokens, context_tokens - num_tokens),
                seed=wanted.seed if "seed" in self.values else secrets.randbits(63),
            )
            for num_tokens in nums_prompt_tokens
        ]


def parse(body: object, *, is_chat: bool, places: Sequence[str] = ()) -> Asked:
    """Return the parsed JSON of a request. places: see ``messages_of``.

    Raises:
        BadRequest: a part of it cannot be served.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    try:
        body, logprobs = take_logprobs(body, is_chat=is_chat)
    except ConfigError as error:
        raise BadRequest(str(error), str(error).partition(":")[0]) from None
    check_served({name: value for name, value in body.items() if not is_chat or name not in _OF_CHATS}, BadRequest)
    model = body.get("model")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadRequest("stream_options: not an object", "stream_options")
    try:
        values, choices, structure = sampling_values(body), num_choices(body), structure_of(body)
        tools = tools_of(body) if is_chat else None
    except ConfigError as error:
        raise BadRequest(str(error), str(error).partition(":")[0]) from None
    _check_stops(values.get("stop"))
    # In a completion -1 means as many tokens as there is room for, which is the default of a chat.
    is_open = is_chat if "max_tokens" not in values else values["max_tokens"] is None
    common: dict[str, Any] = {
        "is_chat": is_chat,
        "max_tokens": values.pop("max_tokens", None) or (None if is_open else COMPLETION_TOKENS),
        "values": values,
        "logprobs": logprobs,
        "is_streamed": _flag(body, "stream"),
        "wants_usage": _flag(options, "include_usage"),
        "model": None if model is None else text_of(model, "model"),
        "num_choices": choices,
        "structure": structure,
    }
    if is_chat:
        messages, template_kwargs = messages_of(body.get("messages"), places), template_kwargs_of(body)
        return Asked(**common, messages=messages, template_kwargs=template_kwargs, tools=tools)
    asked = Asked(**common, prompts=_prompts(body.get("prompt")))
    if asked.num_answers > MAX_CHOICES:
        text = f"n: {choices} answers to each of {len(asked.prompts)} prompts; give at most {MAX_CHOICES} per request"
        raise BadRequest(text, "n")
    return asked


def _check_stops(given: object) -> None:
    stops = given if isinstance(given, list) else [given]
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"stop: {len(stops)} texts; give at most {MAX_STOPS}", "stop")
    for stop in stops:
        if isinstance(stop, str) and len(stop) > MAX_STOP_CHARACTERS:
            raise BadRequest(f"stop: a text of {len(stop)} characters; give at most {MAX_STOP_CHARACTERS}", "stop")


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name}: {str(value)[:40]} is not true or false", name)
    return value is True


def template_kwargs_of(body: Mapping[str, Any]) -> Mapping[str, str | int | float | bool]:
    """Return the variables of a chat template beside the messages, such as enable_thinking.

    Raises:
        BadRequest: a value is not a text, a number or a boolean.
    """
    where = "chat_template_kwargs"
    given = body.get(where) or {}
    if not isinstance(given, dict):
        raise BadRequest(f"{where}: not an object", where)
    for name, value in given.items():
        if name in _TEMPLATE_NAMES or not name.isidentifier() or not isinstance(value, str | int | float | bool):
            raise BadRequest(f"{where}: {name[:40]}: give it another name, or a text, number or boolean", where)
    found: dict[str, str | int | float | bool] = {}
    if body.get("enable_thinking") is not None:  # some clients send it here
        found["enable_thinking"] = _flag(body, "enable_thinking")
    effort = body.get("reasoning_effort")  # of OpenAI's API; templates of reasoning models know it
    if effort is not None:
        found["reasoning_effort"] = text_of(effort, "reasoning_effort")
    return {**found, **given}


def _prompts(given: object) -> tuple[str | tuple[int, ...], ...]:
    many = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if len(many) > MAX_PROMPTS:
        raise BadRequest(f"prompt: {len(many)} prompts; give at most {MAX_PROMPTS} per request", "prompt")
    return tuple(_prompt(prompt) for prompt in many)


def _prompt(given: object) -> str | tuple[int, ...]:
    if isinstance(given, str):
        return text_of(given, "prompt")
    if given:
        with contextlib.suppress(BadRequest):
            return token_ids_of(given, "prompt")
    raise BadRequest("prompt: give a text, a list of token ids, or a list of either", "prompt")


def token_ids_of(given: object, field: str) -> tuple[int, ...]:
    """Return a prompt's token ids.

    Raises:
        BadRequest: it is not a list of token ids.
    """
    if not isinstance(given, list) or not all(type(token) is int and token >= 0 for token in given):
        raise BadRequest(f"{field}: not a list of token ids", field)
    return tuple(given)


def text_of(given: object, field: str) -> str:
    """Return a text. JSON can contain half of a surrogate pair, which no tokenizer accepts.

    Raises:
        BadRequest: it is not a text, or holds such a half.
    """
    if not isinstance(given, str):
        raise BadRequest(f"{field}: not a text", field)
    try:
        given.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{field}: it holds half a surrogate pair; write the whole character", field) from None
    return given


def messages_of(given: object, places: Sequence[str] = ()) -> tuple[Mapping[str, Any], ...]:
    """Return a chat in the form that templates expect: contents as texts, arguments of tool calls as objects.

    places: where each message stands in the client's request, for errors; empty: the chat is the client's own.

    Raises:
        BadRequest: it is not a chat, or has content that is not supported.
    """
    if not isinstance(given, list) or not given:
        raise BadRequest("messages: not a list with at least one message", "messages")
    places = places or [f"messages[{i}]" for i in range(len(given))]
    return tuple(_message(message, where) for message, where in zip(given, places, strict=True))


def _message(given: object, where: str) -> Mapping[str, Any]:
    field = where.partition("[")[0]
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise BadRequest(f'{where}: not an object with a "role" and a "content"', field)
    role = text_of(given["role"], where)
    if role not in ROLES:
        raise BadRequest(f"{where}: role {role[:40]!r} is not one of {', '.join(ROLES)}", field)
    calls = given.get("tool_calls")
    message: dict[str, Any] = {"role": role}
    if role == "assistant" and calls and isinstance(calls, list):
        message["tool_calls"] = [_tool_call(call, where) for call in calls]
    # An answer that only calls tools has no text.
    is_empty = given.get("content") is None and "tool_calls" in message
    message["content"] = "" if is_empty else text_of(_content(given, where), where)
    for name in ("name", "tool_call_id", "reasoning_content"):
        if isinstance(given.get(name), str):
            message[name] = text_of(given[name], where)
    return message


def _tool_call(given: object, where: str) -> Mapping[str, Any]:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest(
            f'{where}: tool_calls: each is {{"function": {{"name": "…", "arguments": "…"}}}}', where.partition("[")[0]
        )
    arguments = function.get("arguments", "")
    if isinstance(arguments, str):
        text_of(arguments, where)
        # Templates write them as JSON themselves. Text that is not JSON stays as it is.
        with contextlib.suppress(ValueError):
            arguments = loads(arguments) if arguments else {}
    call = {"type": "function", "function": {"name": text_of(function["name"], where), "arguments": arguments}}
    return {"id": given["id"], **call} if isinstance(given.get("id"), str) else call


def _content(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant":
        content = [{"type": "refusal", "refusal": message.get("refusal")}]  # in place of the text
    parts: Sequence[Any] = content if isinstance(content, list) else [None]
    texts = [_part(part) for part in parts]
    if None in texts:
        raise BadRequest(f"{where}: content: not a text; images and sound are not supported", where.partition("[")[0])
    return "".join(text for text in texts if text is not None)


def _part(part: object) -> str | None:
    """Return the text of a part of a message; None if it is no text, such as a picture with its description."""
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or not kind.endswith(("text", "refusal")):
        return None
    text = part.get("refusal" if kind == "refusal" else "text")
    return text if isinstance(text, str) else None
