"""The openai package for Node.js, as npm has it, against `mdiq serve` with a real model. `tox -e npm` brings Node.js.

npm/cases.mjs is what it runs; npm/package-lock.json says which versions.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.clients.conftest import Served

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

HERE = Path(__file__).parent / "npm"
HELLO: Any = [{"role": "user", "content": "Write one short sentence about the sea."}]


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and the cases."""
    if shutil.which("npm") is None:
        pytest.skip("no npm here; tox -e npm brings it")
    folder = tmp_path_factory.mktemp("npm")
    for file in HERE.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3_000:]
    return folder


def _run(npm: Path, served: Served, case: str, key: str | None = None) -> Any:
    command = ["node", "cases.mjs", served.url, key or served.key, case]
    done = subprocess.run(command, cwd=npm, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3_000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def sentence(half_b: Served) -> openai.types.chat.ChatCompletion:
    """What OpenAI's client for Python gets."""
    with openai.OpenAI(base_url=half_b.url, api_key=half_b.key, max_retries=0, timeout=120) as client:
        return client.chat.completions.create(model=half_b.model, messages=HELLO, temperature=0, max_tokens=24)


def test_it_lists_the_model(npm: Path, half_b: Served) -> None:
    assert _run(npm, half_b, "models") == {"found": [half_b.model], "one": half_b.model}


def test_a_chat_whole_and_streamed_is_that_of_the_client_for_python(
    npm: Path, half_b: Served, sentence: openai.types.chat.ChatCompletion
) -> None:
    choice, usage = sentence.choices[0], sentence.usage
    assert choice.message.content and usage
    whole, streamed = _run(npm, half_b, "chat"), _run(npm, half_b, "stream")
    assert whole["text"] == streamed["text"] == streamed["helper"] == choice.message.content
    assert whole["reason"] == streamed["reason"] == choice.finish_reason
    assert (whole["status"], whole["request"]) == (200, True)
    for found in (whole["usage"], streamed["usage"]):
        tokens = (found["prompt_tokens"], found["completion_tokens"])
        assert tokens == (usage.prompt_tokens, usage.completion_tokens)
    assert streamed["chunks"] > 10


def test_completions_of_two_prompts_are_the_same_whole_and_streamed(npm: Path, half_b: Served) -> None:
    found = _run(npm, half_b, "completions")
    assert found["whole"] == found["texts"] and found["tokens"] == found["whole"][0]
    assert found["whole"][0].startswith(" 4,")


def test_its_own_loop_runs_a_tool_and_ends(npm: Path, tool_model: Served) -> None:
    found = _run(npm, tool_model, "tools")
    assert found["got"] == ["Rome", "Rome"], "once whole, once streamed"
    assert found["roles"] == ["system", "user", "assistant", "tool", "assistant"]
    assert "4321" in found["text"] and found["streamed"] == found["text"]


def test_a_zod_schema_gives_its_object(npm: Path, half_b: Served) -> None:
    found = _run(npm, half_b, "structured")
    assert found["parsed"] == found["streamed"] and found["parsed"]["name"] == "Rome"
    assert found["parsed"].keys() == {"name", "people"} and isinstance(found["parsed"]["people"], int)


def test_responses_are_streamed_read_again_continued_and_deleted(
    npm: Path, half_b: Served, sentence: openai.types.chat.ChatCompletion
) -> None:
    found = _run(npm, half_b, "responses")
    text = sentence.choices[0].message.content
    assert (found["text"], found["helper"], "".join(found["deltas"])) == (text, text, text)
    assert found["status"] in ("completed", "incomplete")
    assert found["last"] == f"response.{found['status']}"
    assert found["numbers"] == list(range(len(found["numbers"])))
    assert found["again"] == found["numbers"][6:]
    assert found["parsed"].keys() == {"name", "people"}
    num_later, is_after = found["later"]
    assert num_later > found["usage"]["input_tokens"] + found["usage"]["output_tokens"] and is_after
    begun, background = found["background"]
    assert begun in ("queued", "in_progress") and background == text
    gone = found["gone"]
    assert (gone["kind"], gone["param"], gone["code"]) == ("NotFoundError", "response_id", None)


def test_each_error_has_its_class(npm: Path, half_b: Served) -> None:
    found = _run(npm, half_b, "errors", half_b.narrow_key)
    seen = {name: (error["kind"], error["status"], error["param"], error["code"]) for name, error in found.items()}
    assert seen == {
        "bad": ("BadRequestError", 400, "temperature", None),
        "long": ("BadRequestError", 400, "messages", "context_length_exceeded"),
        "key": ("AuthenticationError", 401, None, "invalid_api_key"),
        "model": ("NotFoundError", 404, "model", "model_not_found"),
        "stream": ("NotFoundError", 404, "model", "model_not_found"),
        "limit": ("RateLimitError", 429, None, "rate_limit_exceeded"),
        "schema": ("BadRequestError", 400, "response_format", None),
    }
    assert int(found["limit"]["retry"]) >= 1


def test_an_answer_that_is_aborted_ends_in_the_ring(npm: Path, half_b: Served) -> None:
    left = half_b.service.metrics()["mdiq_requests_left_total"]
    assert _run(npm, half_b, "abort") == {"chunks": 5, "kind": "APIUserAbortError", "whole": "APIUserAbortError"}
    deadline = time.monotonic() + 60
    while half_b.service.metrics()["mdiq_requests_running"]:
        assert time.monotonic() < deadline, half_b.service.log()[-2_000:]
        time.sleep(0.2)
    assert half_b.service.metrics()["mdiq_requests_left_total"] == left + 3
