"""Bodies that come slowly: those of one key do not keep others from sending theirs."""

import asyncio
import json

import aiohttp
from aiohttp.test_utils import TestClient, TestServer

from mdiq.api.app import Api
from mdiq.api.bodies import LARGE_BODY_BYTES, MAX_LARGE_BODIES
from mdiq.api.keys import bare_keys
from tests.api.test_app import CHAT, FakeRing

KEY, OTHER_KEY = "k" * 20, "o" * 20


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_slow_bodies_of_one_key_leave_turns_to_others() -> None:
    ring = FakeRing(max_requests=100)
    api = Api(ring, bare_keys([KEY, OTHER_KEY]), client_timeout_s=5.0)
    body = json.dumps(CHAT).encode() + b" " * LARGE_BODY_BYTES
    async with TestClient(TestServer(api.application()), timeout=aiohttp.ClientTimeout(10)) as client:
        links = []
        for _ in range(MAX_LARGE_BODIES):
            reader, writer = await asyncio.open_connection(client.host, client.port)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:9])
            links.append((reader, writer))
        await asyncio.sleep(0.2)
        post = client.post("/v1/chat/completions", data=body, headers=_headers(OTHER_KEY))
        response = await asyncio.wait_for(post, 3)
        assert response.status == 200, "it is answered while the others still send theirs"
        for reader, writer in links:  # and all of them are answered too
            writer.write(body[9:])
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()
