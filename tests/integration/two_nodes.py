"""`mdiq serve` on loopback with a second node, each a process of this machine."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from tests.integration.conftest import mdiq_command

START_S = 200.0


class TwoNodes:
    """A ring and its API. folder: its files; api: its address; key: one of its keys, if it wants any."""

    key = ""

    def __init__(self, folder: Path, file: Path, api: str, cache: Path) -> None:
        self._file = file
        self.folder = folder
        self.api = api
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "MDIQ_CACHE": str(cache)}
        self._environment = environment
        self.second = self._start("node", "second", file, "--name", "second")
        self.starter = self._start("serve", "serve", file)

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def metric(self, name: str) -> float:
        request = urllib.request.Request(f"{self.api}/metrics", headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=30) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def replace_second(self) -> None:
        """Kill the second node and start it again; return when it waits for the ring, and so for signals."""
        before, deadline = self.log_of("second").count("waits_for_starter"), time.monotonic() + START_S
        self.second.kill()
        self.second.wait(30)
        self.second = self._start("node", "second", self._file, "--name", "second")
        while self.log_of("second").count("waits_for_starter") == before:
            assert self.second.poll() is None and time.monotonic() < deadline, self.log_of("second")[-3_000:]
            time.sleep(0.2)

    def until_healthy(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            ended = [each for each in (self.starter, self.second) if each.poll() is not None]
            assert not ended and time.monotonic() < deadline, self.log_of("serve") + self.log_of("second")
            try:
                urllib.request.urlopen(f"{self.api}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)

    def stop(self) -> list[int]:
        """End both; return their exit codes."""
        processes = (self.starter, self.second)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        return [process.wait(60) for process in processes]

    def _start(self, command: str, log: str, *arguments: str | Path) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{log}.log").open("ab") as out:
            return subprocess.Popen(
                mdiq_command(command, *arguments), stdout=out, stderr=out, env=self._environment, cwd=self.folder
            )


@contextmanager
def two_nodes(
    folder: Path,
    model: Mapping[str, Any],
    num_layers: int,
    second: Mapping[str, Any] = MappingProxyType({}),
    *,
    cache: Path | None = None,
    **more: Any,
) -> Iterator[TwoNodes]:
    """Give a ring that serves. model, more: parts of the topology; each node has half of the layers.

    second: more keys of the second node. cache: where both nodes keep packed weights; None: in a folder of their own.
    """
    data, other_data, control, weights, api = _free_ports(5)
    starter = {"name": "desk", "role": "starter", "data_port": data, "control_port": control, "weights_port": weights}
    both = {"address": "127.0.0.1", "threads": 1}
    half = num_layers // 2
    topology = {
        "version": 1,
        "model": dict(model),
        "nodes": [
            {**starter, **both, "layers": f"0-{half - 1}"},
            {"name": "second", "data_port": other_data, **both, "layers": f"{half}-{num_layers - 1}", **second},
        ],
        **more,
        "api": {"port": api, **more.get("api", {})},
    }
    file = folder / "topology.yaml"
    file.write_text(yaml.safe_dump(topology))
    ring = TwoNodes(folder, file, f"http://127.0.0.1:{api}", cache or folder / "cache")
    try:
        ring.until_healthy()
        yield ring
    finally:
        codes = ring.stop()
    assert codes == [0, 0], ring.log_of("serve")[-3_000:] + ring.log_of("second")[-3_000:]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
