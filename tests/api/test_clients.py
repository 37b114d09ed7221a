"""Limits of keys: as values, and over HTTP before a ring that only pretends."""

import asyncio
import hashlib
from typing import Any

import aiohttp
import pytest
import structlog
from aiohttp.test_utils import TestClient, TestServer

from mdiq.api.admission import Admission, Asker
from mdiq.api.app import Api
from mdiq.api.clients import Client, Clients
from mdiq.api.keys import ApiKey, bare_keys, line_of, parse_keys
from mdiq.api.requests import ApiError, BadRequest
from tests.api.test_app import CHAT, FakeRing

OFFICE, LAB = "key-of-the-office-1", "key-of-the-laboratory"


def _keys(**limits: int) -> list[ApiKey]:
    return parse_keys(f"{line_of('office', OFFICE, limits)}\n{line_of('lab', LAB, {})}\n", "keys")


def _client(**limits: int) -> Client:
    return Client(ApiKey("office", b"", **limits))


def test_a_key_has_no_more_requests_in_flight_than_its_limit_each_prompt_counted() -> None:
    client = _client(max_requests=3)
    with client.in_flight(2, 0.0), client.in_flight(1, 0.0):
        with pytest.raises(ApiError, match="3 requests in flight, and may have 3") as refused:
            client.check(1, 0.0)
        assert (refused.value.status, refused.value.reason, refused.value.retry_after_s) == (429, "key_limit", 1)
    with pytest.raises(BadRequest, match="4 prompts; this key may have 3 in flight"):
        client.check(4, 0.0)
    with pytest.raises(BadRequest, match="n: 4 answers; this key may have 3 in flight, so ask for fewer") as too_many:
        client.check(4, 0.0, num_choices=2)
    assert too_many.value.body["param"] == "n"
    with client.in_flight(3, 0.0):
        assert client.num_running == 3
    assert client.num_running == 0


def test_tokens_of_prompts_and_answers_count_and_the_wait_follows_from_the_rate() -> None:
    client = _client(tokens_per_minute=60)
    client.begin(40, 0.0)
    for _ in range(50):
        client.got(1, 0.0)
    with pytest.raises(ApiError, match="60 tokens a minute; ask again in 31 s") as refused:
        client.check(1, 0.0)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 31)
    client.check(1, 31.0)
    with pytest.raises(ApiError) as refused:
        client.begin(11, 31.0)
    assert refused.value.retry_after_s == 10, "the prompt has to be paid before it runs"
    client.begin(1_000, 91.0)  # more than a minute's: a full bucket is enough, and the rest is owed
    with pytest.raises(ApiError) as refused:
        client.check(1, 91.0)
    assert refused.value.retry_after_s == 941
    assert (client.num_requests, client.num_prompt, client.num_answer, client.num_refused) == (2, 1_040, 50, 3)


def test_keys_that_are_read_again_keep_what_runs_and_what_was_counted() -> None:
    clients = Clients(_keys(tokens_per_minute=60))
    office = clients.find({"Authorization": f"Bearer {OFFICE}"})
    assert office is not None
    office.begin(60, 0.0)
    with office.in_flight(0, 1.0):
        clients.replace(_keys(tokens_per_minute=60))
        with pytest.raises(ApiError):
            office.check(1, 0.0)
        clients.replace(_keys(max_requests=1, share=3))
        assert clients.find({"x-api-key": OFFICE}) is office
        assert (office.key.share, office.num_prompt) == (3, 60)
        office.check(1, 0.0)
    clients.replace(bare_keys([LAB]))
    assert clients.find({"x-api-key": OFFICE}) is None
    assert [client["name"] for client in clients.counts()] == ["key1"]


def test_no_key_fills_all_places_before_the_others() -> None:
    clients = Clients(_keys())
    part = clients.place_share(_keys()[0])
    assert part == 0.5
    admission = Admission()
    for _ in range(6):
        admission.take(1, 8, 0.0, asker=Asker("office", part))
    with pytest.raises(ApiError, match="6 requests of this key") as refused:
        admission.take(1, 8, 0.0, asker=Asker("office", part))
    assert (refused.value.status, refused.value.reason) == (429, "busy")
    places = [admission.take(1, 8, 0.0, asker=Asker("lab", part)) for _ in range(2)]
    with pytest.raises(ApiError, match="8 requests are running"):
        admission.take(1, 8, 0.0, asker=Asker("lab", part))
    for each in places:
        admission.leave(each, 1.0)
    admission.take(2, 8, 0.0, asker=Asker("lab", 0.01))  # one that holds none may always ask


def test_a_key_that_holds_nothing_may_ask_with_many_prompts() -> None:
    Admission().take(8, 8, 0.0, asker=Asker("office", 0.01))


