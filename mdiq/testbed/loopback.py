"""Runs a whole topology on one machine: each node a process of its own, in a network of its own where that can be had.

Where the kernel lets us (root, or user namespaces), every node gets a network namespace with its own address, the one
of the file if that is an IPv4 address, and a bridge joins them: nothing else is reached from there, and nothing there
from outside. Elsewhere the nodes share loopback, each with an address of 127.0.0.0/8 of its own. The ring runs on a
copy of the file with these addresses, and with keys made for it where the file's are not at hand.

Nothing has to be cleaned up by hand: the namespaces have no names and end with the last process in them, and every
process ends with this one, also when it is killed. The command line is __main__.py.
"""

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import yaml

from mdiq.config.load import load_topology
from mdiq.config.units import AUTO
from mdiq.errors import ConfigError, RingError
from mdiq.testbed.networks import SPACE, Link, Namespaces, NoNamespacesError, Plain
from mdiq.transport.keys import make_keys

PYTHON = (sys.executable, "-P", "-m")
MDIQ = (*PYTHON, "mdiq")
RELAY = (*PYTHON, "mdiq.testbed.relay")
CAPTURE = (*PYTHON, "mdiq.testbed.capture")
LINK = "FROM:TO,delay=20ms,bandwidth=10mbit,jitter=5ms"
STOP_S = 20.0
"""A command that has not ended so long after SIGTERM is killed."""
# The kernel ends them if this process is killed. It comes after nsenter, which would lose it.
_DIES_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--") if shutil.which("setpriv") else ()


