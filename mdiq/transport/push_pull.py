"""Hops as ZeroMQ sockets, PUSH to PULL. core/wire.py defines the meaning of messages.

PULL binds and PUSH connects: the receivers are the stable addresses. Delivery is at most once, and a cut link may lose
what was queued; nothing here acknowledges or repeats.
"""

from collections.abc import Sequence

import zmq
import zmq.asyncio

from mdiq.core.frame import Buffer
from mdiq.errors import TransportError
from mdiq.transport.curve import ClientSecurity, ServerSecurity
from mdiq.transport.sockets import (
    FRAME_HWM,
    FRAME_LINGER_MS,
    MAX_FRAME_BYTES,
    ZERO_COPY_BYTES,
    SocketEnd,
    send_whole,
    wire_size,
)
from mdiq.transport.watch import ListenerWatch


class PullSource(SocketEnd):
    """The receiving end of a Hop: a FrameSource over a PULL socket."""

    KIND = zmq.PULL
    LINGER_MS = FRAME_LINGER_MS

    @classmethod
    async def bind(
        cls,
        context: zmq.asyncio.Context,
        endpoint: str,
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        security: ServerSecurity | None = None,
        insecure: bool = False,
    ) -> "PullSource":
        """Listen on ``endpoint``; with port 0 the system chooses one, shown in the source's ``endpoint``.

        max_frame_bytes: a peer that sends a longer part is disconnected; see WireLimits.max_frame_bytes.

        Raises:
            TransportError: the address cannot be used.
        """
        source = cls(context, endpoint, security, hwm=FRAME_HWM, max_bytes=max_frame_bytes, insecure=insecure)
        await source._bind()
        return source

    @property
    def sender(self) -> str | None:
        """The Node that sent the last message from ``receive``; None without security."""
        return self._reader.sender

    @property
    def bytes_in(self) -> int:
        """Bytes received so far, ZMTP framing included."""
        return self._reader.bytes_in

    @property
    def inflow(self) -> int:
        """A number that changes whenever bytes arrive, also those of a message that is not whole yet."""
        return self.bytes_in + (self._watch.inflow if isinstance(self._watch, ListenerWatch) else 0)

    async def receive(self) -> list[Buffer]:
        """Wait for the next message and return its parts; see PartReader.read."""
        return await self._reader.read()


class PushSink(SocketEnd):
    """The sending end of a Hop: a FrameSink over a PUSH socket."""

    KIND = zmq.PUSH
    LINGER_MS = FRAME_LINGER_MS
    bytes_out = 0

    @classmethod
    async def connect(
        cls,
        context: zmq.asyncio.Context,
        endpoint: str,
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        security: ClientSecurity | None = None,
        insecure: bool = False,
    ) -> "PushSink":
        """Connect to the next Stage's ``endpoint``; it may begin to listen later.

        max_frame_bytes: the limit of the next Stage's source.

        Raises:
            TransportError: the endpoint is not an address.
            ConfigError: the next Stage's key is not a public key.
        """
        sink = cls(context, endpoint, security, hwm=FRAME_HWM, max_bytes=max_frame_bytes, insecure=insecure)
        # Frames wait for a connection here, not in a queue of libzmq, which would keep stale ones across a cut.
        sink._socket.setsockopt(zmq.IMMEDIATE, 1)
        await sink._connect()
        return sink

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send one message; wait while the peer is disconnected or slow. Parts must not change afterwards.

        Raises:
            TransportError: a part is longer than the peer accepts; it would close the connection.
        """
        sizes = [memoryview(part).nbytes for part in parts]
        largest = max(sizes)
        if largest > self._max_bytes:
            raise TransportError(
                f"{self.endpoint}: a frame of {largest} bytes is over the {self._max_bytes} that a stage takes; "
                "send fewer tokens in one prompt chunk"
            )
        copy = largest < ZERO_COPY_BYTES
        # With copy=False pyzmq still copies the parts of a message that are below its copy_threshold of 64 KiB.
        await send_whole(self._socket, parts, copy=copy)
        self.bytes_out += sum(map(wire_size, sizes))
