"""The form of an answer, for one backend: the request's own and that of its tools become one grammar, and a parser."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mdiq.api.backend import Backend
from mdiq.api.requests import Asked, BadRequest
from mdiq.api.structure import MAX_PARTS, schema_grammar, wrong_part
from mdiq.api.tool_calls import CallParser
from mdiq.api.tool_forms import Elements, form_of
from mdiq.api.tools import marks_of, stops_of
from mdiq.errors import ConfigError, CostlyFormError

MAX_SEARCHED = 1 << 14  # characters of a schema in which the wrong part is looked for
InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


async def formed(asked: Asked, backend: Backend, in_thread: InThread) -> tuple[Asked, Callable[[], CallParser | None]]:
    """Return the request with a grammar that has been compiled, if it needs one, and what makes its answers' parsers.

    in_thread: runs a job in a thread.

    Raises:
        BadRequest: the model cannot call tools, or a form cannot be used; it says which.
    """
    make_parser: Callable[[], CallParser | None] = lambda: None  # noqa: E731
    if (use := asked.tools) is not None:
        try:
            form = form_of(backend.chat_template)
        except ConfigError as error:
            raise BadRequest(f"tools: {error}", "tools") from None
        try:
            # The schemas of many tools take long.
            grammar = await in_thread(partial(use.grammar, form, asked.structure, backend.special_id))
        except ConfigError as error:
            raise BadRequest(str(error), str(error).partition(":")[0]) from None
        marks = marks_of(form, backend.special_id)
        stops = (*(asked.values.get("stop_token_ids") or ()), *stops_of(form, backend.special_id))
        of_calls = {"grammar": grammar or "", "shown_token_ids": marks, "stop_token_ids": stops}
        asked = replace(asked, values={**asked.values, **of_calls})
        kinds = await in_thread(lambda: use.kinds) if isinstance(form.syntax, Elements) else None
        make_parser = partial(CallParser, form, use.names, kinds, is_many=use.is_many)
    if grammar := asked.values.get("grammar"):
        try:
            await in_thread(partial(backend.check_grammar, grammar))
        except CostlyFormError as error:
            raise _costly(asked, error) from None
        except ConfigError as error:
            raise await in_thread(partial(_refusal, asked, backend, error)) from None
    return asked, make_parser


def tools_about(parser: CallParser | None) -> dict[str, Any] | None:
    """Return as JSON what ``parser_of`` makes the same parser from."""
    if parser is None:
        return None
    return {
        "names": sorted(parser.names),
        "kinds": {name: {key: [*kinds] for key, kinds in each.items()} for name, each in parser.kinds.items()},
        "is_many": parser.is_many,
        "key": parser.key.hex(),
    }


def parser_of(about: Mapping[str, Any] | None, backend: Backend) -> CallParser | None:
    """Return the parser of a response of an earlier process; see ``tools_about``.

    Raises:
        ConfigError: the model calls no tools.
    """
    if about is None:
        return None
    form, key = form_of(backend.chat_template), bytes.fromhex(about["key"])
    return CallParser(form, about["names"], about.get("kinds"), is_many=about["is_many"], key=key)


def _costly(asked: Asked, error: CostlyFormError) -> BadRequest:
    """Return the error of a form whose parts are not looked at: each of them may cost as much."""
    where = "tools" if asked.structure is None else asked.structure.where
    return BadRequest(f"{where}: {error}", where.partition(".")[0])


def _refusal(asked: Asked, backend: Backend, error: ConfigError) -> BadRequest:
    """Return the error that names the field whose form cannot be used."""
    try:
        return _searched(asked, backend, error)
    except CostlyFormError as costly:
        return _costly(asked, costly)


def _searched(asked: Asked, backend: Backend, error: ConfigError) -> BadRequest:
    def trouble(grammar: str) -> ConfigError | None:
        try:
            backend.check_grammar(grammar)
        except CostlyFormError:
            raise
        except ConfigError as own:
            return own
        return None

    def is_usable(grammar: str) -> bool:
        return trouble(grammar) is None

    if (structure := asked.structure) is not None and (own := trouble(structure.grammar)) is not None:
        kind, _, text = structure.grammar.partition(":")
        is_schema = kind == "json_schema" and len(text) < MAX_SEARCHED
        where = wrong_part(json.loads(text), structure.where, is_usable) if is_schema else structure.where
        return BadRequest(f"{where}: {own}", structure.where.partition(".")[0])
    for tool in asked.tools.tools[:MAX_PARTS] if asked.tools else ():  # others' texts wait meanwhile
        own_text = schema_grammar(tool.parameters, tool.where)
        if (own := trouble(own_text)) is not None:
            where = wrong_part(tool.parameters, tool.where, is_usable) if len(own_text) < MAX_SEARCHED else tool.where
            return BadRequest(f"{where}: {own}", tool.where)
    return BadRequest(f"tools: all together, or one after the first {MAX_PARTS}: {error}", "tools")
