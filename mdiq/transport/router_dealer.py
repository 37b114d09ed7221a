"""The control channel as ZeroMQ sockets: a ROUTER at the Starter, a DEALER at every Node. Messages: core/control.py."""

import secrets

import structlog
import zmq
import zmq.asyncio

from mdiq.core import control, weights
from mdiq.errors import TransportError
from mdiq.transport.curve import ClientSecurity, ServerSecurity
from mdiq.transport.junk import JunkBudget
from mdiq.transport.sockets import PartReader, SocketEnd, make_socket, send_whole

log = structlog.get_logger()

CONTROL_HWM = 1_000
CONTROL_LINGER_MS = 500  # so that a last message such as Failed or Goodbye is sent
# A message that is slightly too long is refused with an error, not with a disconnection.
MAX_CONTROL_BYTES = max(control.MAX_BYTES, weights.MAX_BYTES) + 4_096


class RouterServer(SocketEnd):
    """The Coordinator's end: a ControlServer over a ROUTER socket."""

    def __init__(self, socket: zmq.asyncio.Socket, endpoint: str, security: ServerSecurity | None = None) -> None:
        super().__init__(socket, endpoint)
        self._reader = PartReader(socket, security)
        self.num_dropped = 0

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
        insecure: permit plain text beyond loopback where there is no ``security``.

        Raises:
            TransportError: the address cannot be used.
        """
        socket = make_socket(
            context,
            zmq.ROUTER,
            endpoint,
            hwm=hwm,
            max_bytes=MAX_CONTROL_BYTES,
            linger_ms=CONTROL_LINGER_MS,
            security=security,
            insecure=insecure,
        )
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # libzmq ignores a second peer of the same name: it cannot take over the first one's messages. With security
        # no other peer can know the name, and a returning peer must not be ignored because of unread messages.
        socket.setsockopt(zmq.ROUTER_HANDOVER, int(security is not None))
        server = cls(socket, endpoint, security)
        await server._bind(security)
        return server

    @property
    def sender(self) -> str | None:
        """The Node, by its key, that sent the last message from ``receive``; None without security."""
        return self._reader.sender

    async def receive(self) -> tuple[bytes, bytes]:
        """Wait for the next message of one part and return its sender's identity and the message."""
        junk = JunkBudget()
        while True:
            parts = await self._reader.read()
            if len(parts) == 2:
                return bytes(parts[0]), bytes(parts[1])
            self.num_dropped += 1
            log.warning("control_message_dropped", error=f"{len(parts) - 1} parts; a control message has 1")
            await junk.spent(0.0)

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


class DealerLink(SocketEnd):
    """An Agent's end: a ControlLink over a DEALER socket."""

    def __init__(self, socket: zmq.asyncio.Socket, endpoint: str) -> None:
        super().__init__(socket, endpoint)
        self._reader = PartReader(socket)
        self.num_dropped = 0

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

        insecure: permit plain text beyond loopback where there is no ``security``.

        Raises:
            TransportError: the endpoint is not an address, or the name is not a legal identity.
            ConfigError: the Coordinator's key is not a public key.
        """
        socket = make_socket(
            context,
            zmq.DEALER,
            endpoint,
            hwm=CONTROL_HWM,
            max_bytes=MAX_CONTROL_BYTES,
            linger_ms=CONTROL_LINGER_MS,
            security=security,
            insecure=insecure,
        )
        # Messages wait until the peer has accepted us; libzmq drops its queue when it is refused.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        if security is not None:
            # The key authenticates us. Others cannot occupy a name before us that they cannot guess.
            identity = f"{identity}.{secrets.token_hex(8)}"
        try:
            socket.setsockopt(zmq.ROUTING_ID, identity.encode())
        except zmq.ZMQError:
            socket.close(linger=0)
            raise TransportError(f"node name {identity!r}: it must have 1 to 255 bytes") from None
        link = cls(socket, endpoint)
        await link._connect(security)
        return link

    async def receive(self) -> bytes:
        """Wait for the next message of one part and return it."""
        junk = JunkBudget()
        while True:
            parts = await self._reader.read()
            if len(parts) == 1:
                return bytes(parts[0])
            self.num_dropped += 1
            log.warning("control_message_dropped", error=f"{len(parts)} parts; a control message has 1")
            await junk.spent(0.0)

    async def send(self, data: bytes) -> None:
        """Send one message to the Coordinator; wait while very many are queued."""
        await send_whole(self._socket, [data])
