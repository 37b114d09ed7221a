"""Links inside one process: for a Ring without sockets, and for tests that drop or duplicate messages."""

import asyncio
from collections.abc import Callable, Sequence

from mdiq.core.frame import Buffer
from mdiq.errors import TransportError

MAX_WAITING = 16
"""Messages that a link holds before its sender waits; the high-water mark of the sockets."""

Copies = Callable[[Sequence[Buffer]], int]
"""Returns how often a message arrives: 1 is normal, 0 drops it, 2 duplicates it."""


def once(_: Sequence[Buffer]) -> int:
    """The link without faults: every message arrives once."""
    return 1


class MemoryLink:
    """A Hop inside one process: FrameSource and FrameSink in one. Parts are passed on, not copied.

    copies: the faults of the link, for tests.
    """

    def __init__(self, max_waiting: int = MAX_WAITING, *, copies: Copies = once) -> None:
        self._waiting: asyncio.Queue[list[Buffer]] = asyncio.Queue(max_waiting)
        self._copies = copies
        self.bytes_in = 0
        self.bytes_out = 0

    @property
    def inflow(self) -> int:
        """Messages come whole."""
        return self.bytes_in

    async def receive(self) -> list[Buffer]:
        """Wait for the next message and return its parts."""
        parts = await self._waiting.get()
        self.bytes_in += _size(parts)
        return parts

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send one message; wait while the link is full."""
        self.bytes_out += _size(parts)
        for _ in range(self._copies(parts)):
            await self._waiting.put(list(parts))

    async def aclose(self) -> None:
        """Nothing to free: the link lives as long as its two ends."""


class MemoryControlServer:
    """The Coordinator's end of a control channel inside one process; ``connect`` gives the Agents' ends.

    copies: the faults of both directions, for tests.
    """

    def __init__(self, max_waiting: int = 1_000, *, copies: Copies = once) -> None:
        self._max_waiting = max_waiting
        self._copies = copies
        self._waiting: asyncio.Queue[tuple[bytes, bytes, str | None]] = asyncio.Queue(max_waiting)
        self._links: dict[bytes, MemoryControlLink] = {}
        self.sender: str | None = None

    def connect(self, identity: bytes, *, sender: str | None = None) -> "MemoryControlLink":
        """Return an Agent's end. Like a ROUTER socket, the server knows it at once, and keeps the first of each name.

        sender: the Node whose key the Agent would have on a secured link.
        """
        link = MemoryControlLink(self, identity, self._max_waiting, sender)
        self._links.setdefault(identity, link)
        return link

    async def receive(self) -> tuple[bytes, bytes]:
        """Wait for the next message and return its sender's identity and the message."""
        identity, data, self.sender = await self._waiting.get()
        return identity, data

    async def send(self, identity: bytes, data: bytes) -> None:
        """Send one message to a peer, without waiting for it.

        Raises:
            TransportError: no peer of that identity is connected, or its queue is full.
        """
        link = self._links.get(identity)
        if link is None:
            raise TransportError(f"control peer {identity!r}: not connected; check that its process runs")
        for _ in range(self._copies((data,))):
            try:
                link.waiting.put_nowait(data)
            except asyncio.QueueFull:
                raise TransportError(f"control peer {identity!r}: it does not take its messages") from None

    async def aclose(self) -> None:
        """Forget every peer."""
        self._links.clear()

    async def _take(self, identity: bytes, data: bytes, sender: str | None) -> None:
        for _ in range(self._copies((data,))):
            await self._waiting.put((identity, data, sender))

    def _disconnect(self, identity: bytes, link: "MemoryControlLink") -> None:
        if self._links.get(identity) is link:
            del self._links[identity]


class MemoryControlLink:
    """An Agent's end of a control channel inside one process."""

    def __init__(self, server: MemoryControlServer, identity: bytes, max_waiting: int, sender: str | None) -> None:
        self._server = server
        self._identity = identity
        self._sender = sender
        self.waiting: asyncio.Queue[bytes] = asyncio.Queue(max_waiting)

    async def receive(self) -> bytes:
        """Wait for the next message from the Coordinator and return it."""
        return await self.waiting.get()

    async def send(self, data: bytes) -> None:
        """Send one message to the Coordinator."""
        await self._server._take(self._identity, data, self._sender)

    async def aclose(self) -> None:
        """Leave: the server forgets the identity."""
        self._server._disconnect(self._identity, self)


def _size(parts: Sequence[Buffer]) -> int:
    return sum(memoryview(part).nbytes for part in parts)
