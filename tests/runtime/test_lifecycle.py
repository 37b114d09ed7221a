"""The service under its manager: a real datagram socket stands for systemd, time and the compute loop are values."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from mdiq.errors import ConfigError
from mdiq.runtime.lifecycle import (
    EXTEND_S,
    MAX_STATUS_CHARACTERS,
    Notifier,
    Watchdog,
    serve_until_signal,
    watchdog_interval_s,
)
from mdiq.runtime.loops import GivenUp, Progress, Worker
from mdiq.telemetry.trace import Tracer


class Manager:
    """What systemd hears: the datagrams at an address, oldest first."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._socket.close()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@mdiq-test-{os.getpid()}-{tmp_path.name}"
    manager = Manager(address)
    yield manager
    manager.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def notifier(manager: Manager, clock: Clock) -> Iterator[Notifier]:
    notifier = Notifier(manager.address, clock)
    yield notifier
    notifier.close()


def test_readiness_comes_with_its_status_in_one_datagram(manager: Manager, notifier: Notifier) -> None:
    notifier.ready("serving layers 0-11")
    assert manager.heard() == ["READY=1\nSTATUS=serving layers 0-11"]
    assert notifier.is_ready


def test_a_status_is_said_once(manager: Manager, notifier: Notifier) -> None:
    for text in ("loading", "loading", "loaded"):
        notifier.status(text)
    assert manager.heard() == ["STATUS=loading", "STATUS=loaded"]


def test_a_status_cannot_add_fields_and_has_a_bounded_length(manager: Manager, notifier: Notifier) -> None:
    notifier.status("a name with\nREADY=1\r\nMAINPID=1")
    notifier.status("x" * 5000)
    assert manager.heard() == ["STATUS=a name with READY=1 MAINPID=1", "STATUS=" + "x" * MAX_STATUS_CHARACTERS]


def test_a_start_that_makes_progress_gets_more_time_but_does_not_ask_at_every_step(
    manager: Manager, notifier: Notifier, clock: Clock
) -> None:
    for now in (100.0, 101.0, 100.0 + EXTEND_S / 4):
        clock.now = now
        notifier.starting(f"loading, {now:g}")
    extend = f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1e6:.0f}"
    assert manager.heard() == [extend, "STATUS=loading, 100", "STATUS=loading, 101", extend, "STATUS=loading, 130"]


def test_a_service_that_is_ready_asks_for_no_more_time_to_start(manager: Manager, notifier: Notifier) -> None:
    notifier.ready("serving")
    manager.heard()
    notifier.starting("loading layers 4-7")
    assert manager.heard() == ["STATUS=loading layers 4-7"]


def test_a_reload_carries_its_time_and_ends_with_readiness(manager: Manager, notifier: Notifier) -> None:
    notifier.ready("serving")
    notifier.reloading()
    notifier.reloaded()
    _, reloading, reloaded = manager.heard()
    first, second = reloading.split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0
    assert reloaded == "READY=1"


def test_a_reload_during_the_start_does_not_say_ready(manager: Manager, notifier: Notifier) -> None:
    notifier.reloading()
    notifier.reloaded()
    assert manager.heard() == []


def test_without_an_address_nothing_is_said_and_nothing_fails() -> None:
    notifier = Notifier.from_environment({})
    notifier.ready("serving")
    notifier.feed_watchdog()
    notifier.stopping("done")
    notifier.close()


def test_the_address_comes_from_the_environment(manager: Manager) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.address})
    notifier.feed_watchdog()
    assert manager.heard() == ["WATCHDOG=1"]
    notifier.close()


@pytest.mark.parametrize("address", ["vsock:2:1234", "relative/path"])
def test_an_address_of_another_kind_is_ignored_with_a_warning(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    Notifier(address).ready("serving")
    captured = capsys.readouterr()
    assert "notify_socket_unusable" in captured.out + captured.err


def test_a_manager_that_is_gone_is_reported_once_and_does_not_end_the_service(
    manager: Manager, notifier: Notifier, capsys: pytest.CaptureFixture[str]
) -> None:
    manager.close()
    if manager.address[0] == "/":
        os.unlink(manager.address)
    notifier.ready("serving")
    notifier.feed_watchdog()
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("notify_failed") == 1


def test_a_manager_that_listens_again_hears_the_next_report(manager: Manager, notifier: Notifier) -> None:
    for _ in range(1000):  # more than a socket's queue holds
        notifier.feed_watchdog()
    assert manager.heard()
    notifier.ready("serving")
    assert manager.heard() == ["READY=1\nSTATUS=serving"]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "77"}, 60.0),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "78"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_interval_is_that_of_this_process(environ: dict[str, str], expected: float | None) -> None:
    assert watchdog_interval_s(environ, pid=77) == expected


class Loop:
    """A compute loop as a watchdog sees it."""

    def __init__(self, now: float) -> None:
        self.has_work = False
        self.progress_s = now


@pytest.fixture
def loop_and_watchdog(notifier: Notifier, clock: Clock) -> tuple[Loop, Watchdog]:
    loop = Loop(clock.now)
    watchdog = Watchdog(
        notifier, 60.0, has_work=lambda: loop.has_work, last_progress_s=lambda: loop.progress_s, clock=clock
    )
    return loop, watchdog


