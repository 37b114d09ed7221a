"""Virtual time: an event loop whose clock moves on only when nothing is ready, and an executor without threads.

What waits for seconds costs microseconds, and the same schedule runs the same way every time.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
MAX_STEPS = 200_000
"""Turns of the loop without any time between them: something spins."""


class _Selector(selectors.SelectSelector):
    """Nothing ever comes from outside: instead of waiting, time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._num_steps = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("nothing is left that could ever happen, and something still waits")
        self._num_steps = 0 if timeout > 0 else self._num_steps + 1
        assert self._num_steps < MAX_STEPS, f"something spins at {self.now:g} s"
        self.now += max(timeout, 0.0)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is virtual; jobs for threads are done at once, in the loop's own thread."""

    def __init__(self) -> None:
        self.clock = _Selector()
        super().__init__(self.clock)
        self.errors: list[Mapping[str, Any]] = []  # that nobody has looked at
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        return self.clock.now

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
        return self.call_soon(callback, *args, **kwargs)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> "asyncio.Future[T]":  # type: ignore[override]
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class VirtualExecutor:
    """Runs each job when its time is over, one after the other; the ThreadPoolExecutor of a Worker.

    job_s: seconds of a job that is submitted now.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, job_s: float) -> None:
        self._loop = loop
        self.job_s = job_s
        self._free_s = 0.0
        self._waiting: set[Future[Any]] = set()

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        self._waiting.add(future)
        self._free_s = max(self._free_s, self._loop.time()) + self.job_s
        self._loop.call_at(self._free_s, self._run, future, job)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for future in list(self._waiting):
            future.cancel()

    def _run(self, future: "Future[T]", job: Callable[[], T]) -> None:
        self._waiting.discard(future)
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)


def run_virtual(main: Callable[[VirtualTimeLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in virtual time; see that it leaves no task and no error behind."""
    loop = VirtualTimeLoop()
    try:
        asyncio.set_event_loop(loop)
        result = loop.run_until_complete(main(loop))
        left = sorted(task.get_name() for task in asyncio.all_tasks(loop))
        assert not left, f"tasks are left over: {', '.join(left)}"
        assert not loop.errors, f"nobody has looked at: {loop.errors}"
        return result
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        asyncio.set_event_loop(None)
        loop.close()
