"""OpenAI's client against a ring of two nodes that answers with a real model: what it asks for changes the answers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from mdiq.core.known_models import QWEN_CODER_0_5B
from tests.docs.book import ROOT, text_of
from tests.integration.conftest import mdiq_command
from tests.real_models import fetched

pytestmark = pytest.mark.timeout(400)

PORT = 17490
HELLO: Any = [{"role": "user", "content": "Write one short sentence about the sea."}]
TOPOLOGY = f"""\
version: 1
model:
  path: {{model}}
nodes:
  - {{{{name: first, role: starter, address: 127.0.0.1, data_port: {PORT - 4}, control_port: {PORT - 3},
     weights_port: {PORT - 2}, threads: 1}}}}
  - {{{{name: second, address: 127.0.0.1, data_port: {PORT - 1}, threads: 1}}}}
links:
  wire: f32
api:
  port: {PORT}
"""


class Served:
    """The service, and the node that can be killed."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder = folder
        self._file = folder / "topology.yaml"
        self._file.write_text(TOPOLOGY.format(model=model))
        self._environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        self.processes = [self._start("serve", self._file, "--even-split")]
        self.start_node()

    def _start(self, *arguments: str | Path) -> "subprocess.Popen[bytes]":
        with (self._folder / f"{arguments[0]}.log").open("ab") as log:
            return subprocess.Popen(mdiq_command(*arguments), stdout=log, stderr=log, env=self._environment)

    def start_node(self) -> None:
        self.processes.append(self._start("node", self._file, "--name", "second"))

    def kill_node(self) -> None:
        self.processes[-1].kill()
        self.processes[-1].wait()

    def until_ready(self) -> None:
        deadline = time.monotonic() + 300
        while self.ask("/ready")[0] != 200:
            log = (self._folder / "serve.log").read_text()[-2_000:]
            assert self.processes[0].poll() is None and time.monotonic() < deadline, log
            time.sleep(0.5)

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except urllib.error.URLError:
            return 0, None

    def status(self) -> Any:
        done = subprocess.run(
            mdiq_command("status", self._file, "--json"), env=self._environment, capture_output=True, timeout=60
        )
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("openai"), fetched(QWEN_CODER_0_5B))
    try:
        served.until_ready()
        yield served
    finally:
        for process in served.processes:
            process.send_signal(signal.SIGTERM)
        for process in served.processes:
            process.wait(30)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def _texts(client: openai.OpenAI, **asked: Any) -> list[str]:
    """Return the texts of the choices of a chat, from a stream."""
    texts = [""] * asked.get("n", 1)
    with client.chat.completions.create(stream=True, **asked) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    return texts


def _said(client: openai.OpenAI, **asked: Any) -> list[str]:
    """Return the texts of the choices of a completion, whole and in a stream alike."""
    whole = client.completions.create(**asked)
    texts = [""] * len(whole.choices)
    with client.completions.create(stream=True, **asked) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    return texts


def test_choices_differ_are_the_same_again_and_begin_with_that_of_a_request_for_one(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 16, "seed": 5, "temperature": 1.0}
    whole = client.chat.completions.create(**asked, n=4)
    texts = [choice.message.content for choice in whole.choices]
    assert len({*texts}) > 1
    assert _texts(client, **asked, n=4) == texts and _texts(client, **asked) == texts[:1]
    one = client.chat.completions.create(**asked)
    assert whole.usage and one.usage and whole.usage.prompt_tokens == one.usage.prompt_tokens


def test_tokens_are_those_that_the_model_sees_and_their_text_is_the_text(served: Served, client: openai.OpenAI) -> None:
    text = "Hello, w\u00f6rld \U0001f98a<|im_end|>"
    _, found = served.ask("/tokenize", {"content": text})
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] > 1_000
    assert served.ask("/detokenize", {"tokens": found["tokens"]}) == (200, {"prompt": text, "content": text})
    model = client.models.list().data[0].id
    done = client.completions.create(model=model, prompt=found["tokens"], max_tokens=1)
    assert done.usage and done.usage.prompt_tokens == found["count"]
    _, chat = served.ask("/tokenize", {"messages": HELLO, "model": model})
    answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=1)
    assert answer.usage and answer.usage.prompt_tokens == chat["count"]


