"""Stored responses behind a router: whose they are, where they are looked for, and what is made again."""

import asyncio
import json
from typing import Any

import pytest

from mdiq.api.keys import bare_keys
from mdiq.route import links, run
from mdiq.route.servers import State
from tests.route.fake_server import FakeServer, Router, holding, routed

PATH = "/v1/responses"
BODY: dict[str, Any] = {"input": "Hi", "max_output_tokens": 12, "temperature": 0.9, "seed": 3}
ONE, TWO = ({"x-api-key": f"the-key-of-client-{i}"} for i in (1, 2))
KEYS = bare_keys([*ONE.values(), *TWO.values()])


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOOK_S", 0.02)
    monkeypatch.setattr(run, "AGAIN_S", 0.02)


async def _made(router: Router, headers: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    response = await router.client.post(PATH, json={**BODY, **more}, headers=headers)
    assert response.status == 200, await response.text()
    made: dict[str, Any] = await response.json()
    return made


async def test_a_conversation_goes_on_at_its_server_whichever_that_is_after_a_restart_of_the_router() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        router.pool.links["first"].server.is_drained = True
        made = await _made(router)
        async with routed(first, second) as other:
            more = await _made(other, previous_response_id=made["id"])
            assert more["previous_response_id"] == made["id"]
            unknown = await other.client.post(PATH, json={**BODY, "previous_response_id": "resp_none"})
            assert (await unknown.json())["error"]["code"] == "previous_response_not_found"


async def test_a_response_of_another_key_is_not_found_by_a_router_that_does_not_know_it() -> None:
    only = FakeServer("only", "key-of-the-router-")
    keys = {"only": "key-of-the-router-"}
    there = {"keys": KEYS, "server_keys": keys}
    async with routed(only, **there) as router, routed(only, **there) as other:
        made = await _made(router, ONE)
        path, on = f"{PATH}/{made['id']}", {**BODY, "previous_response_id": made["id"]}
        assert (await other.client.get(path, headers=TWO)).status == 404
        assert (await other.client.post(PATH, json=on, headers=TWO)).status == 400
        assert (await other.client.delete(path, headers=TWO)).status == 404
        assert (await other.client.get(path, headers=ONE)).status == 200
        assert (await other.client.post(PATH, json=on, headers=ONE)).status == 200


async def test_a_response_of_another_key_is_not_made_again_where_servers_check_the_keys() -> None:
    first, second = (FakeServer(name, *ONE.values(), *TWO.values(), "key-of-the-router-") for name in ("a", "b"))
    keys = dict.fromkeys(("a", "b"), "key-of-the-router-")
    async with routed(first, second, server_keys=keys, pass_keys=True) as router:
        router.pool.links["b"].server.is_drained = True
        made = await _made(router, ONE)
        router.pool.links["b"].server.is_drained = False
        await first.kill()
        await router.until_state(first, State.GONE)
        num_asked = len(second.asked)
        assert (await router.client.get(f"{PATH}/{made['id']}", headers=TWO)).status == 404
        assert len(second.asked) == num_asked
        got = await (await router.client.get(f"{PATH}/{made['id']}", headers=ONE)).json()
        assert got["id"] == made["id"]


@pytest.mark.parametrize("goes_on", [False, True])
async def test_a_response_that_its_server_lost_in_a_restart_is_made_again(goes_on: bool) -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        router.pool.links["second"].server.is_drained = True
        made = await _made(router)
        calm = await _made(router, previous_response_id=made["id"])
        router.pool.links["second"].server.is_drained = False
        await first.kill()
        await router.until_state(first, State.GONE)
        await first.start()
        await router.until_state(first, State.SERVES)
        if goes_on:
            more = await _made(router, previous_response_id=made["id"])
            assert more["output"][0]["content"] == calm["output"][0]["content"]
            return
        for _ in range(2):
            response = await router.client.get(f"{PATH}/{made['id']}?stream=true")
            assert response.status == 200, await response.text()
            assert "response.incomplete" in await response.text()
        got = await (await router.client.get(f"{PATH}/{made['id']}")).json()
        assert (got["id"], got["output"][0]["content"]) == (made["id"], made["output"][0]["content"])


async def test_an_unknown_response_is_not_found_only_if_every_server_says_so() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        assert (await router.client.get(f"{PATH}/resp_none")).status == 404
        first.model.is_serving = False  # it is paused, and answers what it has
        await router.until_state(first, State.WAITS)
        assert (await router.client.get(f"{PATH}/resp_none")).status == 404
        await second.kill()
        await router.until_state(second, State.GONE)
        response = await router.client.get(f"{PATH}/resp_none")
        assert response.status == 503 and "second" in (await response.json())["error"]["message"]


async def test_a_response_in_the_background_is_counted_for_its_key_when_its_client_sees_it() -> None:
    only = FakeServer("only", "key-of-the-router-")
    async with routed(only, keys=KEYS, server_keys={"only": "key-of-the-router-"}) as router:
        made = await _made(router, ONE, background=True)
        while True:
            got = await (await router.client.get(f"{PATH}/{made['id']}", headers=ONE)).json()
            if got["status"] != "in_progress":
                break
            await asyncio.sleep(0.01)
        await router.client.get(f"{PATH}/{made['id']}", headers=ONE)  # counted once
        counts = {key["name"]: key["answer_tokens"] for key in router.api.status()["keys"]}
        assert counts == {"key1": 12, "key2": 0}


def _holds_at(only: FakeServer, at: int) -> tuple[asyncio.Event, asyncio.Event]:
    """Have the server wait before a token; return what is set then, and what has it go on."""
    reached, goes_on = asyncio.Event(), asyncio.Event()

    def before(i: int) -> Any:
        if i != at:
            return None
        reached.set()
        return goes_on.wait()

    only.model.before = before  # type: ignore[method-assign]
    return reached, goes_on


def _first_key(router: Router) -> tuple[int, int]:
    key = router.api.status()["keys"][0]
    return key["requests"], key["answer_tokens"]


async def test_a_stream_that_its_client_leaves_and_reads_to_its_end_later_is_counted_once() -> None:
    only = FakeServer("only", "key-of-the-router-")
    reached, goes_on = _holds_at(only, 5)
    async with routed(only, keys=KEYS, server_keys={"only": "key-of-the-router-"}) as router:
        response = await router.client.post(PATH, json={**BODY, "stream": True}, headers=ONE)
        await reached.wait()
        response_id = json.loads((await response.content.readuntil(b"\n\n")).partition(b"data: ")[2])["response"]["id"]
        response.close()
        await router.until(lambda: router.api.num_open == 0)
        requests, num_tokens = _first_key(router)
        assert requests == 1 and 5 <= num_tokens < 12
        goes_on.set()
        for _ in range(2):
            again = await router.client.get(f"{PATH}/{response_id}?stream=true", headers=ONE)
            assert b"response.incomplete" in await again.read()
            assert _first_key(router) == (1, 12)


@pytest.mark.parametrize("is_deleted", [True, False])
@pytest.mark.parametrize("is_streamed", [True, False])
async def test_what_a_client_has_read_of_a_response_that_it_ends_is_counted(
    is_streamed: bool, is_deleted: bool
) -> None:
    only = FakeServer("only", "key-of-the-router-")
    reached, _ = _holds_at(only, 9)
    async with routed(only, keys=KEYS, server_keys={"only": "key-of-the-router-"}) as router:
        made = await _made(router, ONE, background=True)
        path = f"{PATH}/{made['id']}"
        await reached.wait()
        if is_streamed:
            response = await router.client.get(f"{path}?stream=true&starting_after=1", headers=ONE)
            for _ in range(8):
                await response.content.readuntil(b"\n\n")
            response.close()
            await router.until(lambda: _first_key(router)[1] > 0)
        else:
            await router.client.get(path, headers=ONE)
            assert _first_key(router) == (0, 0), "it may be read to its end, which tells the tokens"
        if is_deleted:
            assert (await router.client.delete(path, headers=ONE)).status == 200
        else:
            cancelled = await (await router.client.post(f"{path}/cancel", headers=ONE)).json()
            assert cancelled["status"] == "cancelled"
            await router.client.get(path, headers=ONE)
        requests, num_tokens = _first_key(router)
        assert requests == 1 and 9 <= num_tokens <= 20


async def _gone_with_one(router: Router, first: FakeServer) -> dict[str, Any]:
    """Return a response that only the first server had, which is gone now."""
    router.pool.links["second"].server.is_drained = True
    made = await _made(router)
    router.pool.links["second"].server.is_drained = False
    await first.kill()
    await router.until_state(first, State.GONE)
    return made


async def test_a_response_whose_server_is_gone_is_deleted_without_making_it_again() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        made = await _gone_with_one(router, first)
        path = f"{PATH}/{made['id']}"
        gone = await router.client.delete(path)
        assert (gone.status, await gone.json()) == (200, {"id": made["id"], "object": "response", "deleted": True})
        assert (await router.client.get(path)).status == 404
        assert (await router.client.delete(path)).status == 404
        on = await router.client.post(PATH, json={**BODY, "previous_response_id": made["id"]})
        assert (await on.json())["error"]["code"] == "previous_response_not_found"
        assert second.asked == []


async def test_a_response_that_its_server_lost_in_a_restart_is_deleted_without_making_it_again() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        made = await _gone_with_one(router, first)
        await first.start()
        await router.until_state(first, State.SERVES)
        first.asked.clear()
        assert (await (await router.client.delete(f"{PATH}/{made['id']}")).json())["deleted"] is True
        assert (await router.client.get(f"{PATH}/{made['id']}")).status == 404
        assert first.asked == second.asked == []


async def _in_the_background(router: Router, first: FakeServer) -> dict[str, Any]:
    """Return a response that runs at the first server, which does not answer for a while: it is gone."""
    reached, first.model.before = holding(6)
    router.pool.links["second"].server.is_drained = True
    made = await _made(router, background=True)
    await reached.wait()
    router.pool.links["second"].server.is_drained = False
    first.hangs = True
    await router.until_state(first, State.GONE)
    return made


async def test_a_response_whose_server_is_gone_is_cancelled_there_when_it_is_back_and_not_made_again() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second, silence_s=0.3) as router:
        made = await _in_the_background(router, first)
        path = f"{PATH}/{made['id']}"
        for response in (await router.client.post(f"{path}/cancel"), await router.client.get(path)):
            found = await response.json()
            assert response.status == 200 and found.keys() == made.keys()
            assert (found["id"], found["status"], found["output"]) == (made["id"], "cancelled", [])
            assert (found["model"], found["background"], found["temperature"]) == ("tiny", True, 0.9)
        text = await (await router.client.get(f"{path}?stream=true")).text()
        assert '"status": "cancelled"' in text and text.rstrip().rpartition("event: ")[2].startswith("response.inc")
        assert (await router.client.get(f"{path}/input_items")).status == 503
        assert first.model.num_running == 1
        first.hangs = False
        await router.until(lambda: first.model.num_running == 0)
        await router.until_state(first, State.SERVES)
        found = await (await router.client.get(path)).json()
        assert found["status"] == "cancelled" and found["output"][0]["content"][0]["text"].split()
        assert [path for path, _, _ in second.asked] == []


