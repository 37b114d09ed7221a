"""A router before servers that die, hang, refuse and come back, over real sockets."""

import asyncio
import io
import json
import re
from typing import Any

import pytest

from mdiq.api.keys import bare_keys, line_of, parse_keys
from mdiq.errors import RingError
from mdiq.route import links, pool, run
from mdiq.route.run import Refusal
from mdiq.route.servers import State
from tests.route.fake_server import FakeServer, Router, holding, routed

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12},
    "/v1/completions": {"prompt": [5, 6], "max_tokens": 12},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "model": "tiny"},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 12},
}
SEEDED = {"temperature": 0.9, "seed": 3}


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOOK_S", 0.02)
    monkeypatch.setattr(run, "AGAIN_S", 0.02)


def _events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def _plain(events: list[dict[str, Any]]) -> str:
    """Return events with their ids as numbers, in their order, and without times: equal for equal answers."""
    text = json.dumps(events, sort_keys=True)
    text = re.sub(r'"(created|created_at|completed_at)": (\d+|null)', "", text)
    ids = dict.fromkeys(re.findall(r'"((?:chatcmpl|cmpl|msg|resp|fc)[-_][0-9a-f]+)"', text))
    for number, an_id in enumerate(ids):
        text = text.replace(an_id, f"#{number}")
    return text


async def _stream(router: Router, path: str, **more: Any) -> list[dict[str, Any]]:
    response = await router.client.post(path, json={**BODIES[path], "stream": True, **SEEDED, **more})
    assert response.status == 200, await response.text()
    return _events(await response.text())


def _of(router: Router, *servers: FakeServer) -> FakeServer:
    """Return the one that has a request."""
    (found,) = [server for server in servers if server.model.num_running]
    return found


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("at", [0, 1, 7, 11])
async def test_a_stream_whose_server_dies_goes_on_at_another_as_if_nothing_had_happened(path: str, at: int) -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        calm = await _stream(router, path)
        reached, first.model.before = holding(at)
        second.model.before = first.model.before
        asking = asyncio.create_task(_stream(router, path))
        await reached.wait()
        dying = _of(router, first, second)
        other = second if dying is first else first
        other.model.before = lambda _: None
        await dying.kill()
        events = await asking
        assert _plain(events) == _plain(calm)
        assert router.figure("mdiq_route_failovers_total", result="went_on" if at else "again") == 1
        assert router.figure("mdiq_route_failovers_total", result="in_vain") == 0
        await router.until_state(dying, State.GONE)


async def test_several_choices_go_on_each_where_it_was() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    path = "/v1/chat/completions"
    async with routed(first, second) as router:
        calm = await _stream(router, path, n=3)
        num = 0

        def before(_: int) -> Any:
            nonlocal num
            num += 1
            return None if num < 16 else asyncio.Event().wait()

        first.model.before = before
        second.model.before = before
        asking = asyncio.create_task(_stream(router, path, n=3))
        await router.until(lambda: num >= 18)
        dying = next(server for server in (first, second) if server.model.num_running)
        for server in (first, second):
            server.model.before = lambda _: None
        await dying.kill()
        events = await asking

    def texts(events: list[dict[str, Any]]) -> list[str]:
        found = ["", "", ""]
        for event in events:
            for choice in event["choices"]:
                found[choice["index"]] += choice["delta"].get("content", "")
        return found

    assert texts(events) == texts(calm)
    assert len({event["id"] for event in events}) == 1
    assert [event["choices"][0]["finish_reason"] for event in events].count("length") == 3


async def test_a_sampled_request_without_a_seed_goes_on_too() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        reached, first.model.before = holding(6)
        second.model.before = first.model.before
        asking = asyncio.create_task(_stream(router, "/v1/chat/completions", seed=None))
        await reached.wait()
        dying = _of(router, first, second)
        other = second if dying is first else first
        other.model.before = lambda _: None
        await dying.kill()
        events = await asking
    asked = [body for server in (first, second) for _, _, body in server.asked]
    assert len(asked) == 2 and asked[0]["seed"] == asked[1]["seed"] >= 0
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert len(text.split()) == 12 and "error" not in events[-1]