def test_an_idle_compute_loop_feeds_the_watchdog(
    manager: Manager, clock: Clock, loop_and_watchdog: tuple[Loop, Watchdog]
) -> None:
    _, watchdog = loop_and_watchdog
    clock.now += 1000.0
    assert watchdog.look()
    assert manager.heard() == ["WATCHDOG=1"]


def test_a_compute_loop_that_is_late_starves_the_watchdog_and_feeds_it_again_when_it_goes_on(
    manager: Manager, clock: Clock, loop_and_watchdog: tuple[Loop, Watchdog], capsys: pytest.CaptureFixture[str]
) -> None:
    loop, watchdog = loop_and_watchdog
    loop.has_work = True
    looks = []
    for _ in range(4):
        clock.now += 15.0
        looks.append(watchdog.look())
    assert looks == [True, True, False, False]
    assert manager.heard() == ["WATCHDOG=1"] * 2
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("compute_loop_late") == 1
    loop.progress_s = clock.now
    assert watchdog.look()
    assert manager.heard() == ["WATCHDOG=1"]


def test_work_that_comes_after_a_long_rest_is_not_late(clock: Clock, loop_and_watchdog: tuple[Loop, Watchdog]) -> None:
    loop, watchdog = loop_and_watchdog
    clock.now += 1000.0
    assert watchdog.look()
    loop.has_work = True
    clock.now += 15.0
    assert watchdog.look()


def test_steady_progress_under_endless_work_feeds_the_watchdog(
    manager: Manager, clock: Clock, loop_and_watchdog: tuple[Loop, Watchdog]
) -> None:
    loop, watchdog = loop_and_watchdog
    loop.has_work = True
    for _ in range(50):
        clock.now += 15.0
        loop.progress_s = clock.now - 1.0
        assert watchdog.look()
        assert manager.heard() == ["WATCHDOG=1"]


async def test_the_watchdog_runs_by_itself_and_a_stuck_worker_starves_it(
    manager: Manager, notifier: Notifier, clock: Clock
) -> None:
    worker = Worker(clock, Tracer(is_on=False))
    watchdog = Watchdog(
        notifier,
        0.02,
        has_work=lambda: worker.has_work,
        last_progress_s=lambda: worker.last_progress_s,
        clock=clock,
        deadline_s=30.0,
    )
    running = asyncio.create_task(watchdog.run())
    loop = asyncio.get_running_loop()
    began, release = asyncio.Event(), asyncio.Event()

    def job() -> None:
        loop.call_soon_threadsafe(began.set)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()

    async def next_feed() -> str:
        return (await loop.sock_recv(manager._socket, 4096)).decode()

    async with asyncio.timeout(20):
        assert await next_feed() == "WATCHDOG=1"
        stuck = asyncio.create_task(worker.run("stuck", job))
        await began.wait()
        clock.now += 31.0
        assert not watchdog.look()
        manager.heard()
        await asyncio.sleep(0.1)  # several looks of the running watchdog
        assert manager.heard() == []
        release.set()
        await stuck
        worker.nothing_waits()
        assert await next_feed() == "WATCHDOG=1"
    running.cancel()
    await worker.aclose()


async def test_a_long_job_that_tells_of_its_progress_is_not_late(clock: Clock) -> None:
    worker, loop, told = Worker(clock, Tracer(is_on=False)), asyncio.get_running_loop(), asyncio.Queue[int]()
    resume = asyncio.Event()

    def job(progress: Progress) -> str:
        for done in range(3):
            clock.now += 500.0
            progress(done, 3)
            asyncio.run_coroutine_threadsafe(resume.wait(), loop).result()
        return "loaded"

    running = asyncio.create_task(worker.run_long(job, lambda done, _: told.put_nowait(done)))
    assert await told.get() == 0
    assert worker.has_work and worker.last_progress_s == clock.now
    resume.set()
    assert await running == "loaded"
    assert not worker.has_work
    await worker.aclose()


async def test_a_long_job_that_nobody_waits_for_any_more_ends_at_its_next_step(clock: Clock) -> None:
    worker, loop = Worker(clock, Tracer(is_on=False)), asyncio.get_running_loop()
    began, resume = asyncio.Event(), asyncio.Event()
    steps: list[int] = []

    def job(progress: Progress) -> None:
        for done in range(100):
            steps.append(done)
            loop.call_soon_threadsafe(began.set)
            asyncio.run_coroutine_threadsafe(resume.wait(), loop).result()
            progress(done, 100)

    given_up = asyncio.create_task(worker.run_long(job))
    await began.wait()
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert worker.has_work, "the thread is still busy with it"
    following = asyncio.create_task(worker.run_uncounted(lambda: list(steps)))
    resume.set()
    assert await following == [0], "the next job waits for it, and it ended at its step"
    await worker.aclose()


