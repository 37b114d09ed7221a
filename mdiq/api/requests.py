"""What a client asks for: JSON of OpenAI's shape to a prompt and SamplingParams; every mistake named. No sockets."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdiq.core.sequence import SamplingParams
from mdiq.errors import ConfigError

MOST_STOPS = 16  # each costs time at every token
MOST_ERROR_CHARACTERS = 300
COMPLETION_TOKENS = 16  # OpenAI's default for completions
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "seed",
)
_INVALID = "invalid_request_error"
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}
# These would change what the answer is: without them it would be a wrong one.
_NOT_HERE = {
    "logprobs": "log probabilities are not given",
    "top_logprobs": "log probabilities are not given",
    "echo": "the prompt is not repeated",
    "tools": "tools are not called",
    "functions": "functions are not called",
    "response_format": "the answer's form is not enforced",
    "logit_bias": "logits cannot be changed",
    "frequency_penalty": "tokens are not penalized by how often they came (repetition_penalty is there)",
    "presence_penalty": "tokens are not penalized for having come (repetition_penalty is there)",
    "suffix": "text is not inserted",
    "min_tokens": "the least length of an answer cannot be set",
}
_HARMLESS: tuple[object, ...] = ({"type": "text"}, [], {}, False, None)


class ApiError(Exception):
    """An answer that is an error.

    kind: OpenAI's type of it; param: the field that is wrong; more: further fields of the answer.
    """

    def __init__(
        self, status: int, message: str, kind: str | None = None, *, param: str | None = None, **more: object
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, object] = {
            "message": message if len(message) <= MOST_ERROR_CHARACTERS else f"{message[:MOST_ERROR_CHARACTERS]}…",
            "type": kind or _KINDS.get(status, _INVALID),
            "param": param,
            "code": None,
            **more,
        }


class BadRequest(ApiError):
    """A request that cannot be served as it is."""

    def __init__(self, message: str, param: str | None = None, kind: str | None = None, **more: object) -> None:
        super().__init__(400, message, kind, param=param, **more)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: exactly one of ``text``, ``token_ids`` and ``messages`` is set.

    values: of SamplingParams, as they came. max_tokens: None: what the kind of request has by default.
    """

    is_chat: bool
    values: Mapping[str, Any]
    max_tokens: int | None
    is_streamed: bool
    wants_usage: bool
    model: str | None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, str], ...] | None = None

    def params(self, num_prompt_tokens: int, context_tokens: int) -> SamplingParams:
        """Return how to sample, for a prompt of that length; what does not fit of the answer is left out.

        Raises:
            BadRequest: the prompt leaves no room for an answer, or a value is out of range.
        """
        room = context_tokens - num_prompt_tokens
        wanted = self.max_tokens or (room if self.is_chat else COMPLETION_TOKENS)
        if room < 1:
            raise BadRequest(
                f"the prompt has {num_prompt_tokens} tokens, and the ring takes {context_tokens} with the answer",
                "messages" if self.is_chat else "prompt",
                "exceed_context_size_error",
                n_prompt_tokens=num_prompt_tokens,
                n_ctx=context_tokens,
            )
        try:
            return SamplingParams(temperature=1.0).replaced(
                {"seed": secrets.randbits(63), **self.values, "max_tokens": min(wanted, room)}, "request"
            )
        except ConfigError as error:
            text = str(error).removeprefix("request: ")
            raise BadRequest(text, text.partition(":")[0]) from None


def parse(body: object, *, is_chat: bool) -> Asked:
    """Return what a request's JSON asks for.

    Raises:
        BadRequest: something in it cannot be served.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body is no JSON object")
    for field, words in _NOT_HERE.items():
        if body.get(field) not in _HARMLESS:
            raise BadRequest(f"{field}: {words} by this version of mdiq; leave it out", field)
    for field in ("n", "best_of"):
        if body.get(field) not in (None, 1):
            raise BadRequest(f"{field}: one answer a request; ask several times", field)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequest("model: not a text", "model")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadRequest("stream_options: not an object", "stream_options")
    values = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    if body.get("stop"):
        if isinstance(body["stop"], list) and len(body["stop"]) > MOST_STOPS:
            raise BadRequest(f"stop: {len(body['stop'])} texts; give at most {MOST_STOPS}", "stop")
        values["stop"] = body["stop"]
    common: dict[str, Any] = {
        "is_chat": is_chat,
        "values": values,
        "max_tokens": _max_tokens(body),
        "is_streamed": body.get("stream") is True,
        "wants_usage": options.get("include_usage") is True,
        "model": model,
    }
    if is_chat:
        return Asked(**common, messages=_messages(body.get("messages")))
    return _with_prompt(body.get("prompt"), common)


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):  # the newer name goes first
        value = body.get(name)
        if value is not None:
            if type(value) is not int or value < 1:
                raise BadRequest(f"{name}: {str(value)[:40]} is not a number of tokens; give at least 1", name)
            return value
    return None


def _with_prompt(prompt: object, common: dict[str, Any]) -> Asked:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # a list of one prompt
    if isinstance(prompt, str):
        return Asked(**common, text=_checked(prompt, "prompt"))
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return Asked(**common, token_ids=tuple(prompt))
    raise BadRequest("prompt: give one text, or one list of token ids", "prompt")


def _messages(given: object) -> tuple[Mapping[str, str], ...]:
    if not isinstance(given, list) or not given:
        raise BadRequest("messages: not a list with at least one message", "messages")
    messages: list[Mapping[str, str]] = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f'{where}: not an object with a "role" and a "content"', "messages")
        messages.append(
            {"role": _checked(message["role"], where), "content": _checked(_content(message, where), where)}
        )
    return tuple(messages)


def _content(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts: Sequence[Any] = content if isinstance(content, list) else [None]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise BadRequest(f"{where}: content: not a text; images and sound are not read", "messages")
    return "".join(part["text"] for part in parts)


def _checked(text: str, where: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{where}: it holds half a surrogate pair; write the whole character", where) from None
    return text
