"""Follow libzmq's background events of a socket: new peers, refused peers, and connections that it gave up.

A ListenerWatch limits the connections of a listening socket; see room.py. A ServerWatch does so for a secured one, and
logs peers that fail before the Gate is asked. libzmq does not report their addresses, which are read from the
connection as soon as it is accepted. A peer that sends junk at once may be gone by then: its address is "unknown" in
the log, and never that of another peer whose connection has the same descriptor.

A ClientWatch reconnects where libzmq does not: after a refusal, or garbled bytes, libzmq's session is over. It also
looks up names, which would block libzmq's I/O thread; see names.py.

HANDSHAKE_FAILED_PROTOCOL would say more, but is not used: libzmq 4.3.5 also emits it for a garbled message, and then
loses the error, so that the connection hangs instead of ending.
"""

import asyncio
import contextlib
import errno
import itertools
import os
import socket as sockets
import struct
from math import inf

import structlog
import zmq
import zmq.asyncio

from mdiq.errors import TransportError
from mdiq.transport.curve import Refusals
from mdiq.transport.names import look_up, name_in, plain_address, with_address
from mdiq.transport.room import (
    CURVE_HANDSHAKE_BYTES,
    HANDSHAKE_BYTES,
    Room,
    borrowed,
    bytes_received,
    connection_limit,
    end_connection,
)

log = structlog.get_logger()

RETRY_S = 2.0
CLOSE_S = 5.0
LOOK_AGAIN_S = 5.0
SLOW_S = 5.0
ANSWER_S = 1.0  # a closed port answers at once, over any link
UNKNOWN = "unknown"
HANDSHAKE_SLACK = 128  # for the metadata of a handshake
_NUMBERS = itertools.count()


class Watch:
    """Reads the events of one socket as soon as they come, from ``start`` to ``aclose``."""

    _EVENTS = 0

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self._monitor: zmq.Socket[bytes] | None = None

    def start(self) -> None:
        """Begin to watch; before the socket binds or connects."""
        address = f"inproc://mdiq-watch-{next(_NUMBERS)}"
        self._socket.monitor(address, self._EVENTS)
        # A plain socket: with zmq.asyncio an event is seen some rounds of the loop later.
        self._monitor = self._socket.context.socket(zmq.PAIR, socket_class=zmq.Socket)
        self._monitor.connect(address)
        asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._take_in)
        self._take_in()

    async def aclose(self) -> None:
        """Stop watching; the socket can be closed then."""
        if self._monitor is not None and not self._monitor.closed:
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())
            if not self._socket.closed:
                self._socket.disable_monitor()
            self._monitor.close(linger=0)

    def _take_in(self) -> None:
        """Handle all events so far. libzmq wakes us again only after a read that found none."""
        assert self._monitor is not None, "start comes first"
        with contextlib.suppress(zmq.Again):
            while True:
                head, _ = self._monitor.recv_multipart(zmq.NOBLOCK)
                event, value = struct.unpack("=Hi", head)
                self._handle(event, value)

    def _handle(self, event: int, value: int) -> None:
        raise NotImplementedError


class ListenerWatch(Watch):
    """Limits the connections that strangers can open to a listening socket."""

    _EVENTS = zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
    _HANDSHAKE_BYTES = HANDSHAKE_BYTES

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        super().__init__(socket)
        self._port = 0
        self._max = connection_limit()
        self._room = Room(self._max, lambda it: bytes_received(it) > self._HANDSHAKE_BYTES, self._end)

    def listening(self) -> None:
        """To be called as soon as the socket is bound, before any peer connects."""
        self._take_in()

    @property
    def inflow(self) -> int:
        """Bytes on the connections that there are now, without their handshakes.

        A peer that is refused finishes no handshake, however often it tries. A handshake's length varies a little.
        """
        handshake_bytes = self._HANDSHAKE_BYTES + HANDSHAKE_SLACK
        return sum(max(bytes_received(each) - handshake_bytes, 0) for each in self._room.connections)

    def _handle(self, event: int, value: int) -> None:
        match event:
            case zmq.EVENT_LISTENING:
                with contextlib.suppress(OSError), borrowed(value) as listener:
                    self._port = listener.getsockname()[1]
            case zmq.EVENT_ACCEPTED:
                self._room.accepted(value)
            case zmq.EVENT_DISCONNECTED:
                self._room.ended(value)

    def _end(self, connection: int) -> None:
        log.warning("too_many_connections", port=self._port, most=self._max, ended=_address(connection))
        end_connection(connection, self._port)


