"""Routes, streams, keys and errors, over real HTTP, in front of a ring that only pretends."""

import asyncio
import io
import json
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import pytest
import yarl
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from mdiq import __version__
from mdiq.api import answering, streams
from mdiq.api.answering import TEXT_THREADS
from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.api.requests import MAX_BODY_BYTES
from mdiq.core.logprobs import Logprobs, LogprobsWanted, TokenLogprob
from mdiq.core.sequence import FinishReason, SamplingParams, TokenEvent
from mdiq.errors import CapacityError, ConfigError, ModelError, RingError
from mdiq.runtime.starter_service import StreamEvent

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
NO_CACHE = {"prompt_tokens_details": {"cached_tokens": 0}}
HALF = 99  # a token that is a part of a character
Client = TestClient[web.Request, web.Application]


@dataclass
class FakeRing:
    """Answers every prompt with " 0", " 1", ...; ``before`` is awaited before each token."""

    before: Callable[[int], Any] = lambda _: None
    is_serving: bool = True
    state: str = "waits for pi2"
    num_running: int = 0
    max_requests: int = 8
    model_name: str = "tiny"
    context_tokens: int = 64
    vocab_size: int = 100
    asked: list[tuple[tuple[int, ...], SamplingParams]] = field(default_factory=list)
    owners: list[tuple[str, int]] = field(default_factory=list)
    told: list[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def takes_requests(self) -> bool:
        return self.is_serving

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            if len(text) > 1_000:
                raise CapacityError("prompt: at least 100 tokens leave no room")
        return [[len(word) for word in text.split()] for text in texts]

    def text_ids(self, text: str, *, has_special: bool) -> list[int]:
        return [*([1] if has_special else []), *(len(word) for word in text.split())]

    def text_of(self, tokens: Sequence[int]) -> str:
        return " ".join("x" * token for token in tokens)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        tools: Sequence[Any] = (),
        *,
        is_bounded: bool = True,
    ) -> list[int]:
        self.told.append((messages, template_kwargs))
        if messages[0]["content"] == "Ahoy":
            raise ConfigError("the template knows no pirate")
        encode = partial(self.text_ids, has_special=False) if not is_bounded else lambda text: self.encode([text])[0]
        return [1, *encode(messages[0]["content"])]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    def spell(self, token: int) -> tuple[bytes, bool]:
        return (b"\xe2\x82", True) if token == HALF else (f" {token}".encode(), True)

    async def answer(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        logprobs: LogprobsWanted | None = None,
        owner: str = "",
        share: int = 1,
    ) -> AsyncGenerator[StreamEvent, None]:
        if not self.is_serving:
            raise RingError(f"the ring does not serve: {self.state}")
        if not 0 < len(prompt) < self.context_tokens:
            raise CapacityError(f"a prompt of {len(prompt)} tokens")
        index = len(self.asked)
        self.asked.append((prompt, params))
        self.owners.append((owner, share))
        self.num_running += 1
        num_tokens = min(params.max_tokens, self.context_tokens - len(prompt))
        try:
            for i in range(num_tokens):
                waiting = self.before(i)
                if waiting is not None:
                    await waiting
                reason = FinishReason.LENGTH if i == num_tokens - 1 else None
                step = TokenEvent(index, i, len(prompt) + i, reason, logprob=_scored(i, logprobs))
                of_prompt = None
                if logprobs is not None and logprobs.of_prompt and not i:
                    of_prompt = Logprobs(TokenLogprob(t, -t / 2, ((7, -0.5),) * logprobs.top) for t in prompt[1:])
                yield StreamEvent(step, f" {i}", time.monotonic(), prompt_logprobs=of_prompt)
        finally:
            self.num_running -= 1
            self.closed.set()

    def status(self) -> Mapping[str, Any]:
        node = {"name": "desk", "state": "serves", "busy_share": 0.5, "rss_bytes": 7}
        return {
            "is_serving": self.is_serving,
            "nodes": [node, {"name": "pi1", "state": "drained"}],
            "requests": {"waiting": 0, "running": 1, "done": 2, "failed": 3, "refused": 6, "left": 7},
            "rings_formed": 4,
            "counts": {"preemptions": 5},
        }


