"""Prompts files: JSON lines to requests, with every error located. Results files: which lines are done."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdiq.api.fields import NO_LIMIT, check_served, num_choices, sampling_values
from mdiq.api.requests import BadRequest, messages_of, template_kwargs_of, text_of, token_ids_of
from mdiq.core.sequence import SamplingParams
from mdiq.errors import ConfigError
from mdiq.service.requests import PromptLine

MAX_LINE_BYTES = 16 * 2**20
MAX_SETTINGS, MAX_KEPT_CHARACTERS = 256, 1_024  # that are remembered of a file
_KINDS = ("prompt", "prompt_token_ids", "messages")
_canonical = json.JSONEncoder(sort_keys=True).encode


def read_prompts(path: Path, defaults: SamplingParams) -> list[PromptLine]:
    """Read a prompts file; the index of a request is its place among the lines that are not blank.

    Raises:
        ConfigError: the file cannot be read, or some lines are wrong; up to ten are named.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file of JSON lines") from None
    requests: list[PromptLine] = []
    problems: list[str] = []
    settings = _Settings(defaults)
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(_parse_line(line, f"{path}:{number}", len(requests), settings))
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        more = [f"… and {len(problems) - 10} more lines"] if len(problems) > 10 else []
        raise ConfigError("\n".join(problems[:10] + more))
    if not requests:
        raise ConfigError(f'{path}: it holds no prompts; write lines such as {{"prompt": "Hello"}}')
    return requests


def read_finished(path: Path, requests: Sequence[PromptLine]) -> set[int]:
    """Return the indices that a results file holds; a last line without its end was cut off, and counts as not there.

    Raises:
        ConfigError: a whole line is not a result, or it is one of another request.
    """
    digests = {request.index: request.digest for request in requests}
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    finished: set[int] = set()
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else {}
            if "index" not in value or value.get("finish_reason") == "error":
                continue
            index, digest = int(value["index"]), value.get("request")
        except (ValueError, TypeError):
            raise ConfigError(
                f"{path}:{number}: not a line that mdiq run wrote; move the file away to start afresh"
            ) from None
        if index not in digests or (digest is not None and digest != digests[index]):
            raise ConfigError(
                f"{path}:{number}: it answers another request {index} than the prompts file has now; "
                "resume with the prompts of that run, or give another --out"
            )
        finished.add(index)
    return finished


class _Settings:
    """The other fields of a file's lines, checked once where several lines have the same."""

    def __init__(self, defaults: SamplingParams) -> None:
        self._defaults = defaults
        self._known: dict[str, tuple[SamplingParams, Mapping[str, str | int | float | bool]]] = {}

    def of(
        self, value: Mapping[str, Any], kind: str, where: str
    ) -> tuple[SamplingParams, Mapping[str, str | int | float | bool]]:
        """Return the params and the chat template's variables; ``kind`` is the field that holds the prompt.

        Raises:
            ConfigError: a field is not served, or has a wrong value.
        """
        others = {name: given for name, given in value.items() if name != kind}
        key = f"{kind == 'messages'} {others!r}"
        if (known := self._known.get(key)) is None:
            known = self._checked(value, where)
            if len(self._known) < MAX_SETTINGS and len(key) < MAX_KEPT_CHARACTERS:
                self._known[key] = known
        return known

    def _checked(
        self, value: Mapping[str, Any], where: str
    ) -> tuple[SamplingParams, Mapping[str, str | int | float | bool]]:
        check_served(value, lambda text, _: ConfigError(f"{where}: {text}"))
        try:
            values = sampling_values(value)
            if num_choices(value) > 1:
                raise ConfigError("n: a line has one answer; write it several times, with a seed of its own each")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if values.get("max_tokens", 1) is None:  # no limit
            values["max_tokens"] = NO_LIMIT
        params = self._defaults.replaced(values, where)
        try:
            return params, template_kwargs_of(value)
        except BadRequest as error:
            raise ConfigError(f"{where}: {error}") from None


def _parse_line(line: bytes, where: str, index: int, settings: _Settings) -> PromptLine:
    if len(line) > MAX_LINE_BYTES:
        raise ConfigError(f"{where}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; shorten it")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({str(error)[:80]}); write one JSON object a line") from None
    if not isinstance(value, dict):
        raise ConfigError(f'{where}: not a JSON object; write {{"prompt": "…"}}')
    kinds = [kind for kind in _KINDS if kind in value]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        raise ConfigError(f"{where}: needs exactly one of {', '.join(_KINDS)}; found {found}")
    params, template_kwargs = settings.of(value, kinds[0], where)
    digest = hashlib.blake2b(_canonical(value).encode(), digest_size=8).hexdigest()
    common: dict[str, Any] = {"digest": digest, "template_kwargs": template_kwargs}
    given = value[kinds[0]]
    try:
        if kinds[0] == "messages":
            return PromptLine(index, where, params, messages=messages_of(given), **common)
        if kinds[0] == "prompt":
            return PromptLine(index, where, params, text=text_of(given, "prompt"), **common)
        return PromptLine(index, where, params, token_ids=token_ids_of(given, "prompt_token_ids"), **common)
    except BadRequest as error:
        raise ConfigError(f"{where}: {error}") from None
