"""The commands of nodes/README.md, run as they stand there: only addresses and the model's place are the tests' own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.devices.conftest import ROOT, UP_S, Shelf, must, run
from tests.docs.book import commands_of

CHECKOUT = ("mdiq", "nodes", "pyproject.toml", "README.md", "LICENSE")
MODEL_THERE = "~/.cache/mdiq/models/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(slots=True)
class Guide:
    """An operator at a machine on the devices' network, who types what the README says.

    folder: a checkout. addresses: what stands in the README -> the address of the device that is meant.
    """

    shelf: Shelf
    folder: Path
    addresses: Mapping[str, str]
    model: Path
    commands: list[str] = field(init=False)
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.commands = commands_of((ROOT / "nodes" / "README.md").read_text(encoding="utf-8"))
        for name in CHECKOUT:
            source, ignore = ROOT / name, shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, self.folder / name, ignore=ignore)
            else:
                shutil.copy(source, self.folder)
        (self.folder / "bin").mkdir()
        for name in ("mdiq", "pip"):
            self._program(name, f'exec "{sys.executable}" -m {name} "$@"')
        self._program("python", f'exec "{sys.executable}" "$@"')

    def welcome(self) -> None:
        """Do what the README takes as given: a login to each device, by ssh's own configuration."""
        must(run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "id"))
        public = (self.folder / "id.pub").read_bytes()
        known = []
        for name, address in self.shelf.addresses.items():
            self.shelf.sh(name, "mkdir -p -m 700 /root/.ssh && cat >/root/.ssh/authorized_keys", public)
            known.append(" ".join([address, *self.shelf.sh(name, "cat /etc/ssh/ssh_host_ed25519_key.pub").split()[:2]]))
        (self.folder / "known_hosts").write_text("\n".join(known) + "\n")
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder}/id\nIdentitiesOnly yes\nUserKnownHostsFile {self.folder}/known_hosts\n"
            "StrictHostKeyChecking yes\nBatchMode yes\n"
        )
        self._program("ssh", f'exec "{shutil.which("ssh")}" -F "{self.folder}/ssh_config" "$@"')

    def command(self, beginning: str) -> str:
        """Return the one command of the README that begins so."""
        found = [command for command in self.commands if command.startswith(beginning)]
        assert len(found) == 1, f"nodes/README.md: not one but {len(found)} commands begin with {beginning!r}"
        return found[0]

    def type(self, beginning: str, *, on_network: bool = True, but: str = "") -> subprocess.CompletedProcess[str]:
        """Run the command that begins so; ``but``: what is typed behind it."""
        command = self.command(beginning)
        self.done.add(command)
        return self.run(f"{command} {but}", on_network=on_network)

    def run(self, command: str, *, on_network: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the operator's shell."""
        for there, here in self.addresses.items():
            command = re.sub(rf"(?<![\d.]){re.escape(there)}(?![\d.])", here, command)
        command = command.replace(MODEL_THERE, str(self.model))
        shell = ["env", f"PATH={self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "bash", "-c"]
        script = f"cd {self.folder} && set -euo pipefail && {command}"
        return run(*([self.shelf.tool, "hub"] if on_network else []), *shell, script, timeout=UP_S)

    def _program(self, name: str, script: str) -> None:
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.folder / "bin" / name).chmod(0o755)
