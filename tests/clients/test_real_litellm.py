"""litellm and langchain-openai, as they are installed, against `mdiq serve` with a real model."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from tests.clients.conftest import Served

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

HELLO = [{"role": "user", "content": "Write one short sentence about the sea."}]
LONG = [{"role": "user", "content": "sea " * 40_000}]
POPULATION = {
    "type": "function",
    "function": {
        "name": "get_population",
        "description": "Returns how many people live in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CASES: tuple[tuple[dict[str, Any], str, str], ...] = (
    # changes of the request, litellm's class, langchain's class
    ({"messages": LONG}, "ContextWindowExceededError", "ContextOverflowError"),
    ({"temperature": -1}, "BadRequestError", "ModelInvalidRequestError"),
    ({"api_key": "wrong"}, "AuthenticationError", "ModelAuthenticationError"),
    ({"model": "huge"}, "NotFoundError", "ModelNotFoundError"),
    ({"api_key": "narrow"}, "RateLimitError", "ModelRateLimitError"),
)


@pytest.fixture
def litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
    return pytest.importorskip("litellm")


def _asked(served: Served, **change: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": served.model, "api_key": served.key, "messages": HELLO, **change}
    return {"temperature": 0, "max_tokens": 24, "timeout": 120, "max_retries": 0, **asked}


@contextmanager
def _held(served: Served, change: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the change; "narrow" is the key of one request at a time, which is in flight meanwhile."""
    if change.get("api_key") != "narrow":
        yield change
        return
    with openai.OpenAI(base_url=served.url, api_key=served.narrow_key, max_retries=0, timeout=120) as client:
        more = {"ignore_eos": True}
        messages: Any = HELLO
        with client.chat.completions.create(
            model=served.model, messages=messages, stream=True, max_tokens=5_000, extra_body=more
        ):
            yield {**change, "api_key": served.narrow_key}
    deadline = time.monotonic() + 60
    while served.service.metrics()["mdiq_requests_running"]:
        assert time.monotonic() < deadline, "it runs on without its reader"
        time.sleep(0.2)


def _litellms(served: Served, **change: Any) -> dict[str, Any]:
    asked = _asked(served, **change)
    return {**asked, "model": f"openai/{asked['model']}", "api_base": served.url}


def test_litellm_gets_the_same_text_by_each_way(litellm: Any, half_b: Served) -> None:
    asked = _litellms(half_b)
    whole = litellm.completion(**asked)
    text = whole.choices[0].message.content
    assert text and whole.usage.completion_tokens > 5

    async def streamed() -> list[str]:
        stream = await litellm.acompletion(**asked, stream=True)
        return [chunk.choices[0].delta.content or "" async for chunk in stream]

    pieces = asyncio.run(streamed())
    assert len(pieces) > 5 and "".join(pieces) == text
    assert asyncio.run(litellm.acompletion(**asked)).choices[0].message.content == text
    # Its bridge to /v1/responses.
    keys = ("model", "api_key", "api_base", "temperature", "timeout")
    shared = {key: asked[key] for key in keys}
    answer = litellm.responses(input=HELLO[0]["content"], max_output_tokens=24, **shared)
    assert answer.output[-1].content[0].text == text


def test_litellm_gets_tool_calls_and_forms(litellm: Any, half_b: Served) -> None:
    question = [{"role": "user", "content": "How many people live in Rome?"}]
    called = {"tools": [POPULATION], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
    answer = litellm.completion(**_litellms(half_b, messages=question, **called))
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_population", {"city": "Rome"})
    assert answer.choices[0].finish_reason == "tool_calls"
    schema = POPULATION["function"]["parameters"]  # type: ignore[index]
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    asked = _litellms(half_b, messages=question, response_format=form, max_tokens=60)
    assert json.loads(litellm.completion(**asked).choices[0].message.content).keys() == {"city"}


@pytest.mark.parametrize(("change", "kind", "_"), CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_litellm_knows_each_error(
    litellm: Any, half_b: Served, change: dict[str, Any], kind: str, _: str, stream: bool
) -> None:
    with _held(half_b, change) as changed, pytest.raises(getattr(litellm, kind)) as caught:
        litellm.completion(**_litellms(half_b, **changed), stream=stream)
    assert type(caught.value).__name__ == kind


@pytest.mark.parametrize(("change", "_", "kind"), CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_langchain_knows_each_error(half_b: Served, change: dict[str, Any], _: str, kind: str, stream: bool) -> None:
    from langchain_core import exceptions  # type: ignore[import-not-found,unused-ignore]

    langchain_openai = pytest.importorskip("langchain_openai")
    with _held(half_b, change) as changed:
        asked = _asked(half_b, **changed)
        messages = asked.pop("messages")
        model = langchain_openai.ChatOpenAI(base_url=half_b.url, **asked)
        with pytest.raises(getattr(exceptions, kind)):
            _ = [*model.stream(messages)] if stream else model.invoke(messages)
