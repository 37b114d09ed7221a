"""Responses in the background over the end of their service: another one, with what the disk has, goes on with them."""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from openai import AsyncOpenAI

from mdiq.api import response_store, responses
from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.api.lasting import MAX_TRIES
from mdiq.api.response_shapes import ResponseShape
from mdiq.core.sequence import FinishReason, SamplingParams, TokenEvent
from mdiq.core.sequence import Sequence as TokenSequence
from mdiq.errors import CapacityError, MdiqError, RingError, RingStalledError
from mdiq.runtime.starter_service import StreamEvent
from mdiq.service.journal import Changes, Journal
from mdiq.service.response_journal import ServiceJournal
from tests.api.test_forms import TWO_CALLS, WritingRing
from tests.api.test_responses import KEY, OTHER_KEY, TOOLS, _events, _until

ABOUT = {"weights": "int8"}
LONG_S = 3_600.0
SHORT = "The fox sees the hen."
MAX_KILLS = 8


@dataclass
class LastingRing(WritingRing):
    """Gives a token whenever it may; the token at a place depends on seed and place alone.

    lost: raised once instead of the token at its place. computed: places of the tokens that it has given.
    """

    may_give: int = 0
    lost: dict[int, list[MdiqError]] = field(default_factory=dict)
    computed: list[int] = field(default_factory=list)
    shares: list[tuple[str, int]] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def give(self, num_tokens: int = 1_000) -> None:
        self.may_give += num_tokens
        self.wake()

    def wake(self) -> None:
        news, self.news = self.news, asyncio.Event()
        news.set()

    def event(self, sequence: TokenSequence) -> StreamEvent:
        place = len(sequence.generated)
        pieces = [self.text[i : i + 3] for i in range(0, len(self.text), 3)]
        token = (place + sequence.params.seed) % 97
        sequence.generated.append(token)
        sequence.finish_reason = FinishReason.STOP if place == len(pieces) - 1 else None
        step = TokenEvent(sequence.index, token, len(sequence.prompt) + place, sequence.finish_reason)
        return StreamEvent(step, pieces[place], 0.0)

    def resumed(
        self, prompt: tuple[int, ...], params: SamplingParams, tokens: Sequence[int]
    ) -> tuple[TokenSequence, list[StreamEvent]]:
        sequence = TokenSequence(len(self.asked), prompt, params)
        events = [self.event(sequence) for _ in tokens]
        assert sequence.generated == [*tokens], "the journal has other tokens than were drawn"
        return sequence, events

    async def go_on(
        self, sequence: TokenSequence, *, owner: str = "", share: int = 1
    ) -> AsyncGenerator[StreamEvent, None]:
        if not self.is_serving:
            raise RingError("the ring does not serve")
        self.asked.append((sequence.prompt, sequence.params))
        self.shares.append((owner, share))
        self.num_running += 1
        try:
            while sequence.finish_reason is None:
                place = len(sequence.generated)
                while not self.may_give:
                    await self.news.wait()
                self.may_give -= 1
                if errors := self.lost.get(place):
                    error = errors.pop(0)
                    if isinstance(error, RingError):
                        yield StreamEvent(TokenEvent(0, None, place, FinishReason.ERROR, error), "", 0.0)
                        return
                    raise error
                self.computed.append(place)
                yield self.event(sequence)
        finally:
            self.num_running -= 1

    async def until_takes_requests(self) -> None:
        while not self.is_serving:
            await self.news.wait()


class Service:
    """One process of a service. url: of its API. journal: written when a test says so."""

    def __init__(self, url: str, ring: LastingRing, journal: ServiceJournal, api: Api) -> None:
        self.url, self.ring, self.journal, self.api = url, ring, journal, api

    def client(self, key: str = KEY) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=20)


