"""Chat templates: messages to the prompt text that a model was trained on.

A template is a program that comes with a model's file, and messages come from anyone: it runs in jinja's immutable
sandbox, and the size of every value and the number of its steps are bounded. Steps are counted, not timed, so that a
chat that a fast machine renders is rendered by a slow one too. It is never taken from a request; engine/tokenizer.py
says where it comes from.
"""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
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
MAX_STEPS = 1 << 22  # rounds of loops, calls, items looked at; walking 1 MB by character takes about as many
_STEP_CHARS = 1 << 10  # of a text that is copied or compared: one step
_ITEM_SIZE = 32  # what an item of a list counts, beside its text
# About web pages rather than prompts, or slow on what the size limits let through.
_DROPPED_FILTERS = ("pprint", "random", "sum", "urlize", "wordwrap", "xmlattr")
_DROPPED_METHODS = ("expandtabs", "translate")
_CONSTANT_TIME_FILTERS = ("default", "d", "length", "count", "first", "last")
_NUMBER = re.compile(r"\d+")
_NESTED_FIELD = re.compile(r":[^{}]*\{")
T = TypeVar("T")


class ChatTemplate:
    """One model's chat template, compiled. Threads may share it.

    where: names the template in errors, for example "model.gguf: tokenizer.chat_template".

    Raises:
        ModelError: the template is too long, or is not valid jinja.
    """

    def __init__(self, source: str, where: str, *, max_steps: int = MAX_STEPS) -> None:
        self._where = where
        self._lock = threading.Lock()
        if len(source) > MOST_TEMPLATE_CHARS:
            raise ModelError(
                f"{where}: the chat template has {len(source)} characters, and {MOST_TEMPLATE_CHARS} is the limit; "
                "use the model's original template"
            )
        self._environment = _Environment(max_steps)
        self._template = self._in_words("cannot be compiled", lambda: self._environment.from_string(source))

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
            ModelError: the template is wrong, tries to leave its sandbox, takes too many steps or grows too large.
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
            self._environment.begin(plain)
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


class _CodeGenerator(CodeGenerator):
    """Sends what jinja itself cannot intercept through the environment: loops, slices, comparisons, ~ and literals.

    Nested literals grow without any operator: `[x, x]` forty times over cannot be printed, or compared.
    """

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.iter = nodes.Call(nodes.EnvironmentAttribute("counted"), [node.iter], [], None, None)
        super().visit_For(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(")
        self._visit_checked(self.visit, node.expr, frame)
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            self._visit_checked(self.visit, operand.expr, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._visit_checked(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

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
    """transformers' environment for chat templates, with sizes and steps bounded.

    jinja's sandbox keeps a template from Python's internals, and bounds `range`; the rest is here. The size of every
    value is checked where it is made. Steps are what a rendering may do in all: a round of a loop, a call, an item
    that is looked at. So a loop ends, and so does a short one over operations that take long each.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CodeGenerator

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self.begin([])
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
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: self._counted_test(function) for name, function in tests.items()}
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self._strftime_now

    def begin(self, messages: object) -> None:
        """Set the limits of the next rendering."""
        self._written = 0
        self._steps_left = sys.maxsize
        # A template may copy a long document a few times, so the limit grows with what came in.
        self._most_size = MOST_SIZE + 4 * self._size(messages, sys.maxsize)
        self._steps_left = self._max_steps

    def checked(self, value: T) -> T:
        """Return a value that a template has just made, or looks at, if it is small enough."""
        self._size(value, self._most_size)
        return value

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """Pass on what a loop goes over."""
        for item in items:
            self._spend(1)
            yield item

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
                    _limit(times * self._size(value, self._most_size), self._most_size)
        return self.checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        """Call a method, a macro or a global, if the result cannot be huge."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        for value in (owner, *args):
            __self._look_at(value)
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
            if name not in _CONSTANT_TIME_FILTERS:
                self._check_numbers(others, kwargs)
                self._look_at(value)
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
                _limit(self._size(value, self._most_size) + separator * len(value), self._most_size)
            return self.checked(function(*before, value, *others, **kwargs))

        return _marked_as(function, bounded)

    def _counted_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        num_before = 1 if hasattr(function, "jinja_pass_arg") else 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            if len(args) > num_before + 1:  # one that compares
                self.checked(args[num_before:])
            return function(*args, **kwargs)

        return _marked_as(function, counted)

    def _count_written(self, value: T) -> T:
        self._written += self._size(value, self._most_size)
        _limit(self._written, self._most_size * MOST_WRITTEN)
        return value

    def _join(self, separator: str, parts: Iterable[str]) -> str:
        taken: list[str] = []
        size = 0
        for part in parts:
            self._look_at(part)
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
        size = width + sum(self._size(value, self._most_size) for value in values)
        _limit(len(text) + text.count(mark) * size, self._most_size)

    def _strftime_now(self, text: str) -> str:
        self._check_format(text, (), "%")
        return datetime.now().strftime(text)

    def _size(self, value: object, most: int) -> int:
        """Count a value's characters and items; shared parts count each time, as when they are written or compared."""
        self._look_at(value)
        if isinstance(value, str | bytes):
            size = len(value)
        elif isinstance(value, Mapping | list | tuple | set | frozenset):
            size = 0
            for item in value:
                size += _ITEM_SIZE + self._size(item, most - size)
                if isinstance(value, Mapping):
                    size += self._size(value[item], most - size)
                _limit(size, most)
        else:
            size = 1
        _limit(size, most)
        return size

    def _look_at(self, value: object) -> None:
        """Count what a look at a value takes, without its items' own parts."""
        if isinstance(value, str | bytes):
            self._spend(1 + len(value) // _STEP_CHARS)
        elif isinstance(value, list | tuple | range):
            self._spend(1 + len(value))
        else:
            self._spend(1)

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise SecurityError("it takes too many steps")


def _marked_as(function: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """Return the wrapper with the marks by which jinja knows what a filter or a test wants to be called with."""
    for mark in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(function, mark):
            setattr(wrapper, mark, getattr(function, mark))
    return wrapper


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