def _scored(token: int, wanted: LogprobsWanted | None) -> TokenLogprob | None:
    """The likeliest token is always 0."""
    return None if wanted is None else TokenLogprob(token, -token / 4, tuple((i, -i / 4) for i in range(wanted.top)))


@asynccontextmanager
async def _client(ring: FakeRing, *keys: str, cors_origins: Sequence[str] = ()) -> AsyncIterator[Client]:
    application = Api(ring, bare_keys(keys), cors_origins=cors_origins).application()
    async with TestClient(TestServer(application), timeout=aiohttp.ClientTimeout(10)) as client:
        yield client


async def _error(response: aiohttp.ClientResponse) -> dict[str, Any]:
    body = await response.json()
    error: dict[str, Any] = body["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    return error


def _chunks(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    # What broke is not done.
    assert (lines.pop() == "[DONE]") if '"error"' not in lines[-1] else ("[DONE]" not in text)
    return [json.loads(line) for line in lines]


async def test_a_chat_and_a_completion_whole() -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        chat = await (await client.post("/v1/chat/completions", json=CHAT)).json()
        completion = await (await client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 1})).json()
    assert chat["object"] == "chat.completion" and chat["model"] == "tiny"
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": " 0 1 2"}
    assert chat["choices"][0]["finish_reason"] == "length"
    assert chat["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, **NO_CACHE}
    assert completion["object"] == "text_completion" and completion["choices"][0]["text"] == " 0"
    assert chat["id"] != completion["id"]
    assert [prompt for prompt, _ in ring.asked] == [(1, 2), (5, 6)]


async def test_a_chat_in_a_stream_with_its_usage() -> None:
    async with _client(FakeRing()) as client:
        asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        response = await client.post("/v1/chat/completions", json=asked)
        assert response.content_type == "text/event-stream"
        *chunks, usage = _chunks(await response.text())
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": " 0"},
        {"content": " 1"},
        {"content": " 2"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, None, "length"]
    assert response.headers["X-Accel-Buffering"] == "no"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert len({chunk["id"] for chunk in (*chunks, usage)}) == 1


async def test_a_completion_in_a_stream_without_usage() -> None:
    async with _client(FakeRing()) as client:
        response = await client.post("/v1/completions", json={"prompt": "a b", "max_tokens": 2, "stream": True})
        chunks = _chunks(await response.text())
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [" 0", " 1", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]


async def test_models_health_and_metrics() -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        (model,) = (await (await client.get("/v1/models")).json())["data"]
        assert (model["id"], model["max_model_len"]) == ("tiny", 64)
        assert (await client.get("/health")).status == 200
        response = await client.get("/metrics")
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        metrics = await response.text()
        assert {"mdiq_requests_done_total 2.0", "mdiq_preemptions_total 5.0"} <= set(metrics.splitlines())
        assert 'mdiq_stage_busy_ratio{node="desk"} 0.5' in metrics.splitlines()
        assert 'node="pi1"' not in metrics
        ring.is_serving = False
        response = await client.get("/health")
        assert response.status == 503
        assert (await _error(response))["message"] == "waits for pi2"


async def test_a_ring_is_ready_when_it_serves_and_its_status_and_version_need_the_key() -> None:
    ring, key = FakeRing(), {"Authorization": f"Bearer {'k' * 20}"}
    async with _client(ring, "k" * 20) as client:
        response = await client.get("/ready")
        assert (response.status, await response.json()) == (200, {"status": "ready"})
        ring.is_serving = False
        response = await client.get("/ready")
        assert response.status == 503 and int(response.headers["Retry-After"]) > 0
        assert "pi2" not in await response.text(), "anyone may ask"
        for path in ("/status.json", "/version"):
            assert (await client.get(path)).status == 401
        status = await (await client.get("/status.json", headers=key)).json()
        assert await (await client.get("/version", headers=key)).json() == {"version": __version__}
    assert status["nodes"] == ring.status()["nodes"] and status["requests"]["done"] == 2
    assert status["requests"]["refused"]["no_key"] == 0, "GETs are not counted"


async def test_a_ring_that_does_not_serve_or_has_enough_to_do_says_when_to_come_again() -> None:
    ring = FakeRing(is_serving=False, max_requests=2)
    async with _client(ring) as client:
        for status, kind in ((503, "unavailable_error"), (429, "rate_limit_error")):
            response = await client.post("/v1/chat/completions", json=CHAT)
            assert response.status == status and int(response.headers["Retry-After"]) > 0
            assert response.headers["Connection"] == "close"
            assert (await _error(response))["type"] == kind
            ring.is_serving, ring.num_running = True, 2
    assert not ring.asked


async def test_a_key_is_asked_for_everywhere_but_at_health() -> None:
    key = "k" * 20
    async with _client(FakeRing(), "other" * 4, key) as client:
        assert (await client.get("/health")).status == 200
        for header in (None, "Bearer wrong", f"Basic {key}", "Bearer", "Bearer \u00ff"):
            headers = {} if header is None else {"Authorization": header}
            for path in ("/v1/models", "/metrics", "/nowhere"):
                response = await client.get(path, headers=headers)
                assert response.status == 401
                assert (await _error(response))["type"] == "authentication_error"
        for scheme in ("Bearer", "bearer"):
            assert (await client.get("/v1/models", headers={"Authorization": f"{scheme} {key}"})).status == 200


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "nested deeper"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (json.dumps({**CHAT, "model": "gpt-4"}).encode(), 404, "this ring serves 'tiny'"),
        (
            json.dumps({"messages": [{"role": "user", "content": "a " * 63}]}).encode(),
            400,
            "length is 64 tokens",
        ),
        (json.dumps({"messages": [{"role": "user", "content": "Ahoy"}]}).encode(), 400, "no pirate"),
        (json.dumps({"messages": [{"role": "banana", "content": "a"}]}).encode(), 400, "'banana' is not one of"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "Too Large"),
    ],
)
async def test_what_cannot_be_served_is_told_in_json(body: bytes, status: int, words: str) -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        response = await client.post("/v1/chat/completions", data=io.BytesIO(body))
        assert response.status == status
        error = await _error(response)
        assert words in error["message"]
        assert response.headers["x-should-retry"] == "false"
        assert (await client.post("/v1/chat/completions", json=CHAT)).status == 200  # and nothing is broken
    assert len(ring.asked) == 1


