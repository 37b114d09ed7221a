"""`mdiq serve` over several machines, each a network of this one: answers, nodes that die and leave, keys that go."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from mdiq.testbed.loopback import LoopbackRing
from mdiq.transport.curve import DELISTED
from tests.docs.book import PAGES, commands_of, text_of
from tests.integration.conftest import mdiq_command, run_mdiq

pytestmark = pytest.mark.timeout(400)  # a ring is formed several times

API = "http://127.0.0.1:17480"
PROMPT = {"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
ALL = ["desk", "pi1", "pi2"]
ALONE = ("--threads", "1", "--raw", "--json", "--in-process", "--nodes", "1")


class Served:
    """A ring with its service."""

    def __init__(self, ring: LoopbackRing) -> None:
        self.ring = ring
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(ring.folder)}
        with ring.log("desk").open("ab") as log:
            command = ["mdiq", "serve", "{topology}", "--even-split"]
            self.process = ring.start("desk", command, stdout=log, stderr=log, env=self.environment)

    def mdiq(self, command: str, *arguments: str) -> tuple[int, str]:
        """Ask the service as an operator does; return the exit code and what is told."""
        done = subprocess.run(
            mdiq_command(command, self.ring.file, *arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout + done.stderr

    def status(self) -> Any:
        code, text = self.mdiq("status", "--json")
        assert code in (0, 1) and text.startswith("{"), text
        return json.loads(text)

    def until(self, holds: Callable[[Any], bool]) -> Any:
        """Wait until the status is as wanted; return it."""
        for _ in range(120):
            assert self.process.poll() is None, self.ring.log("desk").read_text()[-2000:]
            try:
                status = self.status()
            except AssertionError:
                status = None  # it is on its way
            if status is not None and holds(status):
                return status
            time.sleep(0.5)
        raise AssertionError(f"{status}\n{self.ring.log('desk').read_text()[-2000:]}")

    def until_serves(self, *names: str, rings: int = 0) -> Any:
        def serves(status: Any) -> bool:
            found = [node["name"] for node in status["nodes"] if node["state"] == "serves"]
            return bool(status["is_serving"]) and found == list(names) and status["rings_formed"] >= rings

        return self.until(serves)

    def log_of(self, name: str) -> list[str]:
        return self.ring.log(name).read_text().splitlines()

    def until_logged(self, name: str, *texts: str) -> list[str]:
        """Wait until a node's log has a line with these texts; return all such lines."""
        deadline = time.monotonic() + 20
        while not (found := [line for line in self.log_of(name) if all(text in line for text in texts)]):
            assert time.monotonic() < deadline, self.ring.log(name).read_text()[-2000:]
            time.sleep(0.2)
        return found

    def ask(self, *bodies: dict[str, Any]) -> list[str]:
        """Return the texts of answers to requests that run at the same time."""

        async def post(session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
            async with session.post(f"{API}/v1/completions", json=body) as response:
                assert response.status == 200, await response.text()
                if not body.get("stream"):
                    return str((await response.json())["choices"][0]["text"])
                lines = [line[6:] for line in (await response.text()).split("\n\n") if line.startswith("data: {")]
                return "".join(json.loads(line)["choices"][0]["text"] for line in lines)

        async def all_of_them() -> list[str]:
            async with aiohttp.ClientSession() as session:
                return list(await asyncio.gather(*(post(session, body) for body in bodies)))

        return asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, real_model: Path) -> Iterator[Served]:
    """The ring, with the model that was found before: from the ring's network nothing can be fetched."""
    folder = tmp_path_factory.mktemp("serve")
    file = folder / "topology.yaml"
    ports = "data_port=17470,threads=1"
    nodes = [f"desk=192.168.1.10,{ports},control_port=17471,weights_port=17472"]
    nodes += [f"pi{i}=192.168.1.1{i},{ports}" for i in (1, 2)]
    done = run_mdiq("init", *(word for node in nodes for word in ("--node", node)), "--out", file)
    assert done.code == 0, done.errors
    # Of f32 on all hops the answers do not depend on the split.
    file.write_text(file.read_text().replace("wire: auto", "wire: f32").replace("port: 8080", "port: 17480"))
    assert run_mdiq("keys", file).code == 0
    with LoopbackRing(file, folder / "ring") as ring:
        ring.open_api()
        served = Served(ring)
        served.until_serves(*ALL)
        yield served
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0