async def test_a_response_that_was_cancelled_stays_so_when_its_server_comes_back_without_it() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second, silence_s=0.3) as router:
        made = await _in_the_background(router, first)
        await router.client.post(f"{PATH}/{made['id']}/cancel")
        await first.kill()
        first.hangs = False
        await first.start()
        await router.until_state(first, State.SERVES)
        for _ in range(2):
            assert (await (await router.client.get(f"{PATH}/{made['id']}")).json())["status"] == "cancelled"
        assert (await router.client.delete(f"{PATH}/{made['id']}")).status == 200
        assert (await router.client.get(f"{PATH}/{made['id']}")).status == 404
        assert second.asked == []


async def test_a_response_that_has_ended_is_not_cancelled_when_its_server_is_gone() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second) as router:
        made = await _gone_with_one(router, first)
        response = await router.client.post(f"{PATH}/{made['id']}/cancel")
        assert response.status == 409 and "has ended" in (await response.json())["error"]["message"]
        assert second.asked == []
        text = await (await router.client.get(f"{PATH}/{made['id']}?stream=true")).text()
        assert made["output"][0]["content"][0]["text"] in text


async def test_a_response_that_is_made_again_is_ended_where_it_was_when_that_server_is_back() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second, silence_s=0.3) as router:
        calm = await _made(router)
        made = await _in_the_background(router, first)
        path = f"{PATH}/{made['id']}"
        go_on = asyncio.Event()
        second.model.before = lambda i: go_on.wait() if i == 2 else None
        assert (await (await router.client.get(path)).json())["status"] == "in_progress"
        assert (first.model.num_running, second.model.num_running) == (1, 1)
        first.hangs = False
        await router.until(lambda: first.model.num_running == 0)
        assert second.model.num_running == 1
        go_on.set()
        await router.until(lambda: second.model.num_running == 0)
        found = await (await router.client.get(path)).json()
        assert (found["id"], found["status"]) == (made["id"], "incomplete")
        assert found["output"][0]["content"] == calm["output"][0]["content"]


async def test_a_stream_that_goes_on_elsewhere_is_ended_where_it_was_before_it_is_complete() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    async with routed(first, second, silence_s=0.3) as router:
        go_on = asyncio.Event()
        reached, first.model.before = holding(6)
        second.model.before = lambda i: go_on.wait() if i == 2 else None
        router.pool.links["second"].server.is_drained = True
        asking = asyncio.create_task(router.client.post(PATH, json={**BODY, "stream": True, "background": True}))
        await reached.wait()
        router.pool.links["second"].server.is_drained = False
        first.hangs = True
        await router.until(lambda: second.model.num_running == 1)
        first.hangs = False
        await router.until(lambda: first.model.num_running == 0)
        assert second.model.num_running == 1
        go_on.set()
        text = await (await asking).text()
        assert text.count("event: response.output_text.delta") == 12 and "response.incomplete" in text
