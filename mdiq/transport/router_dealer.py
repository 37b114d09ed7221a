"""The control channel as ZeroMQ sockets: a ROUTER at the Starter, a DEALER at every Node. Messages: core/control.py."""

import secrets

import structlog
import zmq
import zmq.asyncio

from mdiq.core import control, weights
from mdiq.errors import TransportError
from mdiq.transport.curve import ClientSecurity, ServerSecurity
from mdiq.transport.junk import JunkBudget
from mdiq.transport.sockets import SocketEnd, send_whole

log = structlog.get_logger()

CONTROL_HWM = 1_000
CONTROL_LINGER_MS = 500  # so that a last message such as Failed or Goodbye is sent
# A message that is slightly too long is refused with an error, not with a disconnection.
MAX_CONTROL_BYTES = max(control.MAX_BYTES, weights.MAX_BYTES) + 4_096


class _ControlEnd(SocketEnd):
    LINGER_MS = CONTROL_LINGER_MS
    num_dropped = 0

    async def _message(self, num_before: int) -> list[bytes]:
        """Wait for the next message of one part and return its parts. num_before: those that libzmq puts before it."""
        junk = JunkBudget()
        while True:
            parts = await self._reader.read()
            if len(parts) == num_before + 1:
                return [bytes(part) for part in parts]
            self.num_dropped += 1
            num_parts = len(parts) - num_before
            log.warning("control_message_dropped", error=f"{num_parts} parts; a control message has 1")
            await junk.spent(0.0)


class RouterServer(_ControlEnd):
    """The Coordinator's end: a ControlServer over a ROUTER socket."""

    KIND = zmq.ROUTER

    @classmethod
    async def bind(
        cls,
        context: zmq.asyncio.Context,
        endpoint: str,
        *,
        hwm: int = CONTROL_HWM,
        security: ServerSecurity | None = None,
        insecure: bool = False,
    ) -> "RouterServer":
        """Listen on ``endpoint``; with port 0 the system chooses one, shown in the server's ``endpoint``.

        hwm: messages that may wait for one peer; beyond that, ``send`` fails.

        Raises:
            TransportError: the address cannot be used.
        """
        server = cls(context, endpoint, security, hwm=hwm, max_bytes=MAX_CONTROL_BYTES, insecure=insecure)
        server._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # libzmq ignores a second peer of the same name: it cannot take over the first one's messages. With security
        # no other peer can know the name, and a returning peer must not be ignored because of unread messages.
        server._socket.setsockopt(zmq.ROUTER_HANDOVER, int(security is not None))
        await server._bind()
        return server

    @property
    def sender(self) -> str | None:
        """The Node, by its key, that sent the last message from ``receive``; None without security."""
        return self._reader.sender

    async def receive(self) -> tuple[bytes, bytes]:
        """Wait for the next message of one part and return its sender's identity and the message."""
        identity, data = await self._message(1)
        return identity, data

    async def send(self, identity: bytes, data: bytes) -> None:
        """Send one message to a peer, without waiting for it: a hanging peer must not delay the others.

        Raises:
            TransportError: no peer of that identity is connected, or its queue is full.
        """
        try:
            await self._socket.send_multipart([identity, data], flags=zmq.NOBLOCK)
        except zmq.Again:
            raise TransportError(f"control peer {identity!r}: it does not take its messages; it hangs") from None
        except zmq.ZMQError as error:
            raise TransportError(
                f"control peer {identity!r}: not connected ({error.strerror}); check that its process runs"
            ) from None


class DealerLink(_ControlEnd):
    """An Agent's end: a ControlLink over a DEALER socket."""

    KIND = zmq.DEALER

    @classmethod
    async def connect(
        cls,
        context: zmq.asyncio.Context,
        endpoint: str,
        *,
        identity: str,
        security: ClientSecurity | None = None,
        insecure: bool = False,
    ) -> "DealerLink":
        """Connect to the Coordinator's ``endpoint`` under the Node's name; it may begin to listen later.

        Raises:
            TransportError: the endpoint is not an address, or the name is not a legal identity.
            ConfigError: the Coordinator's key is not a public key.
        """
        link = cls(context, endpoint, security, hwm=CONTROL_HWM, max_bytes=MAX_CONTROL_BYTES, insecure=insecure)
        # Messages wait until the peer has accepted us; libzmq drops its queue when it is refused.
        link._socket.setsockopt(zmq.IMMEDIATE, 1)
        if security is not None:
            # The key authenticates us. Others cannot occupy a name before us that they cannot guess.
            identity = f"{identity}.{secrets.token_hex(8)}"
        try:
            link._socket.setsockopt(zmq.ROUTING_ID, identity.encode())
        except zmq.ZMQError:
            link._socket.close(linger=0)
            raise TransportError(f"node name {identity!r}: it must have 1 to 255 bytes") from None
        await link._connect()
        return link

    async def receive(self) -> bytes:
        """Wait for the next message of one part and return it."""
        return (await self._message(0))[0]

    async def send(self, data: bytes) -> None:
        """Send one message to the Coordinator; wait while very many are queued."""
        await send_whole(self._socket, [data])
