"""`mdiq serve` without a topology: one command gives a newcomer the API, and its node processes may die."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.conftest import mdiq_command
from tests.integration.tiny_model import write_tiny_model

pytestmark = pytest.mark.timeout(300)

WAIT_S = 200.0
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Here:
    """The service. url: of its API; keys: its file of keys; key: the one that is sent."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "serve.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        model = write_tiny_model(folder / "tiny")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        self.keys, self.key = folder / "keys", "a-key-of-the-start-"
        self.keys.write_text(self.key)
        self.keys.chmod(0o600)
        words = ("serve", "--keys-file", str(self.keys), "--model", str(model), "--nodes", "3", "--threads", "1")
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        with self.log.open("wb") as log:
            command = mdiq_command(*words, "--port", str(port), "--kv-tokens", "4096")
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)

    def open(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.key}"}
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=WAIT_S)

    def ask(self, path: str, body: object = None) -> Any:
        with self.open(path, body) as response:
            return json.load(response)

    def until_ready(self) -> None:
        end_s = time.monotonic() + WAIT_S
        while time.monotonic() < end_s:
            assert self.process.poll() is None, self.log.read_text()[-3_000:]
            try:
                self.ask("/ready")
                return
            except urllib.error.URLError:
                time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-3_000:])

    def kill_node(self, name: str) -> None:
        for child in psutil.Process(self.process.pid).children():
            if name in child.cmdline():
                child.kill()
                return
        raise AssertionError(f"{name}: no such process")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    here = Here(tmp_path_factory.mktemp("here"))
    try:
        here.until_ready()
        yield here
        here.process.send_signal(signal.SIGTERM)
        assert here.process.wait(60) == 0, here.log.read_text()[-3_000:]
        assert "Traceback" not in here.log.read_text()
    finally:
        here.process.kill()
        here.process.wait()


def test_one_command_serves_a_model_of_this_machine(here: Here) -> None:
    (model,) = here.ask("/v1/models")["data"]
    assert model["id"] == "tiny"
    answer = here.ask("/v1/completions", {"prompt": "ab", "max_tokens": 5, "temperature": 0})
    assert answer["usage"]["completion_tokens"] == 5
    status = here.ask("/status.json")
    assert [node["name"] for node in status["nodes"]] == ["node-0", "node-1", "node-2"]


def test_a_stream_that_is_read_again_while_a_node_dies_has_every_event_of_a_calm_one(here: Here) -> None:
    body = {"input": "Tell me", "max_output_tokens": 400, "temperature": 0.9, "seed": 3, "ignore_eos": True}
    calm = here.ask("/v1/responses", body)
    with here.open("/v1/responses", {**body, "stream": True}) as response:
        first = [json.loads(line[6:]) for line in _lines(response, 40)]
    here.kill_node("node-1")
    one = f"/v1/responses/{first[0]['response']['id']}"
    with here.open(f"{one}?stream=true&starting_after={first[-1]['sequence_number']}") as response:
        rest = [json.loads(line[6:]) for line in _lines(response)]
    numbers = [event["sequence_number"] for event in first + rest]
    assert numbers == list(range(len(numbers)))
    assert rest[-1]["type"] == "response.incomplete"
    (message,), (calm_message,) = rest[-1]["response"]["output"], calm["output"]
    assert message["content"][0]["text"] == calm_message["content"][0]["text"]
    texts = [event["delta"] for event in first + rest if event["type"] == "response.output_text.delta"]
    assert "".join(texts) == message["content"][0]["text"]
    assert re.search(r"ring_goes_on.*sequences=1", here.log.read_text()), "it was killed while the answer was made"


def test_a_reload_takes_over_the_keys_and_leaves_the_ring_alone(here: Here) -> None:
    formed = here.ask("/status.json")["rings_formed"]
    here.keys.write_text("a-key-that-came-later\n")
    here.process.send_signal(signal.SIGHUP)
    end_s = time.monotonic() + WAIT_S
    while "reload_done" not in here.log.read_text():
        assert time.monotonic() < end_s and here.process.poll() is None, here.log.read_text()[-3_000:]
        time.sleep(0.1)
    assert "nothing that the ring depends on has changed; API keys: 1" in here.log.read_text()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        here.ask("/status.json")
    here.key = "a-key-that-came-later"
    status = here.ask("/status.json")
    assert (status["rings_formed"], status["is_serving"]) == (formed, True)


def _lines(response: Any, limit: int | None = None) -> list[bytes]:
    found: list[bytes] = []
    for line in response:
        if line.startswith(b"data: "):
            found.append(line)
            if len(found) == limit:
                break
    return found
