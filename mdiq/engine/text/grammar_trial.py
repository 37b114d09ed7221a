"""Compiles grammars, first of all in a process of its own: some that clients can send would end or stall the service.

Theory. llguidance bounds most of what a grammar costs, but not all: a chain of a thousand ``$ref`` overflows its
stack, which ends the process; a regular expression of 100 kB takes gigabytes; a few dozen patterns under ``allOf`` take
minutes. Nothing in the same process can stop native code. So a process without a model compiles each new grammar before
the service does, under limits that the kernel keeps, and with less stack than a thread of the service has. If it ends,
the grammar is refused, and the next one gets a new process. Its tokens are single bytes: what a compilation costs
hardly depends on the tokens.
"""

import atexit
import json
import math
import re
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from mdiq.errors import ConfigError, CostlyFormError, EngineError

MAX_ERROR_CHARACTERS = 200
MAX_CPU_S = 5
"""Of one compilation. The largest schemas that are in use take half a second on a PC."""
MAX_BYTES = 256 << 20
"""Of memory beyond what the process has at its start."""
STACK_BYTES = 4 << 20  # threads of a service have 8 MiB
# The other limits are those of llguidance: they bound a compilation to some 0.1 s, and a mask to some 20 ms.
_LIMITS = LLParserLimits(verbose_errors=False)
_MAX_CHARACTERS = {"gbnf": 1 << 15, "lark": 1 << 18}  # Python converts the first, for 0.1 s
_USUAL_CHARACTERS = 1 << 17
_KINDS: dict[str, Callable[[str], str]] = {
    "json_schema": LLMatcher.grammar_from_json_schema,
    "choice": lambda text: grammar_from("choice", text),
    "regex": LLMatcher.grammar_from_regex,
    "gbnf": lambda text: grammar_from("gbnf", text),
    "lark": LLMatcher.grammar_from_lark,
}
_TOKEN = re.compile(r"<\[[0-9]+\]>")  # by its id, in the grammars of tools
_ANY_TOKEN = "<[256]>"  # a special one of the trial's own tokenizer
_LENGTH = struct.Struct("<I")


def compiled(tokens: LLTokenizer, grammar: str) -> LLMatcher:
    """Return a matcher at the beginning of a grammar.

    Raises:
        ConfigError: it is not a grammar, or is too large.
    """
    kind, _, text = grammar.partition(":")
    if kind not in _KINDS:
        raise ConfigError(f"grammar: kind {kind[:40]!r}: use one of {', '.join(_KINDS)}")
    if len(text) > (most := _MAX_CHARACTERS.get(kind, _USUAL_CHARACTERS)):
        raise ConfigError(f"it has {len(text)} characters, and {most} is the limit; shorten it")
    try:
        found = LLMatcher(tokens, _KINDS[kind](text), log_level=0, limits=_LIMITS)
    except (ValueError, TypeError, RecursionError) as error:  # of the conversions
        raise ConfigError(f"it cannot be used: {line_of(error)}") from None
    if not found.is_error():  # what no answer fits is an error of the first mask
        first = found.deep_copy()
        first.compute_bitmask()
        if first.is_error():
            raise ConfigError("it cannot be used: no answer fits it")
    if found.is_error():
        raise ConfigError(f"it cannot be used: {line_of(found.get_error())}")
    return found


def line_of(error: object) -> str:
    """Return an error in a line."""
    return " ".join(str(error).split())[:MAX_ERROR_CHARACTERS]


class Trial:
    """The process, which starts with the first grammar. Threads may share it; one compilation runs at a time."""

    def __init__(self, max_cpu_s: int = MAX_CPU_S) -> None:
        self._max_cpu_s = max_cpu_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def check(self, grammar: str) -> None:
        """Compile a grammar there.

        Raises:
            ConfigError: see ``compiled``.
            CostlyFormError: it takes too much time, memory or stack.
            EngineError: the process cannot be started.
        """
        if grammar.startswith("lark:"):
            grammar = _TOKEN.sub(_ANY_TOKEN, grammar)
        data = grammar.encode(errors="replace")
        with self._lock:
            answer = self._answer(data)
        if not answer:
            raise CostlyFormError("it takes too much time or memory to compile; ask for a simpler form")
        if (error := json.loads(answer)) is not None:
            raise ConfigError(error)

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            if self._child is not None:
                self._end(self._child)

    def _answer(self, data: bytes) -> bytes:
        """Return the line with which a grammar was answered; empty if the process has ended instead."""
        if self._child is not None and self._child.poll() is not None:  # something else has ended it
            self._end(self._child)
        self._child = child = self._child or self._started()
        assert child.stdin is not None and child.stdout is not None  # PIPE was asked for
        try:
            child.stdin.write(_LENGTH.pack(len(data)) + data)
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            self._end(child)
        return answer

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        self._child = None
        child.kill()
        child.communicate()

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "mdiq.engine.text.grammar_trial", str(self._max_cpu_s)]
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what native code says when it ends
                start_new_session=True,  # Ctrl-C reaches the service alone
            )
        except OSError as error:
            text = f"the process that tries forms of answers cannot be started: {error.strerror}"
            raise EngineError(text) from None


def _serve(asked: BinaryIO, told: BinaryIO, max_cpu_s: int) -> None:
    """Answer grammars, each with a line of JSON: null, or what is wrong with it. Runs in the process."""
    tokens = LLTokenizer("byte")
    with open("/proc/self/statm", "rb") as file:
        num_bytes = int(file.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, num_bytes + MAX_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    while len(head := asked.read(_LENGTH.size)) == _LENGTH.size:
        grammar = asked.read(_LENGTH.unpack(head)[0]).decode()
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + max_cpu_s)
        error: str | None = None
        try:
            compiled(tokens, grammar)
        except ConfigError as wrong:
            error = str(wrong)
        told.write(json.dumps(error).encode() + b"\n")
        told.flush()


def _limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    serving = threading.Thread(target=_serve, args=(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1])))
    serving.start()
    serving.join()
