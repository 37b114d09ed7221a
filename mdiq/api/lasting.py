"""Responses in the background that outlive the Starter: what is kept of them, and how their answers go on. No files.

Theory. A Sequence follows from its prompt, how it is sampled, and its tokens; the events of a response follow from its
id, its request and those tokens. So a response that is kept with these goes on in another process, and a client that
reads on there misses nothing. What it cannot follow from is when it ended: its last events are kept before they are
shown.

The journal that keeps them is service/response_journal.py.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from mdiq.api.backend import Backend
from mdiq.core.sequence import SamplingParams
from mdiq.errors import RingError, RingStalledError
from mdiq.runtime.starter_service import StreamEvent

log = structlog.get_logger()

MAX_TRIES = 5
"""Rings that a response may be lost with before one of them gives a token: it may be the reason."""

Watch = Callable[[AsyncGenerator[StreamEvent, None], int], AsyncGenerator[StreamEvent, None]]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a response has ended. at_s: Unix time. whole: its object. messages: its answer, as messages of a chat.
    events: all of its stream."""

    at_s: float
    whole: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]
    events: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """A response as it is kept. about: of its request, as JSON; see responses.py. prompt, tokens: ids; none of one that
    has ended. obstacle: why it cannot go on; empty if it can."""

    id: str
    about: Mapping[str, Any]
    prompt: tuple[int, ...] = ()
    params: SamplingParams = SamplingParams()
    tokens: tuple[int, ...] = ()
    ending: Ending | None = None
    obstacle: str = ""


class ResponseJournal(Protocol):
    """Keeps responses. All of it is on the disk when an awaited method returns, unless that says something else."""

    async def accept(self, kept: KeptResponse, tokens: Sequence[int]) -> None:
        """Keep a new response. tokens: of its answer; what is added to them is kept from time to time.

        Raises:
            MdiqError: it cannot be kept now.
        """
        ...

    def follow(self, response_id: str, tokens: Sequence[int]) -> None:
        """Keep what is added to the tokens of a response of an earlier process from time to time."""
        ...

    async def tries(self, response_id: str) -> None:
        """Note that a response of an earlier process is going to be computed; see KeptResponse.obstacle."""
        ...

    async def end(self, response_id: str, ending: Ending) -> None:
        """Keep how a response has ended. While nothing can be written, that is tried again later."""
        ...

    async def forget(self, response_id: str) -> None:
        """Keep nothing of a response. While nothing can be written, that is tried again later."""
        ...

    def forget_soon(self, response_id: str) -> None:
        """Do so without waiting for it."""
        ...

    def status(self) -> Mapping[str, object]:
        """Return what `mdiq status --json` shows."""
        ...


class LastingAnswer:
    """One answer, over rings that come and go. tokens: those so far; the journal writes them from time to time.

    in_thread: runs a job in a thread. watch: follows the events that a ring gives, after so many
    tokens.
    """

    def __init__(
        self,
        backend: Backend,
        prompt: tuple[int, ...],
        params: SamplingParams,
        tokens: Sequence[int] = (),
        *,
        owner: str,
        share: int,
        in_thread: Callable[[Callable[[], Any]], Any],
        watch: Watch,
    ) -> None:
        self._backend = backend
        self.prompt, self.params = prompt, params
        self._owner, self._share = owner, share
        self._in_thread = in_thread
        self._watch = watch
        self.tokens = [*tokens]

    async def events(self, before_ring: Callable[[], Any] | None = None) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events of all its tokens, those that it has had first. before_ring: awaited before a ring has it.

        Raises:
            MdiqError: it cannot be answered; or so many rings were lost with it that it may be the reason.
        """
        num_tries, is_first = 0, True
        while True:
            num_tokens = len(self.tokens)
            sequence, known = await self._in_thread(
                lambda: self._backend.resumed(self.prompt, self.params, tuple(self.tokens))
            )
            for event in known if is_first else ():
                yield event
            if sequence.finish_reason is not None:
                return
            is_first = False
            await self._backend.until_takes_requests()
            if before_ring is not None:
                await before_ring()
                before_ring = None
            try:
                running = self._backend.go_on(sequence, owner=self._owner, share=self._share)
                async with aclosing(self._watch(running, len(self.tokens))) as events:
                    async for event in events:
                        if isinstance(event.step.error, RingError):
                            raise event.step.error
                        if event.step.token is not None:
                            self.tokens.append(event.step.token)
                        yield event
                return
            except RingStalledError:
                raise
            except RingError as error:
                num_tries = 1 if len(self.tokens) > num_tokens else num_tries + 1
                if num_tries >= MAX_TRIES:
                    raise
                log.info("response_waits", tries=num_tries, tokens=len(self.tokens), error=str(error))
