"""Spans of requests: what a collector gets, and that there are none unless somebody asks for them."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from mdiq import __version__
from mdiq.api import request_traces
from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.errors import ConfigError
from tests.api.test_app import CHAT, FakeRing

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KEY = {"Authorization": "Bearer secret"}


@asynccontextmanager
async def _collector() -> AsyncIterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Run a collector; yield its address, and what it is sent."""
    got: list[ExportTraceServiceRequest] = []

    async def take(request: web.Request) -> web.Response:
        got.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(body=b"", content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/"), got


def _attributes(of: Any) -> dict[str, Any]:
    def value(each: Any) -> Any:
        kind = each.WhichOneof("value")
        found = getattr(each, kind)
        return [value(item) for item in found.values] if kind == "array_value" else found

    return {each.key: value(each.value) for each in of.attributes}


async def test_each_request_is_a_span_without_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _collector() as (address, got):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "site=hall-3")
        app = Api(FakeRing(), bare_keys(["secret"])).application()
        async with TestClient(TestServer(app), timeout=aiohttp.ClientTimeout(20)) as client:
            parent = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
            strange = {"traceparent": "x\tsecret"}
            for headers, body in ((KEY | parent, CHAT), (KEY | strange, {"messages": 1}), ({}, CHAT)):
                await (await client.post("/v1/chat/completions", json=body, headers=headers)).read()
            await (await client.get("/health")).read()  # asked for every few seconds
            await (await client.get("/no/such/secret", headers=KEY)).read()
    (resource,) = (each for message in got for each in message.resource_spans)
    named = _attributes(resource.resource)
    assert (named["service.name"], named["service.version"], named["site"]) == ("mdiq", __version__, "hall-3")
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    found = {(span.name, _attributes(span)["http.response.status_code"]): span for span in spans}
    assert [*found] == [
        ("POST /v1/chat/completions", 200),
        ("POST /v1/chat/completions", 400),
        ("POST /v1/chat/completions", 401),
        ("GET", 404),
    ]
    answer = found["POST /v1/chat/completions", 200]
    assert (answer.trace_id.hex(), answer.parent_span_id.hex()) == (TRACE, SPAN)
    assert 0 < answer.end_time_unix_nano - answer.start_time_unix_nano < 20e9
    told = _attributes(answer)
    wanted = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "gen_ai.operation.name": "chat",
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
        "mdiq.key": "key1",
    }
    assert {name: told[name] for name in wanted} == wanted
    assert b"secret" not in b"".join(message.SerializeToString() for message in got)
    assert "gen_ai.usage.input_tokens" not in _attributes(found["POST /v1/chat/completions", 400])


async def test_a_collector_that_is_away_costs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/v1/traces")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    app = Api(FakeRing()).application()
    async with asyncio.timeout(60), TestClient(TestServer(app), timeout=aiohttp.ClientTimeout(20)) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status == 200


async def test_without_a_variable_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in request_traces.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    app = Api(FakeRing()).application()
    async with TestClient(TestServer(app)) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status == 200
    assert request_traces.TRACES not in app


async def test_where_opentelemetry_is_lacking_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set, .*pip install 'mdiq\[otel\]'"):
        async with TestServer(Api(FakeRing()).application()):
            pass


@pytest.mark.parametrize("parent", [f"00-{TRACE}-{SPAN}-01", "00-x", "", "a" * 200])
def test_only_what_may_be_a_span_is_passed_on(parent: str) -> None:
    is_kept = parent.startswith(f"00-{TRACE}")
    assert request_traces.parent_in({"traceparent": parent}) == ({"traceparent": parent} if is_kept else {})
