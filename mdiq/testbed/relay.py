"""A user-space relay that makes a TCP hop slow: delay, jitter and bandwidth of a LinkShape, in both directions.

Kernel traffic shaping is not there on every machine. A relay stands between PUSH and PULL and passes bytes on when they
are due, in order; it knows nothing of what they mean. It runs in a process of its own (``serve``), so that its work is
not charged to a Node, and on a loop whose timers are finer than epoll's milliseconds.
"""

import asyncio
import contextlib
import json
import random
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Callable

from mdiq.errors import ConfigError, TransportError
from mdiq.testbed.link_shape import DelayLine, LinkShape, parse_link

Clock = Callable[[], float]
Draw = Callable[[], float]

MAX_CHUNK_BYTES = 64 * 1024
MIN_CHUNK_BYTES = 1448  # what a TCP segment carries over Ethernet
CHUNK_S = 1e-3  # a piece is passed on as a whole: at most so much of the link's time
UNLIMITED_BUFFER_BYTES = 32 << 20
QUEUE_BYTES = 64 * 1024  # what waits in front of a link beside what travels on it: little, as in a good router
START_TIMEOUT_S = 30.0


def chunk_bytes(shape: LinkShape) -> int:
    """Return how many bytes are read at once."""
    if not shape.bandwidth_bit_per_s:
        return MAX_CHUNK_BYTES
    return min(max(round(shape.bandwidth_bit_per_s * CHUNK_S / 8), MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)


def buffer_bytes(shape: LinkShape) -> int:
    """Return how many bytes may be under way at once; a sender that is faster than the link then has to wait."""
    if not shape.bandwidth_bit_per_s:
        return UNLIMITED_BUFFER_BYTES
    travelling = shape.bandwidth_bit_per_s * (shape.delay_s + shape.jitter_s) / 8
    return min(round(travelling) + QUEUE_BYTES, UNLIMITED_BUFFER_BYTES)


class Relay:
    """A port that leads to another one over a slow link."""

    def __init__(
        self,
        shape: LinkShape,
        host: str,
        port: int,
        *,
        listener: socket.socket | None = None,
        clock: Clock = time.monotonic,
        draw: Draw | None = None,
    ) -> None:
        self._shape = shape
        self._listener = listener
        self._target = (host, port)
        self._clock = clock
        self._draw = draw or (lambda: random.uniform(-1.0, 1.0))
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self) -> None:
        """Listen on a free port of the loopback interface, or where the listener that was given does."""
        listener = self._listener or socket.create_server(("127.0.0.1", 0))
        # Connections inherit it: what waits in the kernel in front of the link is not shaped, so it should be little.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUE_BYTES)
        self._server = await asyncio.start_server(self._accept, sock=listener, limit=MAX_CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        """Close the port and every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # asyncio runs this coroutine in one
        self._connections.add(task)
        try:
            await self._join(reader, writer)
        except OSError:
            pass  # the target cannot be reached: the near side sees its connection closed, and tries again
        except asyncio.CancelledError:
            pass  # the relay ends; asyncio would log what leaves this callback
        finally:
            writer.close()
            self._connections.discard(task)

    async def _join(self, near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter) -> None:
        """Pass bytes both ways until one side ends; then both are closed."""
        far_reader, far_writer = await asyncio.open_connection(*self._target, limit=MAX_CHUNK_BYTES)
        try:
            for writer in (near_writer, far_writer):
                writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ways = [
                asyncio.create_task(self._pass_on(near_reader, far_writer), name="forth"),
                asyncio.create_task(self._pass_on(far_reader, near_writer), name="back"),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            far_writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one direction's bytes on when they are due; return when it has ended and all of it is through."""
        way = _Way(self._shape, self._clock, self._draw)
        with contextlib.suppress(OSError):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(way.fill(reader))
                tasks.create_task(way.drain(writer))


class _Way:
    """One direction of a connection: the bytes under way, each piece with the time at which it is due."""

    def __init__(self, shape: LinkShape, clock: Clock, draw: Draw) -> None:
        self._line = DelayLine(shape)
        self._chunk_bytes = chunk_bytes(shape)
        self._max_bytes = buffer_bytes(shape)
        self._clock = clock
        self._draw = draw
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._num_bytes = 0
        self._changed = asyncio.Event()  # a piece came or went; both sides wait for it, never at the same time

    async def fill(self, reader: asyncio.StreamReader) -> None:
        """Take bytes in until the stream ends; the empty piece marks its end."""
        while True:
            data = await reader.read(self._chunk_bytes)
            while data and self._num_bytes and self._num_bytes + len(data) > self._max_bytes:
                self._changed.clear()
                await self._changed.wait()
            self._pieces.append((self._line.release_s(len(data), self._clock(), self._draw()), data))
            self._num_bytes += len(data)
            self._changed.set()
            if not data:
                return

    async def drain(self, writer: asyncio.StreamWriter) -> None:
        """Send each piece when it is due, until the end has come."""
        while True:
            while not self._pieces:
                self._changed.clear()
                await self._changed.wait()
            due_s, data = self._pieces.popleft()
            if (wait_s := due_s - self._clock()) > 0:
                await asyncio.sleep(wait_s)
            if not data:
                return
            writer.write(data)
            await writer.drain()
            self._num_bytes -= len(data)
            self._changed.set()


class RelayProcess:
    """The relays of a Ring's Hops, all in one child process.

    endpoints: where each relay listens, in the order of the targets.
    """

    def __init__(self, child: asyncio.subprocess.Process, endpoints: list[str]) -> None:
        self._child = child
        self.endpoints = endpoints

    @classmethod
    async def start(cls, shape: LinkShape, targets: list[str]) -> "RelayProcess":
        """Start a relay in front of every target, ``tcp://HOST:PORT``.

        Raises:
            TransportError: the process does not come up.
        """
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "mdiq.testbed.relay", str(shape)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert child.stdin is not None and child.stdout is not None  # PIPE was asked for
        relays = cls(child, [])
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(relays.aclose)
            try:
                child.stdin.write(json.dumps(targets).encode() + b"\n")
                async with asyncio.timeout(START_TIMEOUT_S):
                    relays.endpoints = json.loads(await child.stdout.readline())
            except (OSError, ValueError, TimeoutError):
                raise TransportError(f"--link {shape}: the relays' process does not start; see the log") from None
            undo.pop_all()
        return relays

    @property
    def pid(self) -> int:
        return self._child.pid

    async def aclose(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()  # it holds nothing that must be written
        await self._child.wait()


def serve(link: str) -> None:
    """Be the relays' process: targets come as a line of JSON on standard input, endpoints go to standard output.

    A target is an endpoint, or an endpoint and the descriptor of a socket that listens for it: one that this process
    was started with, made in another network maybe. It ends when standard input does, so with its parent.
    """
    shape = parse_link(link)
    targets = json.loads(sys.stdin.readline())
    # epoll's timeouts are whole milliseconds; select's are not, and there are few sockets.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_serve(shape, targets))


async def _serve(shape: LinkShape, targets: list[str | tuple[str, int]]) -> None:
    relays = [
        Relay(shape, *_host_and_port(target))
        if isinstance(target, str)
        else Relay(shape, *_host_and_port(target[0]), listener=socket.socket(fileno=target[1]))
        for target in targets
    ]
    for relay in relays:
        await relay.start()
    sys.stdout.write(json.dumps([f"tcp://127.0.0.1:{relay.port}" for relay in relays]) + "\n")
    sys.stdout.flush()
    loop = asyncio.get_running_loop()
    parent = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(parent), sys.stdin)
    await parent.read()
    for relay in relays:
        await relay.aclose()


def _host_and_port(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not host or not port.isdigit():
        raise ConfigError(f"relay: {endpoint!r} is not tcp://HOST:PORT")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    try:
        serve(sys.argv[1])
    except ConfigError as error:
        sys.exit(f"relay: {error}")
