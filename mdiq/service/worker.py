"""One Node of a topology as a service: ring after ring."""

import asyncio
from collections.abc import Callable

import structlog

from mdiq.engine.memory import return_free_memory
from mdiq.errors import MdiqError, first_of
from mdiq.runtime.lifecycle import Notifier, serve_until_signal, watchdog_loops
from mdiq.runtime.node import NodeOptions, NodeProcess

log = structlog.get_logger()

REJOIN_S = 0.5
LEAVE_S = 25.0  # for what is in the ring
STOP_S = 28.0  # the unit's TimeoutStopSec is 30


class NodeService:
    """One Node, ring after ring. read: returns what the topology says of it now."""

    def __init__(self, read: Callable[[], NodeOptions], notifier: Notifier, *, once: bool) -> None:
        self._read = read
        self._options = read()
        self._running: asyncio.Task[None] | None = None
        self._is_renewing = False
        self._is_leaving = False
        self._notifier = notifier
        self._once = once
        self._process: NodeProcess | None = None

    async def run(self) -> None:
        """Serve until a signal comes."""
        await serve_until_signal(
            self._rings(),
            notifier=self._notifier,
            drain=self._leave,
            drain_s=STOP_S,
            reload=self._reload,
            beside=watchdog_loops(self._notifier, self._has_work, self._last_progress_s),
        )
        self._notifier.stopping("ends")

    async def _rings(self) -> None:
        log.info("waits_for_starter", control=self._options.control)
        while await self._one_ring():
            self._running = None
            # Only now nothing refers to the ring any more: its tasks and errors had frames that held the weights.
            await asyncio.to_thread(return_free_memory, collect=True)
            await asyncio.sleep(REJOIN_S)

    async def _one_ring(self) -> bool:
        """Serve one ring; return whether there is to be a next one."""
        self._process = process = NodeProcess(self._options, self._notifier)
        self._running = asyncio.create_task(process.run(), name="node")
        try:
            await self._running
        except asyncio.CancelledError:
            if not self._is_renewing:
                raise
            self._is_renewing = False
        except (MdiqError, ExceptionGroup) as group:
            error = first_of(group)
            if self._once or not process.is_assigned or not isinstance(error, MdiqError):
                raise
            # The Starter knows what went wrong, and its next Ring may do better.
            log.error("ring_failed", error=str(error))
        else:
            log.info("ring_ended")
            if self._once and process.has_served:
                return False
        finally:
            self._process = None  # there is no ring to leave until the next one
        return not self._is_leaving

    async def _reload(self) -> None:
        """Read topology and keys again: for the ring that this Node waits for, or for the next one.

        In a ring a revoked key counts at once.
        """
        self._options = self._read()
        if self._running is None or self._process is None:
            return
        if self._process.is_assigned:
            await self._process.renew(self._options)
        else:
            self._is_renewing = self._running.cancel()

    async def _leave(self) -> None:
        """Let what is in the ring end, then leave; the Starter ends what takes longer with an error."""
        self._is_leaving = True
        process, running = self._process, self._running
        if process is None or running is None:
            return
        try:
            if await process.ask_to_leave():
                await asyncio.wait({running}, timeout=LEAVE_S)
        finally:  # also when a second signal comes
            if not running.done():
                await process.leave()

    def _has_work(self) -> bool:
        return self._process is not None and self._process.worker.has_work

    def _last_progress_s(self) -> float:
        return 0.0 if self._process is None else self._process.worker.last_progress_s
