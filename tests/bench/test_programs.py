"""What a program that ran a load says, and how it ended where it says nothing."""

import asyncio
import json
import signal
import sys

import pytest

from mdiq.bench.figures import UserTimes
from mdiq.bench.programs import kill, result_of
from mdiq.errors import RingError

GOOD = {"submitted_s": [1.0, 1.5], "tokens_s": [[2.0, 3.0], [2.5]], "rss_bytes": 7}


def test_each_user_has_the_times_that_the_program_says_and_the_rest_is_kept() -> None:
    users, result = result_of("peer", json.dumps(GOOD).encode(), b"a warning\n", 0)
    assert users == [UserTimes(1.0, (2.0, 3.0)), UserTimes(1.5, (2.5,))]
    assert result["rss_bytes"] == 7


def test_an_error_that_a_program_says_is_raised_with_its_name() -> None:
    with pytest.raises(RingError, match="^ring 1 apart: no memory$"):
        result_of("ring 1 apart", b'{"error": "no memory"}\n', b"Traceback", 0)


@pytest.mark.parametrize(
    ("out", "errors", "code", "ended"),
    [
        (b"", b"Traceback\nValueError: it broke\n", 1, "exit code 1: ValueError: it broke"),
        (b"", b"", -signal.SIGKILL, "signal 9 (Killed): it said nothing"),
        (b"", b"", None, "exit code 0: it said nothing"),
        (b"not JSON", b"", 0, "exit code 0: it said nothing"),
        (b"[1]", b"\xff\n", 0, "exit code 0: \N{REPLACEMENT CHARACTER}"),
        (b'{"submitted_s": [1.0]}', b"", 0, "exit code 0: it said nothing"),
        (b'{"submitted_s": [1.0], "tokens_s": []}', b"", 0, "exit code 0: it said nothing"),
        (b'{"submitted_s": 1.0, "tokens_s": [[2.0]]}', b"", 0, "exit code 0: it said nothing"),
    ],
)
def test_a_program_without_a_result_is_one_line_of_how_it_ended(
    out: bytes, errors: bytes, code: int | None, ended: str
) -> None:
    with pytest.raises(RingError) as raised:
        result_of("peer", out, errors, code)
    assert str(raised.value) == f"peer: its process ended with {ended}"


async def test_a_program_is_killed_once_and_may_have_ended() -> None:
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(60)")
    kill(child)
    assert await child.wait() == -signal.SIGKILL
    kill(child)
