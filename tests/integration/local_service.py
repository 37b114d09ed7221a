"""`mdiq serve` without a topology, on two processes of this machine, with API keys."""

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

import psutil

from mdiq.api.keys import line_of
from tests.integration.conftest import mdiq_command

START_S = 400.0


class LocalService:
    """The service. url: of its API; key: what the metrics are asked for with."""

    def __init__(self, folder: Path, model: Path, keys: Mapping[str, Mapping[str, int]], *words: str) -> None:
        self._log = folder / "serve.log"
        file = folder / "api-keys"
        file.touch(mode=0o600)
        file.write_text("".join(f"{line_of(f'key{i}', key, limits)}\n" for i, (key, limits) in enumerate(keys.items())))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.key = f"http://127.0.0.1:{port}", next(iter(keys))
        command = mdiq_command("serve", "--model", model, "--nodes", "2", "--threads", "1", "--port", str(port))
        command += ["--keys-file", str(file), *words]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> bytes:
        request = urllib.request.Request(f"{self.url}{path}", headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return bytes(response.read())

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.get("/metrics").decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def resident_bytes(self) -> list[int]:
        """Return the memory of the Starter's process and of those of the other nodes."""
        starter = psutil.Process(self.process.pid)
        return [starter.memory_info().rss, *(each.memory_info().rss for each in starter.children())]

    def until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()[-4_000:]
            try:
                self.get("/ready")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)


@contextmanager
def local_service(
    folder: Path, model: Path, keys: Mapping[str, Mapping[str, int]], *words: str
) -> Iterator[LocalService]:
    """Give a service that serves; its end and its log have to be clean.

    keys: the limits of each; words: further options.
    """
    service = LocalService(folder, model, keys, *words)
    try:
        service.until_ready()
        yield service
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0, service.log()[-4_000:]
        assert "Traceback" not in service.log(), service.log()[-4_000:]
    finally:
        service.process.kill()
        service.process.wait()
