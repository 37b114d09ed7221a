"""Programs that run a Load in a process of their own, from outside: what they say, and how they end."""

import asyncio
import contextlib
import json
import signal
from typing import Any

from mdiq.bench.figures import UserTimes
from mdiq.errors import RingError


def kill(child: asyncio.subprocess.Process) -> None:
    """Kill a program unless it has ended; does not wait for it."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()


def result_of(where: str, out: bytes, errors: bytes, code: int | None) -> tuple[list[UserTimes], dict[str, Any]]:
    """Return the times of the users and all of what a program says: submitted_s and tokens_s of each user, and more.

    Raises:
        RingError: it says {"error": ...}, or it ended without a result. where: which program it was.
    """
    try:
        result = json.loads(out)
        if "error" in result:
            raise RingError(f"{where}: {result['error']}")
        users = zip(result["submitted_s"], result["tokens_s"], strict=True)
        return [UserTimes(submitted_s, tuple(tokens_s)) for submitted_s, tokens_s in users], result
    except (ValueError, KeyError, TypeError):
        raise RingError(f"{where}: {_how_it_ended(code, errors)}") from None


def _how_it_ended(code: int | None, errors: bytes) -> str:
    """Return how a program ended, in one line: its exit code or signal, and its last words."""
    code = code or 0
    ended = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
    lines = errors.decode(errors="replace").strip().splitlines()
    return f"its process ended with {ended}: {lines[-1] if lines else 'it said nothing'}"
