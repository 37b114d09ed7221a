"""What an operator asks of a running service: a line of JSON to a socket file, a line back. For its user and root.

The file lies in a folder that nobody else can enter; who can open it may stop the service anyway.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from mdiq.errors import ConfigError, MdiqError

log = structlog.get_logger()

MAX_BYTES = 1 << 20
ANSWER_S = 660.0  # a node is drained when what runs has ended
READ_S = 5.0

Command = Callable[[Mapping[str, Any]], Awaitable[Any]]


class AdminServer:
    """Answers commands by name. Each gets the question and returns what becomes JSON; MdiqErrors go to who asked.

    A lock on a file beside the socket file lasts as long as this process: a second one changes nothing and is refused.
    name: what that refusal calls this service, its file for example.
    """

    def __init__(self, path: Path, commands: Mapping[str, Command], name: object) -> None:
        self._path = path
        self._name = name
        self._commands = commands
        self._server: asyncio.Server | None = None
        self._lock: int | None = None

    async def __aenter__(self) -> "AdminServer":
        with contextlib.ExitStack() as undo:
            undo.callback(self._unlock)
            await self._open()
            undo.pop_all()
        return self

    async def _open(self) -> None:
        try:
            folder = self._path.parent
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
                raise ConfigError(f"{folder}: others can write there; remove it, or set XDG_RUNTIME_DIR")
            self._lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = f"{self._name}: a service of it runs already (it holds {self._path}.lock); stop that first"
                raise ConfigError(text) from None
            self._path.unlink(missing_ok=True)  # of one that was killed
            before = os.umask(0o177)
            try:
                self._server = await asyncio.start_unix_server(self._serve, self._path, limit=MAX_BYTES)
            finally:
                os.umask(before)
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}; mdiq status needs this socket file") from None

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        # The lock file stays: one that is removed while another process waits for it would be locked by two.
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            answer = await self._answer(reader)
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        try:
            async with asyncio.timeout(READ_S):
                question = json.loads(await reader.readline())
            command = self._commands[question["do"]]
        except (TimeoutError, ValueError, KeyError, TypeError, RecursionError):
            return {"error": f"unknown command; use one of {', '.join(self._commands)}"}
        try:
            return {"ok": await command(question)}
        except MdiqError as error:
            return {"error": str(error)}
        except Exception as error:  # of one question, not of the service
            log.exception("admin_failed", question=str(question)[:200])
            return {"error": f"{error!r}; see the log of mdiq serve"}


def socket_path(topology: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the service of a topology listens: the first folder that this process has or may make."""
    return next(_places(topology, environ))


def ask(topology: Path, question: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Any:
    """Return what the service of a topology answers.

    Raises:
        ConfigError: no service of it runs here, or it refuses.
    """
    places = list(_places(topology, environ))
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(ANSWER_S)
        for place in places:
            with contextlib.suppress(OSError):
                link.connect(str(place))
                break
        else:
            if not topology.exists():
                raise ConfigError(
                    f"{topology}: no such file; give the file that mdiq serve or mdiq route was started with"
                )
            raise ConfigError(
                f"{topology}: no mdiq serve or mdiq route of it runs here that this user may ask; start it, or run "
                f"this as root or as its user (looked at {', '.join(str(place) for place in places)})"
            )
        try:
            link.sendall(json.dumps(question).encode() + b"\n")
            with link.makefile("rb") as lines:
                answer = json.loads(lines.readline(MAX_BYTES))
        except (OSError, ValueError):
            raise ConfigError(f"{topology}: mdiq serve ended while it was asked; see its log") from None
    if "error" in answer:
        raise ConfigError(str(answer["error"]))
    return answer["ok"]


def _places(topology: Path, environ: Mapping[str, str]) -> Iterator[Path]:
    # One machine may serve several topologies.
    name = f"serve-{hashlib.sha256(str(topology.resolve()).encode()).hexdigest()[:12]}.sock"
    if folder := environ.get("RUNTIME_DIRECTORY"):  # systemd's, of the unit
        yield Path(folder.partition(":")[0]) / name
    for folder in ("/run/mdiq", "/run/mdiq-route"):  # of the units of a Starter and of a router
        if os.access(folder, os.X_OK):
            yield Path(folder) / name
    if folder := environ.get("XDG_RUNTIME_DIR"):
        yield Path(folder) / "mdiq" / name
    yield Path(f"/tmp/mdiq-{os.getuid()}") / name
