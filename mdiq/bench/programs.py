"""What the programs that run a Load in a process of their own have in common, from outside: their end and its words."""

import asyncio
import contextlib


def kill(child: asyncio.subprocess.Process) -> None:
    """Kill a program unless it has ended; does not wait for it."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()


def last_words(errors: bytes) -> str:
    """Return the last line that a program wrote to standard error, for the one line that tells of its end."""
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
