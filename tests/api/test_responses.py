"""/v1/responses over real HTTP, with OpenAI's own client: answers, streams that are read anew, and background."""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import aiohttp
import openai
import pytest
from aiohttp import web
from openai import AsyncOpenAI

from mdiq.api import response_store, responses
from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.errors import CapacityError, RingError
from tests.api.test_app import FakeRing
from tests.api.test_forms import TWO_CALLS, WritingRing

KEY, OTHER_KEY = "k" * 20, "o" * 20
TOOLS: list[Any] = [
    {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}, "strict": False}
    for name in ("get", "add")
]


class HeldRing(FakeRing):
    """Waits before each token from the second on until it may go on."""

    def __init__(self) -> None:
        super().__init__(before=self._wait)
        self.may_go_on = asyncio.Event()

    async def _wait(self, i: int) -> None:
        if i:
            await self.may_go_on.wait()


@asynccontextmanager
async def _served(ring: FakeRing) -> AsyncIterator[str]:
    runner = web.AppRunner(
        Api(ring, bare_keys([KEY, OTHER_KEY])).application(), handler_cancellation=True, shutdown_timeout=0.5
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _client(ring: FakeRing, key: str = KEY) -> AsyncIterator[AsyncOpenAI]:
    async with _served(ring) as url, AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=20) as client:
        yield client


async def _until(is_so: Any) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110  (nobody tells)
            await asyncio.sleep(0.005)


async def test_a_whole_response_and_the_next_one_that_goes_on_from_it() -> None:
    ring = FakeRing()
    async with _client(ring) as client:
        first = await client.responses.create(model="tiny", input="Hi", instructions="Be kind.", max_output_tokens=3)
        assert (first.status, first.output_text) == ("incomplete", " 0 1 2")
        assert first.usage is not None and (first.usage.input_tokens, first.usage.output_tokens) == (3, 3)
        found = await client.responses.retrieve(first.id)
        assert found.model_dump() == first.model_dump()
        second = await client.responses.create(input="And?", previous_response_id=first.id, max_output_tokens=1)
        for order, limit in (("asc", 1), ("asc", 20), ("desc", 2)):
            pages = client.responses.input_items.list(second.id, order=order, limit=limit)  # type: ignore[arg-type]
            texts = [item.content[0].text async for item in pages]  # type: ignore[union-attr]
            assert texts == ["Hi", " 0 1 2", "And?"][:: 1 if order == "asc" else -1]
    told = [[(m["role"], m["content"]) for m in messages] for messages, _ in ring.told]
    assert told == [
        [("system", "Be kind."), ("user", "Hi")],
        [("user", "Hi"), ("assistant", " 0 1 2"), ("user", "And?")],
    ]


async def test_a_stream_is_what_the_clients_own_helper_expects() -> None:
    async with _client(WritingRing(text=TWO_CALLS)) as client:
        async with client.responses.stream(model="tiny", input="Hi", tools=TOOLS) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        whole = await client.responses.create(input="Hi", tools=TOOLS)
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    for response in (final, whole):
        assert response.status == "completed" and response.output_text == "Let me see."
        calls = [item for item in response.output if item.type == "function_call"]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [("get", {"a": 1}), ("add", {})]
        assert all(call.call_id.startswith("call_") and call.status == "completed" for call in calls)


async def test_results_of_tools_go_back_to_the_model() -> None:
    ring = WritingRing(text=TWO_CALLS)
    told: list[Any] = []
    ring.chat_ids = lambda messages, *_, **__: told.append(messages) or [1, 2]  # type: ignore[func-returns-value,method-assign]
    async with _client(ring) as client:
        first = await client.responses.create(input="Hi", tools=TOOLS)
        calls = [item for item in first.output if item.type == "function_call"]
        ring.text = "Done."
        results: list[Any] = [
            {"type": "function_call_output", "call_id": call.call_id, "output": str(i)} for i, call in enumerate(calls)
        ]
        second = await client.responses.create(input=results, previous_response_id=first.id, tools=TOOLS)
    assert second.output_text == "Done."
    assert [message["role"] for message in told[1]] == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in told[1][1]["tool_calls"]] == [call.call_id for call in calls]


