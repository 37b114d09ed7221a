"""Requests that have begun and not ended, on disk: another process goes on from their tokens. Knows no asyncio.

Theory. A Sequence follows from its prompt, how it is sampled, and the tokens so far; so these are kept, and no KV
cache. What is lost with a process is what came after the last ``write``: it is computed again, with the same tokens. So
a Journal that is old, or that could not be written for a while, costs time and not an answer.

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

VERSION = 1
"""Of the tables; another one is refused."""
_APPLICATION_ID = int.from_bytes(b"mdiq", "big")
_TABLES = (
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE requests (key TEXT PRIMARY KEY, prompt BLOB NOT NULL, params TEXT NOT NULL) WITHOUT ROWID",
    # Pieces: a long answer is not written again for each of its tokens.
    "CREATE TABLE tokens (key TEXT, start INTEGER, ids BLOB NOT NULL, PRIMARY KEY (key, start)) WITHOUT ROWID",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
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

    begun: new requests; their tokens do not count. tokens: those from a place in the answer on. ended: to be forgotten.
    """

    begun: Mapping[str, Begun] = field(default_factory=dict)
    tokens: Mapping[str, tuple[int, Sequence[int]]] = field(default_factory=dict)
    ended: Collection[str] = ()

    def __bool__(self) -> bool:
        return bool(self.begun or self.tokens or self.ended)


class Journal:
    """One open Journal. Any thread may use it, one at a time."""

    def __init__(self, path: Path) -> None:
        """Open a Journal, or make one.

        Raises:
            ConfigError: it cannot be made there, another process has it, or it is damaged or of another version.
            CapacityError: the disk is full.
        """
        self.path = path
        with contextlib.ExitStack() as opened, _in_words(path):
            self._link = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
            opened.callback(self._link.close)
            self._link.execute("PRAGMA locking_mode = EXCLUSIVE")
            is_new = self._check()
            self._link.execute("PRAGMA journal_mode = WAL")
            self._link.execute("PRAGMA synchronous = FULL")
            with self._transaction():  # takes the lock
                for statement in _TABLES if is_new else ():
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
        with _in_words(self.path):
            known = dict(self._link.execute("SELECT name, value FROM about"))
            differing = [
                f"{name} is {value}, and was {known[name]}"
                for name, value in about.items()
                if known.get(name, value) != value
            ]
            if differing:
                raise ConfigError(
                    f"{self.path}: answers have begun with something else: {'; '.join(differing)}. Go on with what it "
                    "was, or give another --out"
                )
            with self._transaction():
                self._link.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", about.items())

    def expect_anything(self) -> None:
        """Forget what has been noted: nothing has begun.

        Raises:
            CapacityError: the disk is full.
        """
        with _in_words(self.path), self._transaction():
            self._link.execute("DELETE FROM about")

    def begun(self) -> dict[str, Begun]:
        """Return the requests that have begun, by their keys.

        Raises:
            ConfigError: it is damaged.
        """
        with _in_words(self.path):
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

    def write(self, changes: Changes) -> None:
        """Bring changes to the disk, all or none. The same changes may be written again.

        Raises:
            ConfigError, CapacityError: they cannot be written.
        """
        rows = [(key, _blob(begun.prompt), json.dumps(asdict(begun.params))) for key, begun in changes.begun.items()]
        pieces = [(key, start, _blob(ids)) for key, (start, ids) in changes.tokens.items()]
        ended = [(key,) for key in changes.ended]
        with _in_words(self.path), self._transaction():
            # A write that failed may have reached the disk all the same, and come again with more tokens.
            self._link.executemany("INSERT OR REPLACE INTO requests VALUES (?, ?, ?)", rows)
            self._link.executemany("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?)", pieces)
            self._link.executemany("DELETE FROM tokens WHERE key = ?", ended)
            self._link.executemany("DELETE FROM requests WHERE key = ?", ended)

    def close(self) -> None:
        """Give the Journal free; it stays on the disk."""
        with contextlib.suppress(sqlite3.Error):  # what was written is in the WAL, which the next one reads
            self._link.close()

    def remove(self) -> None:
        """Close it, and remove it from the disk: every request has ended."""
        self.close()
        for path in (self.path, self.path.with_name(f"{self.path.name}-wal")):
            path.unlink(missing_ok=True)

    def _check(self) -> bool:
        """See that it is a Journal of this version; return whether it is empty as yet."""
        (application_id,) = self._link.execute("PRAGMA application_id").fetchone()
        (version,) = self._link.execute("PRAGMA user_version").fetchone()
        (num_tables,) = self._link.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not num_tables and not application_id:
            return True
        if application_id != _APPLICATION_ID:
            raise ConfigError(f"{self.path}: it is not a journal of mdiq; move it away, or give another --out")
        if version != VERSION:
            raise ConfigError(
                f"{self.path}: a journal of version {version}, and this mdiq reads {VERSION}; go on with the mdiq that "
                f"wrote it, or {_AFRESH}"
            )
        (found,) = self._link.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        return False

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
def _in_words(path: Path) -> Iterator[None]:
    """Raise errors of sqlite3 as ones that say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise _error_of(path, error) from error


def _error_of(path: Path, error: sqlite3.Error) -> MdiqError:
    match getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF:  # the rest of it is detail
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return ConfigError(f"{path}: another process has it; wait for that run, or give another --out")
        case sqlite3.SQLITE_FULL:
            return CapacityError(f"{path}: no space left on its disk; free some")
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return ConfigError(f"{path}: {error}; --out must be in a folder that can be written")
        case sqlite3.SQLITE_IOERR:
            return CapacityError(f"{path}: {error}; see that its disk works and has space left")
        case _:
            return ConfigError(f"{path}: it is damaged ({error}); {_AFRESH}")


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