@pytest.fixture(scope="module")
def expected() -> str:
    """What one process answers."""
    done = run_mdiq("run", str(PROMPT["prompt"]), *ALONE, "--max-tokens", "12")
    return str(done.results[0]["text"])


@pytest.fixture(scope="module")
def long_text() -> str:
    """What one process answers with 150 tokens."""
    done = run_mdiq("run", str(PROMPT["prompt"]), *ALONE, "--max-tokens", "150", "--ignore-eos")
    return str(done.results[0]["text"])


def test_users_beside_each_other_get_what_one_process_answers(served: Served, expected: str) -> None:
    assert served.ask(PROMPT, {**PROMPT, "stream": True}, PROMPT) == [expected] * 3
    status = served.status()
    assert status["requests"]["running"] == 0 and status["requests"]["done"] >= 3
    assert all(node["rss_bytes"] > 0 and node["bytes_out"] > 0 for node in status["nodes"])


def test_the_pages_requests_are_answered(served: Served) -> None:
    """Each `curl` of the pages, sent to this ring's port; JSON is what curl sends without saying so."""
    requests = {command for page in PAGES for command in commands_of(text_of(page)) if command.startswith("curl ")}
    assert requests
    for command in requests:
        _, address, flag, body = shlex.split(command)
        assert address.startswith("http://127.0.0.1:8080/") and flag == "-d"

        def send(body: str, url: str = address.replace("8080", "17480")) -> Any:
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            return urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers), timeout=120)

        # As it stands it draws at temperature 1: one in three answers to it goes on until the context is full (10 of
        # 32). So it is left after its first words, and the whole answer is one of few tokens.
        with send(_with(body, stream=True)) as response:
            events = (json.loads(line[6:]) for line in response if line.startswith(b"data: {"))
            words = (event["choices"][0]["delta"].get("content") for event in events)
            assert next(filter(None, words))
        with send(_with(body, max_tokens=32)) as response:
            assert json.load(response)["choices"][0]["message"]["content"]


def test_a_drained_node_leaves_the_others_its_layers_and_comes_back(served: Served, expected: str) -> None:
    code, text = served.mdiq("drain", "pi2")
    assert code == 0 and "drained" in text
    status = served.until_serves("desk", "pi1")
    assert [node["layers"][1] for node in status["nodes"][:2]][-1] == 30
    idle = status["nodes"][2]
    assert (idle["name"], idle["state"], idle["reason"]) == ("pi2", "stands by", "it is drained")
    assert {*range(11, 30)} <= {*status["nodes"][1]["on_disk"]}, "what it has taken over"
    served.until_logged("pi2", "stands_by")
    assert served.ask(PROMPT) == [expected]
    assert served.mdiq("drain", "desk")[0] == 2  # a mistake, told in words
    assert served.mdiq("drain", "pi2", "--undo")[0] == 0
    served.until_serves(*ALL)