def test_one_key_alone_has_all_places() -> None:
    clients, admission = Clients(bare_keys([OFFICE])), Admission()
    for _ in range(8):
        admission.take(1, 8, 0.0, asker=Asker("key1", clients.place_share(bare_keys([OFFICE])[0])))


async def _ask(client: Any, key: str | None = OFFICE, **more: Any) -> aiohttp.ClientResponse:
    headers = {} if key is None else {"x-api-key": key}
    response: aiohttp.ClientResponse = await client.post("/v1/chat/completions", json={**CHAT, **more}, headers=headers)
    await response.read()
    return response


async def test_limits_hold_over_http_and_other_keys_go_on() -> None:
    go_on = asyncio.Event()
    ring = FakeRing(before=lambda _: go_on.wait())
    api = Api(ring, _keys(max_requests=2, tokens_per_minute=60, share=5))
    async with TestClient(TestServer(api.application()), timeout=aiohttp.ClientTimeout(40)) as client:
        running = [asyncio.create_task(_ask(client)) for _ in range(2)]
        while ring.num_running < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        refused = await _ask(client)
        assert refused.status == 429 and refused.headers["Retry-After"] == "1"
        error = (await refused.json())["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        go_on.set()
        assert [(await task).status for task in running] == [200, 200]
        assert (await _ask(client, LAB)).status == 200
        statuses = [(await _ask(client)).status for _ in range(20)]
        # 60 tokens, and each request takes two of its prompt and three of its answer.
        assert statuses == [200] * 10 + [429] * 10
        assert (await _ask(client, LAB)).status == 200
    assert ring.owners[:2] == [("office", 5)] * 2 and ring.owners[2] == ("lab", 1)
    office, lab = api.status()["keys"]
    assert office == {
        "name": "office",
        "running": 0,
        "requests": 12,
        "refused": 11,
        "prompt_tokens": 24,
        "answer_tokens": 36,
    }
    assert (lab["requests"], lab["answer_tokens"]) == (2, 6)
    assert api.status()["requests"]["refused"]["key_limit"] == 11


async def test_more_answers_than_a_key_may_have_at_once_are_refused_by_the_name_of_the_field() -> None:
    api = Api(FakeRing(), _keys(max_requests=2))
    async with TestClient(TestServer(api.application()), timeout=aiohttp.ClientTimeout(40)) as client:
        refused = await _ask(client, n=3)
        error = (await refused.json())["error"]
        assert (refused.status, error["param"]) == (400, "n")
        assert error["message"] == "n: 3 answers; this key may have 2 in flight, so ask for fewer"
        assert (await _ask(client, n=2)).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": OFFICE}, 200),
        ({"X-Api-Key": f" {OFFICE} "}, 200),
        ({"Authorization": f"Bearer {OFFICE}"}, 200),
        ({"Authorization": "Bearer none", "x-api-key": OFFICE}, 200),
        ({"x-api-key": f"Bearer {OFFICE}"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "\u00ff"}, 401),
        ({"api-key": OFFICE}, 401),
    ],
)
async def test_a_key_comes_in_either_header(headers: dict[str, str], status: int) -> None:
    async with TestClient(TestServer(Api(FakeRing(), _keys()).application())) as client:
        assert (await client.get("/v1/models", headers=headers)).status == status


def _lines(lines: list[Any]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"].startswith("request_")]


async def test_each_request_has_a_line_without_its_content_and_an_id() -> None:
    api = Api(FakeRing(), _keys(max_requests=1))
    with structlog.testing.capture_logs() as logged:
        async with TestClient(TestServer(api.application())) as client:
            key = {"x-api-key": OFFICE}
            whole = await client.post("/v1/chat/completions", json=CHAT, headers={**key, "x-request-id": "mine-7"})
            streamed = await client.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=key)
            await streamed.text()
            for path, headers in (("/v1/models", {}), ("/my/diary", key), ("/v1/models/my-diary", key)):
                answer = await client.get(path, headers=headers)
                assert answer.headers["x-request-id"].startswith("req-")
            two = await client.post("/v1/completions", json={"prompt": ["diary"] * 2}, headers=key)
            assert (await client.get("/v1/models", headers=key)).status == 200
            for path in ("/health", "/metrics"):
                assert (await client.get(path, headers=key)).status == 200
    assert two.status == 400
    first, second, *others = _lines(logged)
    assert whole.headers["x-request-id"] == first["request_id"] == "mine-7"
    assert streamed.headers["x-request-id"] == second["request_id"] != "mine-7"
    for line in (first, second):
        assert line["event"] == "request_ended" and line["client"] == "127.0.0.1"
        assert (line["key"], line["path"], line["status"]) == ("office", "/v1/chat/completions", 200)
        assert (line["prompt_tokens"], line["tokens"], line["finish_reason"]) == (2, 3, "length")
        assert line["seconds"] >= 0
    assert [(line["event"], line["key"], line["path"], line["status"]) for line in others] == [
        ("request_refused", "", "/v1/models", 401),
        ("request_refused", "office", "none", 404),
        ("request_refused", "office", "/v1/models/{id}", 404),
        ("request_refused", "office", "/v1/completions", 400),
        ("request_served", "office", "/v1/models", 200),
    ]
    assert "diary" not in str(logged) and OFFICE not in str(logged)


