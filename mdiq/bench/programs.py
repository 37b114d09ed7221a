"""What the programs that run a Load in a process of their own have in common, from outside: their end and its words."""

import asyncio
import contextlib
import signal


def kill(child: asyncio.subprocess.Process) -> None:
    """Kill a program unless it has ended; does not wait for it."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()


def how_it_ended(code: int | None, errors: bytes) -> str:
    """Return how a program ended that gave no result, in one line: its exit code or signal, and its last words."""
    code = code or 0
    ended = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
    lines = errors.decode(errors="replace").strip().splitlines()
    return f"its process ended with {ended}: {lines[-1] if lines else 'it said nothing'}"
