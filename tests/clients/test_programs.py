"""Programs of others over real HTTP, unpatched: structured answers, tool loops, batches, a command line."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer
from pydantic import BaseModel

from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.core.sequence import SamplingParams
from mdiq.runtime.starter_service import StreamEvent
from tests.api.test_forms import WritingRing

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

KEY = "k" * 20
ROME = '{"name": "Rome", "people": 3}'


class City(BaseModel):
    name: str
    people: int


def call_of(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class TurnsRing(WritingRing):
    """Writes one text after the other, and the last one again and again."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.texts = list(texts)

    async def answer(
        self, prompt: tuple[int, ...], params: SamplingParams, **more: Any
    ) -> AsyncGenerator[StreamEvent, None]:
        self.text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        async for event in super().answer(prompt, params, **more):
            yield event


@asynccontextmanager
async def _served(ring: WritingRing) -> AsyncIterator[str]:
    async with TestServer(Api(ring, bare_keys([KEY])).application()) as server:
        yield str(server.make_url("/v1"))


async def _ask(ring: WritingRing, ask: Callable[[str], Any]) -> Any:
    async with _served(ring) as url:
        return await asyncio.to_thread(ask, url)


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "JSON", "TOOLS"])
async def test_instructor_gets_its_model(mode: str) -> None:
    import instructor
    from openai import OpenAI

    def ask(url: str) -> Any:
        client = instructor.from_openai(OpenAI(base_url=url, api_key=KEY, max_retries=0), mode=instructor.Mode[mode])
        return client.chat.completions.create(
            model="tiny", response_model=City, max_retries=0, messages=[{"role": "user", "content": "Rome"}]
        )

    ring = TurnsRing(call_of("City", ROME) if mode == "TOOLS" else ROME)
    city = await _ask(ring, ask)
    assert (city.name, city.people) == ("Rome", 3)
    (_, params), *_ = ring.asked
    assert params.grammar, "the answer had to have this form"


async def test_langchain_gets_batches_structured_answers_and_tools() -> None:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def get(a: int) -> str:
        """Gets."""
        return str(a)

    def ask(url: str) -> Any:
        model = ChatOpenAI(model="tiny", base_url=url, api_key=KEY, max_retries=0)  # type: ignore[arg-type]
        batch = [answer.content for answer in model.batch(["a", "b", "c"])]
        structured = model.with_structured_output(City, method="json_schema").invoke("Rome")
        calls = model.bind_tools([get]).invoke("Get 1").tool_calls
        streamed = "".join(str(chunk.content) for chunk in model.stream("a"))
        return [batch, structured, [(call["name"], call["args"]) for call in calls], streamed]

    ring = TurnsRing("One.", "One.", "One.", ROME, call_of("get", '{"a": 1}'), "Last.")
    assert await _ask(ring, ask) == [["One."] * 3, City(name="Rome", people=3), [("get", {"a": 1})], "Last."]


async def test_an_agent_of_pydantic_ai_runs_its_tool_and_ends() -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    ring = TurnsRing(call_of("get", '{"a": 4}'), "It is 5.")
    got: list[int] = []

    def get(a: int) -> int:
        """Gets."""
        got.append(a)
        return a + 1

    async with _served(ring) as url:
        agent = Agent(OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=url, api_key=KEY)), tools=[get])
        result = await agent.run("Get 4")
    assert (result.output, got) == ("It is 5.", [4])


async def test_llm_asks_from_the_command_line(tmp_path: Path) -> None:
    async with _served(TurnsRing("Hello.")) as url:
        model = {"model_id": "ring", "model_name": "tiny", "api_base": url, "api_key_name": "ring"}
        (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
        (tmp_path / "keys.json").write_text(json.dumps({"ring": KEY}))
        for more in ([], ["--no-stream"]):
            done = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-P", "-m", "llm", "-m", "ring", "Hi", *more],
                env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert (done.returncode, done.stdout.strip()) == (0, "Hello."), done.stderr[-2_000:]
