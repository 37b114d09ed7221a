"""Requests that have begun and not ended, on disk: another process goes on from their tokens. Knows no asyncio.

Theory. A Sequence follows from its prompt, how it is sampled, and the tokens so far; so these are kept, and no KV
cache. What is lost with a process is what came after the last ``write``: it is computed again, with the same tokens. So
a Journal that is old, or that could not be written for a while, costs time and not an answer.

Notes are what else another process needs to know of a request. They stay when it has ended, until it is forgotten.

A Journal is an sqlite3 file in WAL mode. Each ``write`` is one transaction, and is on the disk when it returns. One
process has it at a time, and no other file beside it but its WAL: locking_mode EXCLUSIVE needs no shared memory.
"""

import contextlib
import json
import sqlite3
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from mdiq.core.sequence import SamplingParams
from mdiq.errors import CapacityError, ConfigError, MdiqError

VERSION = 2
"""Of the tables. A newer one is refused; one of version 1 has no notes yet, and gets them."""
_APPLICATION_ID = int.from_bytes(b"mdiq", "big")
_NOTES = (
    "CREATE TABLE notes (key TEXT, name TEXT, value BLOB NOT NULL, PRIMARY KEY (key, name)) WITHOUT ROWID",
    f"PRAGMA user_version = {VERSION}",
)
_TABLES = (
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE requests (key TEXT PRIMARY KEY, prompt BLOB NOT NULL, params TEXT NOT NULL) WITHOUT ROWID",
    # Pieces: a long answer is not written again for each of its tokens.
    "CREATE TABLE tokens (key TEXT, start INTEGER, ids BLOB NOT NULL, PRIMARY KEY (key, start)) WITHOUT ROWID",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    *_NOTES,
)
_AFRESH = "delete it to go on without: finished answers stay, and the others begin anew"


@dataclass(frozen=True, slots=True)
class Begun:
    """A request that has begun. prompt, tokens: ids of the prompt and of the answer so far."""

    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """What a ``write`` notes, by the requests' keys.

    begun: new requests; their tokens do not count. tokens: those from a place in the answer on. notes: by name. ended:
    these need no prompt and no tokens any more. forgotten: nothing is kept of these.
    """

    begun: Mapping[str, Begun] = field(default_factory=dict)
    tokens: Mapping[str, tuple[int, Sequence[int]]] = field(default_factory=dict)
    ended: Collection[str] = ()
    notes: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    forgotten: Collection[str] = ()

    def __bool__(self) -> bool:
        return bool(self.begun or self.tokens or self.ended or self.notes or self.forgotten)