@pytest.mark.parametrize("path", BODIES)
async def test_a_server_that_gives_other_tokens_than_it_says_ends_the_stream_with_an_error(path: str) -> None:
    first, second = FakeServer("first"), FakeServer("second")
    second.model.kind = 1  # from its third token on
    async with routed(first, second) as router:
        router.pool.links["second"].server.is_drained = True
        reached, first.model.before = holding(6)
        asking = asyncio.create_task(_stream(router, path))
        await reached.wait()
        router.pool.links["second"].server.is_drained = False
        await first.kill()
        events = await asking
    assert "another one" in json.dumps(events[-1]) and '"error"' in json.dumps(events[-1])
    assert router.figure("mdiq_route_failovers_total", result="in_vain") == 1


@pytest.mark.parametrize("mark", [None, "other"])
async def test_an_answer_that_has_begun_does_not_go_on_at_an_unlike_server(mark: str | None) -> None:
    first, second = FakeServer("first"), FakeServer("second")
    second.model.same_tokens = mark
    if mark is None:
        first.model.same_tokens = None
    async with routed(first, second, outage_tolerance_s=0.1) as router:
        router.pool.links["second"].server.is_drained = True
        reached, first.model.before = holding(6)
        asking = asyncio.create_task(_stream(router, "/v1/chat/completions"))
        await reached.wait()
        router.pool.links["second"].server.is_drained = False
        await first.kill()
        events = await asking
    assert events[-1]["error"]["type"] == "unavailable_error" and "no other server" in events[-1]["error"]["message"]
    assert second.asked == []


async def test_an_answer_that_has_begun_waits_for_its_own_server_if_there_is_no_other() -> None:
    only = FakeServer("only")
    async with routed(only) as router:
        calm = await _stream(router, "/v1/messages")
        reached, only.model.before = holding(6)
        asking = asyncio.create_task(_stream(router, "/v1/messages"))
        await reached.wait()
        only.model.before = lambda _: None
        await only.kill()
        await router.until_state(only, State.GONE)
        await only.start()
        assert _plain(await asking) == _plain(calm)


@pytest.mark.parametrize("path", BODIES)
async def test_a_whole_answer_whose_server_dies_comes_from_another_even_an_unlike_one(path: str) -> None:
    first, second = FakeServer("first"), FakeServer("second")
    second.model.same_tokens = None
    async with routed(first, second) as router:
        router.pool.links["second"].server.is_drained = True
        reached, first.model.before = holding(6)
        asking = asyncio.create_task(router.client.post(path, json={**BODIES[path], **SEEDED}))
        await reached.wait()
        router.pool.links["second"].server.is_drained = False
        await first.kill()
        response = await asking
        assert response.status == 200 and "error" not in {k for k, v in (await response.json()).items() if v}
        assert router.figure("mdiq_route_failovers_total", result="again") == 1


async def test_a_server_that_hangs_is_gone_after_its_silence_and_its_requests_go_on_elsewhere() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second, silence_s=0.3) as router:
        router.pool.links["second"].server.is_drained = True
        calm = await _stream(router, "/v1/chat/completions")
        reached, first.model.before = holding(6)
        asking = asyncio.create_task(_stream(router, "/v1/chat/completions"))
        await reached.wait()
        first.hangs = True
        router.pool.links["second"].server.is_drained = False
        assert _plain(await asking) == _plain(calm)
        assert "silent" in router.pool.links["first"].server.text
        first.hangs, first.model.before = False, lambda _: None
        await router.until_state(first, State.SERVES)


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_is_tried_elsewhere_and_passed_on_when_all_refuse(status: int) -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        first.refuses, first.retry_after = status, "9"
        for _ in range(4):
            response = await router.client.post("/v1/completions", json=BODIES["/v1/completions"])
            assert response.status == 200
        second.refuses, second.retry_after = status, "4"
        response = await router.client.post("/v1/completions", json=BODIES["/v1/completions"])
        assert response.status == status and response.headers["Retry-After"] == "4"
        assert (await response.json())["error"]["message"] == "no"


