"""How a service lives under systemd: readiness, status text, watchdog, and what its signals mean. Knows no ring.

    start ──▶ starting ──all conditions met──▶ ready ──SIGTERM──▶ draining ──done, or deadline──▶ end
                                                │ ▲
                                         SIGHUP ▼ │ reload done or refused
                                              reloading

Under systemd a service is told by NOTIFY_SOCKET where to report (sd_notify(3)); without it every report is a no-op, so
the same code runs in a terminal. The protocol is a line in a datagram; a package for it would be longer than the code.
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NoReturn

import structlog

from mdiq.errors import MdiqError

log = structlog.get_logger()

Clock = Callable[[], float]

EXTEND_S = 120.0
"""How much longer a start may take, counted from its last progress."""
MAX_STATUS_CHARACTERS = 200
_SEND_TIMEOUT_S = 0.5
_FEEDS_PER_INTERVAL = 4


class Notifier:
    """Tells the service manager what this process does. Without an address it tells nobody.

    Nothing here raises: a node goes on serving when its manager does not listen.
    """

    def __init__(self, address: str | None, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._socket: socket.socket | None = None
        self._address = ""
        self._status = ""
        self._extended_at_s: float | None = None
        self._is_ready = False
        self._is_lost = False
        if not address:
            return
        if address[0] not in "@/":
            log.warning("notify_socket_unusable", address=address)
            return
        # systemd writes the NUL of an abstract name as @.
        self._address = "\0" + address[1:] if address[0] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Notifier":
        """Return the Notifier of this process: silent unless systemd started it."""
        return cls(environ.get("NOTIFY_SOCKET"))

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    def starting(self, text: str) -> None:
        """Say what the start is at, and so that it makes progress: the manager waits ``EXTEND_S`` longer.

        Call it for every step of a long start; a start that stands still is ended by the manager.
        """
        now = self._clock()
        is_due = self._extended_at_s is None or now - self._extended_at_s >= EXTEND_S / _FEEDS_PER_INTERVAL
        if is_due and not self._is_ready:
            self._extended_at_s = now
            self._send(f"EXTEND_TIMEOUT_USEC={round(EXTEND_S * 1e6)}")
        self.status(text)

    def status(self, text: str) -> None:
        """Show ``text`` in ``systemctl status``."""
        line = _one_line(text)
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def ready(self, text: str) -> None:
        """Say that the service serves."""
        self._is_ready = True
        self._status = _one_line(text)
        self._send(f"READY=1\nSTATUS={self._status}")

    def reloading(self) -> None:
        """Say that the configuration is read again; :meth:`reloaded` must follow. No-op while the service starts."""
        if self._is_ready:
            # Since 253 the manager refuses a reload without its time, by the clock that Python calls monotonic.
            self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """Say that the reload is over, with whatever result. No-op while the service starts: it is not ready yet."""
        if self._is_ready:
            self._send("READY=1")

    def stopping(self, text: str) -> None:
        """Say that the service ends."""
        self._status = _one_line(text)
        self._send(f"STOPPING=1\nSTATUS={self._status}")

    def feed_watchdog(self) -> None:
        """Say that the service works as it should; see :class:`Watchdog`, which judges that."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Close the socket; what is said from now on reaches nobody."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        # READY must not be lost to a queue that is full for a moment; a manager that does not read is waited for once.
        self._socket.settimeout(0.0 if self._is_lost else _SEND_TIMEOUT_S)
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as error:
            if not self._is_lost:
                log.warning("notify_failed", error=str(error))
            self._is_lost = True
        else:
            self._is_lost = False