def test_a_node_that_dies_and_is_started_again_costs_a_pause_and_not_a_token(served: Served, long_text: str) -> None:
    """The other one, and where others have taken over meanwhile: tests/runtime/test_faults.py, test_ring_changes.py."""
    name, num_tokens = "pi1", 150
    rings = served.status()["rings_formed"]

    async def ask(session: aiohttp.ClientSession, died: asyncio.Event) -> str:
        body = {**PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        texts: list[str] = []
        async with session.post(f"{API}/v1/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    texts.append(json.loads(line[6:])["choices"][0]["text"])
                    if not died.is_set() and len(texts) == 20:
                        first = served.ring._nodes[name]
                        first.kill()
                        first.wait()
                        served.ring.start_node(name)
                        died.set()
        return "".join(texts)

    async def ask_three() -> list[str]:
        died = asyncio.Event()
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(ask(session, died) for _ in range(3)))

    assert asyncio.run(ask_three()) == [long_text] * 3
    assert served.until_serves(*ALL)["rings_formed"] == rings, "it was formed anew"


def test_a_rotated_key_costs_a_pause_and_not_a_token(served: Served, long_text: str) -> None:
    rings = served.status()["rings_formed"]
    assert run_mdiq("keys", served.ring.file, "--rotate", "pi2").code == 0

    async def ask() -> str:
        body = {**PROMPT, "max_tokens": 150, "ignore_eos": True, "stream": True}
        async with aiohttp.ClientSession() as session, session.post(f"{API}/v1/completions", json=body) as response:
            first = await response.content.readuntil(b"\n\n")
            await asyncio.to_thread(reload)
            lines = (first.decode() + await response.text()).split("\n\n")
        return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {"))

    def reload() -> None:
        code, text = served.mdiq("reload")
        assert code == 0 and "the ring goes on" in text, text
        served.ring._nodes["pi1"].send_signal(signal.SIGHUP)

    assert asyncio.run(ask()) == long_text
    status = served.until_serves("desk", "pi1")
    assert status["rings_formed"] == rings, "it was formed anew"
    assert "its key was revoked" in status["pauses"][-1]["reason"] and status["pauses"][-1]["sequences"] == 1
    first = served.ring._nodes["pi2"]
    first.terminate()
    assert first.wait(20) == 0
    served.ring.start_node("pi2")
    assert served.until_serves(*ALL)["rings_formed"] == rings, "it was formed anew"


def test_a_revoked_key_ends_its_connections_and_a_broken_file_changes_nothing(served: Served, expected: str) -> None:
    file, rings = served.ring.file, served.status()["rings_formed"]
    before = file.read_text()
    file.write_text(before + "\nnonsense: 1\n")
    code, text = served.mdiq("reload")
    assert code == 2 and "nonsense" in text
    assert served.ask(PROMPT) == [expected]
    topology = yaml.safe_load(before)
    next(node for node in topology["nodes"] if node["name"] == "pi2")["public_key"] = ANOTHER_KEY
    file.write_text(yaml.safe_dump(topology))
    code, text = served.mdiq("reload")
    assert code == 0, text
    status = served.until_serves("desk", "pi1")
    assert status["rings_formed"] == rings and _states(status)["pi2"] == "missing"
    # It is missing from the reload on; it is refused once it has come again.
    refused = served.until_logged("desk", "peer_refused", "plane=control")
    assert all("192.168.1.12" in line and DELISTED in line and "[warning" in line for line in refused)
    file.write_text(before)
    assert served.mdiq("reload")[0] == 0
    served.until_serves(*ALL)
    assert served.ask(PROMPT) == [expected] and served.status()["rings_formed"] == rings


def test_others_take_over_from_a_node_that_is_stopped_and_what_runs_goes_on(served: Served) -> None:
    """The last one: pi1 is missing from here on."""
    rings = served.status()["rings_formed"]

    async def ask_and_stop() -> str:
        body = {**PROMPT, "max_tokens": 60, "ignore_eos": True, "stream": True}
        async with aiohttp.ClientSession() as session, session.post(f"{API}/v1/completions", json=body) as response:
            await response.content.readline()
            served.ring._nodes["pi1"].terminate()
            return await response.text()

    events = asyncio.run(ask_and_stop())
    assert "error" not in events and events.endswith("data: [DONE]\n\n")
    assert served.ring._nodes["pi1"].wait(20) == 0
    log = served.ring.log("pi1").read_text()
    assert "drain_ended" in log and "Traceback" not in log
    served.until(lambda status: _states(status)["pi1"] == "missing")
    assert served.until_serves("desk", "pi2")["rings_formed"] == rings, "it was formed anew"


def _with(body: str, **fields: Any) -> str:
    return json.dumps({**json.loads(body), **fields})


def _states(status: Any) -> dict[str, str]:
    return {node["name"]: node["state"] for node in status["nodes"]}


ANOTHER_KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"  # of libzmq's own documentation
