"""A Node's end of weight transfers: fetches the chunks that it lacks, over as many connections as it takes.

A connection on which nothing comes for ``silence_s`` is given up for a new one; what was taken in by then stays. Each
new connection has an identity of its own, so nothing that was meant for an earlier one arrives on it.
"""

import asyncio
import contextlib
import os
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from mdiq import cache
from mdiq.control.weight_store import Chunk, WeightStore, file_errors, try_lock
from mdiq.core import weights as messages
from mdiq.core.types import LayerRange
from mdiq.core.weights import CREDIT_CHUNKS, Manifest
from mdiq.errors import ModelError, RemoteProtocolError, TransportError
from mdiq.transport.base import ControlLink

log = structlog.get_logger()

SILENCE_S = 10.0
GIVE_UP_S = 60.0
RETRY_S = 0.5
LOCK_S = 0.2
MOST_TRIES = 4  # of a chunk that comes with wrong bytes
CHUNKS_PER_CHECK = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fetched:
    """What ``fetch_weights`` did. ``path`` is what the engine opens; it stays there as long as ``in_use`` does.

    num_fetched: chunks that came. num_confirmed: that were there and only had to be asked about. num_bad: that came
    with wrong bytes. num_mended: that had changed on this disk.
    """

    path: Path
    in_use: cache.Use
    num_fetched: int
    num_confirmed: int
    num_bad: int
    num_mended: int


class _InterruptedError(Exception):
    """This connection is of no use any more."""


async def fetch_weights(
    connect: Callable[[], Awaitable[ControlLink]],
    folder: Path,
    layers: LayerRange,
    *,
    clock: Callable[[], float],
    digest: str = "",
    with_ends: bool = False,
    is_thorough: bool = False,
    progress: Callable[[int, int], object] = lambda *_: None,
    silence_s: float = SILENCE_S,
    give_up_s: float = GIVE_UP_S,
) -> Fetched:
    """Bring the weights of some Layers to this machine, into a folder below ``folder``.

    connect: makes a new connection to the weights port, under a new identity. digest: of the model; empty takes any.
    with_ends: the Starter's part too. is_thorough: hash also what is here already and looks untouched. progress: told
    (done, total) in bytes.

    Raises:
        TransportError: nothing came for ``give_up_s`` seconds.
        ModelError: the Starter refuses, or serves another model; or the folder cannot be written.
        CapacityError: the disk is full.
        RemoteProtocolError: a chunk came with wrong bytes again and again.
    """
    ask = messages.AskManifest(layers.start, layers.stop, with_ends)
    transfer = _Transfer(
        folder, ask, digest, is_thorough=is_thorough, progress=progress, clock=clock, silence_s=silence_s
    )
    try:
        while True:
            link = await connect()
            try:
                return await transfer.run(link)
            except _InterruptedError as error:
                reason = str(error)
                log.info("weights_interrupted", reason=reason)
            finally:
                await link.aclose()
            if clock() - transfer.news_s >= give_up_s:
                raise TransportError(
                    f"weights of layers {layers}: nothing came for {give_up_s:g} s ({reason}); see whether the starter "
                    "runs and its weights port can be reached from here"
                )
            await asyncio.sleep(RETRY_S)
    finally:
        transfer.worker.shutdown(wait=False)


