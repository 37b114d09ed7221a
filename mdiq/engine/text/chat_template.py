"""Chat templates: messages to the prompt text that a model was trained on.

A template is a program in a model's file, which the operator has chosen; it is never taken from a request. It runs in
jinja's immutable sandbox, which keeps it from Python's internals. The size of its output is bounded. Its time is not,
since a long chat on a slow board may take long: so it runs in a thread wherever others must not wait.
"""

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from datetime import datetime
from typing import Any, TypeVar

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mdiq.errors import ConfigError, ModelError

MAX_TEMPLATE_CHARS = 1 << 17  # the longest in use, those with tool calls, have about 20 000
MAX_CHARS = 1 << 25  # of the output, or of a concatenation; a line of a prompts file has at most half of it
MAX_ITEMS = 1 << 20  # of a concatenated list
MAX_RESULT_BITS = 1 << 12  # of a power
T = TypeVar("T")


class ChatTemplate:
    """One model's chat template, compiled. Threads may share it.

    where: names the template in errors, for example "model.gguf: tokenizer.chat_template".

    Raises:
        ModelError: the template is too long, or is not valid jinja.
    """

    def __init__(self, source: str, where: str) -> None:
        self._where = where
        self._lock = threading.Lock()
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(
                f"{where}: the chat template has {len(source)} characters, and {MAX_TEMPLATE_CHARS} is the limit; "
                "use the model's original template"
            )
        self._environment = _Environment()
        self._template = self._in_words("cannot be compiled", lambda: self._environment.from_string(source))

    def render(
        self,
        messages: Iterable[Mapping[str, object]],
        tokens: Mapping[str, str],
        more: Mapping[str, object] | None = None,
        tools: Sequence[Mapping[str, object]] = (),
    ) -> str:
        """Return the prompt text, up to where the assistant's answer begins.

        tokens: the texts of special tokens by the names that templates know: bos_token, eos_token, ...
        more: further variables of the template, such as enable_thinking. tools: that the model may call.

        Raises:
            ConfigError: the template refuses these messages ("roles must alternate"), or they are not plain data.
            ModelError: the template is wrong, tries to leave its sandbox or writes too much.
        """
        try:
            plain = [_plain(dict(message)) for message in messages]
        except RecursionError:
            raise ConfigError("messages: they are nested too deeply") from None
        variables: dict[str, object] = {
            **(more or {}),
            **tokens,
            "messages": plain,
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return self._rendered(variables)
        except ModelError:
            as_texts = [_with_texts(message) for message in plain]
            if as_texts == plain:
                raise
            # Some templates, DeepSeek's among them, want the arguments of tool calls as texts, which is OpenAI's form.
            return self._rendered({**variables, "messages": as_texts})

    def _rendered(self, variables: Mapping[str, object]) -> str:
        # One at a time: its size is counted, and each further computing thread would slow down the event loop.
        with self._lock:
            self._environment.num_written = 0
            return self._in_words("cannot be rendered", lambda: self._template.render(variables))

    def _in_words(self, what: str, work: Callable[[], T]) -> T:
        """Do the work; every failure becomes one line."""
        try:
            return work()
        except _MessagesRefusedError as error:
            raise ConfigError(f"messages: the model's chat template refuses them: {_line(error)}") from None
        except TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {_line(error.message or error)}"
        except TemplateError as error:
            reason = _line(error)
        except MemoryError:
            reason = "it needs too much memory"
        except RecursionError:
            reason = "it is nested too deeply"
        except Exception as error:  # a template can raise anything: the TypeError of a filter, an OverflowError, ...
            reason = f"{type(error).__name__}: {_line(error)}"
        raise ModelError(
            f"{self._where}: the chat template {what} ({reason}); use the model's original template, or raw prompts"
        )


class _MessagesRefusedError(TemplateError):
    """The template called raise_exception."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; its content is rendered unchanged."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment in which transformers renders chat templates, with bounded sizes. The sandbox bounds `range`.

    num_written: characters of values that the template, its macros and its blocks have written in this rendering.
    """

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        self.num_written = 0
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            finalize=self._count_written,
        )
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda text: datetime.now().strftime(text)

    def concat(self, parts: Iterable[str]) -> str:  # jinja keeps "".join here
        """Join the output of a template, a macro or a block: values and the text between them."""
        written: list[str] = []
        size = 0
        for part in parts:
            size += len(part)
            _limit(size, MAX_CHARS)
            written.append(part)
        return "".join(written)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute +, * or **, unless the result would be huge."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _limit(left.bit_length() * right, MAX_RESULT_BITS)
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _limit(len(left) + len(right), MAX_CHARS if isinstance(left, str) else MAX_ITEMS)
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, Sized) and isinstance(times, int):
                    _limit(len(value) * times, MAX_CHARS if isinstance(value, str) else MAX_ITEMS)
        return super().call_binop(context, operator, left, right)

    def _count_written(self, value: object) -> str:
        text = str(value)
        self.num_written += len(text)
        _limit(self.num_written, MAX_CHARS)
        return text


def _limit(size: int, max_size: int) -> None:
    if size > max_size:
        raise SecurityError("a value in it grows too large")


def _raise_exception(message: object = "") -> None:
    raise _MessagesRefusedError(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: Any, *, is_argument: bool = False) -> Any:
    """Copy JSON-like data; fields without a value are left out, since templates would write "None".

    is_argument: of a tool call, where null is a value like others.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item, is_argument=is_argument or key == "arguments")
            for key, item in value.items()
            if item is not None or is_argument
        }
    if isinstance(value, list | tuple):
        return [_plain(item, is_argument=is_argument) for item in value]
    raise ConfigError(f"messages: a value of type {type(value).__name__}; give texts, numbers, lists and objects")


def _with_texts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message with the arguments of its tool calls as JSON texts."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    texts: list[Any] = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(function, dict) and isinstance(arguments, dict):
            call = {**call, "function": {**function, "arguments": _to_json(arguments)}}
        texts.append(call)
    return {**message, "tool_calls": texts}


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
