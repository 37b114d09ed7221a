"""Logs to stderr: readable lines for people, JSON lines for a journal. What is logged is for the callers to choose.

JSON lines come when stderr is no terminal and systemd's JOURNAL_STREAM is set or MDIQ_LOG is "json".
"""

import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure(level: str = "warning", **bound: str | int) -> None:
    """Send every log line of ``level`` or worse to stderr, with the ``bound`` fields (node=...) in each.

    Warnings of the standard library's loggers (asyncio's, say) and of ``warnings`` come in the same form. May be called
    again; the last call holds.
    """
    least = LEVELS[level]
    shared: list[Processor] = [
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
        except Exception:
            self.handleError(record)