class _Transfer:
    """What outlives a connection. ``news_s``: when something was last heard of the chunks."""

    def __init__(
        self,
        folder: Path,
        ask: messages.AskManifest,
        digest: str,
        *,
        is_thorough: bool,
        progress: Callable[[int, int], object],
        clock: Callable[[], float],
        silence_s: float,
    ) -> None:
        self._folder = folder
        self._ask = ask
        self._digest = digest
        self._is_thorough = is_thorough
        self._progress = progress
        self._clock = clock
        self._silence_s = silence_s
        self._num_fetched = self._num_confirmed = self._num_mended = 0
        self._bad: Counter[Chunk] = Counter()
        # One thread: what touches the store happens in order, closing included, also when this task is cancelled.
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self.news_s = clock()

    async def run(self, link: ControlLink) -> Fetched:
        """Fetch what is missing over one connection."""
        await self._send(link, self._ask)
        manifest = await self._receive(link)
        if not isinstance(manifest, Manifest):
            raise _InterruptedError(f"{type(manifest).__name__} came and a manifest was asked for")
        if self._digest not in ("", manifest.digest):
            raise ModelError(
                f"weights: the starter serves model {manifest.digest[:12]}… and {self._digest[:12]}… was called for; "
                "start it again"
            )
        folder = self._folder / manifest.digest
        make = partial(folder.mkdir, parents=True, exist_ok=True)
        with file_errors(folder):
            in_use = await self._in_worker(partial(cache.use, folder, make))
        lock = await self._lock(folder)
        store: WeightStore | None = None

        def finish() -> None:
            try:
                if store is not None:
                    store.close()
            finally:
                os.close(lock)

        try:
            store = await self._in_worker(partial(WeightStore, folder, manifest, is_thorough=self._is_thorough))
            while store.num_unchecked:
                await self._in_worker(partial(store.check, CHUNKS_PER_CHECK))
            self._is_thorough = False
            self._num_mended += store.num_bad
            self.news_s = self._clock()  # another process at the folder, or hashing, is no silence of the Starter
            await self._fill(link, manifest, store)
        finally:
            await asyncio.shield(asyncio.wrap_future(self.worker.submit(finish)))
        with contextlib.suppress(_InterruptedError):  # all is here, whether the Starter hears of it or not
            await self._send(link, messages.Done())
        return Fetched(store.path, in_use, self._num_fetched, self._num_confirmed, self._bad.total(), self._num_mended)

    async def _fill(self, link: ControlLink, manifest: Manifest, store: WeightStore) -> None:
        missing = deque(store.missing())
        total = store.size_of(manifest.chunks())
        done = total - store.size_of(missing)
        self._progress(done, total)
        if missing:
            await self._in_worker(store.make_room)
        asked: dict[Chunk, bytearray] = {}
        num_taken = 0
        while missing or asked:
            while missing and len(asked) < CREDIT_CHUNKS:
                chunk = missing.popleft()
                asked[chunk] = bytearray()
                await self._send(link, messages.AskChunk(*chunk, num_taken, store.known_sha256(chunk)))
            piece = await self._receive(link)
            self.news_s = self._clock()
            if isinstance(piece, messages.Waiting):
                continue
            if not isinstance(piece, messages.Piece):
                raise _InterruptedError(f"{type(piece).__name__} came and a chunk was asked for")
            chunk = piece.file, piece.chunk
            size = manifest.chunk_size(*chunk) if chunk in asked else 0
            if chunk not in asked or piece.offset != len(asked[chunk]) or piece.offset + len(piece.data) > size:
                raise _InterruptedError(f"bytes of chunk {piece.chunk} came that are not the next ones")
            if piece.data:
                asked[chunk] += piece.data
                if len(asked[chunk]) < size:
                    continue
                is_right = await self._in_worker(partial(store.put, chunk, asked[chunk], piece.sha256))
                self._num_fetched += is_right
            else:
                is_right = piece.sha256 == store.known_sha256(chunk)
                if is_right:
                    await self._in_worker(partial(store.confirm, chunk))
                self._num_confirmed += is_right
            del asked[chunk]
            num_taken += 1
            if is_right:
                done += size
                self._progress(done, total)
            else:
                self._count_bad(manifest, chunk)
                missing.appendleft(chunk)

    def _count_bad(self, manifest: Manifest, chunk: Chunk) -> None:
        self._bad[chunk] += 1
        name = manifest.files[chunk[0]][0]
        log.warning("weights_chunk_bad", file=name, chunk=chunk[1], tries=self._bad[chunk])
        if self._bad[chunk] >= MOST_TRIES:
            raise RemoteProtocolError(
                f"{name}: chunk {chunk[1]} came with wrong bytes {MOST_TRIES} times; look at the network and at the "
                "starter's disk"
            )

    async def _send(self, link: ControlLink, message: messages.Message) -> None:
        """Send a message; a link may hold it until its peer is there."""
        try:
            async with asyncio.timeout(self._silence_s):
                await link.send(messages.encode(message))
        except TimeoutError:
            raise _InterruptedError(f"nobody took a question for {self._silence_s:g} s") from None

    async def _receive(self, link: ControlLink) -> messages.Message:
        try:
            # The link is closed after a time-out: nothing can be lost by cancelling.
            async with asyncio.timeout(self._silence_s):
                message = messages.decode(await link.receive())
        except TimeoutError:
            raise _InterruptedError(f"nothing came for {self._silence_s:g} s") from None
        except RemoteProtocolError as error:
            raise _InterruptedError(str(error)) from None
        if isinstance(message, messages.Refused):
            if message.is_final:
                raise ModelError(f"weights: the starter refuses: {message.text}")
            raise _InterruptedError(f"the starter says: {message.text}")
        return message

    async def _lock(self, folder: Path) -> int:
        """Wait until no other process fills the folder: what it fetches need not be fetched again."""
        is_told = False
        while (lock := try_lock(folder)) is None:  # not in the worker: a handle of a cancelled call would be lost
            if not is_told:
                log.info("weights_folder_busy", folder=str(folder))
                is_told = True
            await asyncio.sleep(LOCK_S)
        return lock

    async def _in_worker(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.worker, call)