async def test_prompts_of_no_tokens_or_unknown_ones_and_paths_that_are_not_there() -> None:
    async with _client(FakeRing()) as client:
        for prompt, words in ((" ", "empty"), ([100], "100 tokens only"), ("x" * 200, "token id 200")):
            response = await client.post("/v1/completions", json={"prompt": prompt})
            assert response.status == 400 and words in (await _error(response))["message"]
        for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)):
            response = await client.request(method, path)
            assert response.status == status
            assert path in (await _error(response))["message"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (CapacityError("never fits"), 400, "exceed_context_size_error"),
        (RingError("gone"), 503, "unavailable_error"),
        (ValueError("a secret"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_has_its_status(
    error: Exception, status: int, kind: str, stream: bool
) -> None:
    async def fails() -> None:
        raise error

    async with _client(FakeRing(before=lambda _: fails())) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        assert response.status == status
        found = await _error(response)
    assert found["type"] == kind
    assert found["message"].endswith(str(error)) == (status != 500)
    assert "secret" not in found["message"]


async def test_an_error_in_the_middle_of_a_stream_is_an_event_of_it() -> None:
    async def fails() -> None:
        raise RingError("pi2: it is gone")

    async with _client(FakeRing(before=lambda i: fails() if i == 1 else None)) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        opening, first, last = _chunks(await response.text())
    assert (opening["choices"][0]["delta"]["role"], first["choices"][0]["delta"]["content"]) == ("assistant", " 0")
    assert last["error"]["message"] == "pi2: it is gone"


async def test_a_mistake_of_ours_in_the_middle_of_a_stream_ends_it() -> None:
    async def fails() -> None:
        raise ValueError("a secret")

    async with _client(FakeRing(before=lambda i: fails() if i == 1 else None)) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        text = await response.text()
    assert _chunks(text)[-1]["error"]["type"] == "internal_error"
    assert "secret" not in text


async def test_requests_whose_texts_still_become_tokens_count_too() -> None:
    go_on = threading.Event()

    class SlowTexts(FakeRing):
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            go_on.wait(10)
            return [[1] for _ in texts]

    async with _client(SlowTexts(max_requests=2)) as client:
        asked = [asyncio.create_task(client.post("/v1/completions", json={"prompt": "a"})) for _ in range(5)]
        refused = 0
        for response in asyncio.as_completed(asked):
            if (await response).status == 429:
                refused += 1
            if refused == 3:
                go_on.set()
        assert sorted([task.result().status for task in asked]) == [200, 200, 429, 429, 429]
        assert (await client.post("/v1/completions", json={"prompt": "a"})).status == 200


async def test_texts_of_clients_that_have_left_take_no_thread() -> None:
    go_on = threading.Event()
    begun: list[str] = []

    def encode(text: str) -> str:
        begun.append(text)
        go_on.wait(10)
        return text

    api = Api(FakeRing())
    first, second, *waiting = [
        asyncio.create_task(api._answering.in_thread(partial(encode, text))) for text in "abcdef"
    ]
    while len(begun) < TEXT_THREADS:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for task in (first, *waiting):
        task.cancel()
    await asyncio.gather(first, *waiting, return_exceptions=True)
    last = asyncio.create_task(api._answering.in_thread(partial(encode, "g")))
    go_on.set()
    assert (await second, await last) == ("b", "g")
    assert begun == ["a", "b", "g"]
    await api._close(web.Application())


async def test_two_streams_go_on_beside_each_other() -> None:
    both = asyncio.Barrier(2)
    async with _client(FakeRing(before=lambda _: both.wait())) as client:
        asked = [client.post("/v1/chat/completions", json={**CHAT, "stream": True}) for _ in range(2)]
        texts = [await response.text() for response in await asyncio.gather(*asked)]
    assert all(len(_chunks(text)) == 5 for text in texts)


async def test_a_model_is_found_by_its_name() -> None:
    ring = FakeRing(model_name="Llama-3.2-1B-Instruct")
    async with _client(ring) as client:
        listed = (await (await client.get("/v1/models")).json())["data"]
        assert await (await client.get("/v1/models/Llama-3.2-1B-Instruct")).json() == listed[0]
        response = await client.get("/v1/models/Llama-3")
        assert response.status == 404 and "Llama-3.2-1B-Instruct" in (await _error(response))["message"]
        response = await client.post("/chat/completions", json=CHAT)
        assert response.status == 404 and "/v1/chat/completions" in (await _error(response))["message"]


async def test_tool_calls_of_before_and_words_for_the_template_reach_it() -> None:
    ring = FakeRing()
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
    ]
    async with _client(ring) as client:
        asked = {**CHAT, "messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
        assert (await client.post("/v1/chat/completions", json=asked)).status == 200
    ((told, more),) = ring.told
    assert more == {"enable_thinking": False}
    assert told[1]["content"] == "" and told[1]["tool_calls"][0]["function"]["arguments"] == {"zone": "UTC"}
    assert told[2] == {"role": "tool", "tool_call_id": "c1", "content": "12:00"}


async def test_a_prompt_that_is_too_long_is_told_in_the_words_that_clients_know() -> None:
    async with _client(FakeRing()) as client:
        response = await client.post("/v1/completions", json={"prompt": [1] * 64})
        error = await _error(response)
    assert (error["type"], error["code"]) == ("exceed_context_size_error", "context_length_exceeded")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (64, 64)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_ends_its_sequence(stream: bool) -> None:
    began, never = asyncio.Event(), asyncio.Event()

    async def hangs(i: int) -> None:
        if i:
            began.set()
            await never.wait()

    ring = FakeRing(before=hangs)
    runner = web.AppRunner(Api(ring).application(), handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/chat/completions"
    async with aiohttp.ClientSession() as session:
        asking = asyncio.create_task(session.post(url, json={**CHAT, "stream": stream}))
        await began.wait()
        asking.cancel()
        response = (await asyncio.gather(asking, return_exceptions=True))[0]
        if isinstance(response, aiohttp.ClientResponse):
            response.close()
    async with asyncio.timeout(10):
        await ring.closed.wait()
    await runner.cleanup()


async def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SILENCE_S", 0.01)
    go_on = asyncio.Event()

    async with _client(FakeRing(before=lambda i: go_on.wait() if i == 1 else None)) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        while (await response.content.readline()) != b": keep-alive\n":
            pass
        go_on.set()
        rest = await response.text()
    assert '" 1"' in rest and rest.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("allowed", ["*", "https://chat.example.org"])
async def test_web_pages_of_allowed_origins_may_ask(allowed: str) -> None:
    origin = {"Origin": "https://chat.example.org"}
    asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with _client(FakeRing(), "a-key", cors_origins=[allowed]) as client:
        preflight = await client.options("/v1/chat/completions", headers=asked)
        assert preflight.status == 204
        assert preflight.headers["Access-Control-Allow-Headers"] == "authorization"
        body = {**CHAT, "stream": True}
        for answer in (
            await client.post("/v1/chat/completions", json=body, headers={**origin, "Authorization": "Bearer a-key"}),
            await client.get("/v1/models", headers=origin),  # a page reads errors too
            preflight,
        ):
            assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example.org"


@pytest.mark.parametrize("allowed", [[], ["https://other.example.org"]])
async def test_web_pages_of_other_origins_may_not_ask(allowed: list[str]) -> None:
    async with _client(FakeRing(), cors_origins=allowed) as client:
        pages = ["https://chat.example.org", "null", f"http://rebound.example.org:{client.port}", "http://127.0.0.1:1"]
        for page in pages:
            headers = {
                "Origin": page,
                "Host": page.partition("://")[2] if "rebound" in page else f"127.0.0.1:{client.port}",
            }
            for response in (
                await client.options("/v1/models", headers=headers),
                await client.post("/v1/chat/completions", json=CHAT, headers=headers),
                await client.get("/status.json", headers=headers),
            ):
                assert response.status == 403
                assert "Access-Control-Allow-Origin" not in response.headers
        same = {"Origin": f"http://127.0.0.1:{client.port}"}
        assert (await client.get("/v1/models", headers=same)).status == 200


async def test_who_sends_a_key_is_no_page_that_makes_a_browser_ask() -> None:
    async with _client(FakeRing(), "a-key") as client:
        headers = {"Origin": "https://chat.example.org", "Authorization": "Bearer a-key"}
        response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.status == 200 and "Access-Control-Allow-Origin" not in response.headers
        wrong = {**headers, "Authorization": "Bearer b-key"}
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=wrong)).status == 403


async def test_a_prompt_that_the_ring_can_never_hold_is_told_in_the_same_words() -> None:
    def refuse(_: int) -> None:
        raise CapacityError("the KV cache holds 32 tokens")

    async with _client(FakeRing(refuse)) as client:
        error = await _error(await client.post("/v1/chat/completions", json=CHAT))
    assert error["message"].startswith("This model's maximum context length is 64 tokens")
    assert (error["code"], error["type"], error["n_ctx"]) == (
        "context_length_exceeded",
        "exceed_context_size_error",
        64,
    )


@pytest.mark.parametrize("prompt", [["a", "bb b"], [[1], [2, 1]]])
async def test_several_prompts_of_one_completion_are_choices_by_their_numbers(prompt: list[Any]) -> None:
    body = {"prompt": prompt, "max_tokens": 2}
    async with _client(FakeRing(max_requests=2)) as client:
        whole = await (await client.post("/v1/completions", json=body)).json()
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        chunks = _chunks(await (await client.post("/v1/completions", json=asked)).text())
        refused = await client.post("/v1/completions", json={**body, "prompt": ["a"] * 3})
        error = await _error(refused)
    assert [(c["index"], c["text"], c["finish_reason"]) for c in whole["choices"]] == [
        (0, " 0 1", "length"),
        (1, " 0 1", "length"),
    ]
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, **NO_CACHE}
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    for i in range(2):
        own = [choice for choice in choices if choice["index"] == i]
        assert "".join(choice["text"] for choice in own) == " 0 1"
        assert [choice["finish_reason"] for choice in own] == [None, None, "length"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert refused.status == 400 and error["param"] == "prompt", "there is never a place for three"
    assert "takes 2 at once" in error["message"]


async def test_one_of_several_prompts_that_cannot_be_served_ends_them_all() -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        body = {"prompt": ["a", "x " * 70], "max_tokens": 2}
        error = await _error(await client.post("/v1/completions", json=body))
    assert error["code"] == "context_length_exceeded" and not ring.asked


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x" * 2_000}),
        ("/v1/completions", {"prompt": ["a", [1, 2], "x" * 2_000]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 2_000}]}),
    ],
)
async def test_a_text_that_cannot_fit_is_told_as_one_that_does_not(path: str, body: dict[str, Any]) -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        response = await client.post(path, json=body)
        error = await _error(response)
    assert response.status == 400 and not ring.asked
    assert (error["type"], error["code"], error["param"]) == (
        "exceed_context_size_error",
        "context_length_exceeded",
        "messages" if "messages" in body else "prompt",
    )
    assert error["message"].endswith("tokens, and the prompt is too long: at least 100 tokens leave no room")


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions", "/v1", "/"]
)
async def test_an_address_that_is_not_there_is_told_the_one_that_is(path: str) -> None:
    async with _client(FakeRing()) as client:
        url = str(client.make_url("/")).removesuffix("/") + path
        response = await client.session.post(yarl.URL(url, encoded=True), json=CHAT, allow_redirects=False)
        error = await _error(response)
    assert response.status == 404
    assert f"POST {path}: " in error["message"] and "/v1/chat/completions" in error["message"].partition(": ")[2]


