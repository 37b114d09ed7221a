"""The Starter's end of weight transfers: has Layers packed when they are asked for, and reads their files from disk.

A Node may have CREDIT_PARTS questions open, so a transfer holds no more than that many parts in memory. It can name
Layers and nothing else on the disk, and only those that were offered to it. Layers are packed one at a time, in turns
for the Nodes that ask, while files that are there already are sent.
"""

import asyncio
import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import structlog

from mdiq.core import weights as messages
from mdiq.core.token_bucket import TokenBucket
from mdiq.core.types import LayerRange
from mdiq.core.weights import CREDIT_PARTS, PART_BYTES, PIECE_BYTES
from mdiq.errors import MdiqError, ModelError, RemoteProtocolError, RingError, TransportError, first_of
from mdiq.transport.base import ControlServer
from mdiq.transport.junk import JunkBudget

log = structlog.get_logger()

WEIGHTS_HWM = 256
"""Messages that may wait for one Node: offers of all Layers, the Pieces of its open questions, and some small ones."""
MAX_TRANSFERS = 4
"""Of one Node at a time. Each new connection has a new identity, so earlier ones may not be forgotten yet."""
FORGET_S = 60.0  # a Node that is silent for so long asks for its Layers again
WAITING_S = 2.0


def anyone(_: str, __: LayerRange) -> bool:
    """Let every Node have any Layers."""
    return True


@dataclass(frozen=True, slots=True)
class LayerSource:
    """What is served. digest: the model's. num_layers: that it has.

    find: returns the file of a Layer, whose name ends in its SHA-256; makes it, which may take long, if there is none.
    Called in a thread of its own, one call at a time.
    """

    digest: str
    num_layers: int
    find: Callable[[int], Path]


@dataclass
class _Peer:
    """A transfer to a Node, which has named its Layers.

    node: its name, by its key; in plain text, what it calls itself. under_way: bytes of each part that it asked for
    and has not taken in.
    """

    identity: bytes
    node: str
    layers: LayerRange
    offered: dict[int, tuple[messages.LayerFile, Path]] = field(default_factory=dict)
    asked: deque[messages.AskPart] = field(default_factory=deque)
    under_way: deque[int] = field(default_factory=deque)
    num_taken: int = 0
    given: Counter[int] = field(default_factory=Counter)  # bytes by Layer, since its file was last checked
    heard: asyncio.Event = field(default_factory=asyncio.Event)