class ServerWatch(ListenerWatch):
    """Logs peers that fail in the handshake, and reports when the port is free again after an unbind."""

    _EVENTS = (
        ListenerWatch._EVENTS
        | zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_CLOSED
    )
    _HANDSHAKE_BYTES = CURVE_HANDSHAKE_BYTES

    def __init__(self, socket: zmq.asyncio.Socket, domain: str, refusals: Refusals) -> None:
        super().__init__(socket)
        self._domain = domain
        self._refusals = refusals
        self._shaking: dict[int, str] = {}  # connections whose handshake goes on: their descriptor and peer
        self._accepted: set[int] = set()  # of these: those that were accepted since the events were last all read
        self._num_succeeded = 0  # of these; libzmq does not report which
        self._num_unlisted = 0  # refused by the Gate, which has logged them, and not yet disconnected
        self._reason: str | None = None
        self._is_gate_missing = False
        self._closed = asyncio.Event()

    async def rebind(self, endpoint: str) -> None:
        """Close every connection of the socket and listen again; peers reconnect by themselves.

        Raises:
            TransportError: the port is no longer available.
        """
        self._closed.clear()
        try:
            self._socket.unbind(endpoint)  # the connections belong to the listener, and end with it
            async with asyncio.timeout(CLOSE_S):
                await self._closed.wait()
            # libzmq does not report the end of each one.
            self._room.clear()
            self._shaking.clear()
            self._num_succeeded = self._num_unlisted = 0
            self._socket.bind(endpoint)
            self.listening()
        except (zmq.ZMQError, TimeoutError) as error:
            raise TransportError(f"{endpoint}: cannot listen after a revocation: {error}; restart the node") from None

    def _take_in(self) -> None:
        super()._take_in()
        self._accepted.clear()

    def _handle(self, event: int, value: int) -> None:
        super()._handle(event, value)
        match event:
            case zmq.EVENT_ACCEPTED:
                self._shaking[value] = _address(value)
                self._accepted.add(value)
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_gate_missing = False
                self._num_succeeded += 1
                if self._num_succeeded >= len(self._shaking):
                    self._shaking.clear()
                    self._num_succeeded = 0
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if value == errno.EFAULT:
                # The connection ends when its handshake times out.
                if not self._is_gate_missing:
                    log.error("gate_not_running", plane=self._domain, error="every peer is refused; restart the node")
                self._is_gate_missing = True
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                why = "in time" if value == errno.EAGAIN else f"({os.strerror(value)})"
                self._reason = f"it did not finish the handshake {why}"
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._num_unlisted += 1
            case zmq.EVENT_DISCONNECTED:
                self._disconnected(value)
            case zmq.EVENT_CLOSED:
                self._closed.set()

    def _disconnected(self, connection: int) -> None:
        """Log the peer if its handshake failed.

        libzmq reports a failure together with the end of its connection, but not for keys that the Gate has refused.
        """
        address = self._shaking.pop(connection, None)
        if connection in self._accepted:
            # libzmq reports the end before it closes, so an address that is read before that is right. Here the end
            # may already have been waiting to be read, and the descriptor may have been another connection's.
            address = UNKNOWN
        reason, self._reason = self._reason, None
        if reason is None and self._num_unlisted and address is not None:
            has_noted = self._refusals.has_noted_key
            # A peer of unknown address is one of the unlisted ones if not all of these are among the known addresses,
            # so that none is noted twice.
            num_known = sum(has_noted(self._domain, other) for other in self._shaking.values())
            if has_noted(self._domain, address) or (address == UNKNOWN and self._num_unlisted > num_known):
                self._num_unlisted -= 1
                return
        # If others have succeeded meanwhile, this may be one of them that disconnects already.
        if reason is None and address is not None and not self._num_succeeded:
            reason = "it does not use CURVE, has a wrong public key of ours, or replays a recording"
        if reason:
            self._refusals.note(self._domain, address or UNKNOWN, reason)


