"""Brings results to their file and tokens to the journal, in a thread, while a ring answers.

A result's line is on the disk before the journal forgets its request. So a request whose line is missing goes on from
the journal, and one whose line is there has ended, whatever the journal says: each is answered once.
"""

import asyncio
import threading
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import NoReturn

from mdiq.core.sequence import Sequence
from mdiq.errors import MdiqError
from mdiq.service.journal import Begun, Changes, Journal
from mdiq.service.results import ResultsFile

INTERVAL_S = 1.0
"""Tokens are journalled so often: what came after the last time has to be computed again."""


@dataclass(slots=True, eq=False)
class _Kept:
    """A request that has begun. num_written: tokens of its answer in the journal; None: it is not in there.

    has_result: its line is on the disk, so the journal is to forget it; or, if it is not ``is_final``, to leave it.
    """

    sequence: Sequence
    num_written: int | None
    has_result: bool = False
    is_final: bool = True


@dataclass(slots=True, eq=False)
class _Line:
    key: str
    text: str
    is_final: bool
    written: "asyncio.Future[None]"
    is_stored: bool = False


class Recorder:
    """Records the requests of one run. ``run`` keeps it going.

    journal: None: none is kept. on_trouble: called with a text when the journal cannot be written, and when it can be
    again; results are written all the same.
    """

    def __init__(
        self,
        results: ResultsFile,
        journal: Journal | None,
        *,
        interval_s: float = INTERVAL_S,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._results = results
        self._journal = journal
        self._interval_s = interval_s
        self._on_trouble = on_trouble
        self._kept: dict[str, _Kept] = {}
        self._lines: list[_Line] = []
        self._has_lines = asyncio.Event()
        self._tokens_due_s = 0.0
        self._is_in_trouble = False
        self._writing = threading.Lock()  # a write ends, also when the task that waits for it is cancelled

    def begin(self, key: str, sequence: Sequence, *, is_journalled: bool = False) -> None:
        """Record the tokens of a request from now on. is_journalled: it came from the journal, with its tokens."""
        if self._journal is not None:
            self._kept[key] = _Kept(sequence, len(sequence.generated) if is_journalled else None)

    async def end(self, key: str, line: str, *, is_final: bool = True) -> None:
        """Write the result of a request; return when it is on the disk.

        is_final: the journal forgets the request. Else its tokens stay, for a run that tries again.
        """
        written = asyncio.get_running_loop().create_future()
        self._lines.append(_Line(key, line, is_final, written))
        self._has_lines.set()
        await written

    async def run(self) -> NoReturn:
        """Write results as they come, and tokens every interval.

        Raises:
            CapacityError, OSError: results cannot be written.
        """
        while True:
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._has_lines.wait()
            except TimeoutError:
                pass
            await self.write()

    async def write(self, *, with_tokens: bool = False) -> None:
        """Write the results that wait, and the tokens if an interval is over, or if ``with_tokens`` says so.

        Raises: see ``run``.
        """
        now = asyncio.get_running_loop().time()
        if is_due := with_tokens or now >= self._tokens_due_s:
            self._tokens_due_s = now + self._interval_s
        self._has_lines.clear()
        lines = list(self._lines)
        if lines or is_due:
            self._report(await asyncio.to_thread(self._write, lines, with_tokens=is_due))
        self._lines = self._lines[len(lines) :]  # one that is cancelled leaves them to the next
        for line in lines:
            if not line.written.done():  # its task may have been cancelled
                line.written.set_result(None)

    def _write(self, lines: AbstractSequence[_Line], *, with_tokens: bool) -> MdiqError | None:
        """Write in this thread; return the error of the journal, if there is one."""
        with self._writing:
            lines = [line for line in lines if not line.is_stored]
            try:
                if lines:
                    self._results.append([line.text for line in lines])
            except (MdiqError, OSError):
                self._write_journal(with_tokens=True)  # what these results were made of
                raise
            for line in lines:
                line.is_stored = True
                if kept := self._kept.get(line.key):
                    kept.has_result, kept.is_final = True, line.is_final
            return self._write_journal(with_tokens=with_tokens)

    def _write_journal(self, *, with_tokens: bool) -> MdiqError | None:
        all_kept = dict(self._kept)  # in one step: requests begin meanwhile
        changes = _changes(all_kept, with_tokens=with_tokens)
        try:
            if self._journal is not None and changes:
                self._journal.write(changes)
        except MdiqError as error:
            return error
        for key, (start, ids) in changes.tokens.items():
            all_kept[key].num_written = start + len(ids)
        for key, kept in all_kept.items():
            if kept.has_result:
                del self._kept[key]
        return None

    def _report(self, trouble: MdiqError | None) -> None:
        if trouble is not None and not self._is_in_trouble:
            self._on_trouble(
                f"{trouble}. Results are still written; if this run dies, answers that it has begun are computed anew"
            )
        elif trouble is None and self._is_in_trouble:
            self._on_trouble("the journal can be written again")
        self._is_in_trouble = trouble is not None


def _changes(all_kept: dict[str, _Kept], *, with_tokens: bool) -> Changes:
    """Return what the journal lacks."""
    begun: dict[str, Begun] = {}
    tokens: dict[str, tuple[int, tuple[int, ...]]] = {}
    ended: list[str] = []
    for key, kept in all_kept.items():
        if kept.has_result and kept.is_final:
            if kept.num_written is not None:
                ended.append(key)
        elif with_tokens or kept.has_result:
            start = kept.num_written or 0
            ids = tuple(kept.sequence.generated[start:])
            if ids:
                tokens[key] = start, ids
                if kept.num_written is None:
                    begun[key] = Begun(kept.sequence.prompt, kept.sequence.params)
    return Changes(begun, tokens, ended)
