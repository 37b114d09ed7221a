"""Strangers that open very many connections to a node with few descriptors."""

import contextlib
import os
import resource
import socket
import subprocess
import time
from pathlib import Path

from tests.integration.conftest import mdiq_command

DESCRIPTORS = 256
TOPOLOGY = """
version: 1
model: {{path: smollm2-135m-instruct}}
nodes:
  - {{name: desk, role: starter, address: 127.0.0.1, control_port: {0}, data_port: {1}, weights_port: {2}}}
  - {{name: pi1, address: 127.0.0.1, data_port: {3}}}
"""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in found]


def _connected(port: int, patience_s: float) -> socket.socket:
    until_s = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        assert time.monotonic() < until_s, "nobody listens"
        time.sleep(0.1)


def test_a_node_with_few_descriptors_outlives_hundreds_of_silent_connections(tmp_path: Path) -> None:
    ports = _free_ports(4)
    file, log = tmp_path / "topology.yaml", tmp_path / "log"
    file.write_text(TOPOLOGY.format(*ports))
    with log.open("wb") as out:
        node = subprocess.Popen(
            mdiq_command("node", file, "--name", "pi1"),
            stdout=out,
            stderr=out,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS)),
        )
    held: list[socket.socket] = []
    try:
        held.append(_connected(ports[3], 90))
        for _ in range(3 * DESCRIPTORS):
            held.append(_connected(ports[3], 10))
            time.sleep(0.002)
        until_s = time.monotonic() + 3  # heartbeats read this process's memory each second
        while time.monotonic() < until_s:
            assert node.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
        assert len(os.listdir(f"/proc/{node.pid}/fd")) < DESCRIPTORS / 2
        assert "too_many_connections" in log.read_text()
    finally:
        for each in held:
            each.close()
        node.kill()
        node.wait()
