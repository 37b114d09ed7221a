"""One request for an answer, over all servers that have a part in it.

A server that refuses it for the moment is passed over. One that breaks off is followed by another: from the beginning
as long as the client has nothing of the answer, else from where the client is, if both give the same tokens; see
splice.py. A request that a server had taken waits for one that takes it; any other is refused at once.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import structlog
from aiohttp import ClientResponse, web

from mdiq.api.audit import RECORD
from mdiq.api.requests import ApiError
from mdiq.api.streams import HEADERS, SILENCE_S
from mdiq.route.asked import BYTES_PER_TOKEN, Asked
from mdiq.route.choice import Wanted
from mdiq.route.events import Event, EventReader, StreamError, counts_of, reason_of
from mdiq.route.links import BrokenError, Link, is_stream
from mdiq.route.pool import Pool
from mdiq.route.prefixes import BLOCK_BYTES
from mdiq.route.splice import DiffersError, Splice
from mdiq.route.stored import Stored

log = structlog.get_logger()

MAX_BREAKS = 3
"""Servers that break off one request: it may be what ends them."""
AGAIN_S = 1.0
"""Between two rounds of a request that waits for a server."""
PROXY_STATUSES = (502, 504)
"""Of a proxy before a server which that does not reach; mdiq serve has none of them."""
PASSED = ("Retry-After", "x-should-retry")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A server's answer that is no answer. retry_s: when it may be asked again."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def retry_s(self) -> int:
        """Seconds, 0 if it does not say."""
        text = self.headers.get("Retry-After", "")
        return int(text) if text.isdecimal() and len(text) < 6 else 0

    @property
    def error(self) -> Mapping[str, Any]:
        """The object that says why."""
        with suppress(ValueError, RecursionError):
            error = json.loads(self.body).get("error")
            if isinstance(error, dict):
                return error
        return {}

    @property
    def reason(self) -> str:
        """See ApiError.reason; a server that gets its clients' own keys refuses for their limits too."""
        error = self.error
        if self.status == 429 and str(error.get("message")).startswith("this key"):
            return "key_limit"
        return ApiError(self.status, "", code=error.get("code")).reason

    def response(self) -> web.Response:
        """Return it as the answer to the client."""
        response = web.Response(
            status=self.status, body=self.body, content_type="application/json", headers=dict(self.headers)
        )
        if self.status in (429, 503):
            response.force_close()
        return response


