"""Logs to stderr: readable lines for people, JSON lines for a journal. The callers choose what to log.

Lines are JSON when stderr is not a terminal and systemd's JOURNAL_STREAM is set or MDIQ_LOG is "json".

Whatever the network sends, the log stays small: the lines per minute of each event are limited; see _Limit.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
MAX_LINES = 20
WINDOW_S = 60.0
UNLIMITED = frozenset(
    {
        "request_ended",  # one for each admitted request: the access log
        "peer_refused",  # one per address; transport/curve.py bounds them
    }
)


def configure(level: str = "warning", *, clock: Callable[[], float] = time.monotonic, **bound: str | int) -> None:
    """Send log lines of ``level`` or worse to stderr, with the ``bound`` fields (node=...) in each.

    At most MAX_LINES of one event are written within WINDOW_S; the next line says how many were dropped. Warnings of
    the standard library's loggers (such as asyncio's) and of ``warnings`` have the same form. May be called again; the
    last call counts.
    """
    least = LEVELS[level]
    shared: list[Processor] = [
        _Limit(clock),
        _Bind(bound),
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*shared, *_renderers()],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=_stderr_logger,
        # Loggers are not cached, so that a call of configure also affects existing ones.
        cache_logger_on_first_use=False,
    )
    handler = _StderrHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers()],
        )
    )
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    # Info lines of libraries are noise even where our own are wanted.
    root.setLevel(max(least, logging.WARNING) if least > logging.DEBUG else logging.DEBUG)
    logging.captureWarnings(True)


def _renderers() -> list[Processor]:
    if _wants_json():
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    # The plain traceback: richer ones print the values of variables, including prompts.
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
        )
    ]


def _wants_json() -> bool:
    is_asked_for = "JOURNAL_STREAM" in os.environ or os.environ.get("MDIQ_LOG") == "json"
    return is_asked_for and not sys.stderr.isatty()


@dataclass(slots=True)
class _Window:
    """Lines of one event since ``since_s``: how many may still be written, and how many were dropped."""

    since_s: float
    num_left: int
    num_held_back: int = 0


class _Limit:
    """Drops lines of an event that is too frequent: strangers can cause events, and must not fill a disk.

    After a window that dropped lines the next one has a single line, with their count.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[Any, _Window] = {}  # events are constants of the code, so these are few

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> EventDict:
        record = event.get("_record")  # of the standard library: texts vary, so the place in the code is the key
        kind = event.get("event") if record is None else (record.pathname, record.lineno)
        if kind in UNLIMITED:
            return event
        now = self._clock()
        with self._lock:
            window = self._windows.get(kind)
            if window is None or now - window.since_s >= WINDOW_S:
                num_held_back = window.num_held_back if window is not None else 0
                if num_held_back:
                    event["num_not_logged"] = num_held_back
                window = self._windows[kind] = _Window(now, 1 if num_held_back else MAX_LINES)
            if not window.num_left:
                window.num_held_back += 1
                raise structlog.DropEvent
            window.num_left -= 1
        return event


class _Bind:
    """Adds fixed fields to every line, from any task or thread; context variables do not reach threads."""

    def __init__(self, bound: Mapping[str, str | int]) -> None:
        self._bound = dict(bound)

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> EventDict:
        for name, value in self._bound.items():
            event.setdefault(name, value)
        return event


def _stderr_logger(*_: Any) -> structlog.WriteLogger:
    # Looked up for each line: a progress bar or a test may have replaced the stream.
    return structlog.WriteLogger(sys.stderr)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes records of the standard library's loggers to the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        with contextlib.suppress(structlog.DropEvent):
            super().emit(record)
