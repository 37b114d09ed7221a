"""Have a Ring go on when a Node is lost, as it was or as another Ring: pause, load, begin the next Epoch, replay.

serving ──a Node is gone──▶ paused ──all are back, or others can──▶ loading ──all have loaded──▶ beginning ──▶ serving
                              ▲                                       │                            │
                              ├────────────a Node is gone─────────────┴────────────────────────────┘
                              └──nobody can within Outages.tolerance_s, or gone too often──▶ given up

Each attempt has Epochs of its own: what is still under way from the one before is stale wherever it arrives. Streams
stay open all the while, and each Sequence goes on after the tokens that its caller has.

Which Ring it is then:

- the same one, if the Nodes that are gone come back first, or the one that was planned, if its Nodes are all here;
- a spare has the Layers of each Node that is gone, at once, if one stands by;
- the Nodes before and after it have them, if their memory holds them: at once when its process has ended and they have
  the Layers on their disks or can fetch them quickly; else when it has not come back. A Node that is only silent may
  have lost its link, and has its Layers still. Where Hops round, other cuts give other tokens: that comes last, too.

A Ring that has gone on without a Node takes it in again when it has been back for a while.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf

import structlog

from mdiq.errors import ConfigError, CrampedError, GaveWayError, MdiqError, NodeDiedError, RingError
from mdiq.runtime.changing_ring import ChangingRing
from mdiq.runtime.fetch_ahead import FetchAhead
from mdiq.runtime.loops import loop_failed
from mdiq.runtime.losses import Losses
from mdiq.runtime.options import RingOptions
from mdiq.runtime.recovery_times import RecoveryTimes
from mdiq.runtime.starter_service import StarterService
from mdiq.runtime.takeover import is_same_but_members, members_of, nodes_of, rekeyed, with_members_of, with_newcomers
from mdiq.runtime.workers import Workers

log = structlog.get_logger()

QUICK_FETCH_S = 5.0
"""Of survivors: about what a service manager takes until a Node whose process has ended is back."""
RETURN_S = 5.0
"""How long a Node has been back before the Ring takes it in again; twice as long after each time that it did."""
MAX_RETURN_S = 600.0
STEADY_S = 1800.0
"""A Ring that has lost nothing for so long is no longer one whose Nodes come and go."""
MAX_TIMES = 20


class Recovery:
    """Brings one Ring back, as often as it is needed.

    tolerance_s: how long it waits for the Nodes that are gone. give_up: called with the reason when it cannot.
    times: of the newest pauses. planned: the Ring to which it returns.
    """

    def __init__(
        self,
        ring: ChangingRing,
        workers: Workers,
        service: StarterService,
        ahead: FetchAhead,
        *,
        tolerance_s: float,
        give_up: Callable[[MdiqError], None],
    ) -> None:
        self._ring = ring
        self._workers = workers
        self._service = service
        self._ahead = ahead
        self._tolerance_s = tolerance_s
        self._give_up = give_up
        self.planned = self._served = ring.options  # which served last
        self._barred: set[tuple[str, str | None]] = set()  # Nodes and keys that may not be in the Ring again
        self._return_s, self._lost_at_s = RETURN_S, -inf
        self._losses = Losses()
        self.times: deque[RecoveryTimes] = deque(maxlen=MAX_TIMES)
        self._turn = asyncio.Lock()  # one change at a time
        self._is_working = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._returning: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def is_running(self) -> bool:
        """Whether the Ring is paused."""
        return self._service.ring.is_paused

    def takes_on(self, error: MdiqError) -> bool:
        """Recover from the loss of a Node, if that can be; return whether it is so.

        A Node that cannot do what another Ring wants of it, for whatever reason, is no end of the one that served. One
        that says that it failed is lost like one that dies.
        """
        names, has_failed = self._ring.options.node_names, not isinstance(error, NodeDiedError)
        is_unfit = self._is_working and self._ring.options != self._served and has_failed
        is_loss = not has_failed or is_unfit or error.node in names[1:]
        if self._is_closed or not is_loss or not self._workers.can_come_back or not self._tolerance_s:
            return False
        if is_unfit:
            self._losses.note_unfit(error, names)
        elif has_failed and error.node is not None and self._losses.is_again(error.node):
            self._losses.broken.add(error.node)
        now_s = asyncio.get_running_loop().time()
        if now_s - self._lost_at_s > STEADY_S:
            self._return_s = RETURN_S
        self._lost_at_s = now_s
        too_many = self._losses.add(error)
        self._service.pause()
        if too_many is not None:
            self._give_up(too_many)
        elif not self._is_working and len(self._losses) == 1:
            self._start(partial(asyncio.sleep, 0))  # a recovery is what comes before any work
        return True

    async def change(self, options: RingOptions) -> None:
        """Have another Ring serve from now on, or when its Nodes are all here; what runs goes on there.

        Raises:
            ConfigError: it cannot, and goes on as it was.
            MdiqError: it has given up.
        """
        before = self.planned, self._barred
        self.planned = options
        self._barred = (self._barred | members_of(self._served)) - members_of(options)
        cut_off = members_of(self._ring.options) - members_of(options)  # at once, whatever has to be fetched
        if rekeyed(self._served, options):
            self._served = with_members_of(self._served, options)
        if is_same_but_members(options, self._ring.options):
            await self.replace_members(options)
            return
        is_as_planned = is_same_but_members(options, before[0])
        if is_as_planned and self._is_other_text(options):  # it returns to it when nothing runs
            await self.replace_members(with_newcomers(self._ring.options, options))
            return
        if self.is_running:  # what it waits for may be there by this
            await self.replace_members(with_newcomers(self._ring.options, options))
        try:
            if not cut_off:
                await self._ahead.get_ready(options)
        except RingError:
            raise  # it ends, and the next one is as is wanted now
        except MdiqError as error:
            self.planned, self._barred = before
            kind = GaveWayError if isinstance(error, GaveWayError) else ConfigError
            raise kind(f"the ring goes on with {_split_text(self._ring.options)}; {error}") from None
        await _until_done(self._start(partial(self._change_to, lambda: options)))
        if self.planned != options:
            raise ConfigError(f"the ring goes on with {_split_text(self._ring.options)}; see the log for what it lacks")

    async def go_without(self, name: str) -> bool:
        """Have others take over from a Node that wants to leave; return whether they have.

        What was planned stays so, and the Node is taken in again when it is back.
        """

        def without() -> RingOptions | None:
            ring, is_here = self._ring, name in self._ring.options.node_names
            options = ring.taken_over([name]) if is_here and self._workers.leaving == name else None
            return None if options is not None and self._is_other_text(options) else options

        if (options := without()) is not None:
            try:
                await self._ahead.get_ready(options)
            except MdiqError as error:
                log.info("not_without", node=name, error=str(error))
                return False
        await _until_done(self._start(partial(self._change_to, without)))
        return name not in self._ring.options.node_names

    async def replace_members(self, like: RingOptions) -> None:
        """Let in whom another Ring lets in, under its keys; the Nodes of this one stay. It waits for nothing.

        A Node whose key is another one now is lost, until it comes with that one.
        """
        self._served = with_members_of(self._served, like)
        await self._ring.reform(with_members_of(self._ring.options, like))

    async def aclose(self) -> None:
        """End what is done; there is no other."""
        self._is_closed = True
        self._ahead.close()
        tasks = [task for task in (*self._tasks, self._returning) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, work: Callable[[], Awaitable[None]]) -> "asyncio.Task[None]":
        """Do some work when it is its turn; whatever it raises ends the Ring, which may be paused by then."""
        if self._is_closed:
            raise RingError("the ring was closed meanwhile; ask again")
        task = asyncio.create_task(self._in_turn(work), name="recovery")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _in_turn(self, work: Callable[[], Awaitable[None]]) -> None:
        async with self._turn:
            self._is_working = True
            try:
                await self._recover_if_lost()
                await work()
                await self._recover_if_lost()  # of Nodes that were lost while it found that there is nothing to do
            finally:
                self._is_working = False
                self._losses.forget()

    async def _recover_if_lost(self) -> None:
        if self._losses:
            await self._recover()
            self._losses.forget()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._give_up(loop_failed("recovery", error))

    async def _recover(self) -> None:
        """Bring the Ring back.

        Raises:
            MdiqError: it does not come back.
        """
        clock, before, first = asyncio.get_running_loop().time, self._served, self._losses.first
        unheard_s = first.unheard_s if isinstance(first, NodeDiedError) else None
        times = RecoveryTimes(str(first), clock(), unheard_s)
        self.times.append(times)
        log.warning("ring_paused", error=str(first), waits_s=self._tolerance_s)
        while not await self._attempt(times):
            pass
        if self._ring.options != before:
            times.layers = _split_text(self._ring.options)
        # Whoever was told that it waits is told that it does not any more.
        log.warning("ring_goes_on", **times.shown())
        self._note_served()

    async def _attempt(self, times: RecoveryTimes) -> bool:
        """Wait for a Ring that can serve, and begin an Epoch with it; note when there was one, and had loaded.

        False when a Node was lost meanwhile, which may be back already, without its Layers.
        """
        self._service.pause()  # the attempt before may have begun its Epoch
        if self._losses.unfit and self._ring.options != self._served:
            if not self._barred.isdisjoint(members_of(self._served)):
                raise self._losses.last  # a Node that was cut off is not let in again for that
            await self._ring.reform(self._served)  # it held what runs
        options = await self._ring_that_can()
        times.back_s = asyncio.get_running_loop().time()
        return await self._go_on_as(options, times)

    async def _go_on_as(self, options: RingOptions, times: RecoveryTimes) -> bool:
        """Load, and begin an Epoch; return whether that went well: no Node was lost, and all could."""
        ring, num_losses, clock = self._ring, len(self._losses), asyncio.get_running_loop().time
        try:
            if options != ring.options:
                await ring.reform(options)
            await ring.reload()
            times.loaded_s = clock()
            if ring.options != self._served and not self._losses.has_waited and not ring.holds_what_runs:
                raise CrampedError(f"{_split_text(options)}: too little KV cache for what runs")
            if len(self._losses) == num_losses:
                await ring.begin_again()
                self._service.note_begun(times)
        except MdiqError as error:
            if len(self._losses) == num_losses and not self.takes_on(error):  # nobody has told of it
                raise
        return len(self._losses) == num_losses

    async def _change_to(self, wanted: Callable[[], RingOptions | None]) -> None:
        """Go on as another Ring. wanted: returns it, when it is its turn."""
        ring, options = self._ring, wanted()
        if options is None or options == ring.options:
            return
        if ring.absent(options):
            await self.replace_members(with_newcomers(ring.options, options))
            self._note_served()
            return
        now = asyncio.get_running_loop().time()
        times = RecoveryTimes("a change", now, back_s=now, layers=_split_text(options))
        self._service.pause()
        if await self._go_on_as(options, times):
            self.times.append(times)
            log.info("ring_changed", **times.shown())
        else:
            reason = str(self._losses.last)
            await self._recover()
            if self._losses.unfit:  # it is not tried again
                log.error("ring_not_changed", wanted=_split_text(options), error=reason)
                self.planned = self._ring.options
            self._losses.forget()
        self._note_served()

    def _note_served(self) -> None:
        """Note that the Ring serves as it is now, and have it return to what was planned."""
        self._served = served = self._ring.options
        if rekeyed(served, self.planned):  # a change that waits for its turn has revoked keys of it
            self._served = with_members_of(served, self.planned)
        if not is_same_but_members(self._served, self.planned) and self._returning is None and not self._is_closed:
            self._returning = asyncio.create_task(self._return(), name="return")
            self._returning.add_done_callback(self._returned)

    def _returned(self, task: "asyncio.Task[None]") -> None:
        self._returning = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._give_up(loop_failed("return", error))

    def _can_be_as_planned(self) -> bool:
        """Whether a paused Ring can go on as the one that is planned, which is another one."""
        planned, ring = self.planned, self._ring
        if is_same_but_members(planned, ring.options) or ring.absent(planned):
            return False
        if not self._losses.unfit.isdisjoint(planned.node_names) or (ring.lacks(planned) and not self._cut_off):
            return False
        return not (self._is_other_text(planned) and self._service.ring.num_unfinished)

    @property
    def _cut_off(self) -> list[str]:
        """The Nodes that are in the Ring and may not be any more."""
        return [name for name, key in nodes_of(self._ring.options) if (name, key) in self._barred]

    def _is_other_text(self, options: RingOptions) -> bool:
        """Whether what runs would go on with other tokens in another Ring."""
        return (self._ring.rounds or options.begins_rounding) and options.layers != self._ring.options.layers

    async def _return(self) -> None:
        """Have the Ring as it was planned again, when its Nodes have been back for a while."""
        ring = self._ring
        while not is_same_but_members(ring.options, self.planned):
            absent = ring.absent(self.planned)
            await asyncio.sleep(self._return_s)
            if absent or ring.absent(self.planned) or self.is_running or self._is_working:
                continue
            if self._is_other_text(self.planned) and self._service.ring.num_unfinished:
                continue
            self._return_s = min(2 * self._return_s, MAX_RETURN_S)
            planned = self.planned
            try:
                await self._ahead.get_ready(planned)
            except MdiqError as error:
                log.error("ring_not_changed", wanted=_split_text(planned), error=str(error))
                continue
            await _until_done(self._start(partial(self._change_to, partial(self._if_it_may, planned))))

    def _if_it_may(self, planned: RingOptions) -> RingOptions | None:
        """Return the Ring to return to, unless there is another one by now, or what runs would go on otherwise."""
        is_other_text = self._is_other_text(planned) and self._service.ring.num_unfinished
        return None if is_other_text or planned != self.planned else planned

    async def _ring_that_can(self) -> RingOptions:
        """Return the Ring that is to go on, as soon as there is one; see above.

        Raises:
            MdiqError: there is none.
        """
        try:
            async with asyncio.timeout(self._tolerance_s):
                while missing := self._missing:
                    if self._can_be_as_planned():
                        return self.planned
                    is_any_silent = any(self._losses.is_silent(name) for name in missing)
                    is_any_broken = not self._losses.broken.isdisjoint(missing)
                    max_fetch_s = inf if is_any_broken else None if is_any_silent else QUICK_FETCH_S
                    if (options := self._taken_over(max_fetch_s)) is not None:
                        return options
                    if is_any_broken:  # waiting does not mend that
                        raise self._losses.last
                    await self._workers.until_joined()
            return self._ring.options
        except TimeoutError:
            self._losses.note_waited()
            if (options := self._taken_over(inf)) is None:
                raise self._losses.not_back(self._missing, self._tolerance_s) from None
            return options

    @property
    def _missing(self) -> list[str]:
        """The Nodes that the Ring has to go without, or to wait for."""
        broken = [name for name in self._ring.options.node_names if name in self._losses.broken]
        return [*dict.fromkeys((*self._workers.missing, *self._cut_off, *broken))]

    def _taken_over(self, max_fetch_s: float | None) -> RingOptions | None:
        """Return the Ring without these; where one is cut off, nobody is let in who is not in the planned Ring."""
        options = self._ring.taken_over(self._missing, unfit=self._losses.unfit, max_fetch_s=max_fetch_s)
        return with_newcomers(options, self.planned) if options is not None and self._cut_off else options


async def _until_done(task: "asyncio.Task[None]") -> None:
    """Wait for what goes on also if its caller does not; raise what it raises, or that the Ring was closed."""
    await asyncio.wait({task})
    if task.cancelled():
        raise RingError("the ring was closed meanwhile; ask again")
    task.result()


def _split_text(options: RingOptions) -> str:
    return ", ".join(f"{name} {len(layers)}" for name, layers in zip(options.node_names, options.layers, strict=True))
