"""Ctrl-C on a real terminal."""

import os
import pty
import signal
import sys

_PROGRAM = """
import asyncio, os, signal
from rich.console import Console
from mdiq.cli.signals import run_until_signal

async def main():
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(20)

with Console(stderr=True).status("works"):
    run_until_signal(main())
"""


def test_an_interrupted_line_of_progress_leaves_the_terminal_its_cursor() -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", _PROGRAM])
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # so Linux says that nobody has it open any more
            break
        if not piece:
            break
        shown += piece
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT
    assert b"mdiq: interrupted" in shown
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0, shown
