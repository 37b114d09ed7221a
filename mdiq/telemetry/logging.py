"""Logs to stderr: readable lines for people, JSON lines for a journal. What is logged is for the callers to choose.

JSON lines come when stderr is no terminal and systemd's JOURNAL_STREAM is set or MDIQ_LOG is "json".

Whatever the network sends, the log stays small: of each kind of line only so many are written a minute; see _Limit.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

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
        "request_ended",  # one for each request that was let in: the access log
        "peer_refused",  # each address has its line; see transport/curve.py, which bounds them
    }
)


def configure(level: str = "warning", *, clock: Callable[[], float] = time.monotonic, **bound: str | int) -> None:
    """Send log lines of ``level`` or worse to stderr, with the ``bound`` fields (node=...) in each.

    Of one event MAX_LINES are written within WINDOW_S; the next line that is written says how many were not. Warnings
    of the standard library's loggers (asyncio's, say) and of ``warnings`` come in the same form. May be called again;
    the last call holds.
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
        # Loggers are made anew for each line, so that a call of configure reaches those that exist already.
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
    # Other people's info lines are noise even where ours are wanted.
    root.setLevel(max(least, logging.WARNING) if least > logging.DEBUG else logging.DEBUG)
    logging.captureWarnings(True)


def _renderers() -> list[Processor]:
    if _wants_json():
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    # The plain traceback: the others print the values of variables, prompts among them.
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
    """Lines of one event since ``since_s``: how many may still be written, and how many were not."""

    since_s: float
    num_left: int
    num_held_back: int = 0


class _Limit:
    """Holds back lines of an event that comes too often: strangers cause lines, and must not fill a disk with them.

    After a window that was too small the next one has a single line, with the count of those that were held back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[Any, _Window] = {}  # events are constants of the code, so these are few

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> EventDict:
        record = event.get("_record")  # of the standard library: its texts vary, the place in the code does not
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
    """Adds fixed fields to every line, in whatever task or thread it is logged; context variables reach no thread."""

    def __init__(self, bound: Mapping[str, str | int]) -> None:
        self._bound = dict(bound)

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> EventDict:
        for name, value in self._bound.items():
            event.setdefault(name, value)
        return event


def _stderr_logger(*_: Any) -> structlog.WriteLogger:
    # Looked up for each line: a progress bar or a test may have put another stream there.
    return structlog.WriteLogger(sys.stderr)


class _StderrHandler(logging.Handler):
    """Writes records of the standard library's loggers to whatever stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except structlog.DropEvent:
            pass
        except Exception:
            self.handleError(record)
