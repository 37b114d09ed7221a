"""A ring's API that only keeps books, and the report that comes out."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from mdiq.bench.figures import UserTimes
from mdiq.bench.workload import Load
from mdiq.errors import ConfigError, RemoteProtocolError, RingError
from mdiq.report.gates import GateName, Limits
from mdiq.report.html import html
from mdiq.report.markdown import markdown
from mdiq.report.page import LANGUAGES
from mdiq.report.running import Answer, RunningRing, stage_of
from mdiq.report.trial_document import running_document
from mdiq.report.trial_page import trial_page
from tests.report.fakes import PRICES, RECEIPT
from tests.report.tracing import assert_traces_back

LOAD = Load(2, 3, 4)
KEY = "k"


class Api:
    """Answers each prompt with its number and so many pieces; two Nodes, which send 100 bytes for each request."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.changes_when_busy = False
        self.num_lacking = 0
        self.serving_s = 100.0
        self.status: Any = None
        self.statuses: list[Any] = []
        self.status_code = 200
        self.name = "tiny"
        self.usage: dict[str, Any] = {}
        self.pieces: list[bytes] = []
        self.word = "{word} {i}"

    def application(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.get("/status.json", self._status),
                web.post("/v1/completions", self._complete),
            ]
        )
        return app

    async def _models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({}, status=401)
        return web.json_response({"data": [{"id": self.name}]})

    async def _status(self, request: web.Request) -> web.StreamResponse:
        if self.status is not None:
            return web.json_response(self.status)
        status = self._usual()
        if self.statuses:
            status |= self.statuses.pop(0)
        # In packets, as over a slow link.
        text = json.dumps(status).encode()
        response = web.StreamResponse()
        await response.prepare(request)
        for i in range(0, len(text), 100):
            await response.write(text[i : i + 100])
            await asyncio.sleep(0)
        return response

    def _usual(self) -> dict[str, Any]:
        self.serving_s += 10.0
        node = {"state": "serves", "rss_bytes": 1000, "weight_bytes": 500, "bytes_out": 100 * len(self.asked)}
        # Busy for 50 s before, and for all of the last 10 s.
        busy_s = 50.0 + max(self.serving_s - 110.0, 0.0)
        nodes = [
            {"name": "pi0", "layers": [0, 2], "busy_s": busy_s, "busy_share": 0.1, **node},
            {"name": "pi1", "layers": [2, 6], "busy_s": 60.0, "busy_share": 0.5, **node},
            {"name": "spare", "state": "missing", "layers": []},
        ]
        hops = [{"wire": "f32", "delay_s": 0.01, "bytes_per_s": None}] * 2
        return {"nodes": nodes, "hops": hops, "serving_s": self.serving_s, "state": "serves"}

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert body["ignore_eos"] and body["temperature"] == 0 and body["stream"]
        self.asked.append(body["prompt"])
        if self.status_code != 200 and len(self.asked) > 2 * LOAD.users - 1:
            return web.json_response({"error": {"message": "no room"}}, status=self.status_code)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in self.pieces:
            await response.write(piece)
        word = str(sum(body["prompt"])) + ("!" if self.changes_when_busy and len(self.asked) > 2 * LOAD.users else "")
        for i in range(body["max_tokens"] // 2):  # a piece is two tokens
            await self._send(response, {"choices": [{"text": self.word.format(word=word, i=i)}]})
        used = body["max_tokens"] - self.num_lacking
        await self._send(response, {"choices": [], "usage": {"completion_tokens": used, **self.usage}})
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    async def _send(response: web.StreamResponse, value: object) -> None:
        await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")


async def measured(api: Api, key: str | None = KEY) -> Any:
    async with TestServer(api.application()) as server:
        return await RunningRing(str(server.make_url("/")), key).measure(LOAD, Limits(), 0.0)


async def test_users_are_asked_at_once_and_then_alone() -> None:
    api = Api()
    model, stage = await measured(api)
    prompts = [list(prompt) for prompt in LOAD.prompts(256)]
    warm_up = [list(prompt) for prompt in Load(2, 3, 4, -1).prompts(256)]
    assert sorted(api.asked[:2]) == sorted(warm_up)
    assert sorted(api.asked[2:4]) == sorted(prompts)
    assert api.asked[4:] == prompts
    assert (model, stage.name, stage.nodes, stage.split) == ("tiny", "now", 2, (2, 4))
    assert (stage.equal, stage.passes) == (2, True)
    first, last = stage.devices
    assert (first.name, first.layers, last.layers) == ("pi0", "0-1", "2-5")
    assert first.busy_share == pytest.approx(1.0)
    assert last.busy_share == 0.0
    # 200 bytes for two users: 3 + 4 - 1 rows each pass the first hop, 4 the last one.
    assert (first.bytes_per_token, last.bytes_per_token) == (200 / 12, 200 / 8)
    assert [gate.name for gate in stage.gates] == [GateName.ANSWERS, GateName.THROUGHPUT, GateName.LATENCY]


async def test_a_rate_counts_tokens_and_not_pieces_of_text() -> None:
    _, stage = await measured(Api())
    figures = stage.many.figures
    # 8 tokens came in 4 pieces.
    assert figures.total_tokens_per_s == pytest.approx(8 / stage.many.seconds)


async def test_answers_that_change_in_company_do_not_pass() -> None:
    api = Api()
    api.changes_when_busy = True
    _, stage = await measured(api)
    assert (stage.equal, stage.passes) == (0, False)


async def test_one_device_and_one_user_are_no_plurals() -> None:
    model, two = await measured(Api())
    one = replace(two, nodes=1, split=two.split[:1], devices=two.devices[:1], hops=())
    texts = {}
    for users in (1, 2):
        settings = {"users": users, "prompt_tokens": 3, "answer_tokens": 4, "is_local": False, "url": "http://pi0:8080"}
        document = running_document(RECEIPT, settings, model, one if users == 1 else two, PRICES)
        texts[users] = markdown(trial_page(document, "en"), document, "")
    assert "on the running ring of 1 device at http" in texts[1] and "1 user asks with prompts of" in texts[1]
    assert "The ring of 1 device passed every gate" in texts[1] and "as it stands: 1 device" in texts[1]
    assert "1 devices" not in texts[1] and "1 users" not in texts[1]
    assert "ring of 2 devices at http" in texts[2] and "2 users ask at once with" in texts[2]


async def test_the_report_of_a_running_ring_traces_back_and_claims_no_more_than_was_measured() -> None:
    model, stage = await measured(Api())
    settings = {"users": 2, "prompt_tokens": 3, "answer_tokens": 4, "is_local": False, "url": "http://pi0:8080"}
    document = running_document(RECEIPT, settings, model, stage, PRICES)
    for language in LANGUAGES:
        page = trial_page(document, language)
        text = html(page, document)
        assert assert_traces_back(text, page, document) > 50
    english = html(trial_page(document, "en"), document)
    assert "Whether whole copies of the model would be better was not measured." in english
    assert "no device was killed" in english


async def test_what_is_no_ring_is_an_error_of_one_line() -> None:
    with pytest.raises(ConfigError, match="the key is missing or wrong; set MDIQ_API_KEY"):
        await measured(Api(), None)
    with pytest.raises(ConfigError, match="--api http://127.0.0.1:9: .*give the address"):
        await RunningRing("http://127.0.0.1:9").measure(LOAD, Limits(), 0.0)
    api = Api()
    for api.status in ([], {"nodes": 3}, {"nodes": [], "hops": []}):
        with pytest.raises(RemoteProtocolError, match="not what mdiq's API answers"):
            await measured(api)
    api = Api()
    api.num_lacking = 1
    with pytest.raises(RingError, match="3 of 4 tokens came"):
        await measured(api)


async def test_a_ring_that_is_full_once_all_ask_is_an_error_of_one_line() -> None:
    api = Api()
    api.status_code = 503
    with pytest.raises(RingError, match="503 Service Unavailable .*no room"):
        await measured(api)
    api = Api()
    api.status_code = 429
    with pytest.raises(RingError, match="give fewer --users"):
        await measured(api)


async def test_a_ring_that_changes_while_it_is_measured_is_not_reported() -> None:
    for changes in ({"nodes": [{"state": "serves", "name": "pi9", "layers": [0, 6]}]}, {"rings_formed": 2}):
        api = Api()
        api.statuses = [{}, changes]
        with pytest.raises(RingError, match="measure again"):
            await measured(api)
    api = Api()
    api.status = {"state": "waiting for pi1", "nodes": []}
    with pytest.raises(RingError, match="does not serve now .*waiting for pi1"):
        await measured(api)


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes": []},
        {"nodes": ["pi0"]},
        {"serving_s": float("nan")},
        {"hops": [{"wire": "f32", "delay_s": float("inf"), "bytes_per_s": None}]},
        {"nodes": [{"state": "serves", "name": "pi0", "layers": [0, 10**400], "busy_s": 1}]},
    ],
)
async def test_a_status_with_impossible_figures_is_refused(changes: dict[str, Any]) -> None:
    api = Api()
    api.statuses = [changes, changes]
    with pytest.raises(RemoteProtocolError, match="not what mdiq's API answers"):
        await measured(api)


