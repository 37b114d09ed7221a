"""The interface of a transport: links that move parts of bytes. core/wire.py defines their meaning.

A link guarantees little: a message arrives whole or not at all, perhaps late or twice. The protocols above handle the
rest. One task reads a link, and does not read again after it was cancelled: that could lose a message.
"""

from collections.abc import Sequence
from typing import Protocol

from mdiq.core.frame import Buffer


class FrameSource(Protocol):
    """The receiving end of a Hop."""

    @property
    def bytes_in(self) -> int:
        """Bytes received so far."""
        ...

    @property
    def inflow(self) -> int:
        """A number that changes whenever bytes arrive, also those of a message that is not whole yet."""
        ...

    async def receive(self) -> list[Buffer]:
        """Wait for the next message and return its parts, which are not checked: the peer may be hostile."""
        ...

    async def aclose(self) -> None:
        """Stop receiving and free what the link holds."""
        ...


class FrameSink(Protocol):
    """The sending end of a Hop."""

    @property
    def bytes_out(self) -> int:
        """Bytes sent so far."""
        ...

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send one message; wait while the peer is disconnected or slow. Parts must not change afterwards."""
        ...

    async def aclose(self) -> None:
        """Stop sending and free what the link holds."""
        ...


class ControlLink(Protocol):
    """An Agent's end of the control channel: its one peer is the Coordinator."""

    async def receive(self) -> bytes:
        """Wait for the next message from the Coordinator and return it."""
        ...

    async def send(self, data: bytes) -> None:
        """Send one message to the Coordinator."""
        ...

    async def aclose(self) -> None:
        """Close the link; what was sent before still goes out, for a short while."""
        ...


class ControlServer(Protocol):
    """The Coordinator's end of the control channel: a peer is a sender of messages under an identity."""

    @property
    def sender(self) -> str | None:
        """The Node, by its key, that sent the last message from ``receive``; None on a link without security."""
        ...

    async def receive(self) -> tuple[bytes, bytes]:
        """Wait for the next message and return its sender's identity and the message."""
        ...

    async def send(self, identity: bytes, data: bytes) -> None:
        """Send one message to a peer, without waiting for it.

        Raises:
            TransportError: no peer of that identity is connected, or its queue is full.
        """
        ...

    async def aclose(self) -> None:
        """Close the server; what was sent before still goes out, for a short while."""
        ...
