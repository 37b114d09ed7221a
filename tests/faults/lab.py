"""A whole ring of real processes on loopback, and faults of its nodes in an operator's words.

It is used from outside, as an operator and a client do: processes and signals, `mdiq status`, the HTTP API, log lines.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tests.faults.units import Unit

STARTER = "desk"
POLL_S = 0.005  # a log is looked at so often
FORMED_S = 240.0
_MDIQ = (sys.executable, "-P", "-m", "mdiq")
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
"""The kernel ends a process with the thread that started it, also when this process is killed."""


class Lab:
    """A ring, from ``with`` to its end: a Starter with its HTTP API, workers and spares.

    keeps_up: workers and spares are started again by a restart loop; else by ``start`` only. ring: keys of the
    topology's section ``ring``. memory: that each node may use.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        num_workers: int = 2,
        num_spares: int = 0,
        keeps_up: bool = True,
        ring: Mapping[str, object] | None = None,
        memory: str = "3G",
    ) -> None:
        self.folder, self.model = folder, model
        self.file = folder / "topology.yaml"
        self.workers = [f"pi{i}" for i in range(1, num_workers + 1)]
        self.spares = [f"pi{i}" for i in range(num_workers + 1, num_workers + num_spares + 1)]
        self.names = [STARTER, *self.workers, *self.spares]
        self.pids: dict[int, str] = {}
        self.units: dict[str, Unit] = {}
        self._ring = dict(ring or {})
        self._keeps_up = keeps_up
        self._memory = memory
        self._started_at: dict[str, int] = {}  # where the log of the newest process begins
        self._thaws: list[threading.Timer] = []
        self._runtime = tempfile.TemporaryDirectory(prefix="mdiq-lab-")  # the path of a socket file has to be short
        self._environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": self._runtime.name,
            "MDIQ_LOG": "json",
            "OMP_NUM_THREADS": "1",
            "PIP_NO_INDEX": "1",
        }

    def __enter__(self) -> "Lab":
        try:
            self._write_topology()
            for name in self.names:
                restarts = self._keeps_up and name != STARTER
                self.units[name] = Unit(name, partial(self._spawn, name), restarts=restarts)
            for name in self.names:
                self.start(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process; the caches of the nodes go, and their logs stay."""
        for timer in self._thaws:
            timer.cancel()
        for unit in self.units.values():
            unit.signal(signal.SIGCONT)
            unit.close()
        for cache in self.folder.glob("cache-*"):
            shutil.rmtree(cache)
        self._runtime.cleanup()

    # Faults

    def kill(self, name: str) -> None:
        """kill -9: the process ends without a word; return when it is gone."""
        self.units[name].kill()

    def freeze(self, name: str, seconds: float) -> None:
        """Stop the process for so long (SIGSTOP), as a device does that swaps; return at once."""
        unit = self.units[name]
        frozen = unit.pid
        unit.signal(signal.SIGSTOP)
        timer = threading.Timer(seconds, lambda: _thaw(frozen))
        self._thaws = [timer, *(old for old in self._thaws if old.is_alive())]
        timer.start()

    def stop(self, name: str) -> None:
        """systemctl stop: SIGTERM, and it stays down; return when it has ended."""
        self.units[name].stop()

    def start(self, name: str) -> None:
        """systemctl start; return when there is a process."""
        self.units[name].start()

    def restart(self, name: str) -> None:
        """systemctl restart; return when there is a new process."""
        self.stop(name)
        self.start(name)

    # What an operator and a client see

    @property
    def api(self) -> str:
        return f"127.0.0.1:{self._api_port}"

    def status(self) -> dict[str, Any]:
        """Return what `mdiq status --json` shows; empty while the service is on its way up."""
        done = subprocess.run(
            [*_MDIQ, "status", str(self.file), "--json"], env=self._environment, capture_output=True, timeout=60
        )
        return dict(json.loads(done.stdout)) if done.stdout.startswith(b"{") else {}

    def mdiq(self, command: str, *words: str) -> str:
        """Have an operator type a command about the topology; return what it says.

        Raises:
            CalledProcessError: it refuses.
        """
        typed = [*_MDIQ, command, str(self.file), *words]
        done = subprocess.run(typed, env=self._environment, capture_output=True, text=True, check=True, timeout=300)
        return done.stdout

    def is_healthy(self) -> bool:
        """Whether the API takes requests."""
        try:
            with urllib.request.urlopen(f"http://{self.api}/health", timeout=10):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:  # it does not listen yet
            return False

    def until_whole(self, timeout_s: float = FORMED_S) -> dict[str, Any]:
        """Wait until the ring serves on as many nodes as the topology has, and the others stand by; return the status.

        What the log of each newest process says counts: the Starter may not know yet that the one before is dead.
        """
        status: dict[str, Any] = {}
        for _ in _until(timeout_s, 0.1):
            if self.is_healthy() and all(self._is_ready(name) for name in self.names):
                status = self.status()
                states = [node["state"] for node in status.get("nodes", [])]
                if status.get("is_serving") and states.count("serves") == 1 + len(self.workers):
                    if all(state in ("serves", "stands by") for state in states):
                        return status
        waits = [name for name in self.names if not self._is_ready(name)]
        raise TimeoutError(f"the ring is not whole after {timeout_s:g} s; not ready: {waits}; status: {status}")

    def _is_ready(self, name: str) -> bool:
        unit, events = self.units[name], ("epoch_began", "stands_by")
        said = self.said(name, self._started_at.get(name, 0))
        return unit.is_on and any(line["event"] in events for line in said)

    # Logs

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def mark(self, name: str) -> int:
        """Return where the log ends now."""
        return self.log(name).stat().st_size if self.log(name).exists() else 0

    def marks(self) -> dict[str, int]:
        return {name: self.mark(name) for name in self.names}

    def said(self, name: str, since: int = 0, event: str = "") -> list[dict[str, Any]]:
        """Return the lines of a log after a mark, those of one event if it is given."""
        if not self.log(name).exists():
            return []
        with self.log(name).open("rb") as file:
            file.seek(since)
            text = file.read()
        return [line for line in _parsed(text) if event in ("", line["event"])]

    def until_said(self, names: str | Iterable[str], event: str, since: Mapping[str, int], timeout_s: float) -> str:
        """Wait until one of these nodes has logged an event after its mark; return its name."""
        names = [names] if isinstance(names, str) else list(names)
        for _ in _until(timeout_s, POLL_S):
            for name in names:
                if self.said(name, since[name], event):
                    return name
        raise TimeoutError(f"{', '.join(names)}: no {event} within {timeout_s:g} s")

    def tracebacks(self) -> list[str]:
        """Return the names of nodes in whose logs Python has printed an error that nobody caught."""
        return [name for name in self.names if self.log(name).exists() and "Traceback" in self.log(name).read_text()]

    # Processes

    def _spawn(self, name: str) -> "subprocess.Popen[bytes]":
        environment = dict(self._environment)
        if name == STARTER:
            command = [*_MDIQ, "serve", str(self.file), "--even-split"]
        else:
            command = [*_MDIQ, "node", str(self.file), "--name", name]
            environment["MDIQ_CACHE"] = str(self.folder / f"cache-{name}")
        self._started_at[name] = self.mark(name)
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [*_DIES_WITH_US, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self.pids[process.pid] = name
        return process

    def _write_topology(self) -> None:
        ports = _free_ports(len(self.names) + 3)
        control, weights, self._api_port, *data = ports
        nodes: list[dict[str, object]] = [
            {"name": name, "address": "127.0.0.1", "data_port": port, "threads": 1, "memory": self._memory}
            for name, port in zip(self.names, data, strict=True)
        ]
        nodes[0] |= {"role": "starter", "control_port": control, "weights_port": weights}
        for node in nodes[1 + len(self.workers) :]:
            node["spare"] = True
        topology = {
            "version": 1,
            "model": {"path": str(self.model)},
            "nodes": nodes,
            "api": {"port": self._api_port},
            "ring": self._ring,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(yaml.safe_dump(topology, sort_keys=False))
        done = subprocess.run(
            [*_MDIQ, "keys", str(self.file)], env=self._environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


def serving_of(status: Mapping[str, Any]) -> list[str]:
    """Return the workers and spares that serve, in the order of the ring."""
    return [node["name"] for node in status["nodes"] if node["state"] == "serves"][1:]


def _parsed(text: bytes) -> Iterator[dict[str, Any]]:
    """Yield the log lines of a text that are whole; what is no log line (a traceback) is left out."""
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        with contextlib.suppress(ValueError):
            parsed = json.loads(line)
            if isinstance(parsed, dict) and "event" in parsed:
                yield parsed


def _thaw(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
        os.kill(pid, signal.SIGCONT)


def _until(timeout_s: float, poll_s: float) -> Iterator[None]:
    """Yield again and again until the time is over."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        yield
        time.sleep(poll_s)


def _free_ports(count: int) -> Sequence[int]:
    with contextlib.ExitStack() as sockets:
        taken = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in taken]


def running_of(folder: Path) -> list[str]:
    """Return the command lines of all processes of this machine that name a folder."""
    found = []
    for process in Path("/proc").iterdir():
        if re.fullmatch(r"\d+", process.name):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(folder) in command:
                    found.append(command.strip())
    return found
