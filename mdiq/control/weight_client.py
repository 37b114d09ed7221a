"""A Node's end of weight transfers: fetches the files that it lacks of its Layers, over many connections if need be.

A connection on which nothing comes for ``silence_s`` is given up for a new one; what was taken in by then stays. Each
new connection has an identity of its own, so nothing that was meant for an earlier one arrives on it.
"""

import asyncio
import contextlib
import os
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from mdiq import cache
from mdiq.control.weight_store import StoredFile, file_errors, try_lock
from mdiq.core import weights as messages
from mdiq.core.types import LayerRange
from mdiq.core.weights import CREDIT_PARTS, PART_BYTES
from mdiq.errors import ModelError, RemoteProtocolError, TransportError
from mdiq.transport.base import ControlLink

log = structlog.get_logger()

SILENCE_S = 10.0
TELL_S = 2.0
GIVE_UP_S = 60.0
RETRY_S = 0.5
LOCK_S = 0.2
MAX_TRIES = 4  # of a file that comes with wrong bytes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fetched:
    """What ``fetch_weights`` did. ``paths`` are the files by Layer; they stay there as long as ``in_use`` does.

    num_fetched: files that came; num_bytes: of them that came now. num_bad: that came with wrong bytes. num_mended:
    that had changed on this disk.
    """

    paths: Mapping[int, Path]
    in_use: cache.Use
    num_fetched: int
    num_bytes: int
    num_bad: int
    num_mended: int


class _InterruptedError(Exception):
    """This connection is of no use any more."""


async def fetch_weights(
    connect: Callable[[], Awaitable[ControlLink]],
    folder: Path,
    digest: str,
    layers: LayerRange,
    *,
    clock: Callable[[], float],
    progress: Callable[[int, int], object] = lambda *_: None,
    silence_s: float = SILENCE_S,
    give_up_s: float = GIVE_UP_S,
) -> Fetched:
    """Bring the files of some Layers to this machine, into ``folder``.

    connect: makes a new connection to the weights port, under a new identity. digest: of the model. progress: called
    with (done, total) in bytes; the total is an estimate until all files are known, and (0, 0) comes before the first.

    Raises:
        TransportError: nothing came for ``give_up_s`` seconds.
        ModelError: the Starter refuses, or serves another model; or the folder cannot be written.
        CapacityError: the disk is full.
        RemoteProtocolError: a file came with wrong bytes again and again.
    """
    make = partial(folder.mkdir, parents=True, exist_ok=True)
    with file_errors(folder):
        in_use = await asyncio.to_thread(cache.use, folder, make)
    lock = await _lock(folder, progress)
    transfer = _Transfer(
        folder, lock, messages.AskLayers(digest, layers.start, layers.stop), progress, clock, silence_s
    )
    try:
        while True:
            link = await connect()
            try:
                await transfer.run(link)
                return transfer.fetched(in_use)
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
        await transfer.aclose()


async def _lock(folder: Path, progress: Callable[[int, int], object]) -> int:
    """Wait until no other process fills the folder: what it fetches need not be fetched again."""
    is_told = False
    while (lock := try_lock(folder)) is None:
        if not is_told:
            log.info("weights_folder_busy", folder=str(folder))
            is_told = True
        progress(0, 0)  # the manager of a service sees that the start goes on
        await asyncio.sleep(LOCK_S)
    return lock


