"""`mdiq node`: one Node of a topology, as a service; or a child of `mdiq run`, ended by its parent."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import structlog

from mdiq.cli.signals import LOADS_PROGRAM, READS, run_service
from mdiq.errors import ConfigError, MdiqError, first_of
from mdiq.runtime.placement import bind_to_core, set_threads

if TYPE_CHECKING:  # torch is imported behind set_threads
    from mdiq.runtime.lifecycle import Notifier
    from mdiq.runtime.node import NodeOptions, NodeProcess

log = structlog.get_logger()

MOST_KEY_CHARACTERS = 128
REJOIN_S = 0.5
LEAVE_S = 25.0  # for what is in the ring
STOP_S = 28.0  # the unit's TimeoutStopSec is 30


def serve_topology(file: Path, name: str, *, once: bool) -> NoReturn:
    """Serve ring after ring until a signal comes, or one ring; end the process then."""
    from mdiq.cli.ring_file import node_of, peers_of
    from mdiq.config.load import load_topology
    from mdiq.runtime.lifecycle import Notifier

    notifier = Notifier.from_environment()
    notifier.starting(f"{READS} {file.name}")
    loaded = load_topology(file)
    _, threads = node_of(loaded, name)
    peers_of(loaded, name)  # a key that is wrong is told before torch is loaded
    set_threads(threads)
    notifier.starting(LOADS_PROGRAM)
    from mdiq.core.control import CHECKSUM_KEY
    from mdiq.runtime.node import NodeOptions

    def read() -> NodeOptions:
        loaded = load_topology(file)
        node, _ = node_of(loaded, name)
        control = loaded.topology.starter.control_endpoint
        return NodeOptions(name, control, node.data_endpoint, CHECKSUM_KEY, threads, peers_of(loaded, name))

    run_service(_Service(read, notifier, once=once).run())


class _Service:
    """One Node, ring after ring. read: returns what the topology says of it now."""

    def __init__(self, read: "Callable[[], NodeOptions]", notifier: "Notifier", *, once: bool) -> None:
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
        from mdiq.runtime.lifecycle import serve_until_signal, watchdog_loops

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
        from mdiq.engine.memory import return_free_memory

        log.info("waits_for_starter", control=self._options.control)
        while await self._one_ring():
            self._running = None
            # Only now nothing refers to the ring any more: its tasks and errors had frames that held the weights.
            await asyncio.to_thread(return_free_memory, collect=True)
            await asyncio.sleep(REJOIN_S)

    async def _one_ring(self) -> bool:
        """Serve one ring; return whether there is to be a next one."""
        from mdiq.runtime.node import NodeProcess

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
            # What went wrong was told to the Starter, whose next Ring may do better.
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


def serve_node(name: str, control: str, listen: str, threads: int, pin: int | None, *, stdin_key: bool) -> int:
    """Serve until drained; return the exit code."""
    if not stdin_key:
        raise ConfigError("mdiq node: no topology; write for example mdiq node topology.yaml --name pi1")
    control_key = _read_key()
    _end_with_stdin()
    set_threads(threads)
    if pin is not None:
        bind_to_core(pin)
    # Behind set_threads: torch reads the thread count when it is imported.
    from mdiq.runtime.node import NodeOptions, NodeProcess

    try:
        asyncio.run(NodeProcess(NodeOptions(name, control, listen, control_key, threads)).run())
    except* MdiqError as group:
        raise first_of(group) from None
    return 0


def _read_key() -> bytes:
    try:
        return bytes.fromhex(sys.stdin.readline(MOST_KEY_CHARACTERS).strip())
    except ValueError:
        raise ConfigError("mdiq node: the first line of standard input is not a key in hexadecimal") from None


def _end_with_stdin() -> None:
    """End this process at once when the parent's end of the pipe closes, even while torch loads or computes."""

    def wait_for_end() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        # A worker thread inside torch cannot be stopped, and nothing here outlives the process.
        os._exit(0)

    threading.Thread(target=wait_for_end, name="parent-watch", daemon=True).start()
