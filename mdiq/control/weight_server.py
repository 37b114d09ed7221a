"""The Starter's end of weight transfers: tells what Layers take, and reads chunks from disk when they are asked for.

A Node may have CREDIT_CHUNKS questions open, so a transfer holds no more than that many chunks in memory. Files are
named by their index in the Manifest, and only its chunks are given, so nobody can name anything else on the disk.
"""

import asyncio
import hashlib
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from mdiq.control.chunk_hashes import ChunkHashes
from mdiq.core import weights as messages
from mdiq.core.token_bucket import TokenBucket
from mdiq.core.types import LayerRange
from mdiq.core.weights import CREDIT_CHUNKS, PIECE_BYTES, Manifest, WeightMap
from mdiq.errors import MdiqError, ModelError, RemoteProtocolError, TransportError
from mdiq.transport.base import ControlServer
from mdiq.transport.junk import JunkBudget

log = structlog.get_logger()

WEIGHTS_HWM = 128
"""Messages that may wait for one Node: the Pieces of its open questions, and some that are small."""
MOST_PEERS = 256
FORGET_S = 60.0  # a Node that is silent for so long asks for the Manifest again
WAITING_S = 2.0


def anyone(_: bytes, __: LayerRange) -> bool:
    """Let every peer have any Layers."""
    return True


@dataclass
class _Peer:
    """A Node that has a Manifest. ``under_way``: bytes of each chunk that it asked for and has not taken in."""

    identity: bytes
    manifest: Manifest
    asked: deque[messages.AskChunk] = field(default_factory=deque)
    under_way: deque[int] = field(default_factory=deque)
    num_taken: int = 0
    given: set[tuple[int, int]] = field(default_factory=set)
    heard: asyncio.Event = field(default_factory=asyncio.Event)