def watchdog_interval_s(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> float | None:
    """Return how often the manager wants to hear of this process, or None when it does not watch it."""
    # A child that inherits the environment is not the one that is watched.
    if environ.get("WATCHDOG_PID", str(pid or os.getpid())) != str(pid or os.getpid()):
        return None
    text = environ.get("WATCHDOG_USEC", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        log.warning("watchdog_interval_unusable", watchdog_usec=text)
        return None
    return int(text) / 1e6


class Watchdog:
    """Feeds the manager's watchdog while the compute loop meets its deadline, and starves it when the loop does not.

    interval_s: what the manager allows between two feeds.
    has_work: whether anything waits for the compute loop or is computed now.
    last_progress_s: when, by ``clock``, the compute loop last ended a step.
    deadline_s: the longest step; half of the interval when it is None. A step that takes longer than the interval and
    the deadline together costs the process its life.

    The timer in :meth:`run` only asks. Whether it feeds depends on the loop, so a process whose event loop runs but
    whose worker thread hangs is restarted.
    """

    def __init__(
        self,
        notifier: Notifier,
        interval_s: float,
        *,
        has_work: Callable[[], bool],
        last_progress_s: Callable[[], float],
        clock: Clock = time.monotonic,
        deadline_s: float | None = None,
    ) -> None:
        self._notifier = notifier
        self._interval_s = interval_s
        self._has_work = has_work
        self._last_progress_s = last_progress_s
        self._clock = clock
        self._deadline_s = interval_s / 2 if deadline_s is None else deadline_s
        self._idle_at_s = clock()
        self._is_late = False

    def look(self) -> bool:
        """Feed the watchdog if the compute loop meets its deadline, and return whether it does."""
        now = self._clock()
        if not self._has_work():
            self._idle_at_s = now
        # Work that came after a long rest is not late: it is counted from the last time that nothing waited.
        late_s = now - max(self._last_progress_s(), self._idle_at_s)
        is_late = late_s > self._deadline_s
        if is_late and not self._is_late:
            log.error("compute_loop_late", late_s=round(late_s, 1), deadline_s=self._deadline_s)
        self._is_late = is_late
        if not is_late:
            self._notifier.feed_watchdog()
        return not is_late

    async def run(self) -> NoReturn:
        """Look several times an interval, for ever."""
        while True:
            self.look()
            await asyncio.sleep(self._interval_s / _FEEDS_PER_INTERVAL)


def watchdog_loops(
    notifier: Notifier, has_work: Callable[[], bool], last_progress_s: Callable[[], float]
) -> dict[str, Coroutine[Any, Any, NoReturn]]:
    """Return the Watchdog's loop for ``serve_until_signal``'s ``beside``; none where the manager watches nobody."""
    interval_s = watchdog_interval_s()
    if interval_s is None:
        return {}
    watchdog = Watchdog(notifier, interval_s, has_work=has_work, last_progress_s=last_progress_s)
    return {"watchdog": watchdog.run()}


async def serve_until_signal(
    serving: Awaitable[None],
    *,
    notifier: Notifier,
    drain: Callable[[], Awaitable[None]],
    drain_s: float,
    reload: Callable[[], Awaitable[None]] | None = None,
    beside: Mapping[str, Coroutine[Any, Any, NoReturn]] | None = None,
) -> None:
    """Run ``serving`` until it ends, or until SIGTERM or SIGINT and then ``drain`` end it.

    drain: stops admitting and returns when what was admitted has ended; it gets ``drain_s`` seconds, then ``serving``
    is cancelled. A second signal cuts it short. reload: called by SIGHUP; what it refuses is logged and the old state
    stays. Without it, SIGHUP keeps its usual meaning. beside: loops by name that run as long as ``serving``; the
    service ends if one of them fails, since nobody would miss it otherwise.

    Raises: what ``serving`` raises, or a loop.
    """
    loop = asyncio.get_running_loop()
    end, hurry, hup = asyncio.Event(), asyncio.Event(), asyncio.Event()
    handlers = {number: lambda: (hurry if end.is_set() else end).set() for number in (signal.SIGTERM, signal.SIGINT)}
    if reload is not None:
        handlers[signal.SIGHUP] = hup.set
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    task = asyncio.ensure_future(serving)
    ending = asyncio.ensure_future(end.wait())
    reloading = asyncio.ensure_future(_reload_at(hup, reload, notifier))
    loops = [reloading, *(asyncio.create_task(loop, name=name) for name, loop in (beside or {}).items())]
    try:
        await asyncio.wait({task, ending, *loops}, return_when=asyncio.FIRST_COMPLETED)
        reloading.cancel()
        if end.is_set() and not task.done():
            await _drain_before(task, hurry, notifier, drain, drain_s)
        for ended in (task, *loops):
            if ended.done() and not ended.cancelled():
                ended.result()
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
        for left in (task, ending, *loops):
            left.cancel()
        await asyncio.gather(task, ending, *loops, return_exceptions=True)


async def _drain_before(
    task: "asyncio.Future[None]",
    hurry: asyncio.Event,
    notifier: Notifier,
    drain: Callable[[], Awaitable[None]],
    drain_s: float,
) -> None:
    """Drain until it is done, its time is over, the task ends, or another signal comes."""
    notifier.stopping(f"draining, at most {drain_s:g} s")
    log.info("drain_began", deadline_s=drain_s)
    draining = asyncio.ensure_future(drain())
    hurrying = asyncio.ensure_future(hurry.wait())
    try:
        waited_for: set[asyncio.Future[Any]] = {task, draining, hurrying}
        await asyncio.wait(waited_for, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if draining.done():
            draining.result()
            log.info("drain_ended")
        elif not task.done():
            log.warning("drain_cut_short", reason="signal" if hurry.is_set() else "deadline")
    finally:
        for left in (draining, hurrying):
            left.cancel()
        await asyncio.gather(draining, hurrying, return_exceptions=True)


async def _reload_at(hup: asyncio.Event, reload: Callable[[], Awaitable[None]] | None, notifier: Notifier) -> NoReturn:
    """Reload at every signal, for ever; signals during a reload make one more."""
    while True:
        await hup.wait()
        hup.clear()
        assert reload is not None  # without it SIGHUP has no handler
        notifier.reloading()
        try:
            await reload()
        except MdiqError as error:
            # A mistake in a file must not end a service that works.
            log.error("reload_refused", error=str(error))
        else:
            log.info("reloaded")
        notifier.reloaded()


def _one_line(text: str) -> str:
    # A line break in a status would begin a field of its own, READY=1 say.
    return " ".join(text.split())[:MAX_STATUS_CHARACTERS]
