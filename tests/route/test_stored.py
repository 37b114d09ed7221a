"""Stored responses behind a router: whose they are, where they are looked for, and what is made again."""

import asyncio
from typing import Any

import pytest

from mdiq.api.keys import bare_keys
from mdiq.route import links, run
from mdiq.route.servers import State
from tests.route.fake_server import FakeServer, Router, routed

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