class UnreadableJournalError(ConfigError):
    """A Journal is damaged, or of a newer version: a process can go on without it only. reason: which of them."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; {_AFRESH}")
        self.reason = reason


class Journal:
    """One open Journal. Any thread may use it, one at a time. setting: what names its file, for messages."""

    def __init__(self, path: Path, *, setting: str = "--out") -> None:
        """Open a Journal, or make one.

        Raises:
            UnreadableJournalError: it is damaged, or of a newer version.
            ConfigError: it cannot be made there, or another process has it.
            CapacityError: the disk is full.
        """
        self.path = path
        self._setting = setting
        with contextlib.ExitStack() as opened, self._in_words():
            self._link = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
            opened.callback(self._link.close)
            self._link.execute("PRAGMA locking_mode = EXCLUSIVE")
            lacking = self._check()
            self._link.execute("PRAGMA journal_mode = WAL")
            self._link.execute("PRAGMA synchronous = FULL")
            self._link.execute("PRAGMA secure_delete = ON")  # forgotten prompts do not stay in unused pages
            with self._transaction():  # takes the lock
                for statement in lacking:
                    self._link.execute(statement)
            opened.pop_all()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def expect(self, about: Mapping[str, str]) -> None:
        """Note what the requests depend on; what has been noted already must be the same.

        Raises:
            ConfigError: something differs; the message names it.
            CapacityError: the disk is full.
        """
        with self._in_words():
            known = dict(self._link.execute("SELECT name, value FROM about"))
            if differing := differences(known, about):
                raise ConfigError(
                    f"{self.path}: answers have begun with something else: {differing}. Go on with what it was, or "
                    f"give another {self._setting}"
                )
            with self._transaction():
                self._link.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", about.items())

    def expect_anything(self) -> None:
        """Forget what has been noted: nothing has begun.

        Raises:
            CapacityError: the disk is full.
        """
        with self._in_words(), self._transaction():
            self._link.execute("DELETE FROM about")

    def begun(self) -> dict[str, Begun]:
        """Return the requests that have begun, by their keys.

        Raises:
            UnreadableJournalError: it is damaged.
        """
        with self._in_words():
            tokens: dict[str, list[int]] = {}
            for key, start, ids in self._link.execute("SELECT key, start, ids FROM tokens ORDER BY key, start"):
                its = tokens.setdefault(key, [])
                if start != len(its):
                    raise sqlite3.DatabaseError(f"tokens of request {key} are missing")
                its += _ids(ids)
            return {
                key: Begun(_ids(prompt), _params(params), tuple(tokens.get(key, ())))
                for key, prompt, params in self._link.execute("SELECT key, prompt, params FROM requests")
            }

    def notes(self) -> dict[str, dict[str, bytes]]:
        """Return the notes of all requests, by key and name, those of requests that have ended too.

        Raises:
            UnreadableJournalError: it is damaged.
        """
        with self._in_words():
            found: dict[str, dict[str, bytes]] = {}
            for key, name, value in self._link.execute("SELECT key, name, value FROM notes"):
                found.setdefault(key, {})[name] = value
            return found

    def write(self, changes: Changes) -> None:
        """Bring changes to the disk, all or none. The same changes may be written again.

        Raises:
            ConfigError, CapacityError: they cannot be written.
        """
        rows = [(key, _blob(begun.prompt), json.dumps(asdict(begun.params))) for key, begun in changes.begun.items()]
        pieces = [(key, start, _blob(ids)) for key, (start, ids) in changes.tokens.items()]
        notes = [(key, name, value) for key, its in changes.notes.items() for name, value in its.items()]
        forgotten = [(key,) for key in changes.forgotten]
        ended = [*((key,) for key in changes.ended), *forgotten]
        with self._in_words(), self._transaction():
            # A write that failed may have reached the disk all the same, and come again with more tokens.
            self._link.executemany("INSERT OR REPLACE INTO requests VALUES (?, ?, ?)", rows)
            self._link.executemany("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?)", pieces)
            self._link.executemany("DELETE FROM tokens WHERE key = ?", ended)
            self._link.executemany("DELETE FROM requests WHERE key = ?", ended)
            self._link.executemany("INSERT OR REPLACE INTO notes VALUES (?, ?, ?)", notes)
            self._link.executemany("DELETE FROM notes WHERE key = ?", forgotten)

    def close(self) -> None:
        """Give the Journal free; it stays on the disk."""
        with contextlib.suppress(sqlite3.Error):  # what was written is in the WAL, which the next one reads
            self._link.close()

    def remove(self) -> None:
        """Close it, and remove it from the disk: every request has ended."""
        self.close()
        for path in (self.path, self.path.with_name(f"{self.path.name}-wal")):
            path.unlink(missing_ok=True)

    def _check(self) -> Sequence[str]:
        """See that it is a Journal of this version; return the statements that make of it what it lacks."""
        (application_id,) = self._link.execute("PRAGMA application_id").fetchone()
        (version,) = self._link.execute("PRAGMA user_version").fetchone()
        (num_tables,) = self._link.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not num_tables and not application_id:
            return _TABLES
        if application_id != _APPLICATION_ID:
            text = f"it is not a journal of mdiq; move it away, or give another {self._setting}"
            raise ConfigError(f"{self.path}: {text}")
        if version not in (1, VERSION):
            text = f"a journal of version {version}, and this mdiq reads {VERSION}"
            raise UnreadableJournalError(self.path, f"{text}; the mdiq that wrote it can go on with it")
        (found,) = self._link.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        return _NOTES if version == 1 else ()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._link.execute("BEGIN IMMEDIATE")
        with contextlib.ExitStack() as undone:
            undone.callback(self._roll_back)
            yield
            self._link.execute("COMMIT")
            undone.pop_all()

    def _roll_back(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # sqlite has done so itself, after some errors
            self._link.execute("ROLLBACK")

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        """Raise errors of sqlite3 as ones that say what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._error_of(error) from error

    def _error_of(self, error: sqlite3.Error) -> MdiqError:
        path, setting = self.path, self._setting
        match getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF:  # the rest of it is detail
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return ConfigError(f"{path}: another process has it; wait for that run, or give another {setting}")
            case sqlite3.SQLITE_FULL:
                return CapacityError(f"{path}: no space left on its disk; free some")
            case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
                return ConfigError(f"{path}: {error}; {setting} must be in a folder that can be written")
            case sqlite3.SQLITE_IOERR:
                return CapacityError(f"{path}: {error}; see that its disk works and has space left")
            case _:
                return UnreadableJournalError(path, f"it is damaged ({error})")


def merged(all_changes: Sequence[Changes]) -> Changes:
    """Return changes as one; of what two of them say of the same, the later one counts."""
    begun: dict[str, Begun] = {}
    tokens: dict[str, tuple[int, Sequence[int]]] = {}
    notes: dict[str, dict[str, bytes]] = {}
    for each in all_changes:
        begun |= each.begun
        tokens |= each.tokens
        for key, its in each.notes.items():
            notes.setdefault(key, {}).update(its)
    ended = [key for each in all_changes for key in each.ended]
    forgotten = [key for each in all_changes for key in each.forgotten]
    return Changes(begun, tokens, ended, notes, forgotten)


def differences(known: Mapping[str, str], about: Mapping[str, str]) -> str:
    """Return in words what is not as it was; empty if all is."""
    changed = {name: value for name, value in about.items() if known.get(name, value) != value}
    return "; ".join(f"{name} is {value}, and was {known[name]}" for name, value in changed.items())


def _blob(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def _ids(blob: bytes) -> tuple[int, ...]:
    try:
        return struct.unpack(f"<{len(blob) // 4}I", blob)
    except (struct.error, TypeError) as error:
        raise sqlite3.DatabaseError(f"token ids: {error}") from None


def _params(text: str) -> SamplingParams:
    try:
        return SamplingParams().replaced(json.loads(text), "params")
    except (ValueError, AttributeError, ConfigError) as error:
        raise sqlite3.DatabaseError(f"params: {error}") from None
