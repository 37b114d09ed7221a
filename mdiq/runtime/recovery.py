"""Have a Ring go on when a Node that was lost comes back: pause, wait, load, begin the next Epoch, replay.

serving ──a Node is gone──▶ paused ──all are back──▶ loading ──all have loaded──▶ beginning ──all have begun──▶ serving
                              ▲                         │                            │
                              ├──────a Node is gone─────┴────────────────────────────┘
                              └──not back within Outages.tolerance_s, or gone too often──▶ given up

Each attempt has Epochs of its own: what is still under way from the one before is stale wherever it arrives. Streams
stay open all the while, and each Sequence goes on after the tokens that its caller has.
"""

import asyncio
from collections.abc import Callable

import structlog

from mdiq.errors import MdiqError, NodeDiedError
from mdiq.runtime.epochs import Epochs
from mdiq.runtime.loops import loop_failed
from mdiq.runtime.starter_service import StarterService
from mdiq.runtime.workers import Workers

log = structlog.get_logger()

MAX_LOSSES = 5
"""In one recovery. A Node that dies each time that it loads would otherwise hold up what runs for ever."""
LOAD_S = 600.0
"""For loading and beginning: a Node that lives and does not answer is no use."""


class Recovery:
    """Brings one Ring back, as often as it is needed.

    tolerance_s: how long it waits for the Nodes that are gone. give_up: called with the reason when it cannot.
    """

    def __init__(
        self,
        workers: Workers,
        epochs: Epochs,
        service: StarterService,
        *,
        tolerance_s: float,
        give_up: Callable[[MdiqError], None],
    ) -> None:
        self._workers = workers
        self._epochs = epochs
        self._service = service
        self._tolerance_s = tolerance_s
        self._give_up = give_up
        self._losses: list[MdiqError] = []  # of the recovery that runs
        self._running: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def is_running(self) -> bool:
        """Whether the Ring is paused."""
        return self._running is not None and not self._running.done()

    def takes_on(self, error: MdiqError) -> bool:
        """Recover from the loss of a Node, if it may come back; return whether that is so."""
        is_recoverable = isinstance(error, NodeDiedError) and self._workers.can_come_back and self._tolerance_s
        if self._is_closed or not is_recoverable:
            return False
        self._losses.append(error)
        self._service.pause()
        if len(self._losses) > MAX_LOSSES:
            self._give_up(NodeDiedError(f"{error}; it is loss number {len(self._losses)} in one recovery"))
        elif not self.is_running:
            self._running = asyncio.create_task(self._run(), name="recovery")
            self._running.add_done_callback(self._ended)
        return True

    async def aclose(self) -> None:
        """End a recovery that runs; there is no other one."""
        self._is_closed = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._losses.clear()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._give_up(loop_failed("recovery", error))

    async def _run(self) -> None:
        """Bring the Ring back.

        Raises:
            MdiqError: it does not come back.
        """
        clock = asyncio.get_running_loop().time
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
        )

    async def _attempt(self, clock: Callable[[], float]) -> tuple[float, float] | None:
        """Wait until all Nodes are back, and begin an Epoch with them; return when they were back, and had loaded.

        None when a Node was lost meanwhile, which may be back already, without its Layers.
        """
        self._service.pause()  # the attempt before may have begun its Epoch
        try:
            async with asyncio.timeout(self._tolerance_s):
                await self._workers.all_back()
        except TimeoutError:
            raise self._not_back() from None
        num_losses, back_s = len(self._losses), clock()
        try:
            async with asyncio.timeout(LOAD_S):
                await self._workers.load_again(self._epochs.next_epoch(), self._epochs.spec.kv_tokens)
                loaded_s = clock()
                if len(self._losses) == num_losses:
                    await self._epochs.begin_again(self._service)
        except TimeoutError:
            raise NodeDiedError(f"{self._losses[-1]}; it is back and has not loaded after {LOAD_S:g} s") from None
        except NodeDiedError as error:
            if len(self._losses) == num_losses:  # nobody has told of it
                self.takes_on(error)
        return (back_s, loaded_s) if len(self._losses) == num_losses else None

    def _not_back(self) -> NodeDiedError:
        """Return why what runs has to end: the loss of a Node that is still missing."""
        missing = self._workers.missing
        loss = next((error for error in reversed(self._losses) if error.node in missing), self._losses[-1])
        return NodeDiedError(f"{loss}; it is not back after {self._tolerance_s:g} s")
