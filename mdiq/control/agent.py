"""A Node's end of the control plane: joins, loads what it is told, reports, and ends when it is drained.

What loading means and what there is to report come as callables: torch and the data plane stay out of here.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

import structlog

from mdiq.core import control
from mdiq.core.types import Epoch, SeqId
from mdiq.errors import MdiqError, RemoteProtocolError, TransportError
from mdiq.telemetry.trace import Span
from mdiq.transport.base import ControlLink
from mdiq.transport.junk import JunkBudget

log = structlog.get_logger()

HEARTBEAT_S = 1.0
GOODBYE_S = 2.0
MAX_WAITING = 8
MAX_ANSWERS = 64
SPANS_PER_CHUNK = 2_000

_Request = control.Assign | control.SendBurst | control.Begin | control.Fetch


class Agent:
    """Serves one Node until the Starter drains it.

    load: does what an Assign says and returns what it gave; send_burst and begin, likewise. A newer Assign, a StandBy,
    or the end cancels it. fetch: likewise, beside the others; an Assign cancels it too, and what it has fetched stays.
    stand_by: called when the Ring goes without this Node.
    heartbeat: returns the figures of now.
    spans: returns the trace so far.
    """

    def __init__(
        self,
        link: ControlLink,
        key: bytes,
        hello: control.Hello,
        *,
        load: Callable[[control.Assign], Awaitable[control.Ready]],
        send_burst: Callable[[control.SendBurst], Awaitable[control.BurstSent]],
        begin: Callable[[control.Begin], Awaitable[control.Begun]],
        fetch: Callable[[control.Fetch], Awaitable[control.Fetched]],
        stand_by: Callable[[control.StandBy], Awaitable[None]],
        heartbeat: Callable[[], control.Heartbeat],
        spans: Callable[[], Sequence[Span]],
    ) -> None:
        self._link = link
        self._key = key
        self._hello = hello
        self._load = load
        self._send_burst = send_burst
        self._begin = begin
        self._fetch = fetch
        self._stand_by = stand_by
        self._heartbeat = heartbeat
        self._spans = spans
        self._outgoing: asyncio.Queue[control.Message] = asyncio.Queue(maxsize=1_000)
        self._num_unsent = 0  # since there was no room for one
        # What was asked, with the answers that there are: the Starter asks again when one is lost on its way.
        self._answers: dict[control.Message, control.Message | None] = {}

    async def run(self) -> None:
        """Join, obey, and return when drained.

        Raises:
            MdiqError: loading failed, and the Starter has been told; or the Starter cannot be told anything.
        """
        await self._send(self._hello)
        obeying = asyncio.create_task(self._obey(), name="obey")
        sending = asyncio.create_task(self._send_queued(), name="control-send")
        beating = asyncio.create_task(self._beat(), name="heartbeat")
        tasks = (obeying, sending, beating)
        try:
            # The first that ends decides: only obeying ends well, and an agent that cannot report must not look alive.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def leaving(self) -> bool:
        """Ask the Starter to drain this Node when what is in the Ring has ended; return whether it can be told."""
        with contextlib.suppress(TimeoutError, TransportError):
            async with asyncio.timeout(GOODBYE_S):
                await self._send(control.Leaving())
                return True
        return False

    async def leave(self, error: MdiqError) -> None:
        """Tell the Starter that this Node ends by itself."""
        with contextlib.suppress(TimeoutError, TransportError):  # it may have been drained just now
            async with asyncio.timeout(GOODBYE_S):
                await self._send(control.Failed(type(error).__name__, str(error)))

    def loading(self, done: int, total: int) -> None:
        """Report progress of loading, in tensors or any other unit."""
        self._post(control.Loading(done, total))

    def burst_arrived(self, arrived: control.BurstArrived) -> None:
        """Report a burst that came over the Hop into this Stage."""
        self._post(arrived)

    def gaps(self, epoch: Epoch, seq_ids: tuple[SeqId, ...]) -> None:
        """Report Sequences whose Frames were lost on the way here."""
        self._post(control.Fault(epoch, tuple(seq_ids), "gap", ""))

    def failure(self, epoch: Epoch, seq_ids: tuple[SeqId, ...], error: MdiqError) -> None:
        """Report Sequences that the engine could not compute."""
        self._post(control.Fault(epoch, tuple(seq_ids), type(error).__name__, str(error)))

    async def _obey(self) -> None:
        """Do what the Starter says until it drains this Node. What comes while something is done may end it."""
        reading = asyncio.create_task(self._link.receive(), name="control-receive")
        job: asyncio.Task[None] | None = None
        fetching: asyncio.Task[None] | None = None
        junk, time_of = JunkBudget(), asyncio.get_running_loop().time
        try:
            while True:
                waited_for = {reading, *(task for task in (job, fetching) if task is not None)}
                await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
                if job is not None and job.done():
                    job.result()
                    job = None
                if fetching is not None and fetching.done():
                    fetching.result()
                    fetching = None
                if not reading.done():
                    continue
                start_s, data = time_of(), reading.result()
                reading = asyncio.create_task(self._link.receive(), name="control-receive")
                try:
                    message = control.decode(data, self._key)
                except RemoteProtocolError as error:
                    log.warning("control_message_dropped", error=str(error))
                    await junk.spent(time_of() - start_s)
                    continue
                match message:
                    case control.Drain():
                        with contextlib.suppress(TimeoutError):  # the Starter may be gone by now
                            async with asyncio.timeout(GOODBYE_S):
                                await self._say_goodbye()
                        return
                    case control.StandBy():
                        await _give_up(job)
                        job = None
                        self._answers.clear()  # an assignment like the one before is carried out anew
                        await self._stand_by(message)
                    case control.Ping():
                        pass
                    case control.Assign() | control.SendBurst() | control.Begin() | control.Fetch() if (
                        message in self._answers
                    ):
                        if (answer := self._answers[message]) is not None:
                            self._post(answer)
                    case control.Fetch():
                        await self._stop_fetching(fetching)
                        self._note_asked(message)
                        fetching = asyncio.create_task(self._answer(message, None), name="Fetch")
                    case control.Assign() | control.SendBurst() | control.Begin():
                        self._note_asked(message)
                        if isinstance(message, control.Assign):
                            await _give_up(job)  # nobody waits for what was assigned before
                            job = None
                            await self._stop_fetching(fetching)  # it would keep the folder, and the link
                            fetching = None
                        job = asyncio.create_task(self._answer(message, job), name=type(message).__name__)
                    case _:
                        log.warning("control_message_dropped", error=f"{type(message).__name__}: not for an agent")
        finally:
            await _give_up(reading)
            await _give_up(job)
            await _give_up(fetching)

    def _note_asked(self, message: control.Message) -> None:
        self._answers[message] = None
        while len(self._answers) > MAX_ANSWERS:
            del self._answers[next(iter(self._answers))]

    async def _stop_fetching(self, fetching: "asyncio.Task[None] | None") -> None:
        """Give up what is fetched; it goes on from there when the Starter asks for it again."""
        await _give_up(fetching)
        for message in [each for each in self._answers if isinstance(each, control.Fetch)]:
            del self._answers[message]

    async def _answer(self, message: _Request, before: "asyncio.Task[None] | None") -> None:
        """Do what a message says, after what is done already, and answer it."""
        if before is not None:
            await before
        try:
            self._answers[message] = answer = await self._do(message)
        except MdiqError as error:
            await self._send(control.Failed(type(error).__name__, str(error)))
            raise
        await self._send(answer)

    async def _do(self, message: _Request) -> control.Message:
        match message:
            case control.Fetch():
                return await self._fetch(message)
            case control.Assign():
                return await self._load(message)
            case control.SendBurst():
                return await self._send_burst(message)
            case control.Begin():
                return await self._begin(message)

    async def _say_goodbye(self) -> None:
        spans = self._spans()
        for start in range(0, len(spans), SPANS_PER_CHUNK):
            chunk = spans[start : start + SPANS_PER_CHUNK]
            await self._send(
                control.TraceChunk(tuple((span.loop, span.label, span.start_s, span.stop_s) for span in chunk))
            )
        await self._send(self._heartbeat())
        await self._send(control.Goodbye())

    async def _beat(self) -> NoReturn:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self._outgoing.qsize() < MAX_WAITING:  # while the Starter is away there is no use in more
                self._post(self._heartbeat())

    async def _send_queued(self) -> NoReturn:
        while True:
            await self._send(await self._outgoing.get())

    def _post(self, message: control.Message) -> None:
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            if not self._num_unsent:
                log.warning("control_message_not_sent", message=type(message).__name__)
            self._num_unsent += 1
        else:
            if self._num_unsent:
                log.warning("control_messages_sent_again", num_not_sent=self._num_unsent)
            self._num_unsent = 0

    async def _send(self, message: control.Message) -> None:
        await self._link.send(control.encode(message, self._key))


async def _give_up(task: "asyncio.Task[Any] | None") -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