class ClientWatch(Watch):
    """Connects a socket, again when libzmq has given up or its peer's address has changed; logs why a peer is missing.

    ``start`` connects. A name is looked up first, and again while there is no connection; each time another one of
    its addresses is tried.
    """

    _EVENTS = (
        zmq.EVENT_CONNECTED
        | zmq.EVENT_CONNECT_DELAYED
        | zmq.EVENT_CONNECT_RETRIED
        | zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_DISCONNECTED
    )

    def __init__(self, socket: zmq.asyncio.Socket, endpoint: str, retry_s: float = RETRY_S) -> None:
        super().__init__(socket)
        self._endpoint = endpoint
        self._retry_s = retry_s
        self._retry: asyncio.TimerHandle | None = None
        self._is_told = self._is_silence_told = False
        self._asked_s = inf  # when it began to try to connect
        self._num_refused, self._is_refused = 0, False  # in a row; whether the newest attempt was
        self._name = name_in(endpoint)
        self._naming: asyncio.Task[None] | None = None
        self._address = endpoint  # of the name: where the socket is connected to
        self._is_away = asyncio.Event()
        self._is_away.set()

    def start(self) -> None:
        """Begin to watch, and to connect.

        Raises:
            ZMQError: the endpoint is not an address.
        """
        super().start()
        if self._name is None:
            self._connect()
        else:
            self._address = ""
            self._naming = asyncio.create_task(self._follow(self._name), name="names")
            self._naming.add_done_callback(_log_failure)

    async def aclose(self) -> None:
        """Stop watching and reconnecting; the socket can be closed then."""
        if self._naming is not None:
            self._naming.cancel()
            await asyncio.gather(self._naming, return_exceptions=True)
        self._retry_no_more()
        await super().aclose()

    def _connect_anew(self) -> None:
        if not self._is_refused:
            self._tell(
                "peer_not_trusted", "it has another key than its public_key in the topology, or bytes are garbled"
            )
        self._disconnect()
        self._connect()

    def _retry_no_more(self) -> None:
        if self._retry is not None:
            self._retry.cancel()

    def _handle(self, event: int, value: int) -> None:
        match event:
            case zmq.EVENT_DISCONNECTED:
                self._is_away.set()
                self._retry_no_more()
                # unless libzmq says that it tries itself
                self._retry = asyncio.get_running_loop().call_later(self._retry_s, self._connect_anew)
            case zmq.EVENT_CONNECT_DELAYED:
                self._retry_no_more()
                self._asked_s = asyncio.get_running_loop().time()
            case zmq.EVENT_CONNECT_RETRIED:
                self._retry_no_more()
                self._note_failed()
            case zmq.EVENT_CONNECTED:
                self._is_refused = False
                self._is_away.clear()
                self._retry_no_more()
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_told = self._is_silence_told = False
                self._num_refused = 0
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._num_refused, self._is_refused = self._num_refused + 1, True
                if self._num_refused > 1:  # once is nothing: where the ring changes, a peer may know it before us
                    self._tell(
                        "refused_by_peer", "our public key is not listed there for this plane; mdiq reload there"
                    )
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._tell("peer_not_trusted", "it ended the handshake; is its public_key in the topology its own?")

    def _note_failed(self) -> None:
        """Say of an attempt to connect that it had no answer at all: nobody else says so. A closed port answers."""
        waited_s = asyncio.get_running_loop().time() - self._asked_s
        self._asked_s = inf
        if waited_s >= ANSWER_S and not self._is_silence_told:
            self._is_silence_told = True
            log.warning(
                "peer_does_not_answer",
                endpoint=self._endpoint,
                error=f"nothing came back for {waited_s:.0f} s, and it is tried again; see whether it is switched on "
                "and has that address, and whether a firewall there lets this port in",
            )

    def _tell(self, event: str, error: str) -> None:
        if not self._is_told:
            self._is_told = True
            log.warning(event, endpoint=self._endpoint, error=error)

    async def _follow(self, name: str) -> None:
        """Keep the socket connected to a current address of the name."""
        for i in itertools.count():
            addresses = await self._look_up(name)
            if addresses:
                self._move_to(with_address(self._endpoint, addresses[i % len(addresses)]))
            await asyncio.sleep(LOOK_AGAIN_S)
            await self._is_away.wait()

    async def _look_up(self, name: str) -> list[str]:
        slow = asyncio.get_running_loop().call_later(
            SLOW_S, self._tell, "name_server_silent", f"no answer yet for the address of {name}; other links go on"
        )
        try:
            return await look_up(name)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it cannot be a name"
            self._tell("name_not_found", f"{name}: {reason}; correct the name, or write its address")
            return []
        finally:
            slow.cancel()

    def _move_to(self, address: str) -> None:
        if address != self._address:
            if self._address:
                self._disconnect()
            self._address = address
            self._retry_no_more()
            try:
                self._connect()
            except zmq.ZMQError as error:
                self._address = ""
                self._tell("address_not_usable", f"{address}: {error.strerror}; write another address")

    def _connect(self) -> None:
        self._socket.setsockopt(zmq.IPV6, int("[" in self._address))
        self._socket.connect(self._address)

    def _disconnect(self) -> None:
        with contextlib.suppress(zmq.ZMQError):  # libzmq may have forgotten the endpoint
            self._socket.disconnect(self._address)


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("watch_failed", error=repr(error))


def _address(connection: int) -> str:
    try:
        with borrowed(connection) as socket:
            is_tcp = socket.family in (sockets.AF_INET, sockets.AF_INET6)
            return plain_address(str(socket.getpeername()[0])) if is_tcp else UNKNOWN
    except OSError:
        return UNKNOWN
