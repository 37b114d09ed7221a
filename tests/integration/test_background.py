"""Responses in the background over the death of the Starter: real processes, whose nodes outlive it.

The journal is where `auto` puts it: in the folder that systemd names.
"""

import contextlib
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from tests.faults.lab import STARTER, Lab
from tests.integration.tiny_model import write_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SEED = 21
WAIT_S = 200.0
TEMPLATE = "{% if tools %}<tool_call>{% endif %}{% for message in messages %}{{ message.content }}{% endfor %}"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 300}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORM = {"format": {"type": "json_schema", "name": "person", "schema": PERSON}}
TOOL = {"type": "function", "name": "greet", "parameters": PERSON}
LONG = {"max_output_tokens": 500, "ignore_eos": True}
BODIES: Mapping[str, dict[str, Any]] = {
    "greedy": {"input": "Tell me", "temperature": 0, **LONG},
    "seeded": {"input": "Tell me more", "temperature": 0.9, "seed": 3, **LONG},
    "penalized": {"input": "And more", "temperature": 0.8, "seed": 4, "repetition_penalty": 1.1, **LONG},
    "schema": {"input": "Who?", "temperature": 0.9, "seed": 5, "max_output_tokens": 400, "text": FORM},
    "tool": {"input": "Greet", "seed": 6, "max_output_tokens": 400, "tools": [TOOL], "tool_choice": "required"},
    "short": {"input": "Yes?", "temperature": 0, "max_output_tokens": 3},
}


def _model(folder: Path) -> Path:
    """Write a model whose answers can end: a form needs a token for that."""
    model = write_tiny_model(folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    end = sorted(pre_tokenizers.ByteLevel.alphabet()).index("ÿ")  # no text in UTF-8 has this byte
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return model


class Service:
    """What a client sees of a lab's API."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def ask(self, path: str, body: object = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.lab.api}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            return json.load(response)

    def events(self, response_id: str, after: int = -1, limit: int | None = None) -> list[Any]:
        found: list[Any] = []
        url = f"http://{self.lab.api}/v1/responses/{response_id}?stream=true&starting_after={after}"
        with urllib.request.urlopen(url, timeout=WAIT_S) as response:
            for line in response:
                if line.startswith(b"data: "):
                    found.append(json.loads(line[6:]))
                    if len(found) == limit:
                        break
        return found

    def kill(self) -> None:
        """End the Starter without a word, and start it again; return when its API listens."""
        self.lab.kill(STARTER)
        self.lab.start(STARTER)
        end_s = time.monotonic() + WAIT_S
        while time.monotonic() < end_s:
            with contextlib.suppress(OSError):
                self.ask("/version")
                return
            time.sleep(0.05)
        raise AssertionError("the API does not listen")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("background")
    (folder / "state").mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("STATE_DIRECTORY", str(folder / "state"))
        lab = Lab(folder, _model(folder / "tiny"))
    with lab:
        lab.until_whole()
        yield Service(lab)
        assert lab.tracebacks() == []


def _shown(response: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what must not depend on a restart, nor on when a response was asked for."""
    texts = [
        item["content"][0]["text"] if item["type"] == "message" else (item["name"], item["arguments"])
        for item in response["output"]
    ]
    return response["status"], response["incomplete_details"], texts, response["usage"]["output_tokens"]


def test_a_starter_that_is_killed_again_and_again_ends_every_response_once_and_as_in_a_calm_run(
    service: Service,
) -> None:
    """At once, while they run, while the ring is formed again, and when some have ended."""
    calm = {name: _shown(service.ask("/v1/responses", body)) for name, body in BODIES.items()}
    assert json.loads(calm["schema"][2][0]).keys() == {"name", "age"}  # type: ignore[index]
    rng = random.Random(SEED)
    ids = {
        name: service.ask("/v1/responses", {**body, "background": True, "metadata": {"n": name}})["id"]
        for name, body in BODIES.items()
    }
    service.kill()
    seen: dict[str, list[Any]] = {name: [] for name in BODIES}
    for is_formed in (True, False, True):
        for name in BODIES if is_formed else ():
            # All that has come: 100 or so at first, and later what is left.
            found = service.events(ids[name], limit=len(seen[name]) + rng.randint(20, 120))
            assert found[: len(seen[name])] == seen[name], "what a client has read is as it was"
            seen[name] = found
        service.kill()
    for name, response_id in ids.items():
        rest = service.events(response_id, after=len(seen[name]) - 1)
        whole = [*seen[name], *rest]
        assert [event["sequence_number"] for event in whole] == list(range(len(whole)))
        assert service.events(response_id) == whole
        ended = service.ask(f"/v1/responses/{response_id}")
        assert whole[-1]["response"] == ended and ended["metadata"] == {"n": name}
        assert _shown(ended) == calm[name], name
    (status,) = [service.ask("/status.json")["journal"]]
    assert (status["is_written"], status["responses"], status["running"]) == (True, len(BODIES), 0)
    runs = [line for line in service.lab.said(STARTER) if line["event"] == "journal_opened"]
    assert [line["responses"] for line in runs] == [0] + [len(BODIES)] * 4
    assert max(line["running"] for line in runs) >= 3, "hardly any response ran when the Starter was killed"


def test_what_was_cancelled_and_deleted_is_so_after_the_kill_and_what_had_ended_is_kept(service: Service) -> None:
    service.lab.until_whole()
    ended = service.ask("/v1/responses", {**BODIES["short"], "background": True})["id"]
    running = [
        service.ask("/v1/responses", {**BODIES["greedy"], "max_output_tokens": 20_000, "background": True})["id"]
        for _ in range(3)
    ]
    events = service.events(ended)
    assert service.ask(f"/v1/responses/{running[0]}/cancel", {})["status"] == "cancelled"
    assert service.ask(f"/v1/responses/{running[1]}", method="DELETE")["deleted"]
    service.kill()
    assert service.events(ended) == events
    assert service.ask(f"/v1/responses/{running[0]}")["status"] == "cancelled"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        service.ask(f"/v1/responses/{running[1]}")
    assert service.ask(f"/v1/responses/{running[2]}")["status"] == "in_progress"
    service.lab.until_whole()
    assert service.ask(f"/v1/responses/{running[2]}/cancel", {})["status"] == "cancelled"
    assert service.events(running[2])[-1]["response"]["status"] == "cancelled"
    assert service.ask("/status.json")["requests"]["running"] == 0
