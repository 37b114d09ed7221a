"""Programs of others, unpatched, against `mdiq serve` with a real model; for test_programs.py a test writes answers."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from tests.clients.conftest import Served

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

HELLO = "Write one short sentence about the sea."
ROME = "Describe the city of Rome as JSON with its name and people."
CITIES = "You answer questions about cities. Answer in a sentence once you know the number."
QUESTION = "How many people live in Rome?"


class City(BaseModel):
    name: str = Field(max_length=30)
    people: int = Field(ge=0, le=100_000_000)


def _say(served: Served, text: str) -> str:
    with openai.OpenAI(base_url=served.url, api_key=served.key, max_retries=0, timeout=120) as client:
        messages: Any = [{"role": "user", "content": text}]
        answer = client.chat.completions.create(model=served.model, messages=messages, temperature=0, max_tokens=24)
    return answer.choices[0].message.content or ""


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "JSON", "TOOLS"])
def test_instructor_gets_its_model(half_b: Served, mode: str) -> None:
    import instructor

    with openai.OpenAI(base_url=half_b.url, api_key=half_b.key, max_retries=0, timeout=120) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
        city = client.chat.completions.create(
            model=half_b.model,
            response_model=City,
            max_retries=0,
            temperature=0,
            max_tokens=100,
            messages=[{"role": "user", "content": ROME}],
        )
    assert isinstance(city, City) and city.name == "Rome"


def _chat_model(served: Served, **more: Any) -> Any:
    from langchain_openai import ChatOpenAI

    asked = {"model": served.model, "temperature": 0, "max_tokens": 24, "max_retries": 0, "timeout": 120, **more}
    return ChatOpenAI(base_url=served.url, api_key=served.key, **asked)  # type: ignore[arg-type]


def test_langchain_gets_batches_streams_and_structured_answers(half_b: Served) -> None:
    model, texts = _chat_model(half_b), [HELLO, "Say only: yes", "Count from one to five."]
    alone = [_say(half_b, text) for text in texts]
    assert [answer.content for answer in model.batch(texts)] == alone
    assert [answer.content for answer in asyncio.run(_batch(half_b, texts))] == alone
    assert "".join(str(chunk.content) for chunk in model.stream(HELLO)) == alone[0]
    for method in ("json_schema", "function_calling"):
        city = _chat_model(half_b, max_tokens=100).with_structured_output(City, method=method).invoke(ROME)
        assert isinstance(city, City) and city.name == "Rome", method


async def _batch(served: Served, texts: list[str]) -> list[Any]:
    return list(await _chat_model(served).abatch(texts))


def test_langchain_talks_by_responses_and_goes_on_from_one(half_b: Served) -> None:
    model = _chat_model(half_b, use_responses_api=True, use_previous_response_id=True)
    first = model.invoke(HELLO)
    assert first.text == _say(half_b, HELLO)
    assert "".join(chunk.text for chunk in model.stream(HELLO)) == first.text
    second = model.invoke([("user", HELLO), first, ("user", "Say it again.")])
    assert second.usage_metadata["input_tokens"] > sum(first.usage_metadata[key] for key in _COUNTS)


_COUNTS = ("input_tokens", "output_tokens")


def test_langchain_sends_the_result_of_a_tool_and_gets_the_answer(tool_model: Served) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_core.tools import tool

    @tool
    def get_population(city: str) -> str:
        """Returns how many people live in a city."""
        return "4321"

    model = _chat_model(tool_model, max_tokens=80).bind_tools([get_population])
    messages = [SystemMessage(CITIES), HumanMessage(QUESTION)]
    asked = model.invoke(messages)
    (call,) = asked.tool_calls
    assert (call["name"], call["args"]) == ("get_population", {"city": "Rome"})
    assert "4321" in model.invoke([*messages, asked, get_population.invoke(call)]).content


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_an_agent_of_pydantic_ai_runs_its_tool_and_ends(tool_model: Served, api: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    got: list[str] = []

    def get_population(city: str) -> str:
        """Returns how many people live in a city."""
        got.append(city)
        return "4321"

    async def ask() -> list[str]:
        provider = OpenAIProvider(base_url=tool_model.url, api_key=tool_model.key)
        model = (OpenAIChatModel if api == "chat" else OpenAIResponsesModel)(tool_model.model, provider=provider)
        agent = Agent(model, system_prompt=CITIES, tools=[get_population])
        settings: Any = {"temperature": 0, "max_tokens": 80}
        whole = await agent.run(QUESTION, model_settings=settings)
        async with agent.run_stream(QUESTION, model_settings=settings) as streamed:
            return [whole.output, await streamed.get_output()]

    whole, streamed = asyncio.run(ask())
    assert got == ["Rome", "Rome"] and "4321" in whole and streamed == whole


def test_pydantic_ai_gets_an_object(half_b: Served) -> None:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def ask(output: Any) -> Any:
        provider = OpenAIProvider(base_url=half_b.url, api_key=half_b.key)
        agent = Agent(OpenAIChatModel(half_b.model, provider=provider), output_type=output, retries=0)
        return (await agent.run(ROME, model_settings={"temperature": 0, "max_tokens": 100})).output

    for output in (NativeOutput(City), ToolOutput(City)):
        city = asyncio.run(ask(output))
        assert isinstance(city, City) and city.name == "Rome"


def test_llm_asks_from_the_command_line(half_b: Served, tmp_path: Path) -> None:
    model = {"model_id": "ring", "model_name": half_b.model, "api_base": half_b.url, "api_key_name": "ring"}
    more = {"supports_schema": True, "supports_tools": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([{**model, **more}]))
    (tmp_path / "keys.json").write_text(json.dumps({"ring": half_b.key}))

    def run(*words: str) -> str:
        command = [sys.executable, "-P", "-m", "llm", "-m", "ring", "-o", "temperature", "0", *words]
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2_000:]
        return done.stdout.strip()

    short, expected = ("-o", "max_tokens", "24"), _say(half_b, HELLO)
    assert run(HELLO, *short) == run(HELLO, *short, "--no-stream") == expected
    schema = json.dumps(City.model_json_schema())
    assert City.model_validate_json(run(ROME, "-o", "max_tokens", "100", "--schema", schema)).name == "Rome"
