"""Services as a service manager keeps them: started, started again when they end, stopped."""

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable

RESTART_S = 1.0  # RestartSec of a unit with Restart=always
STOP_S = 40.0  # a service that has not ended so long after SIGTERM is killed; it may drain for 25 s
NOTICED_S = 20.0


class Unit:
    """A service that a thread starts, and starts again when it ends, as a service manager does.

    restarts: whether it is started again after an end that was not asked for. is_on: there is a process.
    """

    def __init__(self, name: str, spawn: Callable[[], "subprocess.Popen[bytes]"], *, restarts: bool) -> None:
        self.name = name
        self.num_starts = 0
        self.is_on = False
        self.restarts = restarts
        self._spawn = spawn
        self._process: subprocess.Popen[bytes] | None = None
        self._is_wanted = self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._keep, name=f"unit {name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The process, or the last one that there was."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    def start(self) -> None:
        """Start it, unless it is on; return when there is a process."""
        with self._changed:
            self._is_wanted = True
            self._changed.notify_all()
            self._until(lambda: self.is_on, NOTICED_S, "not started")

    def until_started(self, after: int) -> None:
        """Wait until it has been started more often than ``after``."""
        with self._changed:
            self._until(lambda: self.num_starts > after, NOTICED_S, "not started again")

    def kill(self) -> None:
        """Kill its process, as the kernel does when memory is short; return when it is gone."""
        with self._changed:
            before = self.num_starts
            if self.is_on:
                self.signal(signal.SIGKILL)
            self._until(lambda: not self.is_on or self.num_starts > before, NOTICED_S, "not gone after SIGKILL")

    def stop(self) -> None:
        """End it with SIGTERM, and after a while with SIGKILL; it stays down."""
        with self._changed:
            self._is_wanted = False
            if self.is_on:
                self.signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                self._until(lambda: not self.is_on, STOP_S, "")
                return
        self.kill()

    def signal(self, number: int) -> None:
        """Send a signal to its process, if there is one."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def close(self) -> None:
        """Kill what still runs of it, and end the thread."""
        with self._changed:
            self._is_wanted, self._is_closing = False, True
            if self.is_on:
                self.signal(signal.SIGKILL)
            self._changed.notify_all()
        self._thread.join(NOTICED_S)
        assert not self._thread.is_alive(), f"{self.name} does not end"

    def _keep(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_wanted or self._is_closing)
                if self._is_closing:
                    return
                self._process = process = self._spawn()
                self.num_starts += 1
                self.is_on = True
                self._changed.notify_all()
            process.wait()
            with self._changed:
                self.is_on = False
                self._is_wanted = self._is_wanted and self.restarts
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_closing, RESTART_S if self._is_wanted else 0)

    def _until(self, holds: Callable[[], bool], timeout_s: float, what: str) -> None:
        if not self._changed.wait_for(holds, timeout_s):
            raise TimeoutError(f"{self.name}: {what} within {timeout_s:g} s")
