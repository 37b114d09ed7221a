"""The names by which an API without keys may be asked: DNS rebinding shows a page nothing."""

import socket

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from mdiq.api.app import Api
from mdiq.api.hosts import Hosts
from mdiq.api.keys import bare_keys
from mdiq.route.app import RouteApi
from mdiq.route.pool import Pool
from tests.api.test_app import CHAT, FakeRing, _error

OWN = "127.0.0.1 127.0.0.1:8080 [::1]:8080 [fe80::1] localhost:8080 LOCALHOST a.localhost mdiq:80 10.0.0.1.".split()
STRANGE = "rebound.example.org 127.0.0.1.nip.io:8080 a.local localhost.example.org. ::1 [::1 a:b [a] . .:80".split()


@pytest.mark.parametrize("host", OWN)
def test_addresses_and_names_that_nobody_else_can_have_are_ours(host: str) -> None:
    assert Hosts().allows(host)


@pytest.mark.parametrize("host", STRANGE)
def test_other_names_are_not(host: str) -> None:
    assert not Hosts().allows(host)


def test_the_machine_and_the_operator_name_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Desk.example.net")
    hosts = Hosts(["Chat.example.org"])
    for host in ("desk.example.net", "desk.local:8080", "desk.lan.", "desk.home.arpa", "CHAT.example.org:443"):
        assert hosts.allows(host)
    assert not hosts.allows("a.chat.example.org") and not hosts.allows("desk.example.org")


@pytest.mark.parametrize("kind", ["ring", "router"])
async def test_a_request_to_another_name_is_told_what_to_set(kind: str) -> None:
    def api(*keys: str) -> Api | RouteApi:
        if kind == "ring":
            return Api(FakeRing(), bare_keys(keys), allowed_hosts=["chat.example.org"])
        return RouteApi(Pool(1.0), bare_keys(keys), max_requests=4, allowed_hosts=["chat.example.org"])

    rebound = {"Host": "rebound.example.org"}
    async with TestClient(TestServer(api().application()), timeout=aiohttp.ClientTimeout(10)) as client:
        for path in ("/status.json", "/metrics", "/v1/models", "/version"):
            response = await client.get(path, headers=rebound)
            error = await _error(response)
            assert (response.status, error["code"]) == (403, "host_not_allowed")
            assert "'rebound.example.org'" in error["message"] and "api.allowed_hosts" in error["message"]
            assert (await client.get(path, headers={"Host": "chat.example.org:443"})).status == 200
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=rebound)).status == 403
        assert (await client.get("/health", headers=rebound)).status != 403, "probes ask under any name"
        page = {"Host": "chat.example.org", "Origin": "https://chat.example.org"}
        assert (await client.get("/status.json", headers=page)).status == 200, "a page of an allowed name"
    async with TestClient(TestServer(api("a-key").application()), timeout=aiohttp.ClientTimeout(10)) as client:
        bearer = {**rebound, "Authorization": "Bearer a-key"}
        assert (await client.get("/status.json", headers=bearer)).status == 200, "a page has no key"
        assert (await client.get("/status.json", headers=rebound)).status == 401