async def _events(url: str, after: int | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the events of a stream that is read anew, and go away after so many."""
    query = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
    found: list[dict[str, Any]] = []
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession() as session, session.get(url, params=query, headers=headers) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: "):
                found.append(json.loads(line.removeprefix(b"data: ")))
                if limit is not None and len(found) == limit:
                    return found
    return found


async def test_a_client_that_lost_its_connection_reads_on_and_misses_no_event() -> None:
    ring = HeldRing()
    async with _served(ring) as url, aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
        body = {"input": "Hi", "stream": True, "max_output_tokens": 5}
        response = await session.post(f"{url}/responses", json=body)
        first: list[dict[str, Any]] = []
        async for line in response.content:
            if line.startswith(b"data: "):
                first.append(json.loads(line.removeprefix(b"data: ")))
            if len(first) == 5:
                break
        response.close()  # its network has failed
        one = f"{url}/responses/{first[0]['response']['id']}"
        reading = asyncio.create_task(_events(one, after=first[-1]["sequence_number"]))
        await asyncio.sleep(0.05)
        assert ring.num_running == 1, "it goes on"
        ring.may_go_on.set()
        rest = await reading
        assert [event["sequence_number"] for event in first + rest] == list(range(len(first + rest)))
        texts = [event["delta"] for event in first + rest if event["type"] == "response.output_text.delta"]
        assert "".join(texts) == " 0 1 2 3 4"
        assert await _events(one) == first + rest, "also when it has ended"
        assert await _events(one, after=len(first + rest)) == []
    assert len(ring.asked) == 1


async def test_a_stream_that_is_not_stored_or_left_alone_for_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "ALONE_S", 0.1)
    for store in (True, False):
        ring = HeldRing()
        async with _client(ring) as client:
            stream = await client.responses.create(input="Hi", stream=True, store=store)
            event = await anext(aiter(stream))
            assert event.type == "response.created"
            assert ring.num_running == 1
            await stream.close()
            await _until(lambda: not ring.num_running)  # noqa: B023
            if not store:
                with pytest.raises(openai.NotFoundError):
                    await client.responses.retrieve(event.response.id)


async def test_a_response_in_the_background_is_there_at_once_and_is_asked_for_later() -> None:
    ring = HeldRing()
    async with _client(ring) as client:
        first = await client.responses.create(input="Hi", background=True, max_output_tokens=4)
        assert first.status in ("queued", "in_progress") and first.background
        await _until(lambda: ring.num_running)
        again = await client.responses.retrieve(first.id)
        assert again.status == "in_progress"
        ring.may_go_on.set()
        while (again := await client.responses.retrieve(first.id)).status == "in_progress":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert (again.status, again.output_text) == ("incomplete", " 0 1 2 3")
        stream = await client.responses.retrieve(first.id, stream=True, starting_after=2)
        kinds = [event.type async for event in stream]
        assert kinds[0] == "response.output_item.added" and kinds[-1] == "response.incomplete"


async def test_a_response_in_the_background_can_be_cancelled_and_any_be_deleted() -> None:
    ring = HeldRing()
    async with _client(ring) as client:
        running = await client.responses.create(input="Hi", background=True)
        await _until(lambda: ring.num_running)
        cancelled = await client.responses.cancel(running.id)
        assert (cancelled.status, ring.num_running) == ("cancelled", 0)
        assert (await client.responses.cancel(running.id)).status == "cancelled"
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(input="And?", previous_response_id=running.id)
        await client.responses.delete(running.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(running.id)
        other = await client.responses.create(input="Hi", background=True)
        await _until(lambda: ring.num_running)
        await client.responses.delete(other.id)
        await _until(lambda: not ring.num_running)
        ring.may_go_on.set()
        kept = await client.responses.create(input="Hi", max_output_tokens=1)
        assert (await client.responses.cancel(kept.id)).status == "incomplete", "it has ended"


async def test_a_stream_that_its_client_has_left_can_be_cancelled() -> None:
    ring = HeldRing()
    async with _client(ring) as client:
        stream = await client.responses.create(input="Hi", stream=True)
        event = await anext(aiter(stream))
        assert event.type == "response.created"
        await stream.close()
        assert (await client.responses.cancel(event.response.id)).status == "cancelled"
        assert not ring.num_running


async def test_responses_are_found_with_the_key_that_asked_for_them_alone() -> None:
    async with _served(FakeRing()) as url:
        async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            mine = await client.responses.create(input="Hi", max_output_tokens=1)
        async with AsyncOpenAI(base_url=url, api_key=OTHER_KEY, max_retries=0) as client:
            for asking in (
                client.responses.retrieve(mine.id),
                client.responses.delete(mine.id),
                client.responses.cancel(mine.id),
            ):
                with pytest.raises(openai.NotFoundError) as gone:
                    await asking
                assert (gone.value.param, gone.value.code) == ("response_id", None), "there is such a path"
            with pytest.raises(openai.BadRequestError) as refusal:
                await client.responses.create(input="And?", previous_response_id=mine.id)
            assert refusal.value.code == "previous_response_not_found"


@pytest.mark.parametrize(
    ("before", "status"),
    [(RingError("pi1 is gone"), 503), (CapacityError("it does not fit"), 400), (KeyError("a bug"), 500)],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_before_the_first_token_is_a_status(before: Exception, status: int, stream: bool) -> None:
    def fail(_: int) -> None:
        raise before

    ring = FakeRing(before=fail)
    async with _client(ring) as client:
        with pytest.raises(openai.APIStatusError) as refusal:
            await client.responses.create(input="Hi", stream=stream)
        assert refusal.value.status_code == status
    assert not ring.num_running


async def test_an_error_after_it_is_an_event_and_a_status() -> None:
    def fail(i: int) -> None:
        if i == 2:
            raise RingError("pi1 is gone")

    async with _client(FakeRing(before=fail)) as client:
        stream = await client.responses.create(input="Hi", stream=True)
        events = [event async for event in stream]
        assert events[-1].type == "response.failed" and "pi1 is gone" in events[-1].response.error.message
        found = await client.responses.retrieve(events[0].response.id)
        assert found.status == "failed" and found.output_text == " 0 1"
        with pytest.raises(openai.InternalServerError, match="pi1 is gone"):
            await client.responses.create(input="Hi")


async def test_bad_requests_and_places_are_those_of_chats() -> None:
    async with _client(FakeRing(max_requests=1)) as client:
        for body, param in (
            ({"input": []}, "input"),
            ({"input": "Hi", "temperature": "hot"}, "temperature"),
            ({"input": "Ahoy"}, "input"),
            ({"input": "x" * 2_000}, "input"),
            ({"input": "Hi", "model": "large"}, "model"),
            ({"input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id"),
        ):
            with pytest.raises(openai.APIStatusError) as refusal:
                await client.responses.create(**body)  # type: ignore[call-overload]
            assert refusal.value.param == param, body
    ring = HeldRing()
    ring.max_requests = 1
    async with _client(ring) as client:
        await client.responses.create(input="Hi", background=True)
        with pytest.raises(openai.RateLimitError):
            await client.responses.create(input="Hi")
        ring.is_serving = False
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(input="Hi")


async def test_numbers_of_events_that_are_none_are_refused() -> None:
    async with _served(FakeRing()) as url, aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
        async with session.post(f"{url}/responses", json={"input": "Hi", "max_output_tokens": 1}) as response:
            one = f"{url}/responses/{(await response.json())['id']}"
        for number in ("x", "1.5", "9" * 20, ""):
            async with session.get(one, params={"stream": "true", "starting_after": number}) as response:
                assert response.status == 400
                assert (await response.json())["error"]["param"] == "starting_after"


async def test_a_conversation_is_no_longer_than_one_request_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a template does not show counts too: ids of calls, for one."""
    monkeypatch.setattr(responses, "MAX_BODY_BYTES", 3_000)
    async with _client(FakeRing()) as client:
        item: Any = {"type": "function_call_output", "call_id": "c" * 1_200, "output": "a"}
        first = await client.responses.create(input=[item], max_output_tokens=1)
        second = await client.responses.create(input=[item], previous_response_id=first.id, max_output_tokens=1)
        with pytest.raises(openai.BadRequestError) as refusal:
            await client.responses.create(input=[item], previous_response_id=second.id, max_output_tokens=1)
        assert refusal.value.param == "previous_response_id"


@pytest.mark.parametrize("how", ["chunked", "deflate"])
async def test_the_size_of_an_input_is_what_it_holds_however_it_came(how: str) -> None:
    body = json.dumps({"input": "Hi", "max_output_tokens": 1, "metadata": {"a": "b" * 400}}).encode()
    async with _served(FakeRing()) as url, aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:

        async def in_pieces() -> AsyncIterator[bytes]:
            yield body

        data: Any = in_pieces() if how == "chunked" else zlib.compress(body)
        headers = {} if how == "chunked" else {"Content-Encoding": "deflate"}
        kept: list[response_store.StoredResponse] = []
        add = response_store.ResponseStore.add
        with mock.patch.object(response_store.ResponseStore, "add", lambda self, it: (kept.append(it), add(self, it))):
            async with session.post(f"{url}/responses", data=data, headers=headers) as response:
                assert response.status == 200
        assert kept[0].body_bytes == len(body)


async def test_choices_have_no_place_here_under_any_name() -> None:
    async with _client(FakeRing()) as client:
        for name in ("n", "n_cmpl", "num_return_sequences", "best_of"):
            with pytest.raises(openai.BadRequestError) as refusal:
                await client.responses.create(input="Hi", extra_body={name: 2})
            assert refusal.value.param == name
