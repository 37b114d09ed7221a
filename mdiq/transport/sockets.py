"""The sockets of all links: options and security, binding and connecting, sending and receiving whole messages.

Limits for a peer: libzmq bounds the length of a part (MAXMSGSIZE), PartReader the number of parts that are returned.
libzmq itself collects the parts of a message until the last has arrived, without a limit, so without security
(curve.py) a port must be reachable by trusted peers only.
"""

import asyncio
import contextlib
import errno
from collections.abc import Sequence
from typing import ClassVar, NoReturn

import zmq
import zmq.asyncio

from mdiq.core.frame import Buffer
from mdiq.errors import TransportError
from mdiq.transport.curve import Security, ServerSecurity, check_plain_text
from mdiq.transport.names import has_ipv6, name_in
from mdiq.transport.watch import ClientWatch, ListenerWatch, ServerWatch

MAX_FRAME_BYTES = 32 * 2**20
"""Default maximum bytes of one part: a full Batch of 512 tokens of 16,384 f32."""
MAX_PARTS = 4
"""Maximum parts returned of one message. A longer message is cut to this number, still more than a Frame has."""
ZERO_COPY_BYTES = 64 * 1024  # below, copying is cheaper than the bookkeeping of a shared buffer
FRAME_HWM = 16  # a decoding Sequence has one Segment in flight: a full queue means a stalled peer, never load
FRAME_LINGER_MS = 200
HANDSHAKE_MS = 5_000
CONNECT_MS = 5_000  # else two minutes, by the kernel, where a firewall drops what comes: it is not opened for that long
DEAD_PEER_S = 6  # without it a pulled cable is noticed after minutes
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2_000
MAX_READY = 16  # messages taken in a row before other tasks run


