"""Answers in a form, and tool calls, of a real model on a ring of processes; a killed node changes none of them.

tests/runtime/test_grammar.py has more ways to be interrupted.
"""

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.engine.text.random_schemas import random_schema
from tests.faults.answers import Asked, Sample, compare
from tests.faults.conftest import HALF_B, model_that_is_here
from tests.faults.lab import Lab

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SEEDS = range(6)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("structure"), model_that_is_here(HALF_B), num_workers=1, num_spares=1) as lab:
        lab.until_whole()
        yield lab


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "shop", "schema": schema, "strict": True}}


def _samples() -> list[Sample]:
    form = {"prompt": "An example of a shop as JSON:\n", "max_tokens": 600}
    return [
        Sample(
            f"schema-{seed}",
            {**form, "response_format": _form(random_schema(seed)), "temperature": float(seed % 2), "seed": seed},
        )
        for seed in SEEDS
    ]


def test_answers_have_their_schema_and_a_killed_node_changes_none(lab: Lab) -> None:
    samples = _samples()
    calm = Asked(lab.api, samples).answers(300)
    for seed, answer in zip(SEEDS, calm, strict=True):
        assert (answer.error, answer.finish_reason) == (None, "stop")
        jsonschema.validate(json.loads(answer.text), random_schema(seed))
    asked = Asked(lab.api, samples)
    asked.until_event(max(range(len(calm)), key=lambda i: calm[i].num_events), 5)
    num_running = asked.num_running()
    lab.kill(lab.workers[0])
    found = asked.answers(300)
    assert num_running > 1, "hardly any answer ran when the node was killed"
    assert [compare(*each).text for each in zip(calm, found, strict=True)] == [""] * len(samples)
    lab.start(lab.workers[0])
    lab.until_whole()


def test_a_tool_is_called_with_arguments_of_its_schema_whole_and_streamed(lab: Lab) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    }
    body = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 100,
    }

    def post(**more: Any) -> str:
        data = json.dumps({**body, **more}).encode()
        url, headers = f"http://{lab.api}/v1/chat/completions", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as response:
            return str(response.read().decode())

    choice = json.loads(post())["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "get_weather")
    arguments = json.loads(call["function"]["arguments"])
    jsonschema.validate(arguments, parameters)
    assert arguments["city"] == "Paris"
    events = [json.loads(line[6:]) for line in post(stream=True).split("\n\n") if line.startswith("data: {")]
    pieces = [each for event in events for each in event["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(piece["function"]["arguments"] for piece in pieces) == call["function"]["arguments"]