@asynccontextmanager
async def _service(file: Path, ring: LastingRing, keys: Sequence[str] = (KEY, OTHER_KEY)) -> AsyncIterator[Service]:
    journal = ServiceJournal(file, ABOUT, setting="journal", interval_s=LONG_S)
    api = Api(ring, bare_keys(keys), journal=journal)
    api.take_up(await journal.open())
    writing = asyncio.create_task(journal.run(api.take_up))
    runner = web.AppRunner(api.application(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield Service(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", ring, journal, api)
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await runner.cleanup()
        await journal.aclose()


def _killed(file: Path, number: int) -> Path:
    """Return a copy of what the disk has now: what a service that dies at this moment leaves."""
    folder = file.parent / f"{number}"
    folder.mkdir()
    for name in (file.name, f"{file.name}-wal"):
        if file.with_name(name).exists():
            shutil.copy(file.with_name(name), folder)
    return folder / file.name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "journal"


async def _ended(client: AsyncOpenAI, response_id: str) -> Any:
    async with asyncio.timeout(20):
        while (found := await client.responses.retrieve(response_id)).status in ("queued", "in_progress"):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return found


def _journal_of(service: Service) -> tuple[bool, int]:
    status = service.api.status()["journal"]
    return status["is_written"], status["responses"]


def _shown(response: Any) -> dict[str, Any]:
    """Return what does not depend on when a response was asked for: its ids and its times do."""
    whole = response.model_dump()
    for name in ("id", "created_at", "completed_at"):
        whole.pop(name)
    for item in whole["output"]:
        item.pop("id")
        item.pop("call_id", None)
    return whole


BODIES: list[tuple[str, dict[str, Any]]] = [
    (SHORT, {"temperature": 0}),
    (SHORT, {"seed": 5, "instructions": "Be kind.", "metadata": {"a": "b"}, "stop": ["xyz"], "logit_bias": {"3": 1}}),
    (TWO_CALLS, {"tools": TOOLS, "seed": 3}),
    ('{"a": 1}', {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}}),
]


def _body(more: dict[str, Any]) -> dict[str, Any]:
    fields = {name: more[name] for name in more.keys() & {"stop", "logit_bias", "seed"}}
    own = {name: value for name, value in more.items() if name not in fields}
    return {"input": "Hi", "extra_body": fields, **own}


@pytest.mark.parametrize(("text", "more"), BODIES)
async def test_a_service_that_is_killed_at_any_moment_is_followed_by_one_that_ends_every_response_alike(
    file: Path, text: str, more: dict[str, Any]
) -> None:
    """After tokens that are on the disk and tokens that are not, and at the end."""
    num_tokens = -(-len(text) // 3)
    left: list[tuple[Path, str, list[dict[str, Any]]]] = []
    async with _service(file, LastingRing(text=text)) as service, service.client() as client:
        asked = await client.responses.create(**_body(more), background=True)
        one = f"{service.url}/responses/{asked.id}"
        left.append((_killed(file, 0), asked.id, []))
        for i in range(num_tokens):
            service.ring.give(1)
            await _until(lambda: len(service.ring.computed) > i)  # noqa: B023
            if i % 3 == 1:
                await service.journal.write(with_tokens=True)
            seen = await _events(one, limit=3)
            if i < num_tokens - 1 and not i % max(num_tokens // MAX_KILLS, 1):
                dead = _killed(file, 2 * i + 1)
                left.append((dead, asked.id, await _now(service, asked.id)))
        calm = await _ended(client, asked.id)
        events = await _events(one)
        left.append((_killed(file, 1_000), asked.id, events))
        assert events[: len(seen)] == seen
    for dead, response_id, seen in left:
        assert events[: len(seen)] == seen
        ring = LastingRing(text=text, is_serving=False)
        async with _service(dead, ring) as service, service.client() as client:
            found = await client.responses.retrieve(response_id)  # also while no ring serves
            assert found.status == ("in_progress" if len(seen) < len(events) else calm.status)
            reading = asyncio.create_task(_events(f"{service.url}/responses/{response_id}", after=len(seen) - 1))
            ring.is_serving = True
            ring.give()
            found = await _ended(client, response_id)
            rest = await reading
            assert _shown(found) == _shown(calm)
            # All but the last event, which has the time, is as it was; and all is where nothing was lost.
            assert [*seen, *rest][:-1] == events[:-1] and len(seen) + len(rest) == len(events)
            assert await _events(f"{service.url}/responses/{response_id}") == [*seen, *rest]
            assert {**found.model_dump(), "completed_at": 0} == {**calm.model_dump(), "completed_at": 0}
            assert sorted({*ring.computed}) == sorted(ring.computed), "no token is computed twice"
            with pytest.raises(openai.NotFoundError):
                async with service.client(OTHER_KEY) as other:
                    await other.responses.retrieve(response_id)
        again = LastingRing(text=text)
        async with _service(dead, again) as service, service.client() as client:
            assert (await client.responses.retrieve(response_id)).model_dump() == found.model_dump()
            assert await _events(f"{service.url}/responses/{response_id}", after=2) == [*seen, *rest][3:]
            assert not again.asked, "it has ended once"


async def _now(service: Service, response_id: str) -> list[dict[str, Any]]:
    """Return the events that a client could have read by now."""
    stored = service.api._responses._store._responses[response_id]
    return [json.loads(event.partition(b"data: ")[2]) for event in stored.events]


async def test_a_response_is_on_the_disk_before_its_client_knows_it_and_its_end_before_anybody_sees_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, write = asyncio.Event(), ServiceJournal.write

    async def held(journal: ServiceJournal, *, with_tokens: bool = False) -> None:
        await goes_on.wait()
        await write(journal, with_tokens=with_tokens)

    monkeypatch.setattr(ServiceJournal, "write", held)
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        creating = asyncio.create_task(client.responses.create(input="Hi", background=True))
        await asyncio.sleep(0.05)
        assert not creating.done() and not service.ring.asked
        goes_on.set()
        asked = await creating
        goes_on.clear()
        service.ring.give()
        await _until(lambda: len(service.ring.computed) == 7)
        await asyncio.sleep(0.05)
        found = await client.responses.retrieve(asked.id)
        assert (found.status, found.output_text) == ("in_progress", SHORT)
        goes_on.set()
        assert (await _ended(client, asked.id)).status == "completed"


def _writes_that_wait(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Have a journal's writes wait while the event that is returned is clear; it is set."""
    goes_on, write = asyncio.Event(), ServiceJournal.write
    goes_on.set()

    async def held(journal: ServiceJournal, *, with_tokens: bool = False) -> None:
        await goes_on.wait()
        await write(journal, with_tokens=with_tokens)

    monkeypatch.setattr(ServiceJournal, "write", held)
    return goes_on


async def test_a_response_is_gone_from_the_disk_also_if_the_client_that_deletes_it_does_not_wait(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = _writes_that_wait(monkeypatch)
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        asked = await client.responses.create(input="Hi", background=True)
        await service.journal.write(with_tokens=True)
        goes_on.clear()
        deleting = asyncio.create_task(client.responses.delete(asked.id))
        await _until(lambda: not service.ring.num_running)
        await asyncio.sleep(0.05)
        assert not deleting.done()
        deleting.cancel()
        await asyncio.sleep(0.05)
        goes_on.set()
        await _until(lambda: _journal_of(service) == (True, 0))
    with Journal(file) as journal:
        assert not journal.notes() and not journal.begun()


async def test_one_response_that_is_damaged_on_the_disk_does_not_keep_the_service_from_starting(file: Path) -> None:
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        ids = [(await client.responses.create(input="Hi", background=True)).id for _ in range(2)]
    with Journal(file) as journal:
        request = json.loads(journal.notes()[ids[0]]["request"])
        request["about"]["ownes"] = request["about"].pop("owner")
        journal.write(Changes(notes={ids[0]: {"request": json.dumps(request).encode()}}))
    ring = LastingRing(text=SHORT)
    ring.give()
    async with _service(file, ring) as service, service.client() as client:
        assert (await _ended(client, ids[1])).output_text == SHORT
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(ids[0])
        await _until(lambda: _journal_of(service) == (True, 1))


async def test_a_journal_that_cannot_be_written_refuses_the_background_alone(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Journal.write

    def full(_: Journal, changes: Changes) -> None:
        raise CapacityError("/var/lib/mdiq/journal: no space left on its disk; free some")

    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        before = await client.responses.create(input="Hi", background=True)
        monkeypatch.setattr(Journal, "write", full)
        with pytest.raises(openai.InternalServerError) as refusal:
            await client.responses.create(input="Hi", background=True)
        error: Any = refusal.value.body
        assert refusal.value.status_code == 503 and error["param"] == "background"
        assert "cannot write its journal now" in error["message"] and "/var" not in error["message"]
        assert refusal.value.response.headers["Retry-After"] == "5"
        assert _journal_of(service) == (False, 1)
        service.ring.give()
        assert (await client.responses.create(input="Hi")).output_text == SHORT
        assert (await _ended(client, before.id)).output_text == SHORT
        monkeypatch.setattr(Journal, "write", write)
        await service.journal.write(with_tokens=True)
        after = await client.responses.create(input="Hi", background=True)
        assert (await _ended(client, after.id)).output_text == SHORT
        dead = _killed(file, 1)
    async with _service(dead, LastingRing()) as service, service.client() as client:
        for each in (before, after):
            assert (await client.responses.retrieve(each.id)).output_text == SHORT


async def test_a_response_that_breaks_before_its_client_knows_it_is_not_kept(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _service(file, ring := LastingRing(text=SHORT)) as service, service.client() as client:
        with monkeypatch.context() as broken:
            broken.setattr(ResponseShape, "begin", lambda _: 1 // 0)
            with pytest.raises(openai.InternalServerError) as refusal:
                await client.responses.create(input="Hi", background=True)
        assert refusal.value.status_code == 500
        await _until(lambda: _journal_of(service) == (True, 0))
    async with _service(file, ring) as service:
        assert not ring.asked


async def test_what_was_cancelled_or_deleted_stays_so_and_both_work_on_what_goes_on(file: Path) -> None:
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        ids = [(await client.responses.create(input="Hi", background=True)).id for _ in range(5)]
        service.ring.give(2)
        await _until(lambda: len(service.ring.computed) == 2)
        assert (await client.responses.cancel(ids[0])).status == "cancelled"
        await client.responses.delete(ids[1])
        await client.responses.cancel(ids[2])
        await client.responses.delete(ids[2])
        dead = _killed(file, 1)
    async with _service(dead, ring := LastingRing(text=SHORT)) as service, service.client() as client:
        assert (await client.responses.retrieve(ids[0])).status == "cancelled"
        assert [event["type"] for event in await _events(f"{service.url}/responses/{ids[0]}")][-1] == (
            "response.incomplete"
        )
        for gone in ids[1:3]:
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(gone)
        await _until(lambda: ring.num_running == 2)
        assert (await client.responses.cancel(ids[3])).status == "cancelled"
        await client.responses.delete(ids[4])
        await _until(lambda: not ring.num_running)
        dead = _killed(file, 2) if not dead.exists() else _killed(dead, 3)
    async with _service(dead, ring := LastingRing(text=SHORT)) as service, service.client() as client:
        assert (await client.responses.retrieve(ids[3])).status == "cancelled"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(ids[4])
        assert not ring.asked and _journal_of(service) == (True, 2)


async def test_a_service_that_is_stopped_leaves_what_runs_to_the_next(file: Path) -> None:
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        asked = await client.responses.create(input="Hi", background=True)
        reading = asyncio.create_task(_events(f"{service.url}/responses/{asked.id}"))
        service.ring.give(3)
        await _until(lambda: len(service.ring.computed) == 3)
    await asyncio.gather(reading, return_exceptions=True)  # it is cut off, and has no last event
    async with _service(file, ring := LastingRing(text=SHORT)) as service, service.client() as client:
        ring.give()
        found = await _ended(client, asked.id)
        assert found.output_text == SHORT and ring.computed == [3, 4, 5, 6]


async def test_what_has_ended_is_kept_as_long_as_without_a_restart(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [1_000_000.0]
    monkeypatch.setattr(responses.time, "time", lambda: times[0])
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        service.ring.give()
        asked = await client.responses.create(input="Hi", background=True)
        await _ended(client, asked.id)
    for later, is_there in ((-500.0, True), (response_store.KEEP_S - 1, True), (response_store.KEEP_S + 1, False)):
        times[0] = 1_000_000.0 + later
        async with _service(file, LastingRing()) as service, service.client() as client:
            if is_there:
                assert (await client.responses.retrieve(asked.id)).output_text == SHORT
            else:
                with pytest.raises(openai.NotFoundError):
                    await client.responses.retrieve(asked.id)
                assert _journal_of(service) == (True, 0)


async def test_the_disk_holds_no_more_than_the_memory_does(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "MAX_KEPT", 3)
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        service.ring.give()
        ids = []
        for _ in range(6):
            ids.append((await client.responses.create(input="Hi", background=True)).id)
            await _ended(client, ids[-1])
    with Journal(file) as journal:
        assert {*journal.notes()} == {*ids[3:]}


async def test_what_expires_leaves_the_disk_though_nobody_asks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "KEEP_S", 0.01)
    monkeypatch.setattr(responses, "KEEP_S", -0.98)
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        service.ring.give()
        await client.responses.create(input="Hi", background=True)
        await _until(lambda: _journal_of(service) == (True, 0))


async def test_rings_that_are_lost_delay_a_response_and_it_is_no_reason_to_fail(file: Path) -> None:
    errors: list[MdiqError] = [RingError("the ring is formed anew; ask again")] * (MAX_TRIES - 1)
    ring = LastingRing(text=SHORT, lost={0: [*errors], 3: [*errors], 6: [*errors]})
    async with _service(file, ring) as service, service.client() as client:
        ring.give()
        asked = await client.responses.create(input="Hi", background=True)
        assert (await _ended(client, asked.id)).output_text == SHORT
        assert ring.computed == [*range(7)] and len(ring.asked) == 3 * (MAX_TRIES - 1) + 1


@pytest.mark.parametrize(
    "errors",
    [
        [RingError("pi1 is gone")] * MAX_TRIES,
        [RingStalledError("no answer after 5 replays")],
        [CapacityError("it does not fit")],
        [KeyError("a bug")],
    ],
)
async def test_a_response_that_cannot_be_answered_fails_once_and_for_all(file: Path, errors: list[Any]) -> None:
    ring = LastingRing(text=SHORT, lost={2: [*errors]})
    async with _service(file, ring) as service, service.client() as client:
        ring.give()
        asked = await client.responses.create(input="Hi", background=True)
        found = await _ended(client, asked.id)
        assert (found.status, found.output_text) == ("failed", "The fo")
    async with _service(file, ring := LastingRing(text=SHORT)) as service, service.client() as client:
        assert (await client.responses.retrieve(asked.id)).model_dump() == found.model_dump()
        assert not ring.asked


async def test_another_model_fails_what_had_not_ended_and_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        asked = await client.responses.create(input="Hi", background=True)
    monkeypatch.setitem(ABOUT, "weights", "int4")
    async with _service(file, ring := LastingRing(text=SHORT)) as service, service.client() as client:
        found = await _ended(client, asked.id)
        assert found.status == "failed" and found.error is not None
        assert "weights is int4, and was int8" in found.error.message
        events = await _events(f"{service.url}/responses/{asked.id}")
        assert [event["sequence_number"] for event in events] == [*range(4)] and not ring.asked


async def test_what_goes_on_keeps_its_place_and_its_key(file: Path) -> None:
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        ids = [(await client.responses.create(input="Hi", background=True)).id for _ in range(2)]
    ring = LastingRing(text=SHORT, max_requests=2)
    async with _service(file, ring, [OTHER_KEY, KEY]) as service, service.client() as client:
        await _until(lambda: ring.num_running == 2)
        assert ring.shares == [(bare_keys([KEY])[0].owner, 1)] * 2
        # The key has another name by now.
        running = {each["name"]: each["running"] for each in service.api.status()["keys"]}
        assert running == {"key1": 0, "key2": 2}
        with pytest.raises(openai.RateLimitError):
            await client.responses.create(input="Hi")
        ring.give()
        assert [(await _ended(client, each)).output_text for each in ids] == [SHORT] * 2
        await client.responses.create(input="Hi")
    async with _service(file, LastingRing(text=SHORT), [OTHER_KEY]) as service, service.client(OTHER_KEY) as other:
        with pytest.raises(openai.NotFoundError):
            await other.responses.retrieve(ids[0])


async def test_a_key_that_is_gone_is_answered_to_the_end_and_nobody_else_sees_it(file: Path) -> None:
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        asked = await client.responses.create(input="Hi", background=True)
    async with _service(file, ring := LastingRing(text=SHORT), [OTHER_KEY]) as service:
        ring.give()
        await _until(lambda: len(ring.computed) == 7 and not ring.num_running)
        async with service.client(OTHER_KEY) as other:
            with pytest.raises(openai.NotFoundError):
                await other.responses.retrieve(asked.id)
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        assert (await client.responses.retrieve(asked.id)).output_text == SHORT


async def test_a_conversation_goes_on_from_a_response_of_before(file: Path) -> None:
    async with _service(file, LastingRing(text=TWO_CALLS)) as service, service.client() as client:
        service.ring.give()
        asked = await client.responses.create(input="Hi", background=True, tools=TOOLS)
        ended = await _ended(client, asked.id)
    async with _service(file, ring := LastingRing(text=SHORT)) as service, service.client() as client:
        told: list[Any] = []
        ring.chat_ids = lambda messages, *_, **__: told.append(messages) or [1, 2]  # type: ignore[func-returns-value,method-assign]
        ring.give()
        calls = [item for item in ended.output if item.type == "function_call"]
        results: list[Any] = [
            {"type": "function_call_output", "call_id": call.call_id, "output": "1"} for call in calls
        ]
        await client.responses.create(input=results, previous_response_id=asked.id, tools=TOOLS)
        items = [item.type async for item in client.responses.input_items.list(asked.id)]
    assert items == ["message"]
    assert [message["role"] for message in told[0]] == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in told[0][1]["tool_calls"]] == [call.call_id for call in calls]


async def test_a_client_that_leaves_before_it_knows_the_id_leaves_nothing_that_goes_on(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, goes_on, write = asyncio.Event(), asyncio.Event(), ServiceJournal.write

    async def held(journal: ServiceJournal, *, with_tokens: bool = False) -> None:
        entered.set()
        await goes_on.wait()
        await write(journal, with_tokens=with_tokens)

    monkeypatch.setattr(ServiceJournal, "write", held)
    async with _service(file, LastingRing(text=SHORT)) as service, service.client() as client:
        creating = asyncio.create_task(client.responses.create(input="Hi", background=True))
        await entered.wait()
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        await asyncio.sleep(0.05)
        goes_on.set()
    async with _service(file, ring := LastingRing(text=SHORT)) as service:
        await asyncio.sleep(0.05)
        assert not ring.asked


@pytest.mark.parametrize("fails", [False, True])
async def test_a_response_that_is_cancelled_again_while_its_end_is_being_written_ends(
    file: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    goes_on = _writes_that_wait(monkeypatch)
    lost: dict[int, list[MdiqError]] = {1: [CapacityError("it does not fit")]} if fails else {}
    async with _service(file, LastingRing(text=SHORT, lost=lost)) as service, service.client() as client:
        asked = await client.responses.create(input="Hi", background=True)
        service.ring.give(1)
        await _until(lambda: len(service.ring.computed) == 1)
        goes_on.clear()
        if fails:
            service.ring.give(1)
            await _until(lambda: not service.ring.num_running)
        first, second = (asyncio.create_task(client.responses.cancel(asked.id)) for _ in range(2))
        await asyncio.sleep(0.05)
        goes_on.set()
        assert [(await each).status for each in (first, second)] == ["cancelled"] * 2
        events = await asyncio.wait_for(_events(f"{service.url}/responses/{asked.id}"), 5)
        assert events[-1]["response"]["status"] == "cancelled"
    async with _service(file, ring := LastingRing(text=SHORT)) as service, service.client() as client:
        assert (await client.responses.retrieve(asked.id)).status == "cancelled"
        assert not ring.asked
