"""Booted test devices, reached as an operator reaches them: over ssh. MDIQ_DEVICES names the tool that boots them.

What the tool must do: ``up NAME [--cpu X] [--memory Y]`` boots a device and prints its address, ``sh NAME COMMAND...``
runs a command in it as root, ``limit NAME --memory Y`` changes its memory while it runs, ``off NAME`` pulls its power
and keeps its disk, ``list`` tells what runs (NAME ADDRESS on), ``hub COMMAND...`` runs a command of this machine on
the devices' network (a namespace in which they hang on the bridge BRIDGE, by interfaces v...),
``down`` removes all devices.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
import zmq

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TOOL = os.environ.get("MDIQ_DEVICES")
HUB = "10.77.0.1"  # this machine on the devices' network
BRIDGE = "mdiq0"  # of that network
STARTER = "desk"
UP_S = 900.0  # the first call may build the devices' disk image
COMMAND_S = 300.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.devices)
            if TOOL is None:
                item.add_marker(pytest.mark.skip(reason="MDIQ_DEVICES names no tool that boots test devices"))


def run(
    *command: str | Path, stdin: bytes | None = None, timeout: float = COMMAND_S
) -> subprocess.CompletedProcess[str]:
    """Run a command of this machine to its end."""
    done = subprocess.run(
        [str(part) for part in command],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=timeout,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    )


def must(done: subprocess.CompletedProcess[str]) -> str:
    """Return the output of a command that has to succeed."""
    assert done.returncode == 0, f"{done.args}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(slots=True)
class Shelf:
    """The devices of a file of tests."""

    tool: str
    addresses: dict[str, str] = field(default_factory=dict)

    def up(self, name: str, cpu: float = 1.0, memory: str = "2G") -> None:
        out = must(run(self.tool, "up", name, "--cpu", str(cpu), "--memory", memory, timeout=UP_S))
        self.addresses[name] = out.split()[-1]

    def sh(self, name: str, script: str, stdin: bytes | None = None, timeout: float = COMMAND_S) -> str:
        """Run a script on a device as root and return its output."""
        return must(self.try_sh(name, script, stdin, timeout))

    def try_sh(
        self, name: str, script: str, stdin: bytes | None = None, timeout: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        return run(self.tool, "sh", name, "bash", "-c", script, stdin=stdin, timeout=timeout)

    def write(self, name: str, path: str, content: bytes) -> None:
        self.sh(name, f"mkdir -p $(dirname {path}) && cat >{path}", content)

    def limit(self, name: str, memory: str) -> None:
        must(run(self.tool, "limit", name, "--memory", memory))

    def off(self, name: str) -> None:
        self.sh(name, "sync")
        must(run(self.tool, "off", name))
        # Its processes may take a while to be gone, and until then it cannot be booted.
        for _ in range(300):
            if f"{name} {self.addresses[name]} on" not in must(run(self.tool, "list")).splitlines():
                return
            time.sleep(0.1)
        raise AssertionError(f"{name}: it is not off")

    def cut(self, name: str) -> None:
        """Pull its network cable."""
        must(run(self.tool, "cut", name))

    def mend(self, name: str) -> None:
        must(run(self.tool, "mend", name))

    def unit(self, name: str, *properties: str, unit: str = "mdiq-node") -> list[str]:
        """Return properties of a device's unit."""
        out = self.sh(name, f"systemctl show --property={','.join(properties)} {unit}")
        values = dict(line.split("=", 1) for line in out.splitlines())
        return [values[wanted] for wanted in properties]

    def wait(self, name: str, condition: str, timeout: float = 120.0) -> str:
        """Wait until a shell condition holds on a device."""
        loop = f"until {condition}; do sleep 0.2; done"
        done = self.try_sh(name, f"timeout {timeout:.0f} bash -c '{loop}'", timeout=timeout + 30)
        assert done.returncode == 0, f"{name}: not within {timeout:.0f} s: {condition}\n" + self.journal(name)
        return done.stdout

    def journal(self, name: str) -> str:
        return self.try_sh(name, "journalctl --no-pager -o cat -n 60 -u mdiq-node").stdout

    def down(self) -> None:
        # Each device has gigabytes to remove.
        must(run(self.tool, "down", timeout=UP_S))


@pytest.fixture(scope="module")
def shelf() -> Iterator[Shelf]:
    """The shelf, empty for each file of tests; whatever was booted is removed at the end, also after failures."""
    assert TOOL is not None  # the tests are skipped without it
    shelf = Shelf(TOOL)
    running = must(run(shelf.tool, "list")).strip()
    if running:
        pytest.fail(f"devices are there already; remove them ({TOOL} down) or let the others end:\n{running}")
    try:
        yield shelf
    finally:
        shelf.down()


def build_wheels(folder: Path) -> Path:
    """Fill a folder with all wheels of a device, as nodes/README.md says."""
    must(run(sys.executable, ROOT / "nodes" / "wheels.py", "--python", "3.11", "--wheels", folder, timeout=UP_S))
    return folder


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheels(tmp_path_factory.mktemp("wheels"))


@dataclass(slots=True)
class Operator:
    """The operator's machine: a topology, keys of the nodes, an ssh key, known hosts, wheels."""

    shelf: Shelf
    folder: Path
    wheels: Path

    @property
    def topology(self) -> Path:
        return self.folder / "topology.yaml"

    def key(self, name: str) -> Path:
        return self.folder / "keys" / f"{name}.key"

    def welcome(self, names: Sequence[str]) -> None:
        """Do what an operator does by hand before: let devices know the ssh key, learn their host keys."""
        (self.folder / "keys").mkdir(mode=0o700)
        must(run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "id"))
        public = (self.folder / "id.pub").read_bytes()
        known = []
        for name in names:
            self.shelf.sh(name, "mkdir -p -m 700 /root/.ssh && cat >/root/.ssh/authorized_keys", public)
            host_key = self.shelf.sh(name, "cat /etc/ssh/ssh_host_ed25519_key.pub").split()[:2]
            known.append(" ".join([self.shelf.addresses[name], *host_key]))
            self.key(name).write_text(f"private key of {name}, forty characters long"[:40])
            self.key(name).chmod(0o600)
        (self.folder / "known_hosts").write_text("\n".join(known) + "\n")
        self.write_topology({name: self.shelf.addresses[name] for name in names})

    def write_topology(self, addresses: dict[str, str]) -> None:
        """Write a topology whose Starter is this machine: provision.py is to bring up the others only."""
        nodes = [
            {"name": name, "address": address, "public_key": zmq.curve_keypair()[0].decode()}
            for name, address in {STARTER: HUB, **addresses}.items()
        ]
        nodes[0]["role"] = "starter"
        document = {"version": 1, "model": {"path": "smollm2-135m-instruct"}, "nodes": nodes}
        self.topology.write_text(yaml.safe_dump(document, sort_keys=False))

    def provision(self, *arguments: str, wheels: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run nodes/provision.py for all but the Starter, on the devices' network."""
        workers = [node["name"] for node in yaml.safe_load(self.topology.read_text())["nodes"][1:]]
        command = [sys.executable, ROOT / "nodes" / "provision.py", self.topology, "--wheels", wheels or self.wheels]
        access = ["--identity", self.folder / "id", "--known-hosts", self.folder / "known_hosts"]
        only = [part for name in workers for part in ("--only", name)]
        return run(self.shelf.tool, "hub", *command, *access, *only, *arguments, timeout=UP_S)