class _Transfer:
    """What outlives a connection. It closes ``lock``. ``news_s``: when something was last heard of the files."""

    def __init__(
        self,
        folder: Path,
        lock: int,
        ask: messages.AskLayers,
        progress: Callable[[int, int], object],
        clock: Callable[[], float],
        silence_s: float,
    ) -> None:
        self._folder = folder
        self._lock = lock
        self._ask = ask
        self._progress = progress
        self._clock = clock
        self._silence_s = silence_s
        self._files: dict[int, StoredFile] = {}
        self._wanted: deque[tuple[StoredFile, int]] = deque()  # files to ask for, from an offset on
        self._num_fetched = self._num_bytes = self._num_mended = 0
        self._bad: Counter[int] = Counter()
        # One thread: what touches the files happens in order, closing included, also when this task is cancelled.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self.news_s = clock()

    async def run(self, link: ControlLink) -> None:
        """Fetch what is missing over one connection."""
        await self._send(link, self._ask)
        self._progress(*self._done())
        self._wanted.clear()
        offered: set[int] = set()
        asked: deque[tuple[StoredFile, int, bytearray]] = deque()
        num_taken = 0
        while len(offered) < len(self._ask.layers) or asked or self._wanted:
            while self._wanted and len(asked) < CREDIT_PARTS:
                stored, offset = self._next_part()
                asked.append((stored, offset, bytearray()))
                await self._send(link, messages.AskPart(stored.file.layer, offset, num_taken))
            message = await self._receive(link)
            match message:
                case messages.Waiting():
                    self.news_s = self._clock()
                    self._progress(*self._done())  # the manager of a service sees that the start goes on
                case messages.LayerFile() if message.layer in self._ask.layers and message.layer not in offered:
                    offered.add(message.layer)
                    await self._offered(message)
                case messages.Piece() if asked:
                    stored, offset, data = asked[0]
                    size = min(stored.file.num_bytes - offset, PART_BYTES)
                    is_next = (message.layer, message.offset) == (stored.file.layer, offset + len(data))
                    if not is_next or len(data) + len(message.data) > size:
                        raise _InterruptedError(f"bytes of layer {message.layer} came that are not the next ones")
                    data += message.data
                    if len(data) == size:
                        asked.popleft()
                        num_taken += 1
                        await self._take(stored, data)
                case _:
                    raise _InterruptedError(f"{type(message).__name__} came and nobody had asked for it")
        with contextlib.suppress(_InterruptedError):  # all is here, whether the Starter hears of it or not
            await self._send(link, messages.Done())

    def fetched(self, in_use: cache.Use) -> Fetched:
        """Return what was done, when all is here."""
        paths = {layer: stored.path for layer, stored in sorted(self._files.items())}
        bad = self._bad.total()
        return Fetched(paths, in_use, self._num_fetched, self._num_bytes, bad, self._num_mended)

    async def aclose(self) -> None:
        """Close the files and then the lock, after what the thread is at, also if this is cancelled."""

        def close() -> None:
            for stored in self._files.values():
                stored.close()
            os.close(self._lock)

        closing = asyncio.wrap_future(self._worker.submit(close))
        self._worker.shutdown(wait=False)
        await asyncio.shield(closing)

    async def _offered(self, file: messages.LayerFile) -> None:
        """Want the parts of a file that are not here."""
        stored = await self._in_worker(partial(self._stored, file))
        if not stored.is_whole:
            missing = sum(other.file.num_bytes - other.num_bytes for other in self._files.values())
            with file_errors(self._folder):
                await self._in_worker(partial(cache.make_room, self._folder, missing))
            self._wanted.append((stored, stored.num_bytes))
        self._progress(*self._done())

    def _next_part(self) -> tuple[StoredFile, int]:
        stored, offset = self._wanted.popleft()
        if offset + PART_BYTES < stored.file.num_bytes:
            self._wanted.appendleft((stored, offset + PART_BYTES))
        return stored, offset

    def _stored(self, file: messages.LayerFile) -> StoredFile:
        stored = self._files.get(file.layer)
        if stored is None or stored.file != file:
            if stored is not None:
                stored.close()
            self._files[file.layer] = stored = StoredFile(self._folder, file)
            self._num_mended += stored.was_mended
        return stored

    async def _take(self, stored: StoredFile, data: bytearray) -> None:
        """Write a part of a file; the last one makes it whole."""
        self.news_s = self._clock()
        await self._in_worker(partial(stored.put, data))
        self._num_bytes += len(data)
        if stored.num_bytes == stored.file.num_bytes:
            if await self._in_worker(stored.finish):
                self._num_fetched += 1
            else:
                self._count_bad(stored.file.layer)
                self._wanted.append((stored, 0))
        self._progress(*self._done())

    def _done(self) -> tuple[int, int]:
        """Return how many bytes are here, and how many there will be: Layers are much alike."""
        files = tuple(self._files.values())  # the thread may be adding one
        sizes = [stored.file.num_bytes for stored in files]
        num_unknown = len(self._ask.layers) - len(sizes)
        total = sum(sizes) + num_unknown * max(sizes, default=0)
        return sum(stored.num_bytes for stored in files), total

    def _count_bad(self, layer: int) -> None:
        self._bad[layer] += 1
        log.warning("weights_file_bad", layer=layer, tries=self._bad[layer])
        if self._bad[layer] >= MAX_TRIES:
            raise RemoteProtocolError(
                f"layer {layer}: its weights came with wrong bytes {MAX_TRIES} times; look at the network and at the "
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

    async def _in_worker(self, call: Callable[[], T]) -> T:
        """Have something done with the files. That it takes long, on a slow card, is no silence of the Starter."""
        start_s = self._clock()
        doing = asyncio.get_running_loop().run_in_executor(self._worker, call)
        try:
            while not (await asyncio.wait({doing}, timeout=TELL_S))[0]:
                self._progress(*self._done())  # the manager of a service sees that the start goes on
            return doing.result()
        finally:
            doing.cancel()
            self.news_s += self._clock() - start_s