class Run:
    """See above."""

    def __init__(self, pool: Pool, stored: Stored, request: web.Request, asked: Asked) -> None:
        self._pool, self._stored, self._request, self._asked = pool, stored, request, asked
        self._record = request[RECORD]
        self._splice = Splice(asked.dialect())
        self._dialect = asked.dialect()
        self._out = web.StreamResponse(headers=HEADERS)
        depths = pool.prefixes.depths(asked.chain)
        self._wanted = Wanted(asked.model, asked.num_tokens, BLOCK_BYTES // BYTES_PER_TOKEN, depths)
        self._tried: set[str] = set()
        self._servers: list[str] = []
        self._refusal: Refusal | None = None
        self._broken: BrokenError | None = None
        self._num_breaks = 0
        self._mark: str | None = None  # of the first server that sent something, with its room
        self._room = 0
        self._until_s = self._kept_open_s = 0.0
        self._held: list[Event] = []
        self._is_counted = False
        self._num_before = 0  # events that the client had when this server was asked

    async def answer(self) -> web.StreamResponse:
        """Return the answer, sent or to be sent.

        Raises:
            ApiError: no server takes the request.
        """
        try:
            return await self._answer()
        except ApiError as error:
            if not self._out.prepared:
                raise
            return await self._give_up(str(error))
        finally:
            self._record.more["servers"] = self._servers
            if not self._is_counted and (num_events := self._splice.num_events):  # its client has not waited for them
                is_told = self._stored.left(self._asked, self._request, self._splice)
                self._note_usage((0, num_events), is_told=is_told)

    async def _answer(self) -> web.StreamResponse:
        while True:
            link = self._pool.choose(self._now_wanted(), self._tried)
            if link is None:
                if self._broken is None:
                    return self._refused()
                if not await self._may_wait():
                    return await self._give_up(str(self._broken))
                continue
            try:
                answer = await self._attempt(link)
            except BrokenError as error:
                self._note_break(link, error)
                if self._num_breaks >= MAX_BREAKS or (self._splice.num_events and not self._can_go_on()):
                    return await self._give_up(str(error))
            except DiffersError as error:
                self._count(link, "broke")
                return await self._give_up(f"{link.server.name} cannot go on with it: {error}")
            else:
                if answer is not None and self._out.prepared and answer is not self._out:
                    # A comment of an earlier server is out: a second answer in that one would be no HTTP.
                    return await self._give_up(f"{link.server.name} answers {answer.status}")
                if answer is not None:
                    return answer

    def _now_wanted(self) -> Wanted:
        wanted = replace(self._wanted, only=self._stored.only(self._asked, self._request))
        if not self._splice.num_events:
            return wanted
        return replace(wanted, same_tokens=self._mark, min_context_tokens=self._room)

    def _can_go_on(self) -> bool:
        return self._asked.is_repeatable and self._mark is not None and self._splice.can_go_on

    async def _attempt(self, link: Link) -> web.StreamResponse | None:
        """Ask a server. None: it has refused the request, which may be asked elsewhere."""
        asked, server = self._asked, link.server
        self._servers = [*self._servers[-9:], server.name]
        self._tried.add(server.name)
        if self._wanted.blocks.get(server.name):
            self._pool.figures.prefix_hits.inc()
        server.num_running += asked.num_prompts
        server.num_tokens += asked.num_tokens
        server.num_begun += asked.num_prompts
        outcome = "left"
        try:
            data = await self._stored.data_for(link, asked, self._request)
            headers = self._stored.headers(link, self._request)
            async with link.ask("POST", asked.path, data=data, headers=headers) as response:
                if response.status in PROXY_STATUSES:
                    raise BrokenError(f"{server.name}: what stands before it answers {response.status}")
                if response.status != 200:
                    outcome = "refused"
                    return self._not_now(link, await self._refusal_of(link, response))
                self._record.has_run = asked.is_answer
                self._pool.prefixes.note(asked.chain, server.name)
                if is_stream(response):
                    answer: web.StreamResponse = await self._stream(link, response)
                else:
                    answer = await self._whole(link, response)
                outcome = "done"
                return answer
        except (BrokenError, DiffersError):
            outcome = ""  # who catches it counts it
            raise
        finally:
            server.num_running -= asked.num_prompts
            server.num_tokens -= asked.num_tokens
            if outcome:
                self._count(link, outcome)

    def _count(self, link: Link, outcome: str) -> None:
        self._pool.figures.requests.labels(link.server.name, outcome).inc()

    # Answers

    async def _whole(self, link: Link, response: ClientResponse) -> web.Response:
        body = await self._pool.whole(link, response)
        self._note_first()
        self._note_failover("again")
        if body[:1] == b"{":
            value = await asyncio.to_thread(_loaded, body) if len(body) > 1 << 16 else _loaded(body)
            usage, self._record.finish_reason = value.get("usage"), reason_of(value)
            for names in (("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens")):
                if (counts := counts_of(usage, *names)) is not None:
                    self._note_usage(counts)
            if self._asked.is_stored:
                body = self._stored.made(link, self._asked, self._request, value) or body
        return self._pool.held(web.Response(body=body, content_type="application/json"), len(body))

    async def _stream(self, link: Link, response: ClientResponse) -> web.StreamResponse:
        reader = EventReader()
        self._splice.begin()
        self._held = []
        self._num_before = self._splice.num_events
        if not self._num_before and (report := link.server.report) is not None:
            self._mark, self._room = report.same_tokens, report.context_tokens
        try:
            async for data in link.chunks(response):
                for event in reader.push(data):
                    if await self._event(link, event):
                        await self._out.write_eof()
                        return self._out
        except StreamError as error:
            raise BrokenError(f"{link.server.name}: {error}") from None
        raise BrokenError(f"{link.server.name}: its answer broke off")

    async def _event(self, link: Link, event: Event) -> bool:
        """Pass an event on; return whether it is the last one."""
        if event.is_comment:
            await self._write(event.raw)
            return False
        if event.value is not None and (why := self._dialect.failure(event.value)) is not None:
            raise BrokenError(f"{link.server.name}: {why}", event=event.raw)
        if event.value is not None and self._dialect.is_closing(event.value):
            self._held.append(event)
            return False
        held, self._held = self._held, []
        for each in held:
            await self._pass(link, each)
        return await self._pass(link, event)

    async def _pass(self, link: Link, event: Event) -> bool:
        if not self._out.prepared:
            await self._out.prepare(self._request)  # before the event is noted as sent
        before = self._splice.num_events
        data = self._splice.take(event)
        is_last = self._dialect.ends(event)
        if self._asked.is_stored and event.value is not None:
            self._stored.streamed(link, self._asked, self._request, event.value, self._splice)
        if data is None:
            return is_last
        if event.value is not None:
            if before == 0:
                self._note_first()
            if before == self._num_before:
                self._note_failover("went_on" if before else "again")
            if (reason := reason_of(event.value)) != "none":
                self._record.finish_reason = reason
            if (counts := self._dialect.usage(event.value)) is not None:
                self._note_usage(counts)
            is_count = event.value.get("choices") == [] and "usage" in event.value
            if is_count and not self._asked.wants_usage:
                return is_last
            is_last = is_last or isinstance(event.value.get("error"), dict)
        await self._out.write(data)
        return is_last

    async def _write(self, data: bytes) -> None:
        if not self._out.prepared:
            await self._out.prepare(self._request)
        await self._out.write(data)

    def _note_failover(self, result: str) -> None:
        if self._broken is not None:
            self._pool.figures.failovers.labels(result).inc()

    def _note_first(self) -> None:
        self._pool.figures.first_s.observe(time.monotonic() - self._record.begun_s)

    def _note_usage(self, counts: tuple[int, int], *, is_told: bool = False) -> None:
        record, now, self._is_counted = self._record, time.monotonic(), True
        record.num_prompt, record.num_answer = counts
        if record.client is not None and not is_told:
            record.client.told(*counts, now)

    # What is no answer

    async def _refusal_of(self, link: Link, response: ClientResponse) -> Refusal:
        headers = {name: response.headers[name] for name in PASSED if name in response.headers}
        refusal = Refusal(response.status, await link.short(response), headers)
        if refusal.error:
            return refusal
        error = ApiError(response.status, f"{link.server.name} answers {response.status} without a reason")
        return replace(refusal, body=json.dumps({"error": error.body}).encode())

    def _not_now(self, link: Link, refusal: Refusal) -> web.StreamResponse | None:
        """Return a refusal that another server would give too; note any other."""
        error, status = refusal.error, refusal.status
        is_ours = status in (401, 403) and not link.passes_keys
        if is_ours:
            link.look_soon()
            refusal = replace(refusal, status=503, body=_unusable(link))
        is_unknown = error.get("code") == "previous_response_not_found"
        if is_unknown and self._stored.is_lost(link, self._asked, self._request):
            self._tried.discard(link.server.name)  # it can be made again, there too
            return None
        # A response that the router does not know may be another server's.
        is_elsewhere = is_unknown or error.get("code") == "model_not_found"
        is_short = error.get("code") == "context_length_exceeded" and link.server.report is not None
        if is_short and link.server.report is not None:
            self._wanted = replace(self._wanted, min_context_tokens=link.server.report.context_tokens + 1)
        if not (status in (429, 503) or is_ours or is_elsewhere or is_short) and not self._splice.num_events:
            return self._passed_on(refusal)
        known = self._refusal
        is_better = known is None or (known.status in (429, 503) and 0 < refusal.retry_s < (known.retry_s or 1 << 20))
        self._refusal = refusal if is_better or is_short else known
        return None

    def _refused(self) -> web.StreamResponse:
        if self._refusal is not None:
            return self._passed_on(self._refusal)
        raise self._pool.nobody()

    def _passed_on(self, refusal: Refusal) -> web.StreamResponse:
        if refusal.status < 500 or refusal.status == 503:
            self._pool.figures.refused.labels(refusal.reason).inc()
        return refusal.response()

    def _note_break(self, link: Link, error: BrokenError) -> None:
        self._broken = error
        self._count(link, "broke")
        link.look_soon()
        if not error.is_refused:
            self._num_breaks += 1
        if not self._until_s:
            self._until_s = time.monotonic() + self._pool.outage_tolerance_s
        log.warning(
            "request_broken_off",
            request_id=self._record.request_id,
            server=link.server.name,
            why=str(error),
            events=self._splice.num_events,
        )

    async def _may_wait(self) -> bool:
        """Wait until a server may take the request; return False when it has waited for long enough."""
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            return False
        await self._pool.news(min(AGAIN_S, left_s))
        self._tried.clear()
        if self._out.prepared and time.monotonic() - self._kept_open_s >= SILENCE_S:
            self._kept_open_s = time.monotonic()
            await self._out.write(b": keep-alive\n\n")
        return True

    async def _give_up(self, why: str) -> web.StreamResponse:
        """End the answer with what has gone wrong."""
        self._pool.figures.failovers.labels("in_vain").inc()
        text = f"the answer broke off, and no other server goes on with it: {why}; ask again"
        if not self._out.prepared:
            raise ApiError(503, text)
        is_first = self._num_breaks == 1 and self._broken is not None and len(self._servers) == 1
        event = self._broken.event if is_first and self._broken is not None else b""
        for held in self._held if event else ():
            await self._out.write(held.raw)
        await self._out.write(event or self._dialect.error(text, self._splice.num_events))
        await self._out.write_eof()
        return self._out


def _loaded(body: bytes) -> Mapping[str, Any]:
    with suppress(ValueError, RecursionError):
        value = json.loads(body)
        if isinstance(value, dict):
            return value
    return {}


def _unusable(link: Link) -> bytes:
    text = f"{link.server.name} refuses the key that this router sends; its operator must see to that"
    return json.dumps({"error": ApiError(503, text).body}).encode()