class LoopbackRing:
    """The Nodes of a topology on this machine, from ``with`` to its end; the Starter's command is the caller's.

    topology: the operator's file. folder: for the copy that the ring runs on (``file``), keys, logs and caches.
    links: Hops that are slow. capture: a file for all packets between the Nodes. without: Nodes not to start yet.
    """

    def __init__(
        self,
        topology: Path,
        folder: Path,
        *,
        links: Sequence[Link] = (),
        capture: Path | None = None,
        without: Sequence[str] = (),
        plain: bool = False,
    ) -> None:
        self._loaded = load_topology(topology, without_keys=True)
        self._names = [node.name for node in self._loaded.topology.nodes]
        self._links, self._capture, self._without = _all_links(links, self._loaded.topology.hops), capture, without
        self._network: Namespaces | Plain = Plain(self._names)
        self._commands: list[subprocess.Popen[Any]] = []
        self._nodes: dict[str, subprocess.Popen[Any]] = {}
        self._relays: list[subprocess.Popen[Any]] = []
        self._captures: list[subprocess.Popen[Any]] = []
        self.folder = folder
        self.file = folder / "topology.yaml"
        self.starter = self._loaded.topology.starter.name
        self.why_plain = "it was asked for" if plain else ""

    @property
    def addresses(self) -> Mapping[str, str]:
        return self._network.addresses

    @property
    def is_plain(self) -> bool:
        """The Nodes share loopback."""
        return isinstance(self._network, Plain)

    def __enter__(self) -> "LoopbackRing":
        """Start the Nodes; they wait for their Starter.

        Raises:
            MdiqError: a file cannot be written, or what was asked for cannot be had on this machine.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._start()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, name: str) -> Path:
        """Return the file that a Node's process writes to."""
        return self.folder / f"{name}.log"

    def start_node(self, name: str, *arguments: str, program: Sequence[str] = MDIQ) -> "subprocess.Popen[Any]":
        """Start a worker's process, with a cache and a log of its own. program: what stands for mdiq."""
        environment = {**os.environ, "MDIQ_CACHE": str(self.folder / f"cache-{name}")}
        command = [*program, "node", str(self.file), "--name", name, *arguments]
        with self.log(name).open("ab") as log:
            process = self._popen(name, command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self._nodes[name] = process
        return process

    def start(self, name: str, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a command in a Node's network, in a session of its own; it ends with the ring at the latest.

        command: ``mdiq`` in front is the one that runs now, and {topology} the ring's file.
        """
        command = [word.replace("{topology}", str(self.file)) for word in command]
        if command[0] == "mdiq":
            command = [*MDIQ, *command[1:]]
        try:
            process = self._popen(name, command, **options)
        except OSError as error:
            raise ConfigError(f"{command[0]}: {error.strerror}; give a command that can be run") from None
        self._commands.append(process)
        return process

    def open_api(self) -> None:
        """Let this machine's programs reach the Starter's API where the file says, if it is in a network of its own.

        Raises:
            ConfigError: the port is not free.
        """
        if self.is_plain:
            return
        host, port = "127.0.0.1", self._loaded.topology.api.port
        try:
            listener = socket.create_server((host, port))
        except OSError as error:
            raise ConfigError(
                f"--open-api: {host}:{port}: {os.strerror(error.errno or 0)}; write another api.port"
            ) from None
        with listener:
            # A socket stays in the network in which it was made, whichever process has it.
            relay = [*self._network.inside(self.starter), *RELAY, "delay=0ms"]
            self._start_relay(relay, [[f"tcp://{host}:{port}", listener.fileno()]], pass_fds=[listener.fileno()])

    def ended(self) -> dict[str, int]:
        """Return exit codes of Nodes that have ended; each once."""
        codes = {name: code for name, node in self._nodes.items() if (code := node.poll()) is not None}
        for name in codes:
            del self._nodes[name]
        return codes

    def close(self) -> None:
        """End every process, the Starter's first, and with them the networks; kill what does not end."""
        nodes = list(self._nodes.values())
        try:
            _end(self._commands)
            _end(nodes)
            _end(self._captures)
        finally:
            for process in (*self._commands, *nodes, *self._relays, *self._captures):
                _kill(process)
            self._network.close()

    def _start(self) -> None:
        if not self.why_plain:
            try:
                self._network = Namespaces(self._own_addresses())
            except NoNamespacesError as error:
                self.why_plain = str(error)
        if self._links and isinstance(self._network, Plain):
            raise ConfigError(f"--link: it needs network namespaces, and there are none here: {self.why_plain}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_copy()
        except OSError as error:
            raise ConfigError(f"{self.folder}: {error.strerror}; choose another folder") from None
        if self._capture is not None:
            self._start_capture(self._capture)
        for link in self._links:
            self._slow_down(link)
        for name in self._names:
            if name != self.starter and name not in self._without:
                self.start_node(name)

    def _own_addresses(self) -> dict[str, str]:
        """Return the addresses of the file, and others for host names, loopback, IPv6, and those that two share."""
        own: dict[str, str] = {}
        free = (str(address) for address in SPACE.hosts())
        given = [node.address for node in self._loaded.topology.nodes]
        for node in self._loaded.topology.nodes:
            is_usable = _is_ipv4(node.address) and given.count(node.address) == 1
            own[node.name] = node.address if is_usable else next(a for a in free if a not in given)
        return own

    def _write_copy(self) -> None:
        loaded, topology = self._loaded, self._loaded.topology
        data = yaml.safe_load(loaded.file.read_text(encoding="utf-8"))
        cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().available
        for node in data["nodes"]:
            node["address"] = self.addresses[node["name"]]
            # They have one machine for all of them, which auto does not know.
            if node.get("threads", "auto") == "auto":
                node["threads"] = max(cores // len(self._names), 1)
            if node.get("memory", "auto") == "auto":
                node["memory"] = f"{max(memory * 8 // 10 // len(self._names) >> 20, 64)}M"
        if (model := loaded.path(topology.model.path)).exists():
            data["model"]["path"] = str(model.resolve())
        files = [(data.get("api"), key) for key in ("keys_file", "tls_cert", "tls_key")]
        for section, key in (*files, (data, "journal")):
            if section and section.get(key, AUTO) not in (None, AUTO):
                section[key] = str(loaded.path(section[key]).resolve())
        security = data.setdefault("security", {})
        keys = loaded.path(topology.security.keys).resolve()
        has_keys = all(node.public_key and (keys / f"{node.name}.key").exists() for node in topology.nodes)
        security["keys"] = str(keys if has_keys else self.folder.resolve() / "keys")
        if not has_keys:
            public = {} if topology.security.insecure else make_keys(Path(security["keys"]), self._names)
            for node in data["nodes"]:
                node.pop("public_key", None)
                node |= {"public_key": public[node["name"]]} if public else {}
        self.file.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def _start_capture(self, file: Path) -> None:
        inside, arguments = self._network.capture()
        command = [*inside, *_DIES_WITH_US, *CAPTURE, str(file), *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._captures.append(process)
        assert process.stdout is not None  # PIPE was asked for
        if process.stdout.readline() != b"captures\n":
            _, errors = process.communicate()
            raise ConfigError(f"--capture {file}: {last_line(errors)}; it needs root, and a file that can be written")

    def _slow_down(self, link: Link) -> None:
        assert isinstance(self._network, Namespaces)
        topology = self._loaded.topology
        receiver = topology.node(link.receiver)
        ports = [receiver.data_port]
        if receiver.is_starter:
            ports += [receiver.control_port, receiver.weights_port]
        try:
            command, targets = self._network.relay(link, ports)
        except NoNamespacesError as error:
            raise ConfigError(f"--link {link}: {error}") from None
        self._start_relay([*command, *RELAY, link.shape], targets)

    def _start_relay(self, command: Sequence[str], targets: object, **options: Any) -> None:
        """Start a relay's process, which ends with its standard input; return when it listens."""
        relay = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            **options,
        )  # fmt: skip
        self._relays.append(relay)
        assert relay.stdin is not None and relay.stdout is not None and relay.stderr is not None  # PIPE was asked for
        with contextlib.suppress(OSError):  # it has ended, and says why
            relay.stdin.write(json.dumps(targets).encode() + b"\n")
            relay.stdin.flush()
        if not relay.stdout.readline():
            raise RingError(f"a link's relay does not start: {last_line(relay.stderr.read())}")

    def _popen(self, name: str, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        return subprocess.Popen(
            [*self._network.inside(name), *_DIES_WITH_US, *command], start_new_session=True, **options
        )


def parse_links(texts: Sequence[str]) -> list[Link]:
    """Return the Links that ``--link`` describes; one without names is meant for every Hop: sender and receiver empty.

    Raises:
        ConfigError: it is neither.
    """
    links = []
    for text in texts:
        match = re.fullmatch(r"(?:([a-z0-9-]+):([a-z0-9-]+),)?([a-z]+=.+)", text)
        if match is None:
            raise ConfigError(f"--link {text}: write for example {LINK}; without FROM:TO, it is for every hop")
        links.append(Link(match[1] or "", match[2] or "", match[3]))
    return links


def _all_links(links: Sequence[Link], ring: Sequence[tuple[str, str]]) -> list[Link]:
    """Return one Link a Hop; those with names go before those without.

    Raises:
        ConfigError: a Link is for no Hop of the ring.
    """
    hops = ring if len(ring) > 1 else ()  # one node alone has none
    for link in links:
        if link.sender and (link.sender, link.receiver) not in hops:
            known = ", ".join(f"{a}:{b}" for a, b in hops)
            raise ConfigError(f"--link {link.sender}:{link.receiver}: the ring has no such hop; it has {known}")
    shapes = {hop: link.shape for link in links if not link.sender for hop in hops}
    shapes |= {(link.sender, link.receiver): link.shape for link in links if link.sender}
    return [Link(*hop, shape) for hop, shape in shapes.items()]


def _is_ipv4(text: str) -> bool:
    try:
        return not ipaddress.IPv4Address(text).is_loopback
    except ValueError:
        return False


def _end(processes: Sequence["subprocess.Popen[Any]"]) -> None:
    """Ask processes to end, all at once, and wait until they have."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)


def _kill(process: "subprocess.Popen[Any]") -> None:
    """End a process, and what it has left in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def last_line(text: bytes) -> str:
    return next(reversed(text.decode(errors="replace").strip().splitlines()), "it says nothing")
