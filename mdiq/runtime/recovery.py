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
from mdiq.runtime.starter_service import StarterService
from mdiq.runtime.workers import Workers

log = structlog.get_logger()

MAX_LOSSES = 5
"""In one recovery. A Node that dies each time that it loads would otherwise hold up what runs for ever."""


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

    @property
    def is_running(self) -> bool:
        """Whether the Ring is paused."""
        return self._running is not None and not self._running.done()

    def takes_on(self, error: MdiqError) -> bool:
        """Recover from the loss of a Node, if it may come back; return whether that is so."""
        if not (isinstance(error, NodeDiedError) and self._workers.can_come_back and self._tolerance_s):
            return False
        self._losses.append(error)
        self._service.pause()
        if not self.is_running:
            self._running = asyncio.create_task(self._run(), name="recovery")
        return True

    async def aclose(self) -> None:
        """End a recovery that runs."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        lost_s = clock()
        log.warning("ring_paused", error=str(self._losses[0]), waits_s=self._tolerance_s)
        try:
            times_s: tuple[float, float] | None = None
            num_losses = 0
            while times_s is None or num_losses < len(self._losses):
                num_losses = len(self._losses)
                if num_losses > MAX_LOSSES:
                    raise NodeDiedError(f"{self._losses[-1]}; it is loss number {num_losses} in one recovery")
                times_s = await self._attempt(clock)
            back_s, loaded_s = times_s
            log.warning(  # whoever was told that it waits is told that it does not any more
                "ring_goes_on",
                after_s=round(clock() - lost_s, 3),
                back_s=round(back_s - lost_s, 3),
                loaded_s=round(loaded_s - lost_s, 3),
                sequences=self._service.ring.num_unfinished,
            )
        except MdiqError as error:
            self._give_up(error)
        finally:
            self._losses.clear()

    async def _attempt(self, clock: Callable[[], float]) -> tuple[float, float] | None:
        """Wait until all Nodes are back, and begin an Epoch with them; return when they were back, and had loaded.

        None when a Node was lost meanwhile.
        """
        try:
            async with asyncio.timeout(self._tolerance_s):
                await self._workers.all_back()
            back_s = clock()
            others = await self._workers.load_again(self._epochs.next_epoch())
            loaded_s = clock()
            await self._epochs.begin_again(self._service, others)
        except TimeoutError:
            raise NodeDiedError(f"{self._losses[-1]}; it is not back after {self._tolerance_s:g} s") from None
        except NodeDiedError as error:
            if error not in self._losses:
                self._losses.append(error)
            return None
        return back_s, loaded_s
