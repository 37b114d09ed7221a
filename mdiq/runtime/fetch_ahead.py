"""Has Nodes bring Layers to their disks while the Ring serves, so that a pause is short of their transfer.

Those that a Node may have to take over (`standby_layers`): a spare, the Layers of all workers; another Node, those of
its neighbours, as far as its memory would hold them. And those of another Ring, before it is changed to.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import NoReturn

import structlog

from mdiq.core.types import LayerRange
from mdiq.errors import GaveWayError, MdiqError, NodeDiedError, RingError
from mdiq.runtime.options import RingOptions
from mdiq.runtime.serving_ring import ServingRing
from mdiq.runtime.takeover import standby_layers
from mdiq.runtime.workers import Workers

log = structlog.get_logger()

LOOK_S = 5.0
"""How often it looks for Nodes that lack something."""
RETRY_S = 600.0
"""After a fetch that failed: most likely a disk is full."""
MAX_ROUNDS = 3
"""Of a change whose Nodes come, go, and lose what they had fetched."""
PAUSE_S = 0.2
"""How soon a fetch is left alone in a pause, for what is waited for."""


class FetchAhead:
    """Fetches for one Ring. One transfer after the other, at a share of the links' rate; none while the Ring pauses."""

    def __init__(self, ring: ServingRing, workers: Workers) -> None:
        self._ring = ring
        self._workers = workers
        self._failed_s: dict[tuple[str, LayerRange], float] = {}
        self._turn = asyncio.Lock()
        self._num_waiting = 0  # changes, which go before what may be of use later
        self._num_given_way = 0
        self._is_closed = False

    async def run(self) -> NoReturn:
        """Keep Nodes ready to take over until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(LOOK_S)
            for name, layers in [] if self._ring.is_paused else self._wanted():
                if self._ring.is_paused or self._num_waiting:
                    break
                if clock() - self._failed_s.get((name, layers), -RETRY_S) < RETRY_S:
                    continue
                try:
                    await self._fetch(name, layers, until=lambda: bool(self._num_waiting))
                except NodeDiedError:
                    pass  # the Ring is told of it by others
                except MdiqError as error:
                    self._failed_s[name, layers] = clock()
                    log.warning("standby_layers_lacking", node=name, layers=str(layers), error=str(error))

    async def get_ready(self, options: RingOptions) -> None:
        """Have the Nodes of another Ring fetch what they lack of it; those that are gone, or not here, do not.

        A pause is waited for: what is lost meanwhile comes first.

        Raises:
            GaveWayError: another change is asked for. RingError: the Ring ends.
            MdiqError: a Node cannot.
        """
        self._num_waiting += 1
        turn = self._num_given_way
        try:
            for _ in range(MAX_ROUNDS):
                while self._ring.is_paused and self._goes_on(turn):  # noqa: ASYNC110  (it tells nobody)
                    await asyncio.sleep(PAUSE_S)
                lacking = [
                    (name, layers)
                    for name, layers in list(zip(options.node_names, options.layers, strict=True))[1:]
                    if self._lacks(name, layers)
                ]
                if not lacking:
                    return
                for name, layers in lacking:
                    with contextlib.suppress(NodeDiedError):
                        await self._fetch(name, layers, until=lambda: not self._goes_on(turn))
                if self._is_closed:
                    raise RingError("the ring was closed meanwhile; ask again")
                if not self._goes_on(turn):
                    raise GaveWayError("it was given up for another change")
        finally:
            self._num_waiting -= 1

    def give_way(self) -> None:
        """Have changes that only get ready be given up: another one is asked for."""
        self._num_given_way += 1

    def close(self) -> None:
        """Have all of them be given up: the Ring ends."""
        self._is_closed = True

    def _goes_on(self, turn: int) -> bool:
        return not self._is_closed and turn == self._num_given_way

    def _wanted(self) -> list[tuple[str, LayerRange]]:
        ring = self._ring
        wanted = standby_layers(ring.options, lambda name: ring.loaded.num_more(name, ring.options))
        return [(name, layers) for name, layers in wanted.items() if self._lacks(name, layers)]

    def _lacks(self, name: str, layers: LayerRange) -> bool:
        """Whether a Node that is here lacks one of these, as far as is known."""
        workers = self._workers
        is_here = name in workers.standing_by or (name in self._ring.options.node_names and name not in workers.missing)
        return workers.can_change and is_here and not {*layers} <= workers.at_hand.get(name, frozenset())

    async def _fetch(self, name: str, layers: LayerRange, *, until: Callable[[], bool] = lambda: False) -> None:
        """Have a Node fetch Layers when it is its turn; leave it alone when the Ring pauses, or ``until`` is true.

        Raises:
            MdiqError: it cannot.
        """
        async with self._turn:
            fetch = self._workers.fetch(name, layers, self._ring.ahead_bytes_per_s)
            fetching = asyncio.create_task(fetch, name=f"fetch for {name}")
            try:
                while not (self._ring.is_paused or until() or fetching.done()):
                    await asyncio.wait({fetching}, timeout=PAUSE_S)
            finally:
                fetching.cancel()
                await asyncio.gather(fetching, return_exceptions=True)
            if not fetching.cancelled():
                fetching.result()
