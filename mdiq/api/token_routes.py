"""Texts and chats to token ids, and token ids to text, in the shapes of vLLM and of llama.cpp. They need no ring."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from aiohttp import web

from mdiq.api.answering import Answering
from mdiq.api.backend import Backend
from mdiq.api.fields import check_served
from mdiq.api.requests import BadRequest, messages_of, template_kwargs_of, text_of, token_ids_of, too_long
from mdiq.errors import MdiqError, ModelError

MAX_CHARACTERS_PER_TOKEN = 8
"""Of what the ring holds: longer texts are not counted, since others' texts wait meanwhile, a second for 300,000."""
_KINDS = ("prompt", "messages", "content")  # of vLLM, of vLLM, of llama.cpp
_SPECIAL = ("add_special_tokens", "add_special")
_REFUSED = ("tools", "with_pieces", "return_token_strs")


class TokenRoutes:
    """POST /tokenize and /detokenize."""

    def __init__(self, backend: Backend, answering: Answering) -> None:
        self._backend = backend
        self._answering = answering

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/tokenize", self._tokenize), web.post("/detokenize", self._detokenize)]

    async def _tokenize(self, request: web.Request) -> web.Response:
        return await self._answer(request, self._tokens)

    async def _detokenize(self, request: web.Request) -> web.Response:
        return await self._answer(request, self._text)

    async def _answer(
        self, request: web.Request, answer: Callable[[Mapping[str, Any]], Mapping[str, object]]
    ) -> web.Response:
        async with self._answering.open_text(request):
            given = await self._answering.body(request)
            if not isinstance(given, dict):
                raise BadRequest("the body is not a JSON object")
            if (model := given.get("model")) is not None:
                self._answering.check_model(text_of(model, "model"))
            # What is read of a long list, and written, takes as long as what is made of it.
            answered = await self._answering.in_thread(partial(_as_json, answer, given))
        return web.Response(body=answered, content_type="application/json")

    def _tokens(self, given: Mapping[str, Any]) -> Mapping[str, object]:
        kinds = [kind for kind in _KINDS if given.get(kind) is not None]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none"
            raise BadRequest(f"prompt: give exactly one of {', '.join(_KINDS)}; found {found}", "prompt")
        for name in _REFUSED:
            if given.get(name):
                raise BadRequest(f"{name}: tokens are given as ids, of texts and messages; leave it out", name)
        if given.get("parse_special") not in (None, True):
            raise BadRequest("parse_special: special tokens in a text are always seen; leave it out", "parse_special")
        check_served({name: value for name, value in given.items() if name not in _SPECIAL}, BadRequest)
        (kind,) = kinds
        try:
            tokens = self._ids(kind, given)
        except ModelError:  # it names files of this machine
            raise BadRequest(f"{kind}: the model's chat template cannot render them", kind) from None
        except MdiqError as error:
            raise BadRequest(str(error), kind) from None
        return {"count": len(tokens), "max_model_len": self._backend.context_tokens, "tokens": tokens}

    def _ids(self, kind: str, given: Mapping[str, Any]) -> list[int]:
        if kind == "messages":
            messages, template_kwargs = messages_of(given["messages"]), template_kwargs_of(given)
            self._check_length(kind, len(json.dumps(messages, ensure_ascii=False)))
            return [*self._backend.chat_ids(messages, template_kwargs, is_bounded=False)]
        text = text_of(given[kind], kind)
        self._check_length(kind, len(text))
        has_special = kind == "prompt"  # vLLM's default, and llama.cpp's
        for name in _SPECIAL:
            if (value := given.get(name)) is not None:
                if not isinstance(value, bool):
                    raise BadRequest(f"{name}: {str(value)[:40]} is not true or false", name)
                has_special = value
                break
        return [*self._backend.text_ids(text, has_special=has_special)]

    def _check_length(self, kind: str, num_characters: int) -> None:
        context_tokens = self._backend.context_tokens
        if num_characters > MAX_CHARACTERS_PER_TOKEN * context_tokens:
            raise too_long(f"its {num_characters} characters are far more, and are not counted", context_tokens, kind)

    def _text(self, given: Mapping[str, Any]) -> Mapping[str, object]:
        tokens, backend = token_ids_of(given.get("tokens"), "tokens"), self._backend
        if len(tokens) > backend.context_tokens:
            text = f"tokens: {len(tokens)} tokens; give at most {backend.context_tokens}, as many as the ring holds"
            raise BadRequest(text, "tokens")
        if (largest := max(tokens, default=0)) >= backend.vocab_size:
            text = f"tokens: token id {largest}: the model has {backend.vocab_size} tokens only"
            raise BadRequest(text, "tokens")
        text = backend.text_of(tokens)
        return {"prompt": text, "content": text}


def _as_json(answer: Callable[[Mapping[str, Any]], Mapping[str, object]], given: Mapping[str, Any]) -> bytes:
    return json.dumps(answer(given)).encode()
