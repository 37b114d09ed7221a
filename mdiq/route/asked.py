"""A request as a router sees it: what it is for, and the body that servers get. Pure."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdiq.api.fields import num_choices
from mdiq.api.requests import BadRequest
from mdiq.errors import ConfigError
from mdiq.route.events import CHARACTERS_PER_TOKEN, Dialect, MessagesDialect, ResponsesDialect
from mdiq.route.prefixes import chain_of

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
_DIALECTS: Mapping[str, type[Dialect]] = {
    CHATS: Dialect,
    COMPLETIONS: Dialect,
    MESSAGES: MessagesDialect,
    RESPONSES: ResponsesDialect,
}
BYTES_PER_TOKEN = CHARACTERS_PER_TOKEN


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for an answer.

    data: its body as servers get it. num_prompts: answers that it wants, num_choices of them to each of its prompts.
    is_repeatable: the same body gives the same tokens again, where the servers do. wants_usage: its client wants the
    counts of tokens at the end of a stream; servers always give them. is_stored: its answer can be asked for again, of
    the server that gave it. previous: the response that it goes on from. is_answer: False: only tokens are counted.
    """

    path: str
    data: bytes
    model: str | None
    num_prompts: int
    chain: Sequence[bytes] = ()
    is_streamed: bool = False
    is_repeatable: bool = True
    wants_usage: bool = True
    is_stored: bool = False
    previous: str | None = None
    is_answer: bool = True
    num_choices: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens of its prompts, roughly."""
        return len(self.data) // BYTES_PER_TOKEN

    def dialect(self) -> Dialect:
        """Return what the events of its stream mean."""
        return _DIALECTS.get(self.path, Dialect)()


def asked_of(path: str, body: object, draw_seed: Callable[[], int]) -> Asked:
    """Return a request for an answer. draw_seed: called for a request without a seed, which could not be repeated.

    Raises:
        BadRequest: the body is not an object. Other mistakes in it are for the server to name.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    body = dict(body)
    is_repeatable = True
    if body.get("seed") in (None, -1):
        # Each prompt of several has a seed of its own, which no field can say.
        if _num_prompts(body) == 1:
            body["seed"] = draw_seed()
        else:
            is_repeatable = body.get("temperature") == 0
    is_streamed, wants_usage = body.get("stream") is True, True
    if is_streamed and path in (CHATS, COMPLETIONS):
        options = body.get("stream_options")
        if options is None or isinstance(options, dict):
            wants_usage = (options or {}).get("include_usage") is True
            body["stream_options"] = {**(options or {}), "include_usage": True}
    model, previous = body.get("model"), body.get("previous_response_id")
    choices = _num_choices(body)
    return Asked(
        path,
        packed(body),
        model if isinstance(model, str) else None,
        _num_prompts(body) * choices,
        chain_of(body),
        is_streamed,
        is_repeatable,
        wants_usage,
        path == RESPONSES and body.get("store") is not False,
        previous if path == RESPONSES and isinstance(previous, str) else None,
        num_choices=choices,
    )


def packed(body: Mapping[str, Any]) -> bytes:
    """Return a body as JSON that is no longer than what its client sent: servers refuse those that are too long.

    Raises:
        BadRequest: it is nested too deeply.
    """
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair is no text, but JSON can have it
        return json.dumps(body, separators=(",", ":")).encode()
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None


def _num_prompts(body: Mapping[str, Any]) -> int:
    prompt = body.get("prompt")
    is_many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if is_many and isinstance(prompt, list) else 1


def _num_choices(body: Mapping[str, Any]) -> int:
    try:
        return num_choices(body)
    except ConfigError:  # the server names it
        return 1


def whole_of(path: str, body: object) -> Asked:
    """Return a request that needs no ring, such as the tokens of a text.

    Raises:
        BadRequest: the body is not an object.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    model = body.get("model")
    return Asked(path, packed(body), model if isinstance(model, str) else None, 1, is_answer=False)