@pytest.mark.parametrize("given", ["a" * 65, "a b", "\u00ff", "a\x07"])
async def test_an_id_that_is_long_or_not_printable_is_not_taken(given: str) -> None:
    with structlog.testing.capture_logs() as logged:
        async with TestClient(TestServer(Api(FakeRing()).application())) as client:
            try:
                answer = await client.get("/v1/models", headers={"x-request-id": given})
            except ValueError:
                assert given == "a\x07"  # this client does not send it
                return
    assert answer.headers["x-request-id"].startswith("req-")
    assert given not in str(logged)


async def test_a_request_whose_client_leaves_has_a_line_too() -> None:
    began, never = asyncio.Event(), asyncio.Event()

    async def hangs(i: int) -> None:
        if i:
            began.set()
            await never.wait()

    ring = FakeRing(before=hangs)
    with structlog.testing.capture_logs() as logged:
        server = TestServer(Api(ring, _keys()).application())
        async with TestClient(server) as client:
            asking = asyncio.create_task(_ask(client))
            await began.wait()
            asking.cancel()
            async with asyncio.timeout(40):
                await ring.closed.wait()
                while not _lines(logged):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    [line] = _lines(logged)
    assert (line["event"], line["status"], line["tokens"], line["finish_reason"]) == ("request_ended", 499, 1, "none")


def test_a_bare_key_keeps_what_it_has_when_lines_before_it_go_and_no_other_key_gets_it() -> None:
    first, second, third = bare_keys(["a" * 20, "b" * 20, "c" * 20])
    clients = Clients([first, second])
    held = [clients.find({"x-api-key": letter * 20}) for letter in "ab"]
    assert held[0] is not None and held[1] is not None
    held[1].num_requests = 7
    clients.replace(bare_keys(["b" * 20, "c" * 20]))
    assert clients.find({"x-api-key": "b" * 20}) is held[1] and held[1].key.name == "key1"
    new = clients.find({"x-api-key": "c" * 20})
    assert new is not None and new.num_requests == 0 and new not in held
    clients.replace(bare_keys(["c" * 20]))
    assert clients.find({"x-api-key": "c" * 20}) is new and clients.find({"x-api-key": "a" * 20}) is None


def test_a_named_key_that_is_another_one_now_keeps_its_counts() -> None:
    clients = Clients([ApiKey("office", hashlib.sha256(b"one").digest())])
    client = clients.find({"x-api-key": "one"})
    assert client is not None
    clients.replace([ApiKey("office", hashlib.sha256(b"two").digest())])
    assert clients.find({"x-api-key": "two"}) is client and clients.find({"x-api-key": "one"}) is None


async def test_a_key_without_a_name_inherits_nothing_of_the_one_whose_line_is_gone() -> None:
    go_on, third = asyncio.Event(), "key-of-a-third-room"
    ring = FakeRing(before=lambda _: go_on.wait())
    api = Api(ring, bare_keys([OFFICE, LAB, third]))
    async with TestClient(TestServer(api.application()), timeout=aiohttp.ClientTimeout(40)) as client:
        asked = [asyncio.create_task(_ask(client)) for _ in range(6)]
        while ring.num_running < 6:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        api.replace_keys(bare_keys([LAB, third]))  # that of the laboratory is called key1 now
        asked.append(asyncio.create_task(_ask(client, LAB)))
        while ring.num_running < 7 and not asked[-1].done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        go_on.set()
        assert [(await task).status for task in asked] == [200] * 7
    owners = [owner for owner, _ in ring.owners]
    assert len({*owners[:6]}) == 1 and owners[6] != owners[0]


def test_a_key_with_a_name_is_the_same_owner_when_it_is_another_key() -> None:
    named = [ApiKey("office", digest) for digest in (b"a" * 32, b"b" * 32)]
    assert named[0].owner == named[1].owner == "office"


async def test_more_answers_than_a_key_may_have_at_once_are_refused_by_their_field() -> None:
    api = Api(FakeRing(), _keys(max_requests=2))
    async with TestClient(TestServer(api.application())) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "n": 3}, headers={"x-api-key": OFFICE})
        error = (await response.json())["error"]
    assert response.status == 400 and error["param"] == "n"
    assert error["message"] == "n: 3 answers; this key may have 2 in flight, so ask for fewer"