class SocketEnd:
    """Base of all links over a socket: makes, owns and closes it. ``endpoint`` is the address, with the real port.

    hwm: messages that may wait. max_bytes: a peer that announces a longer part is disconnected.
    insecure: permit plain text beyond loopback where there is no ``security``.

    Raises:
        TransportError: the link would leave this machine in plain text.
        ConfigError: a key is not valid.
    """

    KIND: ClassVar[int]
    LINGER_MS: ClassVar[int]

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        security: Security | None,
        *,
        hwm: int,
        max_bytes: int,
        insecure: bool,
    ) -> None:
        if security is None:
            check_plain_text(endpoint, insecure=insecure)
        self.endpoint = endpoint
        self._security = security
        self._watch: ListenerWatch | ClientWatch | None = None
        self._max_bytes = max_bytes
        self._socket = context.socket(self.KIND)
        self._socket.set_hwm(hwm)
        options = {
            # libzmq closes the connection of a peer that announces more, before it allocates the memory.
            zmq.MAXMSGSIZE: max_bytes,
            zmq.LINGER: self.LINGER_MS,
            zmq.HANDSHAKE_IVL: HANDSHAKE_MS,
            zmq.CONNECT_TIMEOUT: CONNECT_MS,
            # The kernel detects dead peers. A heartbeat of libzmq 4.3.5 (HEARTBEAT_IVL) aborts the process when it is
            # due on a connection that has ended before we had read all of it: stream_engine_base.cpp, out_event.
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: DEAD_PEER_S // 3,
            zmq.TCP_KEEPALIVE_INTVL: DEAD_PEER_S // 6,
            zmq.TCP_KEEPALIVE_CNT: 4,
            zmq.TCP_MAXRT: DEAD_PEER_S * 1_000,  # of unacknowledged data
            zmq.RECONNECT_IVL: RECONNECT_MS,
            zmq.RECONNECT_IVL_MAX: RECONNECT_MAX_MS,
            zmq.IPV6: int("[" in endpoint),
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._reader = PartReader(self._socket, security if isinstance(security, ServerSecurity) else None)
        with contextlib.ExitStack() as undo:
            undo.callback(self._socket.close, linger=0)
            if security is not None:
                security.apply(self._socket)
            undo.pop_all()

    async def aclose(self) -> None:
        """Close the socket; queued messages are still sent for its linger time, within ``Context.term``."""
        if isinstance(self._security, ServerSecurity):
            self._security.gate.remove_renewal(self._security.domain, self.renew)
        if self._watch is not None:
            await self._watch.aclose()
        self._socket.close()

    async def renew(self) -> None:
        """Close every connection of a secured listener; peers that are still admitted reconnect.

        Raises:
            TransportError: the port cannot be had again.
        """
        if isinstance(self._watch, ServerWatch):
            await self._watch.rebind(self.endpoint)

    async def _bind(self) -> None:
        """Listen on ``endpoint``; with security, its Gate authenticates peers.

        Raises:
            TransportError: the address is in use, not of this machine, or not an address.
        """
        security = self._security
        self._watch = watch = (
            ServerWatch(self._socket, security.domain, security.gate.refusals)
            if isinstance(security, ServerSecurity)
            else ListenerWatch(self._socket)
        )
        watch.start()
        try:
            self._socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            await self._give_up("listen", error)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        watch.listening()
        if isinstance(security, ServerSecurity):
            security.gate.add_renewal(security.domain, self.renew)

    async def _connect(self) -> None:
        """Connect to ``endpoint``, which libzmq does in the background; so is a host name looked up.

        Raises:
            TransportError: the endpoint is not an address. A missing listener shows only later.
        """
        try:
            if self._security is None and name_in(self.endpoint) is None:
                self._socket.connect(self.endpoint)
            else:
                self._watch = watch = ClientWatch(self._socket, self.endpoint)
                watch.start()
        except zmq.ZMQError as error:
            await self._give_up("connect", error)

    async def _give_up(self, verb: str, error: zmq.ZMQError) -> NoReturn:
        self._socket.setsockopt(zmq.LINGER, 0)
        await self.aclose()
        raise TransportError(f"{self.endpoint}: cannot {verb} there: {_advice(error)}") from None


def listen_endpoint(endpoint: str) -> str:
    """Return the endpoint to listen on for a Node reached at ``endpoint``: the same, or all interfaces for a name.

    A machine's own name often resolves to another address on that machine than elsewhere, possibly an IPv6 one: where
    the machine has IPv6, it listens on both.
    """
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if host == "localhost":
        return f"tcp://127.0.0.1:{port}"
    if name_in(endpoint) is None:
        return endpoint
    return f"tcp://[::]:{port}" if has_ipv6() else f"tcp://0.0.0.0:{port}"


class PartReader:
    """Reads whole messages from a socket; the peer chooses the sizes and the number of parts.

    security: messages of senders that are not admitted, or no longer, are dropped.
    """

    def __init__(self, socket: zmq.asyncio.Socket, security: ServerSecurity | None = None) -> None:
        self._socket = socket
        self._security = security
        self._plain: zmq.Socket[bytes] = zmq.Socket.shadow(socket.underlying)  # the same socket without futures
        self._num_ready = 0
        self.bytes_in = 0
        self.sender: str | None = None

    async def read(self) -> list[Buffer]:
        """Wait for the next message and return its parts, at most MAX_PARTS; further ones are dropped.

        With security, ``sender`` is the name of its sender.
        """
        while True:
            try:
                parts, sender = await self._read()
            except zmq.Again:
                continue  # the connection ended before its message was read
            if self._security is None or (sender is not None and self._security.admits(sender)):
                self.sender = sender
                return parts

    async def _read(self) -> tuple[list[Buffer], str | None]:
        receiving = self._socket.recv(copy=False)
        # zmq.asyncio returns a future, done at once if a message has already arrived.
        if asyncio.isfuture(receiving) and receiving.done():
            await self._give_way()
        else:
            self._num_ready = 0
        frame = await receiving
        self.bytes_in += wire_size(len(frame))
        parts: list[Buffer] = [_content(frame)]
        while frame.more:
            # A message arrives whole, so its other parts are here.
            frame = self._plain.recv(zmq.NOBLOCK, copy=False)
            self.bytes_in += wire_size(len(frame))
            if len(parts) < MAX_PARTS:
                parts.append(_content(frame))
            else:
                await self._give_way()
        return parts, _sender(frame) if self._security is not None else None

    async def _give_way(self) -> None:
        """Let other tasks run now and then: awaiting a done future does not, and a flood would block the loop."""
        self._num_ready += 1
        if self._num_ready >= MAX_READY:
            self._num_ready = 0
            await asyncio.sleep(0)


async def send_whole(socket: zmq.asyncio.Socket, parts: Sequence[Buffer], *, copy: bool = True) -> None:
    """Send one message, however often its connection ends meanwhile; wait while there is no connection.

    Raises:
        TransportError: the socket is closed.
    """
    while True:
        try:
            await socket.send_multipart(parts, copy=copy)
            return
        except zmq.Again:
            continue  # the connection ended just then: libzmq has taken back the parts that it had
        except zmq.ZMQError:
            if socket.closed:
                raise TransportError("the link is closed") from None
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # Closing cancels pyzmq's own futures; the sending task itself is not cancelled.
            if socket.closed and task is not None and not task.cancelling():
                raise TransportError("the link is closed") from None
            raise


def _content(frame: zmq.Frame) -> Buffer:
    return frame.bytes if len(frame) < ZERO_COPY_BYTES else frame.buffer


def _sender(frame: zmq.Frame) -> str | None:
    """Return the name that the Gate gave to a message's sender, or None for a message without security."""
    try:
        return str(frame.get("User-Id")) or None
    except zmq.ZMQError:
        return None


def wire_size(size: int) -> int:
    """Return the bytes that a part takes on the wire: ZMTP 3.1 frames have a header of 2 or 9 bytes (RFC 37)."""
    return size + (2 if size < 256 else 9)


def _advice(error: zmq.ZMQError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "the port is in use; stop what uses it, or choose another one in the topology or by --base-port"
        case errno.EADDRNOTAVAIL | errno.ENODEV:
            return "no network interface of this machine has that address; use one that it has, or 127.0.0.1"
        case errno.EACCES:
            return "not permitted; choose a port of 1024 or more"
        case errno.EINVAL | errno.EPROTONOSUPPORT | zmq.ENOCOMPATPROTO:
            return "not an endpoint; write tcp://ADDRESS:PORT, for example tcp://127.0.0.1:5001"
        case _:
            return f"{error.strerror}; write tcp://ADDRESS:PORT with an address that can be reached"