class WeightServer:
    """Serves the model at ``path`` to whoever reaches ``server``.

    limit: bytes a second of all transfers together. may_fetch: whether a peer may have some Layers, by its identity.
    outstanding_bytes: of chunks that were asked for and not yet taken in; most_outstanding_bytes: the most so far.
    """

    def __init__(
        self,
        server: ControlServer,
        weights: WeightMap,
        path: Path,
        hashes: ChunkHashes,
        *,
        clock: Callable[[], float],
        limit: TokenBucket | None = None,
        may_fetch: Callable[[bytes, LayerRange], bool] = anyone,
    ) -> None:
        self._server = server
        self._weights = weights
        self._path = path
        self._hashes = hashes
        self._clock = clock
        self._limit = limit
        self._may_fetch = may_fetch
        self._peers: dict[bytes, tuple[_Peer, asyncio.Task[None]]] = {}
        self.outstanding_bytes = 0
        self.most_outstanding_bytes = 0
        self.num_dropped = 0
        self.num_chunks = 0

    async def run(self) -> None:
        """Serve until cancelled."""
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
            await asyncio.to_thread(self._save_hashes)

    async def _handle(self, identity: bytes, message: messages.Message, tasks: asyncio.TaskGroup) -> None:
        peer, task = self._peers.get(identity, (None, None))
        match message:
            case messages.AskManifest():
                if task is not None:
                    task.cancel()
                await self._begin(identity, message, tasks)
            case messages.AskChunk() if peer is None:
                await self._send(identity, messages.Refused("ask for the manifest first", False))
            case messages.AskChunk() if peer is not None:
                self._ask(peer, message)
            case messages.Done():
                if task is not None:
                    task.cancel()
                    tasks.create_task(asyncio.to_thread(self._save_hashes), name="hashes")
            case _:
                raise RemoteProtocolError(f"{type(message).__name__}: a node may not send this")

    async def _begin(self, identity: bytes, ask: messages.AskManifest, tasks: asyncio.TaskGroup) -> None:
        refused: messages.Refused | None = None
        try:
            manifest = self._weights.manifest(ask.layers, with_ends=ask.with_ends)
            messages.encode(manifest)  # a model of very many parts may not fit into a message
        except MdiqError as error:
            refused = messages.Refused(str(error), True)
        if not self._may_fetch(identity, ask.layers):
            refused = messages.Refused(f"layers {ask.layers} are not this node's", True)
        elif len(self._peers) >= MOST_PEERS and identity not in self._peers:
            refused = messages.Refused("too many transfers at once", False)
        if refused is not None:
            log.warning("weights_refused", peer=repr(identity), error=refused.text)
            await self._send(identity, refused)
            return
        peer = _Peer(identity, manifest)
        self._peers[identity] = peer, tasks.create_task(self._serve(peer), name=f"weights {identity!r}")
        log.info("weights_asked", peer=repr(identity), layers=str(ask.layers), chunks=len(manifest.chunks()))
        await self._send(identity, manifest)

    def _ask(self, peer: _Peer, ask: messages.AskChunk) -> None:
        while peer.under_way and peer.num_taken < ask.taken:
            self.outstanding_bytes -= peer.under_way.popleft()
            peer.num_taken += 1
        if not any(file == ask.file and first <= ask.chunk < stop for file, first, stop in peer.manifest.ranges):
            raise RemoteProtocolError(f"chunk {ask.chunk} of file {ask.file} does not belong to the peer's layers")
        if len(peer.under_way) >= CREDIT_CHUNKS:
            raise RemoteProtocolError(f"more than {CREDIT_CHUNKS} chunks at a time")
        size = peer.manifest.chunk_size(ask.file, ask.chunk)
        peer.under_way.append(size)
        self.outstanding_bytes += size
        self.most_outstanding_bytes = max(self.most_outstanding_bytes, self.outstanding_bytes)
        peer.asked.append(ask)
        peer.heard.set()

    async def _serve(self, peer: _Peer) -> None:
        """Answer one Node's questions until it is done, is silent or cannot be reached."""
        try:
            while True:
                while peer.asked:
                    await self._answer(peer, peer.asked.popleft())
                peer.heard.clear()
                async with asyncio.timeout(FORGET_S):
                    await peer.heard.wait()
        except (TimeoutError, TransportError) as error:
            log.info("weights_peer_gone", peer=repr(peer.identity), error=str(error))
        except MdiqError as error:
            log.error("weights_not_served", peer=repr(peer.identity), error=str(error))
            await self._send(peer.identity, messages.Refused(str(error), True))
        finally:
            self.outstanding_bytes -= sum(peer.under_way)
            if self._peers.get(peer.identity, (None,))[0] is peer:
                del self._peers[peer.identity]

    async def _answer(self, peer: _Peer, ask: messages.AskChunk) -> None:
        is_again = (ask.file, ask.chunk) in peer.given
        peer.given.add((ask.file, ask.chunk))
        data, sha256 = await asyncio.to_thread(self._read, ask, is_again)
        self.num_chunks += bool(data)
        for offset in range(0, max(len(data), 1), PIECE_BYTES):
            piece = messages.Piece(ask.file, ask.chunk, offset, sha256, data[offset : offset + PIECE_BYTES])
            await self._keep_pace(peer, len(piece.data))
            await self._server.send(peer.identity, messages.encode(piece))

    async def _keep_pace(self, peer: _Peer, num_bytes: int) -> None:
        """Wait until so many bytes may go out; the Node hears now and then that it is not forgotten."""
        if self._limit is None:
            return
        now = self._clock()
        due_s = now + self._limit.take(num_bytes, now)
        while (wait_s := due_s - self._clock()) > 0:
            await asyncio.sleep(min(wait_s, WAITING_S))
            if wait_s > WAITING_S:
                await self._server.send(peer.identity, messages.encode(messages.Waiting()))

    def _read(self, ask: messages.AskChunk, is_again: bool) -> tuple[bytes, bytes]:
        """Return a chunk and its hash; no bytes if the Node has it.

        Raises:
            ModelError: the file is not what it was.
        """
        name, num_bytes, mtime_ns = self._weights.files[ask.file]
        path = self._path / name if self._weights.is_directory else self._path
        known = self._hashes.get(ask.file, ask.chunk)
        try:
            with path.open("rb", buffering=0) as file:
                stat = os.fstat(file.fileno())
                if (stat.st_size, stat.st_mtime_ns) != (num_bytes, mtime_ns):
                    raise ModelError(f"{path}: it was changed while it is served; start the starter again")
                data = _read_all(file.fileno(), ask.chunk * self._weights.chunk_bytes, self._weights.chunk_bytes)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); look at the starter's disk") from None
        if known is None or is_again:
            sha256 = hashlib.sha256(data).digest()
            if known not in (None, sha256):
                raise ModelError(f"{path}: its bytes have changed and its time has not; look at the starter's disk")
            self._hashes.put(ask.file, ask.chunk, sha256)
            known = sha256
        return (b"" if known == ask.known_sha256 else data), known

    def _save_hashes(self) -> None:
        try:
            self._hashes.save()
        except ModelError as error:
            log.warning("hashes_not_kept", error=str(error))

    async def _send(self, identity: bytes, message: messages.Message) -> None:
        """Send something to a peer that may be gone."""
        try:
            await self._server.send(identity, messages.encode(message))
        except TransportError as error:
            log.info("weights_peer_gone", peer=repr(identity), error=str(error))


def _read_all(handle: int, offset: int, most: int) -> bytes:
    parts = []
    while most > 0 and (part := os.pread(handle, most, offset)):
        parts.append(part)
        offset, most = offset + len(part), most - len(part)
    return b"".join(parts)
