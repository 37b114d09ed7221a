"""Where figures come from: when, on which machine, by which command and which state of the sources."""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import mdiq
from mdiq.bench.machine import machine

_GIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """commit: of the sources, empty if they are not a Git checkout; is_changed: they differ from it.

    load_average: of the minute before, by other programs as well; over the number of cores, figures are too low.
    """

    made_at: str
    command: str
    mdiq: str
    commit: str
    is_changed: bool
    machine: Mapping[str, str | int]
    load_average: float


def make_receipt(arguments: Sequence[str]) -> Receipt:
    """Return the Receipt of figures that will be made now, by ``mdiq`` with these arguments."""
    sources = Path(mdiq.__file__).parent
    commit = _git(sources, "rev-parse", "HEAD")
    return Receipt(
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["mdiq", *arguments]),
        mdiq=mdiq.__version__,
        commit=commit,
        is_changed=bool(commit and _git(sources, "status", "--porcelain", "--", ".")),
        machine=machine(),
        load_average=os.getloadavg()[0],
    )


def _git(folder: Path, *arguments: str) -> str:
    """Return what git says of the checkout that holds a folder; empty if there is none, or no git."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=_GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
