"""Keeps a Ring up: forms it, serves Sequences on it, and forms it again when a Node is lost or the operator says so.

What it tells an operator meanwhile is in ring_status.py.

surveying ──all Nodes measured──▶ forming
forming ──all Nodes loaded──▶ serving ──a Node is lost──▶ forming
                                 ├──reload, drain──▶ draining ──nothing runs──▶ forming
                                 └──there is a better plan, and it was idle──▶ forming
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any, NoReturn

import structlog

from mdiq.core.sequence import Sequence
from mdiq.errors import ConfigError, GaveWayError, MdiqError, PlanError, RingError
from mdiq.runtime.loops import Clock, is_first
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_status import KeeperState as KeeperState
from mdiq.runtime.ring_status import KeptRing, Requests, RingView, Turns, names_of, serves_text
from mdiq.runtime.starter_service import StreamEvent
from mdiq.runtime.takeover import is_same_but_members, members_of, nodes_of

log = structlog.get_logger()

RETRY_S = 5.0
NO_ROOM_RETRY_S = 60.0  # each try has the Nodes measure again
DRAIN_S = 600.0  # how long what runs may hold up a reload
IDLE_S = 60.0  # without a Sequence, before a better plan is taken up

Form = Callable[[frozenset[str]], RingOptions]
"""What a topology says: returns the Ring without the Nodes that are drained.

