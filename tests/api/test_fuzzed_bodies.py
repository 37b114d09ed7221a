"""Bodies of any kind: never a 500, never a hang, always JSON or a whole stream."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdiq.api.app import Api
from mdiq.api.fields import _REASONS, _SYNONYMS, MAX_TOKENS, NUM_CHOICES, SAMPLING
from tests.api.test_app import FakeRing, _chunks

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/completions": {"prompt": ["a bb", [1, 2]], "max_tokens": 3},
    "/tokenize": {"prompt": "a bb"},
    "/detokenize": {"tokens": [1, 2]},
}
OTHERS = (
    "model messages prompt stream stream_options chat_template_kwargs enable_thinking reasoning_effort content tokens "
    "add_special_tokens add_special parse_special with_pieces user metadata"
).split()
FIELDS = sorted({*SAMPLING, *MAX_TOKENS, *NUM_CHOICES, *_SYNONYMS, *_REASONS, *OTHERS})
WORDS = ["", "a", "tiny", "user", "assistant", "tool", "text", "\ud800", "\x00", "5", "-1", "role", "Hi", "x" * 2_000]
NUMBERS = [0, 1, -1, 2, 63, 64, 65, 1 << 31, 1 << 63, 1 << 64, -(1 << 63) - 1, 10**400, 0.5, -0.0, 1e308]
NUMBERS += [float("nan"), float("inf"), float("-inf"), 5e-324]

SCALARS = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | st.text(max_size=5)
NAMES = st.sampled_from(
    [*FIELDS, "role", "content", "text", "type", "tool_calls", "function", "name", "arguments", "id"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": VALUES},
        optional={"tool_calls": VALUES, "name": VALUES, "tool_call_id": VALUES},
    ),
    max_size=3,
)
thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@contextmanager
def _asked() -> Iterator[Callable[[str, bytes], tuple[int, str]]]:
    """Give what sends a body to a path and returns status and answer; each has 10 seconds."""

    async def send(path: str, body: bytes) -> tuple[int, str]:
        async with asyncio.timeout(10):
            response = await client.post(path, data=body)
            return response.status, await response.text()

    async def started() -> Any:
        return await TestClient(TestServer(Api(FakeRing(max_requests=64)).application())).__aenter__()

    with asyncio.Runner() as runner:
        client = runner.run(started())
        try:
            yield lambda path, body: runner.run(send(path, body))
        finally:
            runner.run(client.close())


def _check(status: int, text: str) -> None:
    assert status in (200, 400, 404), (status, text)
    if status == 200 and text.startswith("data: "):
        assert all(chunk["object"] for chunk in _chunks(text)), "it ends in an error"
    else:
        answer = json.loads(text)
        if status != 200:
            assert set(answer["error"]) >= {"message", "type", "param", "code"}
            assert answer["error"]["type"] in ("invalid_request_error", "exceed_context_size_error", "not_found_error")
            assert 0 < len(answer["error"]["message"]) <= 301


@pytest.mark.parametrize("path", GOOD)
def test_fields_with_any_value_get_an_answer_or_their_error(path: str) -> None:
    statuses = set()
    own = sorted(GOOD[path])
    with _asked() as send:

        @thorough
        @given(st.dictionaries(st.sampled_from(FIELDS) | st.sampled_from(own), VALUES, max_size=5))
        def check(change: dict[str, Any]) -> None:
            status, text = send(path, json.dumps({**GOOD[path], **change}).encode())
            _check(status, text)
            statuses.add(status)

        check()
    assert {200, 400} <= statuses, "it tries too little"


def test_messages_of_any_kind_get_an_answer_or_their_error() -> None:
    with _asked() as send:

        @thorough
        @given(MESSAGES, st.booleans())
        def check(messages: list[Any], stream: bool) -> None:
            body = {"messages": messages, "max_tokens": 2, "stream": stream}
            _check(*send("/v1/chat/completions", json.dumps(body).encode()))

        check()


@pytest.mark.parametrize("path", GOOD)
def test_any_json_and_any_bytes_get_an_answer_or_their_error(path: str) -> None:
    with _asked() as send:

        @thorough
        @given(VALUES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40))
        def check(body: bytes) -> None:
            _check(*send(path, body))

        check()


@pytest.mark.parametrize("path", GOOD)
def test_a_body_that_is_cut_or_damaged_gets_an_error(path: str) -> None:
    whole = json.dumps({**GOOD[path], "stop": ["\u00e9"], "logit_bias": {"5": 1}}).encode()
    with _asked() as send:

        @thorough
        @given(st.integers(0, len(whole) - 1), st.binary(max_size=3), st.integers(0, 3))
        def check(at: int, inserted: bytes, num_lost: int) -> None:
            _check(*send(path, whole[:at] + inserted + whole[at + num_lost :]))

        check()