async def test_an_answer_without_an_end_or_a_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdiq.report.running.MAX_ANSWER_BYTES", 10_000)
    api = Api()
    api.pieces = [b": waits\n\n" * 500] * 10
    with pytest.raises(RemoteProtocolError, match="an answer without an end"):
        await measured(api)
    api = Api()
    api.word = ""
    with pytest.raises(RingError, match="tokens came, but no text"):
        await measured(api)


async def test_a_name_from_the_network_is_one_line_that_can_be_written() -> None:
    api = Api()
    api.name = "m\n# \ud800" + 500 * "x"
    model, _ = await measured(api)
    assert model == "m?# ?" + 195 * "x"


async def test_prompts_that_the_ring_has_in_its_cache_tell_nothing_of_a_first_token() -> None:
    api = Api()
    api.usage = {"prompt_tokens_details": {"cached_tokens": 2}}
    with pytest.raises(ConfigError, match="--seed 0: the ring still has these prompts in its cache; give another"):
        await measured(api)


def test_a_busy_share_is_of_the_loads_time_and_not_of_the_rest_after_it() -> None:
    api = Api()
    before = api._usual()
    after = api._usual() | {"serving_s": before["serving_s"] + 60.0}
    after["nodes"][0]["busy_s"] = before["nodes"][0]["busy_s"] + 1.0
    answers = [Answer(UserTimes(10.0, (11.0, 12.0)), "a b", 4), Answer(UserTimes(10.0, (11.5, 14.0)), "c d", 4)]
    stage = stage_of(LOAD, answers, answers, before, after, Limits())
    assert [device.busy_share for device in stage.devices] == [0.25, 0.0]  # a second of four