def test_biases_and_penalties_change_what_is_said(served: Served, client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    asked: dict[str, Any] = {
        "model": model,
        "prompt": "The sea is blue. The sea is blue. The sea is",
        "max_tokens": 24,
        "temperature": 0,
    }
    (plain,) = _said(client, **asked)
    assert plain.count(" blue") >= 4
    (token,) = served.ask("/tokenize", {"content": " blue"})[1]["tokens"]
    assert " blue" not in _said(client, **asked, logit_bias={str(token): -100})[0]
    assert _said(client, **{**asked, "max_tokens": 3}, logit_bias={str(token): 100}) == [" blue" * 3]
    assert _said(client, **asked, frequency_penalty=2)[0].count(" blue") < plain.count(" blue")


def test_an_answer_is_as_long_as_is_asked_for(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Say only: yes"}]}
    short = client.chat.completions.create(**asked, temperature=0, max_tokens=40)
    long = client.chat.completions.create(**asked, temperature=0, max_tokens=40, extra_body={"min_tokens": 20})
    assert short.usage and short.usage.completion_tokens < 10 and short.choices[0].finish_reason == "stop"
    assert long.usage and long.usage.completion_tokens > 20
    numbers: dict[str, Any] = {"model": model, "prompt": "1, 2, 3, 4,", "temperature": 0, "stop": [","]}
    (first,) = _said(client, **numbers)
    (later,) = _said(client, **numbers, extra_body={"min_tokens": 8})
    assert "," not in first and later.startswith(f"{first},") and not later.endswith(",")


def test_no_answer_ends_with_half_a_character(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    animals = "\U0001f98a\U0001f43b\U0001f43c\U0001f981\U0001f42f"
    prompt = f"Repeat: {animals} {animals} {animals[:2]}"
    said = []
    for max_tokens in range(1, 9):
        asked: dict[str, Any] = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
        said += _said(client, **asked)
        assert _said(client, **asked, stop=["never"]) == said[-1:]
    assert all(later.startswith(text) for text, later in zip(said, said[1:], strict=False))
    assert "\ufffd" not in said[-1] and len({*said}) < len(said), "some token gave half a character alone"


def test_what_does_not_fit_is_known_as_such(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    for prompt in ("sea " * 40_000, [5] * 40_000):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=model, prompt=prompt)
        assert caught.value.code == "context_length_exceeded"


def test_choices_with_penalties_are_the_same_when_a_node_dies_meanwhile(served: Served, client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
        "n": 3,
        "seed": 11,
        "temperature": 1.0,
        "max_tokens": 60,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "logit_bias": {"11162": 3},
        "extra_body": {"min_tokens": 50},
    }
    calm = _texts(client, **asked)
    texts, num_chunks = ["", "", ""], 0
    with client.chat.completions.create(stream=True, **asked) as stream:
        for chunk in stream:
            num_chunks += 1
            if num_chunks == 40:
                served.kill_node()
                served.start_node()
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == calm
    assert served.ask("/status.json")[1]["pauses"][-1]["sequences"] == 3


def test_the_program_of_the_page_prints_an_answer(served: Served) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", text_of(ROOT / "docs" / "api.md"), re.MULTILINE | re.DOTALL)
    there = f"http://127.0.0.1:{PORT}/v1"
    by_environment = program.replace('base_url="http://127.0.0.1:8080/v1", api_key="none"', "")
    for text in (program.replace("http://127.0.0.1:8080/v1", there), by_environment):
        assert text != program
        environment = {**os.environ, "OPENAI_BASE_URL": there, "OPENAI_API_KEY": "none"}
        command = [sys.executable, "-W", "ignore", "-c", text]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and len(done.stdout.split()) > 3, done.stderr[-2_000:]


def test_the_status_is_that_of_the_command_line(served: Served) -> None:
    served.until_ready()
    shown, told = served.status(), served.ask("/status.json")[1]
    assert shown.keys() == told.keys() and shown["requests"] == told["requests"]
    assert [node.keys() for node in shown["nodes"]] == [node.keys() for node in told["nodes"]]
