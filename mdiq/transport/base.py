"""What the layers above expect of a transport: links that move parts of bytes. What the bytes mean is core/wire.py's.

A link promises little: a message arrives whole or not at all, perhaps late or twice. The protocols above mend the rest.
One task reads a link, and it is never cancelled in the hope of reading again: that could lose a message.
"""

from collections.abc import Sequence
from typing import Protocol

from mdiq.core.frame import Buffer


class FrameSource(Protocol):
    """The end of a Hop that Frames come out of."""

    @property
    def bytes_in(self) -> int:
        """Bytes received so far."""
        ...

    async def receive(self) -> list[Buffer]:
        """Wait for the next message and return its parts; a hostile peer may have sent anything."""
        ...

    async def aclose(self) -> None:
        """Stop receiving and free what the link holds."""
        ...


class FrameSink(Protocol):
    """The end of a Hop that Frames go into."""

    @property
    def bytes_out(self) -> int:
        """Bytes sent so far."""
        ...

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send one message; wait while the peer is away or behind. Parts must not change afterwards."""
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
    """The Coordinator's end of the control channel: a peer is whoever has sent something under an identity."""

    @property
    def sender(self) -> str | None:
        """The Node whose key sent what ``receive`` returned last; None where the link has no security."""
        ...

    async def receive(self) -> tuple[bytes, bytes]:
        """Wait for the next message and return its sender's identity and the message."""
        ...

    async def send(self, identity: bytes, data: bytes) -> None:
        """Send one message to a peer, without waiting for it.

        Raises:
            TransportError: no peer of that identity is connected, or it does not take what it is sent.
        """
        ...

    async def aclose(self) -> None:
        """Close the server; what was sent before still goes out, for a short while."""
        ...
