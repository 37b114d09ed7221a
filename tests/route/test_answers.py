"""What a router makes of answers and bodies that are out of the ordinary, over real sockets."""

import asyncio
import gzip
import io
import json
import socket
from functools import partial
from typing import Any

import pytest
from aiohttp import web

from mdiq.api.keys import bare_keys
from mdiq.route import app, links, pool, run
from mdiq.route.servers import State
from tests.route.fake_server import FakeServer, Handler, holding, routed

PATH = "/v1/completions"
BODY: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 12}


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOOK_S", 0.02)
    monkeypatch.setattr(run, "AGAIN_S", 0.02)


class OddServer(FakeServer):
    """Gives the first request that it gets another answer. answer: makes it."""

    answer: Handler | None = None

    @web.middleware
    async def _faults(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "POST" and self.answer is not None:
            answer, self.answer = self.answer, None
            await request.read()
            return await answer(request)
        response = await super()._faults(request, handler)
        if isinstance(response, web.Response) and "gzip" in request.headers.get("Accept-Encoding", ""):
            assert isinstance(response.body, bytes)
            response.body = gzip.compress(response.body)
            response.headers["Content-Encoding"] = "gzip"
        return response


async def _breaks_after_a_comment(request: web.Request) -> web.StreamResponse:
    out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await out.prepare(request)
    await out.write(b": keep-alive\n\n")
    await asyncio.sleep(0.05)
    assert request.transport is not None
    request.transport.abort()
    return out


async def test_a_refusal_after_a_comment_ends_the_stream_with_an_error() -> None:
    first, second = OddServer("first"), FakeServer("second")
    first.answer = _breaks_after_a_comment
    second.refuses = 400
    async with routed(first, second) as router:
        response = await router.client.post(PATH, json={**BODY, "stream": True})
        text = await response.text()
        assert response.status == 200 and "HTTP/1.1" not in text
        assert "second answers 400" in json.loads(text.splitlines()[-2].removeprefix("data: "))["error"]["message"]


@pytest.mark.parametrize("status", [502, 504])
@pytest.mark.parametrize("path", [PATH, "/v1/messages"])
async def test_a_proxy_that_does_not_reach_its_server_is_a_reason_to_ask_another(path: str, status: int) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text="<html>Bad Gateway</html>", content_type="text/html")

    first, second = OddServer("first"), FakeServer("second")
    first.answer = answer
    async with routed(first, second) as router:
        body = {**BODY, "messages": [{"role": "user", "content": "Hi"}], "model": "tiny"}
        response = await router.client.post(path, json=body)
        assert response.status == 200, await response.text()
        assert len(second.asked) == 1


@pytest.mark.parametrize("path", [PATH, "/v1/messages"])
async def test_a_refusal_that_is_no_json_becomes_one(path: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=500, text="<html>oh</html>", content_type="text/html")

    only = OddServer("only")
    only.answer = answer
    async with routed(only) as router:
        response = await router.client.post(path, json=BODY)
        assert response.status == 500
        assert "only answers 500" in (await response.json())["error"]["message"]


async def test_an_answer_is_not_asked_for_in_a_form_that_clients_could_not_read() -> None:
    only = OddServer("only")
    async with routed(only) as router:
        response = await router.client.post(PATH, json=BODY)
        assert response.status == 200 and (await response.json())["usage"]["completion_tokens"] == 12


async def test_the_key_of_a_client_is_passed_on_and_the_routers_own_is_for_the_status() -> None:
    only = FakeServer("only", "the-key-of-client-1", "key-of-the-router-")
    keys = {"only": "key-of-the-router-"}
    async with routed(only, server_keys=keys, pass_keys=True) as router:
        for headers, status in (({}, 401), ({"x-api-key": "the-key-of-client-1"}, 200)):
            response = await router.client.post(PATH, json=BODY, headers=headers)
            assert response.status == status, await response.text()
        assert [sent.get("Authorization") for _, sent, _ in only.asked] == [None, None]
        assert [sent.get("x-api-key") for _, sent, _ in only.asked] == [None, "the-key-of-client-1"]
        assert router.pool.links["only"].server.state is State.SERVES


