"""litellm and langchain-openai, as they are installed: each error arrives as the class that their users catch.

`tox -e clients` installs them.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.errors import RingError
from tests.api.test_app import FakeRing

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

KEY = "k" * 20
LONG, FAR = "a " * 63, "x" * 3_000  # one that does not fit, and one that is not even tokenized
CASES: tuple[tuple[dict[str, Any], str, dict[str, Any], str, str], ...] = (
    # the ring, the text, changes of the request, litellm's class, langchain's class
    ({}, LONG, {}, "ContextWindowExceededError", "ContextOverflowError"),
    ({}, FAR, {}, "ContextWindowExceededError", "ContextOverflowError"),
    ({}, "Hi", {"temperature": -1}, "BadRequestError", "ModelInvalidRequestError"),
    ({}, "Hi", {"api_key": "wrong"}, "AuthenticationError", "ModelAuthenticationError"),
    ({}, "Hi", {"model": "huge"}, "NotFoundError", "ModelNotFoundError"),
    ({"num_running": 8}, "Hi", {}, "RateLimitError", "ModelRateLimitError"),
    ({"is_serving": False}, "Hi", {}, "ServiceUnavailableError", "ModelAPIError"),
)


@asynccontextmanager
async def _served(ring: FakeRing) -> AsyncIterator[str]:
    async with TestServer(Api(ring, bare_keys([KEY])).application()) as server:
        yield str(server.make_url("/v1"))


@pytest.fixture
def litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
    return pytest.importorskip("litellm")


@pytest.fixture
def chat_model() -> Callable[..., Any]:
    return pytest.importorskip("langchain_openai").ChatOpenAI


def _asked(url: str, text: str, change: dict[str, Any]) -> dict[str, Any]:
    changed = {"model": "tiny", "api_key": KEY, "max_tokens": 3, "timeout": 10, "max_retries": 0, **change}
    model = f"openai/{changed.pop('model')}"
    return {"model": model, "api_base": url, "messages": [{"role": "user", "content": text}], **changed}


@pytest.mark.parametrize(("ring", "text", "change", "kind", "_"), CASES)
@pytest.mark.parametrize("stream", [False, True])
async def test_litellm_knows_each_error(
    litellm: Any, ring: dict[str, Any], text: str, change: dict[str, Any], kind: str, _: str, stream: bool
) -> None:
    async with _served(FakeRing(**ring)) as url:
        asked = {**_asked(url, text, change), "stream": stream}
        for ask in (lambda: asyncio.to_thread(litellm.completion, **asked), lambda: litellm.acompletion(**asked)):
            with pytest.raises(getattr(litellm, kind)) as caught:
                await ask()
            assert type(caught.value).__name__ == kind


async def test_litellm_gets_choices_whole_and_streamed(litellm: Any) -> None:
    async with _served(FakeRing()) as url:
        whole = await litellm.acompletion(**_asked(url, "Hi", {"n": 2}))
        stream = await litellm.acompletion(**_asked(url, "Hi", {}), stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert [choice.message.content for choice in whole.choices] == [" 0 1 2"] * 2
    assert whole.usage.prompt_tokens == 2 and "".join(pieces) == " 0 1 2"


@pytest.mark.parametrize(("ring", "text", "change", "_", "kind"), CASES)
@pytest.mark.parametrize("stream", [False, True])
async def test_langchain_knows_each_error(
    chat_model: Any, ring: dict[str, Any], text: str, change: dict[str, Any], _: str, kind: str, stream: bool
) -> None:
    from langchain_core import exceptions  # type: ignore[import-not-found,unused-ignore]

    async with _served(FakeRing(**ring)) as url:
        asked = {"model": "tiny", "api_key": KEY, "max_tokens": 3, "max_retries": 0, "base_url": url, **change}
        model = chat_model(**asked)
        with pytest.raises(getattr(exceptions, kind)):
            if stream:
                _ = [chunk async for chunk in model.astream(text)]
            else:
                await asyncio.to_thread(model.invoke, text)


async def test_langchain_gets_a_batch_and_a_stream(chat_model: Any) -> None:
    async with _served(FakeRing()) as url:
        model = chat_model(model="tiny", api_key=KEY, max_tokens=3, base_url=url)
        answers = await model.abatch(["Hi", "a b"])
        pieces = [chunk.content async for chunk in model.astream("Hi")]
    assert [answer.content for answer in answers] == [" 0 1 2"] * 2 and "".join(pieces) == " 0 1 2"
    assert answers[1].usage_metadata["input_tokens"] == 3


async def test_langchain_raises_what_ends_a_stream(chat_model: Any) -> None:
    async def fails() -> None:
        raise RingError("pi2: it is gone")

    async with _served(FakeRing(before=lambda i: fails() if i == 1 else None)) as url:
        model = chat_model(model="tiny", api_key=KEY, max_retries=0, base_url=url)
        with pytest.raises(Exception, match="pi2: it is gone"):
            _ = [chunk async for chunk in model.astream("Hi")]
