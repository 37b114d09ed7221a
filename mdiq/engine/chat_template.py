"""Chat templates: messages to the prompt text that a model was trained on.

A template is a program that comes with a model's file, so it is treated as hostile: it runs in jinja's immutable
sandbox, and its time and the size of every value are bounded. It is never taken from a request; engine/tokenizer.py
says where it comes from.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import FrameType
from typing import Any, TypeVar

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mdiq.errors import ConfigError, ModelError

MOST_TEMPLATE_CHARS = 1 << 17  # the longest in use, those with tool calls, have about 20 000
MOST_SIZE = 1 << 22  # of one value, in characters; long messages raise it
MOST_WRITTEN = 8  # times that size: all that a template writes, macros and blocks included
MOST_NUMBER = 1 << 16  # given to a method, a filter or a format: center(n), indent(n), '%9d'
MOST_RESULT_BITS = 1 << 12
DEADLINE_S = 2.0
DEADLINE_CHARS = 10_000  # of messages: as many more take DEADLINE_S more, which small boards need for a quarter of them
COMPILE_DEADLINE_S = 20.0  # it grows with the length of the template only; 20 000 characters take about 1 s
_ITEM_SIZE = 32  # what an item of a list counts, beside its text
# About web pages rather than prompts, or slow on what the size limits let through.
_DROPPED_FILTERS = ("pprint", "random", "sum", "urlize", "wordwrap", "xmlattr")
_DROPPED_METHODS = ("expandtabs", "translate")
_TEMPLATE_FILENAME = "<template>"  # jinja's name for code that comes from a string
_NUMBER = re.compile(r"\d+")
_NESTED_FIELD = re.compile(r":[^{}]*\{")
T = TypeVar("T")


class ChatTemplate:
    """One model's chat template, compiled. Threads may share it.

    where: names the template in errors, for example "model.gguf: tokenizer.chat_template".

    Raises:
        ModelError: the template is too long, or is not valid jinja.
    """

    def __init__(self, source: str, where: str, *, deadline_s: float = DEADLINE_S) -> None:
        self._where = where
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        if len(source) > MOST_TEMPLATE_CHARS:
            raise ModelError(
                f"{where}: the chat template has {len(source)} characters, and {MOST_TEMPLATE_CHARS} is the limit; "
                "use the model's original template"
            )
        self._environment = _Environment()
        self._template = self._bounded(
            "cannot be compiled", COMPILE_DEADLINE_S, lambda: self._environment.from_string(source)
        )

    def render(
        self,
        messages: Iterable[Mapping[str, object]],
        tokens: Mapping[str, str],
        more: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt text, up to where the assistant's answer begins.

        tokens: the texts of special tokens by the names that templates know: bos_token, eos_token, ...
        more: what else the template is told, such as enable_thinking.

        Raises:
            ConfigError: the template refuses these messages ("roles must alternate"), or they are not plain data.
            ModelError: the template is wrong, tries to leave its sandbox, runs too long or grows too large.
        """
        plain = [_plain(dict(message)) for message in messages]
        variables: dict[str, object] = {
            **(more or {}),
            **tokens,
            "messages": plain,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        with self._lock:
            # A template may copy a long document a few times, so the limit grows with what came in.
            size = _size(plain, sys.maxsize)
            self._environment.begin(most_size=MOST_SIZE + 4 * size)
            # So does the time: some templates walk over every character.
            deadline_s = self._deadline_s * (1 + size / DEADLINE_CHARS)
            return self._bounded("cannot be rendered", deadline_s, lambda: self._template.render(variables))

    def _bounded(self, what: str, deadline_s: float, work: Callable[[], T]) -> T:
        """Do the work, for so long; every failure becomes one line.

        A trace function sees every call in this thread, and every line of the template's own code, so it ends loops;
        nothing else stops code in a thread that is not the main one. Time is the thread's own processor time: a busy
        machine is not the template's fault. What would run in C for long is refused beforehand, by the size limits
        of _Environment.
        """
        end_s = time.thread_time() + deadline_s

        def trace(frame: FrameType, event: str, arg: object) -> Any:
            filename = frame.f_code.co_filename
            if filename == __file__:  # these checks are bounded themselves, and called often
                return None
            if time.thread_time() > end_s:
                raise _DeadlinePassed
            return trace if filename == _TEMPLATE_FILENAME else None

        previous = sys.gettrace()  # a debugger's or a coverage tool's
        try:
            sys.settrace(trace)
            try:
                return work()
            finally:
                sys.settrace(previous)
        except _MessagesRefusedError as error:
            raise ConfigError(f"messages: the model's chat template refuses them: {_line(error)}") from None
        except _DeadlinePassed:
            reason = f"it runs longer than {deadline_s:g} s"
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


class _DeadlinePassed(BaseException):  # noqa: N818
    """No Exception: jinja catches those in some places and goes on."""


class _MessagesRefusedError(TemplateError):
    """The template called raise_exception."""


class _CodeGenerator(CodeGenerator):
    """Sends what jinja itself cannot intercept through the environment: the operator ~, and literals.

    Nested literals grow without any operator: `[x, x]` forty times over cannot be printed, or compared.
    """

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(str(part) for part in (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._visit_checked(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._visit_checked(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._visit_checked(super().visit_Tuple, node, frame)
        else:  # the targets of an assignment
            super().visit_Tuple(node, frame)

    def _visit_checked(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.checked(")
        visit(node, frame)
        self.write(")")


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; what is in it is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """jinja's namespace, written as a word only: what it holds is not counted, and may be itself."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with the size of every value bounded where it is made.

    jinja's sandbox keeps a template from Python's internals, and bounds `range`; the rest is here.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CodeGenerator

    def __init__(self) -> None:
        self.begin(most_size=MOST_SIZE)
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            finalize=self._count_written,
            optimized=False,  # else constant expressions are computed while compiling, filters included
        )
        self.filters["tojson"] = _to_json
        self.filters = {
            name: self._bounded_filter(name, function)
            for name, function in self.filters.items()
            if name not in _DROPPED_FILTERS
        }
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self._strftime_now

    def begin(self, most_size: int) -> None:
        """Set the limits of the next rendering."""
        self._most_size = most_size
        self._written = 0

    def checked(self, value: T) -> T:
        """Return a value that a template has just made, if it is small enough."""
        _size(value, self._most_size)
        return value

    def concat(self, parts: Iterable[str]) -> str:  # jinja keeps "".join here
        """Join what a template, a macro, a block or the operator ~ writes."""
        return self._join("", parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute +, *, ** and %, if the result cannot be huge."""
        if operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,), "%")
        elif isinstance(left, int) and isinstance(right, int):
            num_bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            _limit(num_bits, MOST_RESULT_BITS)
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    _limit(times * _size(value, self._most_size), self._most_size)
        return self.checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        """Call a method, a macro or a global, if the result cannot be huge."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str | int):
            __self._check_numbers(args, kwargs)
        if isinstance(owner, bytes | bytearray) or (isinstance(owner, str) and name in _DROPPED_METHODS):
            raise SecurityError(f"{type(owner).__name__}.{name} is not at hand")
        if isinstance(owner, str) and name == "replace" and len(args) > 1:
            __self._check_replace(owner, args[0], args[1])
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            return __self._join(owner, args[0])
        return __self.checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return str.format inside the sandbox, where value is that; jinja does not send it through `call`."""
        method = super().wrap_str_format(value)
        if method is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            self._check_numbers(args, kwargs)
            self._check_format(value.__self__, (*args, *kwargs.values()), "{")
            return self.checked(method(*args, **kwargs))

        return bounded

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # jinja reads from the function whether it wants the context or the environment before the value.
        num_before = 1 if hasattr(function, "jinja_pass_arg") else 0

        def bounded(*args: Any, **kwargs: Any) -> Any:
            before, value, others = args[:num_before], args[num_before], args[num_before + 1 :]
            if name not in ("default", "d"):
                self._check_numbers(others, kwargs)
            given = (*others, *kwargs.values())
            if name == "replace" and len(given) > 1:
                self._check_replace(str(value), str(given[0]), str(given[1]))
            elif name == "format":
                self._check_format(str(value), given, "%")
            elif name == "indent":
                width = max((len(item) if isinstance(item, str) else int(item) for item in given), default=4)
                _limit(len(str(value)) + (str(value).count("\n") + 1) * width, self._most_size)
            elif name == "join":
                value = list(value)
                separator = max((len(item) for item in given if isinstance(item, str)), default=0)
                _limit(_size(value, self._most_size) + separator * len(value), self._most_size)
            return self.checked(function(*before, value, *others, **kwargs))

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, mark):
                setattr(bounded, mark, getattr(function, mark))
        return bounded

    def _count_written(self, value: T) -> T:
        self._written += _size(value, self._most_size)
        _limit(self._written, self._most_size * MOST_WRITTEN)
        return value

    def _join(self, separator: str, parts: Iterable[str]) -> str:
        taken: list[str] = []
        size = 0
        for part in parts:
            taken.append(part)
            size += len(part) + len(separator)
            _limit(size, self._most_size)
        return separator.join(taken)

    def _check_numbers(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _limit(abs(value), MOST_NUMBER)

    def _check_replace(self, text: str, old: str, new: str) -> None:
        _limit(len(text) + (text.count(old) if old else len(text) + 1) * len(new), self._most_size)

    def _check_format(self, text: str, values: tuple[Any, ...], mark: str) -> None:
        self._check_numbers(values, {})
        if mark == "{" and _NESTED_FIELD.search(text):
            raise SecurityError("a width from a value is not supported")
        width = max((int(number[:9]) for number in _NUMBER.findall(text)), default=0)
        _limit(width, MOST_NUMBER)
        size = width + sum(_size(value, self._most_size) for value in values)
        _limit(len(text) + text.count(mark) * size, self._most_size)

    def _strftime_now(self, text: str) -> str:
        self._check_format(text, (), "%")
        return datetime.now().strftime(text)


def _size(value: object, most: int) -> int:
    """Count a value's characters and items; shared parts count each time, as when they are written or compared."""
    if isinstance(value, str | bytes):
        size = len(value)
    elif isinstance(value, Mapping | list | tuple | set | frozenset):
        size = 0
        for item in value:
            size += _ITEM_SIZE + _size(item, most - size)
            if isinstance(value, Mapping):
                size += _size(value[item], most - size)
            _limit(size, most)
    else:
        size = 1
    _limit(size, most)
    return size


def _limit(size: int, most: int) -> None:
    if size > most:
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
    if isinstance(indent, str) or (indent or 0) > 16:
        raise SecurityError("tojson: indent is a number up to 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: Any) -> Any:
    """Copy JSON-like data; fields without a value are left out, since templates would write "None"."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ConfigError(f"messages: a value of type {type(value).__name__}; give texts, numbers, lists and objects")


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