async def test_closing_a_worker_waits_for_its_job(clock: Clock) -> None:
    worker, loop = Worker(clock, Tracer(is_on=False)), asyncio.get_running_loop()
    began, resume = asyncio.Event(), asyncio.Event()
    ended: list[str] = []

    def job(progress: Progress) -> None:
        try:
            loop.call_soon_threadsafe(began.set)
            asyncio.run_coroutine_threadsafe(resume.wait(), loop).result()
            progress(1, 2)
            ended.append("it went on")
        finally:
            ended.append("ended")

    running = asyncio.create_task(worker.run_long(job))
    await began.wait()
    closing = asyncio.create_task(worker.aclose())
    await asyncio.sleep(0.02)
    assert not closing.done()
    resume.set()
    await closing
    assert ended == ["ended"]
    with pytest.raises(GivenUp):
        await running


class Service:
    """A service that serves until it is cancelled, and what was asked of it."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.calls: asyncio.Queue[str] = asyncio.Queue()
        self.drained = asyncio.Event()
        self.refusal: Exception | None = None
        self.was_closed = False

    async def serve(self) -> None:
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.was_closed = True

    async def drain(self) -> None:
        self.calls.put_nowait("drain")
        await self.drained.wait()

    async def reload(self) -> None:
        self.calls.put_nowait("reload")
        if self.refusal is not None:
            raise self.refusal


async def _start(service: Service, notifier: Notifier, drain_s: float = 20.0) -> "asyncio.Task[None]":
    running = asyncio.create_task(
        serve_until_signal(
            service.serve(), notifier=notifier, drain=service.drain, drain_s=drain_s, reload=service.reload
        )
    )
    await service.began.wait()
    return running


async def test_a_loop_beside_the_service_that_fails_ends_it_with_its_reason(notifier: Notifier) -> None:
    service = Service()

    async def fail() -> NoReturn:
        await service.began.wait()
        raise RuntimeError("nobody fed the watchdog any more")

    async with asyncio.timeout(20):
        with pytest.raises(RuntimeError, match="nobody fed the watchdog"):
            await serve_until_signal(
                service.serve(), notifier=notifier, drain=service.drain, drain_s=1.0, beside={"watchdog": fail()}
            )
    assert service.was_closed


async def test_sigterm_drains_and_ends_without_an_error(manager: Manager, notifier: Notifier) -> None:
    service = Service()
    running = await _start(service, notifier)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await service.calls.get() == "drain"
    assert manager.heard() == ["STOPPING=1\nSTATUS=draining, at most 20 s"]
    assert not service.was_closed
    service.drained.set()
    await running
    assert service.was_closed


async def test_a_drain_is_cut_at_its_deadline(notifier: Notifier) -> None:
    service = Service()
    running = await _start(service, notifier, drain_s=0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    assert service.was_closed
    assert not service.drained.is_set()


async def test_a_second_signal_cuts_the_drain(notifier: Notifier) -> None:
    service = Service()
    running = await _start(service, notifier)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await service.calls.get() == "drain"
    os.kill(os.getpid(), signal.SIGINT)
    await running
    assert service.was_closed


async def test_sighup_reloads_and_the_service_goes_on(manager: Manager, notifier: Notifier) -> None:
    service = Service()
    notifier.ready("serving")
    running = await _start(service, notifier)
    os.kill(os.getpid(), signal.SIGHUP)
    assert await service.calls.get() == "reload"
    await asyncio.sleep(0)
    assert [message.split("\n")[0] for message in manager.heard()] == ["READY=1", "RELOADING=1", "READY=1"]
    assert not running.done()
    service.drained.set()
    os.kill(os.getpid(), signal.SIGTERM)
    await running


async def test_a_reload_that_is_refused_leaves_the_service_as_it_was(
    manager: Manager, notifier: Notifier, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service()
    service.refusal = ConfigError("topology.yaml:3: wrong")
    notifier.ready("serving")
    running = await _start(service, notifier)
    os.kill(os.getpid(), signal.SIGHUP)
    assert await service.calls.get() == "reload"
    service.refusal = None
    os.kill(os.getpid(), signal.SIGHUP)
    assert await service.calls.get() == "reload"
    captured = capsys.readouterr()
    assert "topology.yaml:3: wrong" in captured.out + captured.err
    service.drained.set()
    os.kill(os.getpid(), signal.SIGTERM)
    await running


async def test_a_bug_in_a_reload_ends_the_service(notifier: Notifier) -> None:
    service = Service()
    service.refusal = ZeroDivisionError()
    running = await _start(service, notifier)
    os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(ZeroDivisionError):
        await running
    assert service.was_closed


async def test_a_service_that_fails_raises_its_error(notifier: Notifier) -> None:
    service = Service()

    async def fail() -> None:
        raise ConfigError("no port")

    with pytest.raises(ConfigError, match="no port"):
        await serve_until_signal(fail(), notifier=notifier, drain=service.drain, drain_s=1.0)


async def test_the_handlers_are_taken_back_at_the_end(notifier: Notifier) -> None:
    async def end() -> None:
        return

    before = signal.getsignal(signal.SIGTERM)
    await serve_until_signal(end(), notifier=notifier, drain=end, drain_s=1.0)
    assert signal.getsignal(signal.SIGTERM) == before