class WeightServer:
    """Serves the Layers of ``source`` to whoever reaches ``server``.

    limit: bytes a second of all transfers together; it may be changed; None: as fast as they can. may_fetch: whether a
    Node may have some Layers, by its name.
    outstanding_bytes: of parts that were asked for and not yet taken in; peak_outstanding_bytes: its peak.
    """

    def __init__(
        self,
        server: ControlServer,
        source: LayerSource,
        *,
        clock: Callable[[], float],
        limit: TokenBucket | None = None,
        may_fetch: Callable[[str, LayerRange], bool] = anyone,
    ) -> None:
        self._server = server
        self._source = source
        self._clock = clock
        self.limit = limit
        self._may_fetch = may_fetch
        self._peers: dict[bytes, tuple[_Peer, asyncio.Task[None]]] = {}
        # A thread of their own: whoever else needs a thread does not wait for packing.
        self._finder = ThreadPoolExecutor(1, thread_name_prefix="find-layer")
        self._finding: dict[int, asyncio.Future[tuple[messages.LayerFile, Path]]] = {}
        self.outstanding_bytes = 0
        self.peak_outstanding_bytes = 0
        self.num_dropped = 0
        self.num_parts = 0

    async def run(self) -> NoReturn:
        """Serve until cancelled, once."""
        try:
            async with asyncio.TaskGroup() as tasks:
                junk = JunkBudget()
                while True:
                    identity, data = await self._server.receive()
                    start_s = self._clock()
                    try:
                        await self._handle(identity, messages.decode(data), tasks)
                    except RemoteProtocolError as error:
                        self.num_dropped += 1
                        log.warning("weights_message_dropped", peer=repr(identity), error=str(error))
                    if identity not in self._peers:
                        await junk.spent(self._clock() - start_s)
        finally:
            self._finder.shutdown(wait=False, cancel_futures=True)

    async def _handle(self, identity: bytes, message: messages.Message, tasks: asyncio.TaskGroup) -> None:
        peer, _ = self._peers.get(identity, (None, None))
        match message:
            case messages.AskLayers():
                self._end(identity)
                await self._begin(identity, message, tasks)
            case messages.AskPart() if peer is None:
                await self._send(identity, messages.Refused("ask for the layers first", False))
            case messages.AskPart() if peer is not None:
                self._ask(peer, message)
            case messages.Done():
                self._end(identity)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__}: a node may not send this")

    async def _begin(self, identity: bytes, ask: messages.AskLayers, tasks: asyncio.TaskGroup) -> None:
        node = self._server.sender or identity.partition(b"/")[0].decode(errors="replace")
        refused = self._refusal(node, ask)
        if refused is not None:
            log.warning("weights_refused", peer=repr(identity), error=refused.text)
            await self._send(identity, refused)
            return
        before = [peer for peer, _ in self._peers.values() if peer.node == node]
        if len(before) >= MAX_TRANSFERS:
            self._end(before[0].identity)
        peer = _Peer(identity, node, ask.layers)
        self._peers[identity] = peer, tasks.create_task(self._serve(peer), name=f"weights {identity!r}")
        log.info("weights_asked", peer=repr(identity), layers=str(ask.layers))

    async def end_refused(self) -> None:
        """End the transfers of Layers that their Nodes may not have any more."""
        for peer in [peer for peer, _ in self._peers.values() if not self._may_fetch(peer.node, peer.layers)]:
            self._end(peer.identity)
            await self._send(peer.identity, messages.Refused(f"layers {peer.layers} are not wanted any more", True))

    def _end(self, identity: bytes) -> None:
        """End a peer's transfer, if it has one."""
        if (known := self._peers.pop(identity, None)) is not None:
            known[1].cancel()

    def _refusal(self, node: str, ask: messages.AskLayers) -> messages.Refused | None:
        if not self._may_fetch(node, ask.layers):
            return messages.Refused(f"layers {ask.layers} are not this node's", True)
        if ask.digest != self._source.digest:
            ours, theirs = self._source.digest[:12], ask.digest[:12]
            return messages.Refused(f"it serves model {ours}… and {theirs}… was called for; start the node again", True)
        if ask.layer_stop > self._source.num_layers:
            last = self._source.num_layers - 1
            return messages.Refused(
                f"layers {ask.layers}: the model has layers 0-{last}; give the node some of these", True
            )
        return None

    def _ask(self, peer: _Peer, ask: messages.AskPart) -> None:
        while peer.under_way and peer.num_taken < ask.taken:
            self.outstanding_bytes -= peer.under_way.popleft()
            peer.num_taken += 1
        file, _ = peer.offered.get(ask.layer, (None, None))
        if file is None or ask.offset >= file.num_bytes:
            raise RemoteProtocolError(f"byte {ask.offset} of layer {ask.layer} was not offered to the peer")
        if len(peer.under_way) >= CREDIT_PARTS or len(peer.asked) >= CREDIT_PARTS:  # whatever it says it has taken
            raise RemoteProtocolError(f"more than {CREDIT_PARTS} parts at a time")
        size = min(file.num_bytes - ask.offset, PART_BYTES)
        peer.under_way.append(size)
        self.outstanding_bytes += size
        self.peak_outstanding_bytes = max(self.peak_outstanding_bytes, self.outstanding_bytes)
        peer.asked.append(ask)
        peer.heard.set()

    async def _serve(self, peer: _Peer) -> None:
        """Offer one Node its Layers, and answer its questions until it is done, is silent or cannot be reached."""
        try:
            async with asyncio.TaskGroup() as tasks:
                offering = tasks.create_task(self._offer(peer), name="offer")
                tasks.create_task(self._answer_all(peer, offering), name="answer")
        except* (TimeoutError, TransportError) as group:
            log.info("weights_peer_gone", peer=repr(peer.identity), error=str(first_of(group)))
        except* MdiqError as group:
            error = first_of(group)
            log.error("weights_not_served", peer=repr(peer.identity), error=str(error))
            # A ring that ends is followed by another one, which packs on.
            await self._send(peer.identity, messages.Refused(str(error), not isinstance(error, RingError)))
        finally:
            self.outstanding_bytes -= sum(peer.under_way)
            if self._peers.get(peer.identity, (None,))[0] is peer:
                del self._peers[peer.identity]

    async def _offer(self, peer: _Peer) -> None:
        """Have the Layers packed where they are not, and tell the Node of each; it hears now and then that it waits."""
        for layer in peer.layers:
            finding = self._find(layer)
            while not (await asyncio.wait({finding}, timeout=WAITING_S))[0]:
                await self._server.send(peer.identity, messages.encode(messages.Waiting()))
            peer.offered[layer] = file, _ = finding.result()
            await self._server.send(peer.identity, messages.encode(file))

    def _find(self, layer: int) -> "asyncio.Future[tuple[messages.LayerFile, Path]]":
        """Have a Layer found, once for all who wait for it: however often Nodes ask, each is found or queued once.

        They are found in the order in which they come: Nodes take turns.
        """
        if (finding := self._finding.get(layer)) is None:
            finding = asyncio.get_running_loop().run_in_executor(self._finder, self._found, layer)
            self._finding[layer] = finding
            finding.add_done_callback(lambda done: self._on_found(layer, done))
        return finding

    def _found(self, layer: int) -> tuple[messages.LayerFile, Path]:
        path = self._source.find(layer)
        return _described(layer, path), path

    def _on_found(self, layer: int, done: "asyncio.Future[tuple[messages.LayerFile, Path]]") -> None:
        del self._finding[layer]
        if not done.cancelled():
            done.exception()  # those who wait raise it; perhaps none is left

    async def _answer_all(self, peer: _Peer, offering: "asyncio.Task[None]") -> None:
        while True:
            while peer.asked:
                await self._answer(peer, peer.asked.popleft())
            peer.heard.clear()
            try:
                async with asyncio.timeout(FORGET_S):
                    await peer.heard.wait()
            except TimeoutError:
                if offering.done():
                    raise

    async def _answer(self, peer: _Peer, ask: messages.AskPart) -> None:
        file, path = peer.offered[ask.layer]
        if peer.given[ask.layer] >= file.num_bytes:  # it had all of it, and asks again: what came was wrong
            peer.given[ask.layer] = 0
            await asyncio.to_thread(_check, path, file)
        data = await asyncio.to_thread(_read, path, file, ask.offset)
        peer.given[ask.layer] += len(data)
        self.num_parts += 1
        for start in range(0, len(data), PIECE_BYTES):
            piece = messages.Piece(ask.layer, ask.offset + start, data[start : start + PIECE_BYTES])
            await self._keep_pace(peer, len(piece.data))
            await self._server.send(peer.identity, messages.encode(piece))

    async def _keep_pace(self, peer: _Peer, num_bytes: int) -> None:
        """Wait until so many bytes may go out; the Node hears now and then that it is not forgotten."""
        if self.limit is None:
            return
        now = self._clock()
        due_s = now + self.limit.take(num_bytes, now)
        while (wait_s := due_s - self._clock()) > 0:
            await asyncio.sleep(min(wait_s, WAITING_S))
            if wait_s > WAITING_S:
                await self._server.send(peer.identity, messages.encode(messages.Waiting()))

    async def _send(self, identity: bytes, message: messages.Message) -> None:
        """Send something to a peer that may be gone."""
        try:
            await self._server.send(identity, messages.encode(message))
        except TransportError as error:
            log.info("weights_peer_gone", peer=repr(identity), error=str(error))


def _described(layer: int, path: Path) -> messages.LayerFile:
    try:
        return messages.LayerFile(layer, path.stat().st_size, bytes.fromhex(path.stem.rpartition("-")[2]))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be served ({error}); look at the starter's disk") from None


def _read(path: Path, file: messages.LayerFile, offset: int) -> bytes:
    """Return a part of a file.

    Raises:
        ModelError: the file is not what it was.
    """
    parts: list[bytes] = []
    size = min(file.num_bytes - offset, PART_BYTES)
    try:
        with path.open("rb", buffering=0) as opened:
            if os.fstat(opened.fileno()).st_size != file.num_bytes:
                raise ModelError(f"{path}: it was changed while it is served; start the starter again")
            while size > 0 and (part := os.pread(opened.fileno(), size, offset)):
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); look at the starter's disk") from None
    return b"".join(parts)


def _check(path: Path, file: messages.LayerFile) -> None:
    """Remove a file whose bytes are not those that its name tells of: it is made anew at the next start.

    Raises:
        ModelError: they are not.
    """
    try:
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").digest() == file.sha256:
                return
        path.unlink()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); look at the starter's disk") from None
    raise ModelError(f"{path}: its bytes have changed; look at the starter's disk, and start the starter again")
