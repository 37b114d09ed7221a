"""Two rings and one copy at one address, of real processes: one ring is killed while requests run, and nobody notices.

MDIQ_ROUTE_REQUESTS says how many requests there are; 60 by itself.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import yaml

from tests.integration.conftest import mdiq_command

NUM_REQUESTS = int(os.environ.get("MDIQ_ROUTE_REQUESTS", "60"))
AT_ONCE = 12
WAIT_S = 400.0

pytestmark = pytest.mark.timeout(900 + 6 * NUM_REQUESTS)

CHAT = [{"role": "user", "content": "Name three rivers, and say where they are."}]
LONG = {"max_tokens": 40, "ignore_eos": True}
SAMPLED = {"temperature": 0.9, "seed": 11}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": CHAT, "temperature": 0, **LONG}),
    ("/v1/chat/completions", {"messages": CHAT, **SAMPLED, **LONG, "stream": True}),
    ("/v1/completions", {"prompt": "The capital of France is", "temperature": 0, **LONG, "stream": True}),
    ("/v1/completions", {"prompt": ["One, two", "Red, green"], **SAMPLED, **LONG, "n": 2, "stream": True}),
    ("/v1/messages", {"messages": CHAT, "model": "", **SAMPLED, "max_tokens": 40, "stream": True}),
    ("/v1/responses", {"input": "Tell me of the sea", **SAMPLED, "max_output_tokens": 40, "stream": True}),
    ("/v1/responses", {"input": "Tell me of the sea", **SAMPLED, "max_output_tokens": 40}),
    ("/v1/chat/completions", {"messages": CHAT, "temperature": 0, "logprobs": True, **LONG, "stream": True}),
]
"""Paths and bodies of requests, by turns."""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Service:
    """A process with an API."""

    def __init__(self, folder: Path, name: str, port: int, *words: str | Path) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                mdiq_command(*words), stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
            )

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def until_ready(self) -> None:
        end_s = time.monotonic() + WAIT_S
        while time.monotonic() < end_s:
            assert self.process.poll() is None, self.log.read_text()[-3_000:]
            try:
                self.get("/ready")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3_000:])

    def kill(self) -> None:
        """End the process and all nodes of its ring at once, as a power cut does."""
        whole = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in whole:
            process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()


class Door:
    """The servers, and the router in front of them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.servers = folder, dict[str, Service]()
        words = ("serve", "--model", model, "--threads", "1", "--kv-tokens", "4096")
        for name, nodes in (("ring-a", 2), ("ring-b", 2), ("copy", 1)):
            port = _free_port()
            self.servers[name] = Service(folder, name, port, *words, "--nodes", str(nodes), "--port", str(port))
            self.servers[name].until_ready()  # one after the other: each measures itself
        port = _free_port()
        self.file = folder / "routes.yaml"
        servers = [{"name": name, "url": server.url} for name, server in self.servers.items()]
        # On a machine with few cores, three servers that compute answer late.
        routes = {"version": 1, "api": {"port": port}, "silence": "30s", "servers": servers}
        self.file.write_text(yaml.safe_dump(routes))
        self.router = Service(folder, "router", port, "route", self.file)
        self.router.until_ready()

    def end(self) -> None:
        for service in (self.router, *self.servers.values()):
            service.end()

    def running(self, name: str) -> int:
        (found,) = [each for each in self.router.get("/status.json")["servers"] if each["name"] == name]
        return int(found["running"])

    def state(self, name: str) -> str:
        (found,) = [each for each in self.router.get("/status.json")["servers"] if each["name"] == name]
        return str(found["state"])

    def figures(self) -> dict[str, float]:
        with urllib.request.urlopen(self.router.url + "/metrics", timeout=30) as response:
            lines = [line.rpartition(" ") for line in response.read().decode().splitlines() if line[:1] != "#"]
        return {name: float(value) for name, _, value in lines}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, real_model: Path) -> Iterator[Door]:
    door = Door(tmp_path_factory.mktemp("route"), real_model)
    try:
        yield door
        assert "Traceback" not in door.router.log.read_text()
    finally:
        door.end()