async def test_a_refusal_that_a_client_gets_is_counted_whoever_gave_it() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    path = "/v1/completions"
    async with routed(first, second) as router:
        first.refuses = 429
        assert (await router.client.post(path, json=BODIES[path])).status == 200
        assert router.figure("mdiq_route_refused_total", reason="busy") == 0, "another server took it"
        second.refuses = 429
        assert (await router.client.post(path, json=BODIES[path])).status == 429
        assert router.figure("mdiq_route_refused_total", reason="busy") == 1
        first.refuses = second.refuses = None
        assert (await router.client.post(path, json={**BODIES[path], "temperature": "hot"})).status == 400
        assert router.figure("mdiq_route_refused_total", reason="invalid") == 1


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (429, {"message": "this key may have 60 tokens a minute; ask again in 9 s"}, "key_limit"),
        (429, {"message": "4 requests are running or waiting"}, "busy"),
        (400, {"message": "too long", "code": "context_length_exceeded"}, "too_long"),
        (503, {"message": "it waits"}, "unavailable"),
    ],
)
def test_the_reason_of_a_refusal_is_that_of_its_server(status: int, error: dict[str, str], reason: str) -> None:
    assert Refusal(status, json.dumps({"error": error}).encode(), {}).reason == reason


async def test_a_request_that_is_wrong_is_refused_once() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        response = await router.client.post("/v1/completions", json={"prompt": [5], "temperature": -1})
        assert response.status == 400 and (await response.json())["error"]["param"] == "temperature"
        assert len(first.asked) + len(second.asked) == 1


async def test_an_error_of_a_ring_in_a_stream_is_a_reason_to_go_on_elsewhere() -> None:
    first, second = FakeServer("first"), FakeServer("second")

    def before(i: int) -> Any:
        if i == 5:
            raise RingError("the ring has ended")
        return None

    async with routed(first, second) as router:
        for path in BODIES:
            calm = await _stream(router, path)
            router.pool.links["second"].server.is_drained = True
            first.model.before = before
            asking = asyncio.create_task(_stream(router, path))
            await router.until(lambda: first.model.num_running > 0)
            router.pool.links["second"].server.is_drained = False
            assert _plain(await asking) == _plain(calm)
            first.model.before = lambda _: None


async def test_a_drained_server_ends_what_it_has_and_gets_nothing_new() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        calm = await _stream(router, "/v1/completions")
        first.asked.clear()
        second.asked.clear()
        router.pool.links["first"].server.is_drained = True
        for _ in range(3):
            assert _plain(await _stream(router, "/v1/completions")) == _plain(calm)
        assert len(first.asked) == 0 and len(second.asked) == 3


async def test_a_server_that_waits_gets_nothing_new_and_no_server_at_all_is_503() -> None:
    only = FakeServer("only")
    async with routed(only) as router:
        assert (await router.client.get("/health")).status == 200
        only.model.is_serving = False
        await router.until_state(only, State.WAITS)
        response = await router.client.post("/v1/completions", json=BODIES["/v1/completions"])
        assert response.status == 503 and response.headers["Retry-After"]
        health = await router.client.get("/health")
        assert health.status == 503 and "only: waits" in (await health.json())["error"]["message"]