async def test_what_a_request_repeats_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "MAX_ECHO_CHARACTERS", 100)
    async with _client(FakeRing()) as client:
        body = {"prompt": "a " * 20, "echo": True, "max_tokens": 1, "n": 2}
        assert (await client.post("/v1/completions", json=body)).status == 200
        response = await client.post("/v1/completions", json={**body, "n": 3})
        assert response.status == 400 and (await _error(response))["param"] == "echo"


async def test_a_template_that_fails_names_no_file_of_this_machine() -> None:
    class Broken(FakeRing):
        def chat_ids(self, *_: Any, **__: Any) -> list[int]:
            raise ModelError("/srv/models/secret.json: chat_template: it fails")

    async with _client(Broken()) as client:
        for path in ("/v1/chat/completions", "/v1/responses", "/tokenize"):
            body = {"input": "Hi"} if path == "/v1/responses" else {"messages": CHAT["messages"]}
            response = await client.post(path, json=body)
            assert response.status == 400
            assert "/srv" not in await response.text()


@pytest.mark.parametrize("name", ["namespace", "range", "raise_exception", "messages"])
async def test_what_a_template_calls_is_not_taken_from_a_request(name: str) -> None:
    async with _client(FakeRing()) as client:
        body = {**CHAT, "chat_template_kwargs": {name: 1}}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status == 400 and (await _error(response))["param"] == "chat_template_kwargs"
