"""Have a Ring go on when a Node is lost, as it was or as another Ring: pause, load, begin the next Epoch, replay.

serving ──a Node is gone──▶ paused ──all are back, or others can──▶ loading ──all have loaded──▶ beginning ──▶ serving
                              ▲                                       │                            │
                              ├────────────a Node is gone─────────────┴────────────────────────────┘
                              └──nobody can within Outages.tolerance_s, or gone too often──▶ given up

Each attempt has Epochs of its own: what is still under way from the one before is stale wherever it arrives. Streams
stay open all the while, and each Sequence goes on after the tokens that its caller has.

Which Ring it is then:

- the same one, if the Nodes that are gone come back first;
- a spare has the Layers of each Node that is gone, at once, if one stands by;
- the Nodes before and after it have them, if their memory holds them: at once when its process has ended and they have
  the Layers on their disks or can fetch them quickly; else when it has not come back. A Node that is only silent may
  have lost its link, and has its Layers still. Where Hops round, other cuts give other tokens: that comes last, too.

A Ring that has gone on without a Node takes it in again when it has been back for a while.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from math import inf
from typing import Protocol

import structlog

from mdiq.errors import CapacityError, ConfigError, MdiqError, NodeDiedError, RingError
from mdiq.runtime.loops import loop_failed
from mdiq.runtime.options import RingOptions
from mdiq.runtime.starter_service import StarterService
from mdiq.runtime.takeover import is_same_but_idle, members_of, with_idle_of, with_newcomers
from mdiq.runtime.workers import Workers

log = structlog.get_logger()

MAX_LOSSES = 5
"""In one recovery. A Node that dies each time that it loads would otherwise hold up what runs for ever."""
LOAD_S = 600.0
"""For loading and beginning: a Node that lives and does not answer is no use."""
QUICK_FETCH_S = 5.0
"""Of survivors: about what a service manager takes until a Node whose process has ended is back."""
RETURN_S = 5.0
"""How long a Node has been back before the Ring takes it in again; twice as long after each time that it did."""
MAX_RETURN_S = 600.0


class ChangingRing(Protocol):
    """A Ring that can become another one; RingHost is one.

    options: what it is now.
    """

    @property
    def options(self) -> RingOptions: ...
    def absent(self, options: RingOptions) -> set[str]:
        """Return the Nodes of a Ring that are not here."""
        ...

    def taken_over(
        self, lost: Collection[str], *, unfit: Collection[str] = (), max_fetch_s: float | None = inf
    ) -> RingOptions | None:
        """Return the Ring without these Nodes, or None.

        unfit: Nodes whose memory is too small. max_fetch_s: how long survivors may fetch Layers; None: only spares.
        """
        ...

    async def reform(self, options: RingOptions) -> None:
        """Be another Ring from now on; nobody loads yet."""
        ...

    async def reload(self) -> None:
        """Have all Nodes hold what they are to hold."""
        ...

    @property
    def rounds(self) -> bool:
        """Whether Hops round activations: another cut between the Layers gives other tokens."""
        ...

    @property
    def holds_what_runs(self) -> bool:
        """Whether the KV cache, as it is loaded, is large enough for each request that runs."""
        ...

    async def begin_again(self) -> None:
        """Begin the next Epoch, and replay."""
        ...


class Recovery:
    """Brings one Ring back, as often as it is needed.

    tolerance_s: how long it waits for the Nodes that are gone. give_up: called with the reason when it cannot.
    """

    def __init__(
        self,
        ring: ChangingRing,
        workers: Workers,
        service: StarterService,
        *,
        tolerance_s: float,
        give_up: Callable[[MdiqError], None],
    ) -> None:
        self._ring = ring
        self._workers = workers
        self._service = service
        self._tolerance_s = tolerance_s
        self._give_up = give_up
        self._planned = self._served = ring.options  # to which it returns; which served last
        self._barred: set[tuple[str, str | None]] = set()  # Nodes and keys that may not be in the Ring again
        self._return_s = RETURN_S
        self._losses: list[MdiqError] = []  # of what is done now
        self._unfit: set[str] = set()  # Nodes that could not do what another Ring wanted of them
        self._has_waited = False  # long enough: a smaller Ring is better than none
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

        A Node that cannot do what another Ring wants of it, for whatever reason, is no end of the one that served.
        """
        is_unfit = self._is_working and self._ring.options != self._served and not isinstance(error, NodeDiedError)
        is_loss = isinstance(error, NodeDiedError) or is_unfit
        if self._is_closed or not is_loss or not self._workers.can_come_back or not self._tolerance_s:
            return False
        if is_unfit:
            self._unfit.add(error.node or self._ring.options.node_names[0])
        self._losses.append(error)
        self._service.pause()
        if len(self._losses) > MAX_LOSSES:
            self._give_up(NodeDiedError(f"{error}; it is loss number {len(self._losses)} in one recovery"))
        elif not self._is_working and len(self._losses) == 1:
            self._start(self._nothing_else)
        return True

    async def change(self, options: RingOptions) -> None:
        """Have another Ring serve from now on, or when its Nodes are all here; what runs goes on there.

        Raises:
            ConfigError: it cannot, and goes on as it was.
            MdiqError: it has given up.
        """
        self._planned = options
        self._barred = (self._barred | members_of(self._served)) - members_of(options)
        if is_same_but_idle(options, self._ring.options):
            await self.replace_idle(options)
            return
        await _until_done(self._start(partial(self._change_to, lambda: options)))
        if self._planned != options:
            raise ConfigError(f"the ring goes on with {_split_text(self._ring.options)}; see the log for what it lacks")

    async def go_without(self, name: str) -> bool:
        """Have others take over from a Node that wants to leave; return whether they have.

        What was planned stays so, and the Node is taken in again when it is back.
        """

        def without() -> RingOptions | None:
            ring = self._ring
            options = ring.taken_over([name]) if name in ring.options.node_names else None
            return None if options is not None and self._is_other_text(options) else options

        await _until_done(self._start(partial(self._change_to, without)))
        return name not in self._ring.options.node_names

    async def replace_idle(self, like: RingOptions) -> None:
        """Have the Nodes stand by that do so in another Ring, unless they are in this one. It waits for nothing."""
        self._served = with_idle_of(self._served, like)
        await self._ring.reform(with_idle_of(self._ring.options, like))

    async def aclose(self) -> None:
        """End what is done; there is no other."""
        self._is_closed = True
        tasks = [task for task in (*self._tasks, self._returning) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, work: Callable[[], Awaitable[None]]) -> "asyncio.Task[None]":
        """Do some work when it is its turn; whatever it raises ends the Ring, which may be paused by then."""
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
                self._forget_losses()

    async def _recover_if_lost(self) -> None:
        if self._losses:
            await self._recover()
            self._forget_losses()

    async def _nothing_else(self) -> None:
        """A recovery is what comes before any work."""

    def _forget_losses(self) -> None:
        self._losses.clear()
        self._unfit.clear()
        self._has_waited = False

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._give_up(loop_failed("recovery", error))

    async def _recover(self) -> None:
        """Bring the Ring back.

        Raises:
            MdiqError: it does not come back.
        """
        clock, before = asyncio.get_running_loop().time, self._served
        lost_s = clock()
        log.warning("ring_paused", error=str(self._losses[0]), waits_s=self._tolerance_s)
        while (times_s := await self._attempt(clock)) is None:
            pass
        back_s, loaded_s = times_s
        log.warning(  # whoever was told that it waits is told that it does not any more
            "ring_goes_on",
            after_s=round(clock() - lost_s, 3),
            back_s=round(back_s - lost_s, 3),
            loaded_s=round(loaded_s - lost_s, 3),
            sequences=self._service.ring.num_unfinished,
            **({} if self._ring.options == before else {"layers": _split_text(self._ring.options)}),
        )
        self._note_served()

    async def _attempt(self, clock: Callable[[], float]) -> tuple[float, float] | None:
        """Wait for a Ring that can serve, and begin an Epoch with it; return when there was one, and had loaded.

        None when a Node was lost meanwhile, which may be back already, without its Layers.
        """
        self._service.pause()  # the attempt before may have begun its Epoch
        if self._unfit and self._ring.options != self._served:
            if not self._barred.isdisjoint(members_of(self._served)):
                raise self._losses[-1]  # a Node that was cut off is not let in again for that
            await self._ring.reform(self._served)  # it held what runs
        options, back_s = await self._ring_that_can(), clock()
        loaded_s = await self._go_on_as(options)
        return None if loaded_s is None else (back_s, loaded_s)

    async def _go_on_as(self, options: RingOptions) -> float | None:
        """Load, and begin an Epoch; return when all had loaded, or None when a Node was lost, or could not."""
        ring, num_losses, loaded_s = self._ring, len(self._losses), 0.0
        try:
            async with asyncio.timeout(LOAD_S):
                if options != ring.options:
                    await ring.reform(options)
                await ring.reload()
                loaded_s = asyncio.get_running_loop().time()
                if ring.options != self._served and not self._has_waited and not ring.holds_what_runs:
                    raise CapacityError(f"{_split_text(options)}: too little KV cache for what runs")
                if len(self._losses) == num_losses:
                    await ring.begin_again()
        except TimeoutError:
            raise NodeDiedError(f"what was to go on has not loaded after {LOAD_S:g} s") from None
        except MdiqError as error:
            if len(self._losses) == num_losses and not self.takes_on(error):  # nobody has told of it
                raise
        return loaded_s if len(self._losses) == num_losses else None

    async def _change_to(self, wanted: Callable[[], RingOptions | None]) -> None:
        """Go on as another Ring. wanted: returns it, when it is its turn."""
        ring, clock = self._ring, asyncio.get_running_loop().time
        options = wanted()
        if options is None or options == ring.options:
            return
        if ring.absent(options):
            await self.replace_idle(with_newcomers(ring.options, options))
            self._note_served()
            return
        start_s = clock()
        self._service.pause()
        if await self._go_on_as(options) is not None:
            log.info("ring_changed", paused_s=round(clock() - start_s, 3), layers=_split_text(options))
        else:
            reason = str(self._losses[-1])
            await self._recover()
            if self._unfit:  # it is not tried again
                log.error("ring_not_changed", wanted=_split_text(options), error=reason)
                self._planned = self._ring.options
            self._forget_losses()
        self._note_served()

    def _note_served(self) -> None:
        """Note that the Ring serves as it is now, and have it return to what was planned."""
        self._served = self._ring.options
        if not is_same_but_idle(self._served, self._planned) and self._returning is None and not self._is_closed:
            self._returning = asyncio.create_task(self._return(), name="return")
            self._returning.add_done_callback(self._returned)

    def _returned(self, task: "asyncio.Task[None]") -> None:
        self._returning = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._give_up(loop_failed("return", error))

    def _is_other_text(self, options: RingOptions) -> bool:
        """Whether what runs would go on with other tokens in another Ring."""
        return self._ring.rounds and options.layers != self._ring.options.layers

    async def _return(self) -> None:
        """Have the Ring as it was planned again, when its Nodes have been back for a while."""
        ring = self._ring
        while not is_same_but_idle(ring.options, self._planned):
            absent = ring.absent(self._planned)
            await asyncio.sleep(self._return_s)
            if absent or ring.absent(self._planned) or self.is_running or self._is_working:
                continue
            if self._is_other_text(self._planned) and self._service.ring.num_unfinished:
                continue
            self._return_s = min(2 * self._return_s, MAX_RETURN_S)
            await _until_done(self._start(partial(self._change_to, lambda: self._planned)))

    async def _ring_that_can(self) -> RingOptions:
        """Return the Ring that is to go on, as soon as there is one; see above.

        Raises:
            NodeDiedError: there is none.
        """
        ring = self._ring
        try:
            async with asyncio.timeout(self._tolerance_s):
                while missing := self._workers.missing:
                    is_any_silent = any(self._is_silent(name) for name in missing)
                    max_fetch_s = None if is_any_silent else QUICK_FETCH_S
                    options = ring.taken_over(missing, unfit=self._unfit, max_fetch_s=max_fetch_s)
                    if options is not None:
                        return options
                    await self._workers.until_joined()
            return ring.options
        except TimeoutError:
            self._has_waited = True
            options = ring.taken_over(self._workers.missing, unfit=self._unfit)
            if options is None:
                raise self._not_back() from None
            return options

    def _is_silent(self, name: str) -> bool:
        """Whether a Node that is missing may live, as far as is known."""
        loss = next((error for error in reversed(self._losses) if error.node == name), None)
        return isinstance(loss, NodeDiedError) and loss.is_silent

    def _not_back(self) -> NodeDiedError:
        """Return why what runs has to end: the loss of a Node that is still missing."""
        missing = self._workers.missing
        loss = next((error for error in reversed(self._losses) if error.node in missing), self._losses[-1])
        return NodeDiedError(f"{loss}; it is not back after {self._tolerance_s:g} s")


async def _until_done(task: "asyncio.Task[None]") -> None:
    """Wait for what goes on also if its caller does not; raise what it raises, or that the Ring was closed."""
    await asyncio.wait({task})
    if task.cancelled():
        raise RingError("the ring was closed meanwhile; ask again")
    task.result()


def _split_text(options: RingOptions) -> str:
    return ", ".join(f"{name} {len(layers)}" for name, layers in zip(options.node_names, options.layers, strict=True))