async def test_models_of_all_servers_are_listed_and_each_request_goes_to_its_own() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    second.model.model_name = "other"
    async with routed(first, second) as router:
        listed = await (await router.client.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == ["tiny", "other"]
        for _ in range(3):
            body = {**BODIES["/v1/completions"], "model": "other"}
            assert (await (await router.client.post("/v1/completions", json=body)).json())["model"] == "other"
        assert first.asked == []
        body["model"] = "third"
        response = await router.client.post("/v1/completions", json=body)
        assert response.status == 404 and (await response.json())["error"]["code"] == "model_not_found"
        del body["model"]
        response = await router.client.post("/v1/completions", json=body)
        assert response.status == 400 and "tiny" in (await response.json())["error"]["message"]
        assert (await router.client.get("/v1/models/other")).status == 200


async def test_a_conversation_goes_where_its_beginning_was_computed() -> None:
    servers = [FakeServer(f"s{i}") for i in range(3)]
    async with routed(*servers) as router:
        chats: dict[int, list[dict[str, str]]] = {}
        for turn in range(4):
            for number in range(3):
                chat = chats.setdefault(number, [{"role": "user", "content": f"{number} " * 400}] * 2)
                body = {"messages": chat, "max_tokens": 2}
                assert (await router.client.post("/v1/chat/completions", json=body)).status == 200
                chat += [{"role": "assistant", "content": "x"}, {"role": "user", "content": f"{turn}"}]
        places = [{body["messages"][0]["content"][0] for _, _, body in server.asked} for server in servers]
        assert sorted(places, key=str) == [{"0"}, {"1"}, {"2"}]
        assert router.figure("mdiq_route_prefix_hits_total") == 9


async def test_a_long_prompt_goes_to_the_server_whose_cache_is_not_full() -> None:
    full, empty = FakeServer("full"), FakeServer("empty")
    full.model.kv_live_tokens = 4_000
    async with routed(full, empty) as router:
        for num_words, had in ((10, 1), (200, 0)):
            full.asked.clear()
            router.pool.links["empty"].server.num_begun = 9 if had else 0
            body = {"prompt": "word " * num_words, "max_tokens": 2}
            assert (await router.client.post("/v1/completions", json=body)).status == 200
            assert len(full.asked) == had
        assert router.figure("mdiq_route_server_kv_free_tokens", server="full") == 96


async def test_the_key_of_a_client_is_checked_here_and_a_server_gets_its_own_or_that() -> None:
    first, second = FakeServer("first", "key-of-the-first-"), FakeServer("second", "a-key-of-a-client")
    keys = bare_keys(["a-key-of-a-client"])
    async with routed(first, second, keys=keys, server_keys={"first": "key-of-the-first-"}, waits_for=1) as router:
        assert (await router.client.post("/v1/completions", json=BODIES["/v1/completions"])).status == 401
        headers = {"Authorization": "Bearer a-key-of-a-client"}
        assert (
            await router.client.post("/v1/completions", json=BODIES["/v1/completions"], headers=headers)
        ).status == 200
        assert first.asked[0][1]["Authorization"] == "Bearer key-of-the-first-"
        assert (await router.client.get("/health")).status == 200
        assert (await router.client.get("/metrics")).status == 401


async def test_more_answers_than_a_key_may_have_at_once_are_refused_by_the_name_of_the_field() -> None:
    only = FakeServer("only")
    keys = parse_keys(line_of("office", "a-key-of-a-client", {"max_requests": 2}), "keys")
    async with routed(only, keys=keys, server_keys={"only": "x"}) as router:
        headers = {"Authorization": "Bearer a-key-of-a-client"}
        for more, param in (({"n_cmpl": 3}, "n"), ({"n": 3}, "n"), ({"prompt": ["a", "b", "c"], "n": 2}, "prompt")):
            body = {**BODIES["/v1/completions"], **more}
            response = await router.client.post("/v1/completions", json=body, headers=headers)
            assert (response.status, (await response.json())["error"]["param"]) == (400, param)
        assert only.asked == []


async def test_a_server_that_refuses_the_routers_key_gets_nothing() -> None:
    first, second = FakeServer("first", "key-of-the-first-"), FakeServer("second")
    async with routed(first, second, server_keys={"first": "a-wrong-key-of-it"}, waits_for=1) as router:
        await router.until_state(first, State.LOCKED)
        assert (await router.client.post("/v1/completions", json=BODIES["/v1/completions"])).status == 200
        assert first.asked == []


async def test_more_requests_than_may_be_open_are_refused() -> None:
    only = FakeServer("only")
    reached, only.model.before = holding(0)
    async with routed(only, max_requests=2) as router:
        body = {"prompt": [[5], [6]], "max_tokens": 1}
        asking = asyncio.create_task(router.client.post("/v1/completions", json=body))
        await reached.wait()
        response = await router.client.post("/v1/completions", json=BODIES["/v1/completions"])
        assert response.status == 429 and response.headers["Retry-After"]
        only.model.before = lambda _: None
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await router.until(lambda: router.api.num_open == 0)


async def test_a_client_that_goes_away_ends_what_its_server_does() -> None:
    only = FakeServer("only")
    reached, only.model.before = holding(3)
    async with routed(only) as router:
        body = {**BODIES["/v1/completions"], "stream": True}
        response = await router.client.post("/v1/completions", json=body)
        await reached.wait()
        response.close()
        await only.model.closed.wait()
        await router.until(lambda: router.api.num_open == 0)
        assert router.figure("mdiq_route_requests_total", server="only", outcome="left") == 1


async def test_the_usage_of_a_stream_is_counted_for_its_key_and_shown_only_if_it_is_wanted() -> None:
    only = FakeServer("only")
    keys = bare_keys(["a-key-of-a-client"])
    async with routed(only, keys=keys, server_keys={"only": "x"}) as router:
        headers = {"Authorization": "Bearer a-key-of-a-client"}
        for wants in (False, True):
            options = {"stream_options": {"include_usage": True}} if wants else {}
            body = {**BODIES["/v1/completions"], "stream": True, **options}
            response = await router.client.post("/v1/completions", json=body, headers=headers)
            assert ('"usage"' in await response.text()) == wants
        (key,) = router.api.status()["keys"]
        assert (key["prompt_tokens"], key["answer_tokens"], key["requests"]) == (4, 24, 2)


async def test_a_response_is_asked_for_where_it_is_and_goes_on_there() -> None:
    servers = [FakeServer(f"s{i}") for i in range(3)]
    async with routed(*servers) as router:
        for _ in range(4):
            made = await (await router.client.post("/v1/responses", json=BODIES["/v1/responses"])).json()
            got = await (await router.client.get(f"/v1/responses/{made['id']}")).json()
            assert got == made
            items = await router.client.get(f"/v1/responses/{made['id']}/input_items")
            assert (await items.json())["data"][0]["content"][0]["text"] == "Hi"
            body = {**BODIES["/v1/responses"], "previous_response_id": made["id"]}
            more = await router.client.post("/v1/responses", json=body)
            assert more.status == 200 and (await more.json())["previous_response_id"] == made["id"]
        gone = await router.client.delete(f"/v1/responses/{made['id']}")
        assert (await gone.json())["deleted"] is True
        assert (await router.client.get(f"/v1/responses/{made['id']}")).status == 404
        assert (await router.client.get("/v1/responses/resp_none")).status == 404


async def test_a_response_that_the_router_has_forgotten_is_found_at_its_server() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        made = await (await router.client.post("/v1/responses", json=BODIES["/v1/responses"])).json()
        async with routed(first, second) as other:
            assert await (await other.client.get(f"/v1/responses/{made['id']}")).json() == made
            body = {**BODIES["/v1/responses"], "previous_response_id": made["id"]}
            assert (await other.client.post("/v1/responses", json=body)).status == 200


async def test_a_response_of_another_key_is_not_found() -> None:
    only = FakeServer("only")
    keys = bare_keys(["the-key-of-client-1", "the-key-of-client-2"])
    async with routed(only, keys=keys, server_keys={"only": "x"}) as router:
        one, two = ({"x-api-key": f"the-key-of-client-{i}"} for i in (1, 2))
        made = await (await router.client.post("/v1/responses", json=BODIES["/v1/responses"], headers=one)).json()
        path = f"/v1/responses/{made['id']}"
        assert (await router.client.get(path, headers=one)).status == 200
        assert (await router.client.get(path, headers=two)).status == 404
        body = {**BODIES["/v1/responses"], "previous_response_id": made["id"]}
        assert (await router.client.post("/v1/responses", json=body, headers=two)).status == 400


async def test_a_conversation_whose_server_is_gone_is_made_again_at_another() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        router.pool.links["second"].server.is_drained = True
        body = {**BODIES["/v1/responses"], **SEEDED}
        made = await (await router.client.post("/v1/responses", json=body)).json()
        again = {**body, "previous_response_id": made["id"]}
        calm = await (await router.client.post("/v1/responses", json=again)).json()
        router.pool.links["second"].server.is_drained = False
        await first.kill()
        await router.until_state(first, State.GONE)
        more = await (await router.client.post("/v1/responses", json=again)).json()
        assert _plain([more["output"]]) == _plain([calm["output"]])
        assert more["previous_response_id"] == made["id"]
        third = await router.client.post("/v1/responses", json={**body, "previous_response_id": calm["id"]})
        assert third.status == 200, await third.text()
        got = await (await router.client.get(f"/v1/responses/{made['id']}")).json()
        assert got["id"] == made["id"] and got["output"][0]["content"] == made["output"][0]["content"]


async def test_a_stream_that_is_read_again_after_its_server_has_died_has_all_events_under_the_same_ids() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        calm = await _stream(router, "/v1/responses")
        for server in (first, second):
            server.asked.clear()
        router.pool.links["second"].server.is_drained = True
        reached, first.model.before = holding(6)
        body = {**BODIES["/v1/responses"], "stream": True, **SEEDED}
        response = await router.client.post("/v1/responses", json=body)
        await reached.wait()
        begun: list[dict[str, Any]] = []
        async for line in response.content:
            begun += _events(line.decode())
            if len(begun) == 8:
                break
        response.close()
        router.pool.links["second"].server.is_drained = False
        await first.kill()
        one = f"/v1/responses/{begun[0]['response']['id']}"
        response = await router.client.get(one, params={"stream": "true", "starting_after": "7"})
        assert response.status == 200, await response.text()
        assert _plain(begun + _events(await response.text())) == _plain(calm)


async def test_a_response_in_the_background_is_made_again_when_its_server_dies() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        body = {**BODIES["/v1/responses"], **SEEDED}
        calm = await (await router.client.post("/v1/responses", json=body)).json()
        router.pool.links["second"].server.is_drained = True
        reached, first.model.before = holding(6)
        made = await (await router.client.post("/v1/responses", json={**body, "background": True})).json()
        assert made["status"] == "in_progress" or made["status"] == "queued"
        await reached.wait()
        router.pool.links["second"].server.is_drained = False
        await first.kill()
        while True:
            got = await router.client.get(f"/v1/responses/{made['id']}")
            found = await got.json()
            assert got.status == 200 and found["id"] == made["id"], found
            if found["status"] == "incomplete":
                break
        assert found["output"][0]["content"] == calm["output"][0]["content"]


async def test_the_status_and_the_metrics_say_how_the_servers_are() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        await router.client.post("/v1/completions", json=BODIES["/v1/completions"])
        status = await (await router.client.get("/status.json")).json()
        assert [server["state"] for server in status["servers"]] == ["serves", "serves"]
        assert sum(server["begun"] for server in status["servers"]) == 1
        text = await (await router.client.get("/metrics")).text()
        assert 'mdiq_route_server_state{server="first",state="serves"} 1.0' in text
        assert "mdiq_route_first_byte_seconds_count 1.0" in text


async def test_what_is_not_a_request_is_refused_here() -> None:
    only = FakeServer("only")
    async with routed(only) as router:
        for data, status in ((b"[1]", 400), (b"{", 400), (b"x" * (3 << 20), 413)):
            response = await router.client.post("/v1/completions", data=io.BytesIO(data))
            assert response.status == status, await response.text()
        assert only.asked == []
        response = await router.client.post("/v1/none", json={})
        assert response.status == 404 and (await response.json())["error"]["code"] == "unknown_url"
        error = await (await router.client.post("/v1/messages", data=b"[1]")).json()
        assert error["type"] == "error"


async def test_what_is_held_of_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    only = FakeServer("only")
    async with routed(only) as router:
        assert (await router.client.post("/v1/completions", json=BODIES["/v1/completions"])).status == 200
        monkeypatch.setattr(pool, "MAX_WHOLE_BYTES", 20)
        response = await router.client.post("/v1/completions", json=BODIES["/v1/completions"])
        assert response.status == 503 and "more than 20 bytes" in (await response.json())["error"]["message"]
        monkeypatch.setattr(pool, "MAX_HELD_BYTES", 10)
        response = await router.client.post("/v1/completions", json=BODIES["/v1/completions"])
        assert response.status == 503 and "holds too much" in (await response.json())["error"]["message"]
        assert (
            await router.client.post("/v1/completions", json={**BODIES["/v1/completions"], "stream": True})
        ).status == 200


async def test_tokens_are_counted_at_any_server() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        await first.kill()
        for path, body in (
            ("/tokenize", {"prompt": "a bc"}),
            ("/v1/messages/count_tokens", {"model": "tiny", "messages": BODIES["/v1/messages"]["messages"]}),
        ):
            response = await router.client.post(path, json=body)
            assert response.status == 200, await response.text()


async def test_a_slow_client_holds_up_only_its_own_answer() -> None:
    only = FakeServer("only")
    async with routed(only) as router:
        assert router.client.server.port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", router.client.server.port, limit=1_024)
        body = json.dumps({"prompt": [5], "max_tokens": 4_000, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await reader.readline()
        for _ in range(3):
            assert len(await _stream(router, "/v1/completions")) == 13
        writer.transport.abort()
        await router.until(lambda: router.api.num_open == 0)