A survey where Nodes are to be measured first; it is asked again after that. Raises ConfigError when there can be
none, and PlanError when the model does not fit.
"""
OnLoading = Callable[[str, int, int], None]


class RingKeeper:
    """One Ring after the other.

    read: reads the topology; called at the start and at a reload. Raises ConfigError.
    open_ring: gives a Ring that is not entered yet.
    on_state: told at every change. on_formed: awaited with every Ring that is formed, before it serves. on_not_formed:
    called with a Ring that could not be formed, and why; the topology is asked for the next one after it.
    on_not_changed: called with the better one that a Ring could not become; it is not asked to again.
    """

    def __init__(
        self,
        read: Callable[[], Form],
        open_ring: Callable[[RingOptions, OnLoading], KeptRing],
        *,
        clock: Clock = time.monotonic,
        on_state: Callable[[KeeperState], None] = lambda _: None,
        on_formed: Callable[[Any], Awaitable[None]] | None = None,
        on_not_formed: Callable[[RingOptions, MdiqError], None] = lambda *_: None,
        on_not_changed: Callable[[RingOptions], None] = lambda _: None,
    ) -> None:
        self._on_formed, self._on_not_formed, self._on_not_changed = on_formed, on_not_formed, on_not_changed
        self._read, self._open_ring = read, open_ring
        self._clock, self._on_state = clock, on_state
        self._form, self._drained = read(), frozenset[str]()
        self._wanted = self._form(self._drained)  # of the next Ring
        self._now = RingView(self._wanted)
        self._has_plan = True  # else the last one failed, and there is no better one
        self._is_ending = self._holds_back = False  # holds back: a change waits until nothing runs
        self._renew, self._is_better = asyncio.Event(), asyncio.Event()  # better: the plan, by what the Ring does
        self._changing, self._closed = Turns(lambda: self._now.give_way()), asyncio.Event()
        self._closed.set()
        self._requests, self._num_rings = Requests(), 0
        self._context_tokens: int | None = None
        self.last_error: str | None = None
        self._state = KeeperState(False, "starts")

    @property
    def state(self) -> KeeperState:
        """Whether the Ring serves now: not while a Node of it is gone or silent, or a Hop of it carries nothing."""
        if paused := self._now.paused():
            return KeeperState(False, paused)
        if self._state.is_serving and (degraded := self._now.degraded()):
            return KeeperState(False, degraded)
        if self._state.is_serving:  # by now other Nodes may have taken over
            return KeeperState(True, serves_text(self._now.options))
        return self._state

    @property
    def takes_requests(self) -> bool:
        """Whether ``stream`` takes a Sequence. In a pause it waits for the Ring to go on, as those that run do."""
        return self._state.is_serving

    @property
    def formed(self) -> KeptRing | None:
        """The Ring, if it is formed."""
        return self._now.formed

    @property
    def wanted(self) -> RingOptions:
        """What the Ring is to be: what it is, unless a better plan waits, or Nodes stand in for others."""
        return self._wanted

    @property
    def num_running(self) -> int:
        """Sequences that are not finished."""
        return self._requests.num_running

    @property
    def max_live(self) -> int:
        """Sequences that the Ring takes in at once; the others wait for their turn."""
        return 1 if self._now.formed is None else self._now.formed.pace().max_live

    async def run(self) -> NoReturn:
        """Keep a Ring up until cancelled."""
        while True:
            self._renew.clear()
            try:
                if not self._has_plan:
                    self._plan()
                await self._one_ring()
            except MdiqError as error:
                self.last_error = str(error)
                log.error("ring_failed", error=str(error))
                self._say(f"the ring failed: {error}")
                await self._pause(NO_ROOM_RETRY_S if isinstance(error, PlanError) else RETRY_S)

    async def stream(self, sequence: Sequence) -> AsyncGenerator[StreamEvent, None]:
        """Run a Sequence; see StarterService.stream.

        Raises:
            RingError: there is no Ring that takes it.
        """
        ring = self._now.ring
        if ring is None or not self.takes_requests:
            raise RingError(f"the ring does not serve: {self.state.text}; ask again in a while")
        self._requests.begun()
        is_done = False
        error: Exception | None = None
        events = ring.stream(sequence)
        try:
            async for event in events:
                is_done = event.step.finish_reason is not None
                error = event.step.error
                if error is not None and self._is_ending:
                    raise RingError("the service ends; ask again in a while")
                yield event
        except MdiqError as raised:
            error = raised
            raise
        finally:
            await events.aclose()  # leaving it cancels the Sequence
            self._requests.ended(error, is_done=is_done)

    async def drain_node(self, name: str, *, undo: bool = False) -> str:
        """Take a Node out of the Ring, or let it in again; return what was done. What runs goes on without it.

        Raises:
            ConfigError: there can be no Ring without it.
        """
        async with self._changing:
            drained = self._drained - {name} if undo else self._drained | {name}
            if drained == self._drained:
                return f"{name}: it {'is not' if undo else 'is already'} drained"
            options = self._form(drained)
            await self._change(options, drained, f"{'lets in' if undo else 'drains'} {name}")
            done = "back in the ring" if undo else "drained"
            return f"{name}: {self._now.changed_text(options, f'{done}; ', f'not {done} yet; ')}"

    async def reload(self) -> str:
        """Read the topology again; return what was done. A Node that is not in it any more is cut off at once.

        Raises:
            ConfigError: it cannot be used; nothing has changed.
        """
        async with self._changing:
            form = self._read()
            options = form(self._drained)
            self._form = form
            if options == self._wanted:
                waits = "" if self._wanted == self._now.options else "; a better plan is taken up when nothing runs"
                return f"nothing that the ring depends on has changed{waits}"
            now = self._now.options
            revoked = members_of(now) - members_of(options)
            ring, old = self._now.formed, now.remote
            if ring is not None and old is not None:
                if is_same_but_members(options, now):
                    await ring.change(options)
                    self._wanted = options
                    return "the ring goes on; who may join, and with which key, is as the topology says now"
                stay = tuple(node for node in old.standing_by if (node.name, node.public_key) not in revoked)
                if len(stay) < len(old.standing_by):
                    spares = tuple(node for node in old.spares if (node.name, node.public_key) not in revoked)
                    await ring.replace_members(replace(now, remote=replace(old, standing_by=stay, spares=spares)))
            is_cut = bool(revoked & nodes_of(now))
            await self._change(options, self._drained, "reloads", at_once=is_cut)
            return self._now.changed_text(options)

    def plan_again(self) -> None:
        """Ask the topology for a better Ring, and have it at once if what runs goes on; else when nothing runs."""
        with contextlib.suppress(MdiqError):  # the Ring goes on
            self._plan()
            self._is_better.set()

    async def finish(self) -> None:
        """Take no more Sequences, and wait until those that run are done."""
        self._is_ending = True
        self._say("ends")
        await self._requests.quiet.wait()

    def describe(self) -> str:
        """Return the state in words, those of a start newly made: they change without an event."""
        return self._now.starting() or self.state.text

    @property
    def context_tokens(self) -> int | None:
        """Most tokens of one Sequence, as the newest Ring holds them; None before the first."""
        if self._now.formed is not None:
            self._context_tokens = self._now.formed.context_tokens
        return self._context_tokens

    def has_work(self) -> bool:
        """Tell whether anything is computed or waits to be; for a watchdog."""
        return self._now.ring is not None and self._now.ring.worker.has_work

    def last_progress_s(self) -> float:
        """Return when a job last ended; for a watchdog."""
        return 0.0 if self._now.ring is None else self._now.ring.worker.last_progress_s

    def status(self) -> dict[str, Any]:
        """Return what `mdiq status --json` shows."""
        return {
            "is_serving": self.state.is_serving,
            "state": self.describe(),
            **self._now.about_plan(self._clock()),
            "requests": {"waiting": self._now.num_waiting, **self._requests.counts()},
            "rings_formed": self._num_rings,
            "last_error": self.last_error,
            **self._now.about_ring(self._clock()),
        }

    def _plan(self) -> None:
        """Ask the topology for the next Ring."""
        self._wanted = self._form(self._drained)
        self._has_plan = True

    async def _one_ring(self) -> None:
        """Form a Ring and serve on it until it is to be renewed; raise why when it is lost."""
        options = self._wanted
        ring = self._open_ring(options, self._note_loading)
        self._now = now = RingView(options, ring)
        self._closed.clear()
        self._say(self.describe())
        renewing = asyncio.create_task(self._renew.wait(), name="renew")
        entering = asyncio.create_task(ring.__aenter__(), name="form")
        tasks: list[asyncio.Task[Any]] = [renewing, entering]
        try:
            await asyncio.wait({entering, renewing}, return_when=asyncio.FIRST_COMPLETED)
            if not entering.done():
                return
            if (error := entering.exception()) is not None:
                if isinstance(error, MdiqError) and not self._renew.is_set():
                    self._on_not_formed(options, error)
                    self._has_plan = False
                    self._plan()  # with what there is to learn from it
                raise error
            now.is_formed = not options.is_survey
            if self._on_formed is not None:
                await self._on_formed(ring)
            if not self._renew.is_set():
                self._wanted = self._form(self._drained)  # with what it has measured
            if options.is_survey:
                return
            self._num_rings += 1
            now.serving_since_s = self._clock()
            self.last_error = None
            tasks.append(losing := asyncio.create_task(ring.until_lost(), name="lost"))
            log.info("ring_formed", nodes=names_of(now.options))
            self._say_that_it_serves()
            tasks.append(asyncio.create_task(self._until_left(ring), name="leaving"))
            tasks.append(asyncio.create_task(self._until_better_plan(ring), name="better plan"))
            done, _ = await asyncio.wait({*tasks} - {entering}, return_when=asyncio.FIRST_COMPLETED)
            if losing.done():
                raise losing.result()
            for task in done:  # one that has failed says why the Ring ends
                task.result()
            ring.service.fail_all(RingError("the ring is formed anew; ask again"))
        finally:
            closing = asyncio.create_task(self._close(ring, tasks), name="close the ring")
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:  # a service that is to stop while it closes a Ring stops after that
                await asyncio.wait({closing})
                raise

    async def _close(self, ring: KeptRing, tasks: list[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._now = RingView(self._now.options)
        self._say("ends" if self._is_ending else "forms the ring anew")
        await ring.aclose()
        self._closed.set()

    async def _change(self, options: RingOptions, drained: frozenset[str], what: str, *, at_once: bool = False) -> None:
        """Have the Ring serve as another one, without a break if it can be; else form it anew when nothing runs.

        at_once: do not wait for that.
        """
        if (ring := self._now.formed) is not None and ring.can_change_to(options):
            log.info("ring_changes", what=what)
            before = self._wanted, self._drained, self._has_plan
            self._wanted, self._drained, self._has_plan = options, drained, True  # also if the Ring is lost by this
            try:
                await ring.change(options)
            except ConfigError:
                self._wanted, self._drained, self._has_plan = before
                with contextlib.suppress(MdiqError):
                    self._form(self._drained)  # it plans without the drained ones that it was asked for last
                raise
            self._say_that_it_serves()
            return
        self._holds_back = True
        self._say(what)
        try:
            if not at_once:
                async with asyncio.timeout(DRAIN_S):
                    await self._requests.quiet.wait()
        except TimeoutError:
            log.warning("drain_cut_short", running=self._requests.num_running)
        finally:
            self._holds_back = False
        self._wanted, self._drained, self._has_plan = options, drained, True
        self._renew.set()
        await self._closed.wait()

    async def _until_left(self, ring: KeptRing) -> None:
        """Wait until a Node asks to be drained that the Ring cannot go on without, and nothing runs any more.

        It ends with the Ring then, unless it is started again before that, and goes on with what it had.
        """
        while True:
            name = await ring.until_leaving()
            if await ring.go_without(name):
                self._say_that_it_serves()
                continue
            log.info("node_leaves", node=name, running=self._requests.num_running)
            if not self._is_ending:
                self._say(f"{name} leaves when what runs is done")
            if await is_first(self._requests.quiet.wait(), ring.until_staying()):
                return
            self._say_that_it_serves()

    async def _until_better_plan(self, ring: KeptRing) -> None:
        """Take up better plans, see ``plan_again``; return if the Ring has to be formed anew for one."""
        tried: RingOptions | None = None  # it becomes this one when all Nodes are here, or it cannot
        while True:
            if self._wanted in (ring.options, tried):
                self._is_better.clear()
                await self._is_better.wait()
            if not (self._is_better.is_set() and ring.can_change_to(self._wanted)):
                self._is_better.clear()
                if not await is_first(self._requests.until_idle(IDLE_S), self._is_better.wait()):
                    continue
            async with self._changing.lock:
                tried = wanted = self._wanted
                if wanted == ring.options:  # it has changed meanwhile
                    continue
                if not ring.can_change_to(wanted):
                    return
                try:
                    await ring.change(wanted)
                except MdiqError as error:  # the Ring has logged it, and goes on, unless it is lost
                    if isinstance(error, ConfigError) and not isinstance(error, GaveWayError):
                        self._on_not_changed(wanted)
                    with contextlib.suppress(MdiqError):
                        self._plan()
                self._say_that_it_serves()

    async def _pause(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._renew.wait()

    def _note_loading(self, node: str, done: int, total: int) -> None:
        self._now.loading[node] = done, total
        if not self._now.is_formed:
            self._say(self.describe())

    def _say_that_it_serves(self) -> None:
        if not self._is_ending and not self._holds_back:
            self._say(serves_text(self._now.options), is_serving=True)

    def _say(self, text: str, *, is_serving: bool = False) -> None:
        self._state = KeeperState(is_serving, text)
        self._on_state(self._state)