async def test_a_key_that_is_not_ascii_is_not_passed_on() -> None:
    only = FakeServer("only")
    async with routed(only) as router:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.client.server.port)
        body = json.dumps(BODY).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b" 200 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
        assert "Authorization" not in only.asked[0][1]


async def test_a_body_is_not_longer_for_a_server_than_it_was() -> None:
    only = FakeServer("only")
    only.model.context_tokens = 1 << 22
    async with routed(only) as router:
        for prompt in ("\u3042" * 600_000, [5] * 900_000):
            data = json.dumps({"prompt": prompt}, ensure_ascii=False, separators=(",", ":")).encode()
            assert len(data) < 2 << 20
            response = await router.client.post(PATH, data=io.BytesIO(data))
            assert response.status != 413, await response.text()
        half = await router.client.post("/tokenize", data=b'{"prompt": "\\ud800"}')
        assert half.status in (200, 400), await half.text()


async def test_a_prompt_that_is_too_long_for_one_server_goes_to_one_with_more_room_in_messages_too() -> None:
    small, large = FakeServer("small"), FakeServer("large")
    small.model.context_tokens, large.model.context_tokens = 20, 2_000
    async with routed(small, large) as router:
        router.pool.links["large"].server.num_begun = 5  # the other one is asked first
        messages = [{"role": "user", "content": "a b c d " * 40}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 4}
        response = await router.client.post("/v1/messages", json=body)
        assert response.status == 200, await response.text()
        assert len(small.asked) == len(large.asked) == 1


async def test_a_stream_that_its_client_leaves_is_counted_for_its_key() -> None:
    only = FakeServer("only")
    reached, only.model.before = holding(5)
    async with routed(only, keys=bare_keys(["the-key-of-client-1"]), server_keys={"only": "x"}) as router:
        headers = {"x-api-key": "the-key-of-client-1"}
        response = await router.client.post(PATH, json={**BODY, "stream": True}, headers=headers)
        await reached.wait()
        response.close()
        await router.until(lambda: router.api.num_open == 0)
        (key,) = router.api.status()["keys"]
        assert key["answer_tokens"] == 5


async def test_a_connection_to_a_server_is_watched_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    idle: list[int] = []

    def noted(address: Any) -> socket.socket:
        made = links.watched_socket(address)
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle.append(made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))
        return made

    monkeypatch.setattr("mdiq.route.links.aiohttp.TCPConnector", partial(_connector, links.aiohttp.TCPConnector, noted))
    async with routed(FakeServer("only")):
        assert set(idle) == {15}


def _connector(kind: Any, noted: Any, **settings: Any) -> Any:
    assert settings.pop("socket_factory") is links.watched_socket
    return kind(**settings, socket_factory=noted)


async def test_an_answer_is_held_until_its_client_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 8 << 20

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=b'{"x": "' + b"x" * size + b'"}', content_type="application/json")

    only = OddServer("only")
    only.answer = answer
    async with routed(only) as router:
        assert router.client.server.port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", router.client.server.port, limit=1_024)
        body = json.dumps(BODY).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await reader.readline()
        monkeypatch.setattr(pool, "MAX_HELD_BYTES", size)
        response = await router.client.post(PATH, json=BODY)
        assert response.status == 503 and "holds too much" in await response.text()
        writer.transport.abort()
        await router.until(lambda: router.pool._num_held == 0)
        assert (await router.client.post(PATH, json=BODY)).status == 200


async def test_what_is_held_of_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_OPEN_BYTES", 1_000)
    only = FakeServer("only")
    async with routed(only) as router:
        response = await router.client.post(PATH, json={**BODY, "prompt": "a" * 2_000})
        assert response.status == 429 and response.headers["Retry-After"]
        for _ in range(30):
            assert (await router.client.post(PATH, json=BODY)).status == 200
