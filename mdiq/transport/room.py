"""Limit the connections of a listener, and choose the one to close when a stranger opens too many.

Anyone who reaches a port can open idle connections, each of which costs a descriptor until the handshake times out. So
a listener has a maximum. The oldest connection with an unfinished handshake is closed first: a peer of the Ring
finishes it within a fraction of a second, and a stranger never does.
"""

import contextlib
import resource
import socket as sockets
import struct
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

MAX_DESCRIPTORS = 65_536
MAX_CONNECTIONS = 256
LISTENERS = 8
"""A listener may use one in this many of the descriptors: a Starter has four listeners, and models and threads need
some."""
_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in struct tcp_info, since Linux 4.1; see linux/tcp.h
_GREETING_BYTES = 64  # ZMTP 3.1, RFC 37
HANDSHAKE_BYTES = _GREETING_BYTES + 24
"""A peer that finished the handshake has sent more bytes, even without security: a greeting and a READY."""
CURVE_HANDSHAKE_BYTES = _GREETING_BYTES + 202 + 257
"""The same with CURVE, RFC 26: a greeting, a HELLO and an INITIATE, which is more with its metadata."""

T = TypeVar("T", bound=Hashable)


def raise_descriptor_limit() -> None:
    """Raise this process's descriptor limit to its hard limit, at most MAX_DESCRIPTORS; the usual 1,024 are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a sandbox may forbid it: then fewer connections fit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection_limit(max_connections: int = MAX_CONNECTIONS) -> int:
    """Return how many connections a listener of this process may hold, at most ``max_connections``."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max_connections if soft == resource.RLIM_INFINITY else max(8, min(max_connections, soft // LISTENERS))


class Room(Generic[T]):
    """The connections of one listener.

    is_through: returns whether a connection's handshake is finished, which it then stays. end: closes a connection.
    is_idle: returns whether one that is through may be closed if all are.
    """

    def __init__(
        self,
        max_connections: int,
        is_through: Callable[[T], bool],
        end: Callable[[T], None],
        is_idle: Callable[[T], bool] = lambda _: False,
    ) -> None:
        self._max = max_connections
        self._is_through = is_through
        self._is_idle = is_idle
        self._end = end
        self._shaking: dict[T, None] = {}  # oldest first; a dict for its order
        self._through: dict[T, None] = {}

    def accepted(self, connection: T) -> None:
        """Add a connection. If there are too many, close the oldest with an unfinished handshake, else the oldest that
        is idle, else this one."""
        self.ended(connection)
        self._shaking[connection] = None
        if len(self._shaking) + len(self._through) > self._max:
            leaving = self._to_close(connection)
            self.ended(leaving)
            self._end(leaving)

    @property
    def connections(self) -> list[T]:
        return [*self._shaking, *self._through]

    def ended(self, connection: T) -> None:
        """Note that a connection has ended."""
        self._shaking.pop(connection, None)
        self._through.pop(connection, None)

    def clear(self) -> None:
        """Note that all connections have ended."""
        self._shaking.clear()
        self._through.clear()

    def _to_close(self, newest: T) -> T:
        for connection in [each for each in self._shaking if each != newest]:
            if not self._is_through(connection):
                return connection
            del self._shaking[connection]
            self._through[connection] = None
        return next(filter(self._is_idle, self._through), newest)


def bytes_received(connection: int) -> int:
    """Return the bytes received so far on a TCP connection; 0 if it has ended or the kernel does not report them."""
    try:
        with borrowed(connection) as socket:
            info = socket.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _BYTES_RECEIVED + 8)
    except OSError:
        return 0
    return int(struct.unpack_from("=Q", info, _BYTES_RECEIVED)[0]) if len(info) >= _BYTES_RECEIVED + 8 else 0


def end_connection(connection: int, port: int) -> None:
    """End a connection accepted on a port: its owner reads the end of the stream and closes it.

    The owner may have closed it already, and the descriptor may belong to another connection: that is left alone.
    """
    with contextlib.suppress(OSError), borrowed(connection) as socket:
        if socket.family in (sockets.AF_INET, sockets.AF_INET6) and socket.getsockname()[1] == port:
            socket.shutdown(sockets.SHUT_RDWR)


@contextlib.contextmanager
def borrowed(descriptor: int) -> Iterator[sockets.socket]:
    """Yield a socket object for a descriptor that libzmq owns. The descriptor is neither closed nor duplicated.

    Raises:
        OSError: the descriptor is not a socket.
    """
    socket = sockets.socket(fileno=descriptor)
    try:
        yield socket
    finally:
        socket.detach()
