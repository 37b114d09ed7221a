"""Runs a command's coroutine to its end, or ends every process of it when a signal comes; and services."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from typing import Any, NoReturn, TypeVar

from mdiq.errors import first_of

READS, LOADS_PROGRAM = "reads", "loads its program"
"""First words of a unit's status before its program has loaded; nodes/provision.py waits until others stand there."""

T = TypeVar("T")


def run_until_signal(main: Coroutine[Any, Any, T]) -> T:
    """Return what the coroutine does; on SIGINT or SIGTERM cancel it, and exit when it has cleaned up."""
    received: list[int] = []

    async def with_handlers() -> T:
        task = asyncio.current_task()
        assert task is not None  # this coroutine runs in one
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if received:
                _show_cursor()
                os._exit(128 + number)
            received.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        return await main

    try:
        with _one_error():
            return asyncio.run(with_handlers())
    except asyncio.CancelledError:
        _show_cursor()
        sys.stderr.write("mdiq: interrupted\n")
        sys.stderr.flush()
        sys.stdout.flush()
        # A forward that still runs in the worker thread cannot be stopped; waiting for it could take long.
        os._exit(128 + received[0] if received else 1)


def run_service(main: Coroutine[Any, Any, None]) -> NoReturn:
    """Run a service, which minds its signals itself, and end the process with it."""
    with _one_error():
        asyncio.run(main)
    sys.stderr.flush()
    sys.stdout.flush()
    # A forward that still runs in the worker thread cannot be stopped; waiting for it could take long.
    os._exit(0)


def _show_cursor() -> None:
    """Show a terminal's cursor, which a line of progress hides; os._exit does not end that line."""
    terminal = sys.__stderr__  # that line puts something else in the place of sys.stderr
    if terminal is not None and terminal.isatty():
        terminal.write("\r\x1b[2K\x1b[?25h")
        terminal.flush()


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Raise the first error of a TaskGroup's: users see one."""
    try:
        yield
    except ExceptionGroup as group:
        raise first_of(group) from None