def _answer(path: str, body: dict[str, Any], text: str) -> list[tuple[str, str | None]]:
    """Return texts and reasons to end of an answer's choices, whatever its form."""
    if not body.get("stream"):
        value = json.loads(text)
        if path == "/v1/responses":
            return [(value["output"][0]["content"][0]["text"], value["status"])]
        return [(choice["message"]["content"], choice["finish_reason"]) for choice in value["choices"]]
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert not any("error" in event or event.get("type") == "error" for event in events), events[-1]
    if path == "/v1/responses":
        deltas = "".join(each["delta"] for each in events if each["type"] == "response.output_text.delta")
        final = events[-1]["response"]
        assert final["output"][0]["content"][0]["text"] == deltas
        assert len({each["response"]["id"] for each in events if "response" in each}) == 1
        assert [each["sequence_number"] for each in events] == list(range(len(events)))
        return [(deltas, final["status"])]
    if path == "/v1/messages":
        deltas = "".join(each["delta"].get("text", "") for each in events if each["type"] == "content_block_delta")
        return [(deltas, events[-2]["delta"]["stop_reason"])]
    assert text.endswith("data: [DONE]\n\n") and len({event["id"] for event in events}) == 1
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            piece = choice["text"] if path == "/v1/completions" else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    return [(texts[i], reasons[i]) for i in sorted(texts)]


async def _ask(session: aiohttp.ClientSession, url: str, kind: int) -> list[tuple[str, str | None]]:
    path, body = KINDS[kind]
    async with session.post(url + path, json=body) as response:
        text = await response.text()
        assert response.status == 200, f"{path}: {response.status} {text}"
    return _answer(path, body, text)


def test_requests_are_answered_as_if_no_ring_had_been_killed(door: Door) -> None:
    """None fails that had not begun, and those that had begun end right."""
    model = door.router.get("/v1/models")["data"][0]["id"]
    for _, body in KINDS:
        if "model" in body:
            body["model"] = model
    found: dict[int, Any] = {}
    killed_at: list[int] = []

    async def all_of_them() -> list[Any]:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            copy = door.servers["copy"].url
            calm = [await _ask(session, copy, kind) for kind in range(len(KINDS))]
            places, is_time = asyncio.Semaphore(AT_ONCE), asyncio.Event()

            async def one(number: int) -> None:
                async with places:
                    found[number] = await _ask(session, door.router.url, number % len(KINDS))
                if len(found) >= NUM_REQUESTS // 4:
                    is_time.set()

            async def killer() -> None:
                await is_time.wait()
                while await asyncio.to_thread(door.running, "ring-a") < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                killed_at.append(len(found))
                await asyncio.to_thread(door.servers["ring-a"].kill)

            async with asyncio.TaskGroup() as group:
                group.create_task(killer())
                for number in range(NUM_REQUESTS):
                    group.create_task(one(number))
            return calm

    calm = asyncio.run(all_of_them())
    wrong = [number for number in range(NUM_REQUESTS) if found[number] != calm[number % len(KINDS)]]
    assert wrong == []
    assert killed_at and killed_at[0] < NUM_REQUESTS - 3
    figures = door.figures()
    failovers = {
        key: figures[f'mdiq_route_failovers_total{{result="{key}"}}'] for key in ("again", "went_on", "in_vain")
    }
    print(f"{NUM_REQUESTS} requests, ring-a killed after {killed_at[0]}: {failovers}")  # noqa: T201
    assert failovers["in_vain"] == 0 and failovers["again"] + failovers["went_on"] >= 3
    assert failovers["went_on"] >= 1, "no answer had begun"
    assert door.state("ring-a") == "gone"
