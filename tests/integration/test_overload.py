"""`mdiq serve` on loopback under more than it can do at once: all are answered right, now or when they come again."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.integration.conftest import mdiq_command
from tests.integration.tiny_model import write_tiny_model

pytestmark = pytest.mark.timeout(400)

NUM_REQUESTS = 200
NUM_READERS = 2  # of the wrong kind
NUM_LEAVING = 20
PROMPTS = [f"The answer to question {i} is" for i in range(8)]
SHORT = {"max_tokens": 12, "temperature": 0}
LONG = {"max_tokens": 80, "temperature": 0, "stream": True}


@dataclass(frozen=True)
class Served:
    """A service of two nodes. log: of both; pid: of the Starter."""

    folder: Path
    api: str
    port: int
    pid: int

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.api}/metrics", timeout=30) as response:
            lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def num_open(self) -> int:
        """Return the descriptors and threads of the Starter."""
        return len(os.listdir(f"/proc/{self.pid}/fd")) + len(os.listdir(f"/proc/{self.pid}/task"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("overload")
    write_tiny_model(folder / "model")
    data, other_data, control, weights, api = _free_ports(5)
    starter = {"name": "desk", "role": "starter", "data_port": data, "control_port": control, "weights_port": weights}
    both = {"address": "127.0.0.1", "threads": 1, "memory": "1G"}
    topology = {
        "version": 1,
        "model": {"path": "model", "weights": "plain"},
        "nodes": [
            {**starter, **both, "layers": "0-2"},
            {"name": "second", "data_port": other_data, **both, "layers": "3-5"},
        ],
        "api": {"port": api, "client_timeout": "4s", "max_waiting": 24},
        "ring": {"max_live": 8, "prefix_reuse": False},
    }
    file = folder / "topology.yaml"
    file.write_text(yaml.safe_dump(topology))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "MDIQ_CACHE": str(folder / "cache")}
    with (folder / "log").open("wb") as log:
        commands = [("node", file, "--name", "second"), ("serve", file)]
        processes = [
            subprocess.Popen(mdiq_command(*command), stdout=log, stderr=log, env=environment, cwd=folder)
            for command in commands
        ]
    served = Served(folder, f"http://127.0.0.1:{api}", api, processes[-1].pid)
    try:
        _until_healthy(served, processes)
        yield served
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in processes]
    assert codes == [0, 0], (folder / "log").read_text()[-3_000:]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _until_healthy(served: Served, processes: list["subprocess.Popen[bytes]"]) -> None:
    async def wait() -> None:
        async with asyncio.timeout(200):
            while True:
                assert all(process.poll() is None for process in processes), (served.folder / "log").read_text()
                try:
                    await asyncio.to_thread(urllib.request.urlopen, f"{served.api}/health", timeout=5)
                    return
                except (urllib.error.URLError, OSError):
                    await asyncio.sleep(0.3)

    asyncio.run(wait())


async def _answer(session: aiohttp.ClientSession, url: str, body: dict[str, Any], seen: Counter[str]) -> str:
    """Return the text; come again as often as the service says when."""
    while True:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status == 200:
                if not body.get("stream"):
                    return str((await response.json())["choices"][0]["text"])
                text = await response.text()
                assert text.endswith("data: [DONE]\n\n"), text[-300:]
                events = (json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {"))
                return "".join(event["choices"][0]["text"] for event in events)
            error = (await response.json())["error"]
            assert (response.status, error["type"]) == (429, "rate_limit_error"), error
            retry_s = int(response.headers["Retry-After"])
        assert 1 <= retry_s <= 60 and f"ask again in {retry_s} s" in error["message"]
        seen["refused"] += 1
        await asyncio.sleep(min(retry_s, 2))  # sooner than the service says: more are refused


def _stalled_reader(served: Served) -> socket.socket:
    """Ask for long answers, and read nothing of them."""
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    link.connect(("127.0.0.1", served.port))
    body = json.dumps({**LONG, "prompt": PROMPTS[:2], "max_tokens": 8_000}).encode()
    link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    return link


async def _leave(served: Served, i: int) -> None:
    """Ask, and go away: at once, while it waits, or while it is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    body = json.dumps({**LONG, "prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": 5_000}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    await writer.drain()
    if i % 2:
        await reader.readline()
    writer.close()


async def _storm(served: Served, seen: Counter[str]) -> tuple[list[str], list[str]]:
    """Return the texts of the many and of those who read a long answer meanwhile."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # an idle connection may end just when it is used
    timeout = aiohttp.ClientTimeout(300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, AsyncExitStack() as stack:
        for _ in range(NUM_READERS):
            stack.enter_context(_stalled_reader(served))
        long = [asyncio.create_task(_answer(session, served.api, {**LONG, "prompt": PROMPTS[i]}, seen)) for i in (3, 4)]
        await asyncio.sleep(0.2)  # they are the first
        short = [
            _answer(session, served.api, {**SHORT, "prompt": PROMPTS[i % len(PROMPTS)], "stream": i % 3 == 0}, seen)
            for i in range(NUM_REQUESTS)
        ]
        texts, *_ = await asyncio.gather(asyncio.gather(*short), *(_leave(served, i) for i in range(NUM_LEAVING)))
        long_texts = await asyncio.gather(*long)
        await _until(served, lambda metrics: metrics["mdiq_requests_cut_off_total"] == NUM_READERS)
    return texts, long_texts


def test_two_hundred_at_once_beside_clients_that_do_not_read_and_clients_that_leave(served: Served) -> None:
    async def calm(body: dict[str, Any], prompts: list[str]) -> list[str]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:
            return [await _answer(session, served.api, {**body, "prompt": each}, Counter()) for each in prompts]

    short, long = asyncio.run(calm(SHORT, PROMPTS)), asyncio.run(calm(LONG, PROMPTS[3:5]))
    before, seen = served.num_open(), Counter[str]()
    texts, long_texts = asyncio.run(_storm(served, seen))

    assert texts == [short[i % len(PROMPTS)] for i in range(NUM_REQUESTS)]
    assert long_texts == long
    metrics = asyncio.run(_until(served, _is_quiet))
    assert seen["refused"], "it was never too much"
    assert metrics['mdiq_requests_refused_total{reason="busy"}'] >= seen["refused"]  # and some of those that leave
    assert metrics["mdiq_requests_done_total"] == NUM_REQUESTS + len(PROMPTS) + 2 * len(long)
    assert metrics["mdiq_requests_left_total"] >= 2 * NUM_READERS, "two prompts each"
    assert metrics["mdiq_requests_failed_total"] == 0
    assert metrics["mdiq_kv_reserved_tokens"] == 0
    assert served.num_open() <= before + 8, "connections or threads are left over"
    assert asyncio.run(calm(SHORT, PROMPTS)) == short
    log = (served.folder / "log").read_text()
    assert "reader_cut_off" in log and "Traceback" not in log

    done = subprocess.run(
        mdiq_command("status", served.folder / "topology.yaml"),
        env={**os.environ, "XDG_RUNTIME_DIR": str(served.folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    line = " ".join(done.stdout.split())
    assert re.search(rf"0 running, 0 of them waiting; .* refused \(busy \d+.* {NUM_READERS} not read", line)


def _is_quiet(metrics: dict[str, float]) -> bool:
    return not metrics["mdiq_requests_running"] and not metrics["mdiq_kv_reserved_tokens"]


async def _until(served: Served, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    async with asyncio.timeout(120):
        while not holds(metrics := await asyncio.to_thread(served.metrics)):  # noqa: ASYNC110
            await asyncio.sleep(0.3)
    return metrics
