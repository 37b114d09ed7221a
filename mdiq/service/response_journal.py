"""The journal of `mdiq serve`: responses in the background over restarts of the Starter. Written in a thread.

A response is in it before its client knows its id, its tokens are added every interval, and its end is in it before
anybody sees that; see api/lasting.py. Whatever is wrong with the file, the service goes on: it takes no response in the
background while it cannot write one down, and what it has accepted before goes on in memory.
"""

import asyncio
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import structlog

from mdiq.api.lasting import Ending, KeptResponse
from mdiq.config.load import LoadedTopology
from mdiq.config.units import AUTO
from mdiq.errors import CapacityError, ConfigError, MdiqError
from mdiq.service.journal import Begun, Changes, Journal, UnreadableJournalError, differences, merged
from mdiq.service.recorder import INTERVAL_S

log = structlog.get_logger()

FILE_NAME = "journal"
ASIDE = ".unreadable"
"""Ending of the name that a file gets that cannot be read; a second one takes its place."""
WAIT_S = 10.0  # for the disk, before a client is refused
REOPEN_S = 30.0
MAX_CHANGES = 4_096  # that wait for a disk which is full
MAX_STARTS = 10
"""Services that may end while they compute a response, before one of them keeps a token: it may be the reason."""


def journal_file(loaded: LoadedTopology, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return where a service keeps its journal; None: it keeps none.

    ``auto`` is the folder that systemd gives the service for its state; without systemd there is none.
    """
    wanted = loaded.topology.journal
    if wanted != AUTO:
        return None if wanted is None else loaded.path(wanted)
    folder, _, _ = environ.get("STATE_DIRECTORY", "").partition(":")
    return Path(folder, FILE_NAME) if folder else None


@dataclass(slots=True)
class _Running:
    """A response that runs. tokens: of its answer; num_written: of them that are on the disk."""

    tokens: Sequence[int]
    num_written: int = 0
    num_starts: int = 0


@dataclass(slots=True, eq=False)
class _Change:
    """What is to be on the disk at once. make: gives it, in the thread. is_new: it may not come later if it fails."""

    key: str
    make: Callable[[], Changes]
    written: "asyncio.Future[None]"
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class _Found:
    """A response of an earlier process. at_s: Unix time at which it was accepted."""

    kept: KeptResponse
    at_s: float
    num_starts: int = 0


class ServiceJournal:
    """One file. ``open`` reads it, ``run`` writes it, ``aclose`` writes the rest. See api.lasting.ResponseJournal.

    about: what the tokens of answers depend on; a response that began with something else does not go on. setting: what
    names the file, for messages. clock: seconds, monotonic.
    """

    def __init__(
        self,
        file: Path,
        about: Mapping[str, str],
        *,
        setting: str,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file, self._about, self._setting = file, about, setting
        self._interval_s = interval_s
        self._clock = clock
        self._journal: Journal | None = None
        self._running: dict[str, _Running] = {}
        self._known: set[str] = set()  # that are in the file, or are to be
        self._changes: list[_Change] = []
        self._has_changes = asyncio.Event()
        self._tokens_due_s = 0.0
        self._trouble: MdiqError | None = None
        self._writing = threading.Lock()  # a write ends, also when the task that waits for it is cancelled
        self._write_began_s: float | None = None
        self._num_writes = self._num_failures = 0
        self._write_s, self._num_bytes = 0.0, 0

    async def open(self) -> list[KeptResponse]:
        """Return the responses of an earlier process, in the order in which they came.

        A file that cannot be read gets another name, and a new one is begun. If that cannot be, ``run`` tries again.
        """
        try:
            journal, found = await asyncio.to_thread(self._open)
        except MdiqError as error:
            self._report(error)
            return []
        self._journal = journal
        for each in found:
            self._known.add(each.kept.id)
            if each.kept.ending is None:
                self._running[each.kept.id] = _Running(each.kept.tokens, len(each.kept.tokens), each.num_starts)
        self._report(None)
        log.info("journal_opened", file=str(self._file), responses=len(found), running=len(self._running))
        return [each.kept for each in found]

    async def run(self, take_up: Callable[[Sequence[KeptResponse]], None]) -> NoReturn:
        """Write changes as they come, and tokens every interval. take_up: gets what a file has that opens late."""
        while True:
            if self._journal is None:
                await asyncio.sleep(REOPEN_S)
                take_up(await self.open())
                continue
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._has_changes.wait()
            except TimeoutError:
                pass
            await self.write()

    async def aclose(self) -> None:
        """Write what is left, and close the file."""
        try:
            async with asyncio.timeout(WAIT_S):
                await self.write(with_tokens=True)
        except TimeoutError:
            self._report(self._too_slow())
            return  # another thread has it
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)

    async def accept(self, kept: KeptResponse, tokens: Sequence[int]) -> None:
        if self._journal is None or self._is_stuck or len(self._changes) > MAX_CHANGES:
            raise self._trouble or self._too_slow()
        request = {"about": kept.about, "depends_on": self._about, "at_s": time.time()}
        try:
            note = (await asyncio.to_thread(json.dumps, request)).encode()
        except (ValueError, RecursionError) as wrong:
            log.warning("response_not_kept", error=type(wrong).__name__)
            raise ConfigError("the request is nested too deeply to be kept") from None
        changes = Changes(begun={kept.id: Begun(kept.prompt, kept.params)}, notes={kept.id: {"request": note}})
        self._known.add(kept.id)
        change = self._add(kept.id, lambda: changes, is_new=True)
        try:
            async with asyncio.timeout(WAIT_S):
                await change.written
        except TimeoutError:
            self._report(error := self._too_slow())
            self.forget_soon(kept.id)
            raise error from None
        self._running[kept.id] = _Running(tokens)

    def follow(self, response_id: str, tokens: Sequence[int]) -> None:
        if running := self._running.get(response_id):
            running.tokens = tokens

    async def tries(self, response_id: str) -> None:
        running = self._running.get(response_id)
        if running is not None:
            starts = {"num": running.num_starts + 1, "tokens": len(running.tokens)}
            changes = Changes(notes={response_id: {"starts": json.dumps(starts).encode()}})
            await self._until_written(self._add(response_id, lambda: changes))

    async def end(self, response_id: str, ending: Ending) -> None:
        if response_id not in self._known:
            return
        self._running.pop(response_id, None)

        def make() -> Changes:
            try:
                blob = _ending_blob(ending)
            except (ValueError, RecursionError):  # what a client has nested too deeply is at most computed again
                return Changes()
            return Changes(ended=[response_id], notes={response_id: {"ending": blob}})

        await self._until_written(self._add(response_id, make))

    async def forget(self, response_id: str) -> None:
        if (change := self._forget(response_id)) is not None:
            await self._until_written(change)

    def forget_soon(self, response_id: str) -> None:
        self._forget(response_id)

    def status(self) -> Mapping[str, object]:
        now = self._clock()
        writing_s = 0.0 if self._write_began_s is None else now - self._write_began_s
        return {
            "is_written": self._trouble is None,
            "responses": len(self._known),
            "running": len(self._running),
            "waiting": len(self._changes),
            "writes": self._num_writes,
            "failures": self._num_failures,
            "write_s": self._write_s + writing_s,
            "bytes": self._num_bytes,
        }

    async def write(self, *, with_tokens: bool = False) -> None:
        """Write the changes that wait, and the tokens if an interval is over, or if ``with_tokens`` says so."""
        now = self._clock()
        if is_due := with_tokens or now >= self._tokens_due_s:
            self._tokens_due_s = now + self._interval_s
        self._has_changes.clear()
        changes = [*self._changes]
        if self._journal is None or not (changes or is_due):
            return
        self._write_began_s = now
        trouble = await asyncio.to_thread(self._write, self._journal, changes, with_tokens=is_due)
        self._write_s += self._clock() - now
        self._write_began_s = None
        self._num_writes += 1
        self._num_failures += trouble is not None
        again: list[_Change] = []
        if trouble is not None:  # it may have reached the disk all the same
            again = [self._forgetting(each.key) if each.is_new else each for each in changes]
        self._changes = [*again, *self._changes[len(changes) :]]
        self._report(trouble)
        for each in changes:
            if trouble is not None and each.is_new:  # also if nobody waits for it: nothing may be added to it
                self._known.discard(each.key)
            if each.written.done():
                continue
            if trouble is not None and each.is_new:
                each.written.set_exception(trouble)
            else:
                each.written.set_result(None)

    def _write(self, journal: Journal, changes: Sequence[_Change], *, with_tokens: bool) -> MdiqError | None:
        """Write in this thread; return the error, if there is one."""
        with self._writing:
            running = dict(self._running) if with_tokens else {}  # in one step: others begin meanwhile
            tokens = {
                key: (each.num_written, ids)
                for key, each in running.items()
                if (ids := tuple(each.tokens[each.num_written :]))
            }
            whole = merged([Changes(tokens=tokens), *(each.make() for each in changes)])
            try:
                if whole:
                    journal.write(whole)
            except MdiqError as error:
                return error
            for key, (start, ids) in tokens.items():
                running[key].num_written = start + len(ids)
            self._measure()
            return None

    def _measure(self) -> None:
        """Note how large the file and its WAL are; in a thread, since a disk may not answer."""
        files = [self._file, self._file.with_name(f"{self._file.name}-wal")]
        with suppress(OSError):
            self._num_bytes = sum(file.stat().st_size for file in files if file.exists())

    def _add(self, key: str, make: Callable[[], Changes], *, is_new: bool = False) -> _Change:
        written = asyncio.get_running_loop().create_future()
        written.add_done_callback(lambda it: it.cancelled() or it.exception())  # its client may have gone
        self._changes.append(change := _Change(key, make, written, is_new))
        self._has_changes.set()
        return change

    def _forget(self, response_id: str) -> _Change | None:
        if response_id not in self._known:
            return None
        self._known.discard(response_id)
        self._running.pop(response_id, None)
        return self._add(response_id, self._forgetting(response_id).make)

    def _forgetting(self, key: str) -> _Change:
        changes = Changes(forgotten=[key])
        return _Change(key, lambda: changes, asyncio.get_running_loop().create_future())

    async def _until_written(self, change: _Change) -> None:
        if self._is_stuck:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                await change.written
                return
        self._report(self._too_slow())

    @property
    def _is_stuck(self) -> bool:
        return self._write_began_s is not None and self._clock() - self._write_began_s >= WAIT_S

    def _too_slow(self) -> MdiqError:
        return CapacityError(f"{self._file}: its disk has not written for {WAIT_S:g} s; see that it works")

    def _report(self, trouble: MdiqError | None) -> None:
        if trouble is not None and self._trouble is None:
            log.error("journal_not_written", error=str(trouble))
        elif trouble is None and self._trouble is not None:
            log.info("journal_written_again")
        self._trouble = trouble

    # In a thread

    def _open(self) -> tuple[Journal, list[_Found]]:
        try:
            return self._opened()
        except UnreadableJournalError as error:
            aside = self._file.with_name(f"{self._file.name}{ASIDE}")
            with self._in_words():
                for ending in ("-wal", ""):
                    with suppress(FileNotFoundError):
                        os.replace(f"{self._file}{ending}", f"{aside}{ending}")
            log.error("journal_set_aside", reason=error.reason, file=str(aside))
            return self._opened()

    def _opened(self) -> tuple[Journal, list[_Found]]:
        with self._in_words():
            self._file.touch(mode=0o600)  # it has what people wrote
        journal = Journal(self._file, setting=self._setting)
        self._measure()
        try:
            return journal, sorted(self._read(journal), key=lambda found: found.at_s)
        except MdiqError:
            journal.close()
            raise

    def _read(self, journal: Journal) -> Iterator[_Found]:
        begun, all_notes = journal.begun(), journal.notes()
        for key, notes in all_notes.items():
            try:
                request = json.loads(notes["request"])
                at_s = float(request["at_s"])
                if "ending" in notes:
                    yield _Found(KeptResponse(key, request["about"], ending=_ending(notes["ending"])), at_s)
                    continue
                its, starts = begun[key], json.loads(notes.get("starts", b"{}"))
                num_starts = int(starts["num"]) if starts and starts["tokens"] == len(its.tokens) else 0
                obstacle = self._obstacle(request["depends_on"], num_starts)
                kept = KeptResponse(key, request["about"], its.prompt, its.params, its.tokens, obstacle=obstacle)
            except RecursionError:  # one request is no reason to lose the others
                log.warning("response_not_kept", error="RecursionError")
                continue
            except (LookupError, TypeError, ValueError, zlib.error) as error:
                reason = f"it is damaged (response {key[:60]}: {type(error).__name__})"
                raise UnreadableJournalError(self._file, reason) from None
            yield _Found(kept, at_s, num_starts)

    def _obstacle(self, depends_on: Mapping[str, str], num_starts: int) -> str:
        if changed := differences(depends_on, self._about):
            return f"the service was started with something else: {changed}; ask again"
        if num_starts >= MAX_STARTS:
            return f"the service has ended {num_starts} times before it gave a token; it is not computed again"
        return ""

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"{error.strerror}; {self._setting} must be in a folder that can be written"
            raise ConfigError(f"{self._file}: {text}") from None


def _ending_blob(ending: Ending) -> bytes:
    value = {
        "at_s": ending.at_s,
        "whole": ending.whole,
        "messages": ending.messages,
        "events": [event.decode() for event in ending.events],
    }
    return zlib.compress(json.dumps(value).encode())


def _ending(blob: bytes) -> Ending:
    value: Mapping[str, Any] = json.loads(zlib.decompress(blob))
    events = tuple(event.encode() for event in value["events"])
    return Ending(float(value["at_s"]), value["whole"], value["messages"], events)
