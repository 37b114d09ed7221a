"""The journal of a service after its process died, and whatever can be wrong with its file."""

import asyncio
import json
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mdiq.api.lasting import Ending, KeptResponse
from mdiq.config.load import load_topology
from mdiq.core.sequence import SamplingParams
from mdiq.errors import CapacityError, ConfigError, MdiqError
from mdiq.service import response_journal
from mdiq.service.journal import VERSION, Changes, Journal
from mdiq.service.response_journal import MAX_STARTS, ServiceJournal, journal_file

ABOUT = {"weights": "int8", "mode": "exact"}
LONG_S = 3_600.0
REQUEST = {"owner": "ab", "input": [{"role": "user", "content": "Hi \ud800"}], "created_at": 5}
KEPT = KeptResponse("resp_1", REQUEST, (1, 2), SamplingParams(seed=7, grammar="regex:a*"))
ENDING = Ending(
    1_000.5, {"id": "resp_1", "output": []}, [{"role": "assistant", "content": "é"}], (b"a\n", "é".encode())
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal"


@pytest.fixture(autouse=True)
def _folder(path: Path) -> None:
    path.parent.mkdir()


@asynccontextmanager
async def _running(
    path: Path, about: dict[str, str] = ABOUT
) -> AsyncIterator[tuple[ServiceJournal, list[KeptResponse]]]:
    """A journal that is written; its interval does not end by itself."""
    journal = ServiceJournal(path, about, setting="journal", interval_s=LONG_S)
    found = await journal.open()
    running = asyncio.create_task(journal.run(lambda late: found.extend(late)))
    try:
        yield journal, found
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await journal.aclose()


def _shown(journal: ServiceJournal) -> tuple[object, object]:
    status = journal.status()
    return status["is_written"], status["responses"]


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


def _moved(old: Path, new: Path) -> Path:
    return old.rename(new)


def _files(folder: Path) -> list[Path]:
    return [*folder.iterdir()]


def _after_kill(path: Path, folder: Path) -> Path:
    """Copy what a process that dies now leaves on the disk."""
    folder.mkdir()
    for name in (path.name, f"{path.name}-wal"):
        if (file := path.with_name(name)).exists():
            shutil.copy(file, folder)
    return folder / path.name


async def _found(path: Path, about: dict[str, str] = ABOUT) -> list[KeptResponse]:
    async with _running(path, about) as (_, found):
        return found


async def test_what_a_killed_service_had_accepted_is_found_as_it_was(path: Path, tmp_path: Path) -> None:
    tokens: list[int] = []
    async with _running(path) as (journal, found):
        assert found == []
        await journal.accept(KEPT, tokens)
        at_once = _after_kill(path, tmp_path / "1")
        tokens += [10, 11]
        await journal.write(with_tokens=True)
        tokens += [12]
        with_tokens = _after_kill(path, tmp_path / "2")
        await journal.end(KEPT.id, ENDING)
        ended = _after_kill(path, tmp_path / "3")
        await journal.forget(KEPT.id)
        gone = _after_kill(path, tmp_path / "4")
    assert await _found(at_once) == [KEPT]
    assert await _found(with_tokens) == [replace(KEPT, tokens=(10, 11))]
    assert await _found(ended) == [KeptResponse(KEPT.id, REQUEST, ending=ENDING)]
    assert await _found(gone) == []
    with Journal(ended) as rest:
        assert rest.begun() == {}, "the prompt and the tokens of one that has ended are of no use"


async def test_a_service_that_stops_writes_the_rest(path: Path) -> None:
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [10, 11, 12])
        await journal.accept(replace(KEPT, id="resp_2"), [])
        journal.forget_soon("resp_2")
    assert await _found(path) == [replace(KEPT, tokens=(10, 11, 12))]


async def test_tokens_of_a_response_that_goes_on_are_added_to_those_of_before(path: Path) -> None:
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [10, 11])
    for more in (12, 13):
        async with _running(path) as (journal, (kept,)):
            journal.follow(kept.id, [*kept.tokens, more])
    assert await _found(path) == [replace(KEPT, tokens=(10, 11, 12, 13))]


async def test_responses_come_back_in_the_order_in_which_they_were_accepted(path: Path) -> None:
    ids = [f"resp_{i * 7 % 10}" for i in range(10)]
    async with _running(path) as (journal, _):
        for each in ids:
            await journal.accept(replace(KEPT, id=each), [])
    assert [kept.id for kept in await _found(path)] == ids


async def test_a_response_that_was_cancelled_while_it_ended_has_the_end_that_its_client_saw(path: Path) -> None:
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [])
        ends = [replace(ENDING, at_s=float(i)) for i in range(2)]
        await asyncio.gather(*(journal.end(KEPT.id, end) for end in ends))
        await journal.forget("resp_1")
        await journal.end(KEPT.id, ENDING)  # a task that has not heard of it
        await journal.accept(replace(KEPT, id="resp_2"), [])
        await asyncio.gather(*(journal.end("resp_2", end) for end in ends))
    (kept,) = await _found(path)
    assert kept.id == "resp_2" and kept.ending is not None and kept.ending.at_s == 1.0


async def test_the_file_is_closed_to_others(path: Path) -> None:
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [])
        for file in _files(path.parent):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_nothing_of_a_forgotten_response_stays_in_the_file(path: Path) -> None:
    secret = {**REQUEST, "input": "a secret of somebody's " * 400}
    async with _running(path) as (journal, _):
        await journal.accept(replace(KEPT, about=secret), [])
        await journal.end(KEPT.id, ENDING)
    assert b"a secret of somebody's" in _bytes(path)
    async with _running(path) as (journal, _):
        await journal.forget(KEPT.id)
    assert b"a secret of somebody's" not in _bytes(path)


def _limit(journal: ServiceJournal, *, is_full: bool) -> None:
    assert journal._journal is not None
    link = journal._journal._link
    (pages,) = link.execute("PRAGMA page_count").fetchone()
    link.execute(f"PRAGMA max_page_count = {pages if is_full else 1_000_000}")


async def test_a_full_disk_refuses_what_is_new_and_what_it_missed_is_written_later(path: Path, tmp_path: Path) -> None:
    big = replace(KEPT, id="resp_2", prompt=tuple(range(9_000)))
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, tokens := [1])
        _limit(journal, is_full=True)
        with pytest.raises(CapacityError, match="no space left on its disk"):
            await journal.accept(big, [])
        assert _shown(journal) == (False, 1)
        large = replace(ENDING, events=(os.urandom(9_000).hex().encode(),))
        await journal.end(KEPT.id, large)  # its client does not wait for the disk to be mended
        killed = _after_kill(path, tmp_path / "full")
        _limit(journal, is_full=False)
        await journal.write(with_tokens=True)
        assert _shown(journal) == (True, 1)
        await journal.accept(replace(KEPT, id="resp_3"), [])
    assert await _found(killed) == [KEPT], "it goes on, and ends again"
    assert tokens == [1]
    assert [kept.id for kept in await _found(path)] == ["resp_1", "resp_3"]
    (kept, _) = await _found(path)
    assert kept.ending == large


async def test_its_status_counts_responses_writes_failures_and_bytes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(journal: Journal, changes: Changes) -> None:
        raise CapacityError("no space left")

    seconds = iter(range(1_000))
    journal = ServiceJournal(path, ABOUT, setting="journal", clock=lambda: float(next(seconds)))
    assert journal.status()["bytes"] == 0
    await journal.open()
    running = asyncio.create_task(journal.run(lambda _: None))
    try:
        await journal.accept(KEPT, [])
        await journal.accept(replace(KEPT, id="resp_2"), [])
        await journal.end("resp_2", ENDING)
        calm = dict(journal.status())
        assert (calm["responses"], calm["running"], calm["waiting"], calm["failures"]) == (2, 1, 0, 0)
        assert calm["bytes"] == sum(len(_bytes(file)) for file in _files(path.parent)) > 0
        writes, write_s = calm["writes"], calm["write_s"]
        assert isinstance(writes, int) and writes >= 3 and isinstance(write_s, float) and write_s >= writes
        monkeypatch.setattr(Journal, "write", full)
        await journal.end(KEPT.id, ENDING)
        failed = dict(journal.status())
        assert (failed["is_written"], failed["running"], failed["failures"], failed["waiting"]) == (False, 0, 1, 1)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await journal.aclose()


async def test_one_that_was_refused_is_never_found_even_if_its_write_came_through(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Journal.write

    def seems_to_fail(journal: Journal, changes: Changes) -> None:
        write(journal, changes)
        raise CapacityError("disk I/O error")

    async with _running(path) as (journal, _):
        with monkeypatch.context() as broken:
            broken.setattr(Journal, "write", seems_to_fail)
            with pytest.raises(CapacityError):
                await journal.accept(KEPT, [])
        await journal.write()
    assert await _found(path) == []


async def test_one_that_was_refused_after_its_client_had_left_gets_no_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(journal: Journal, changes: Changes) -> None:
        raise CapacityError("no space left")

    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [])
        with monkeypatch.context() as broken:
            broken.setattr(Journal, "write", full)
            leaving = asyncio.create_task(journal.accept(replace(KEPT, id="resp_2"), []))
            while not journal._changes:  # noqa: ASYNC110
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            await journal.write()
        await journal.write()
        await journal.end("resp_2", ENDING)
        assert _shown(journal) == (True, 1)
    assert await _found(path) == [KEPT]


async def test_a_disk_that_hangs_refuses_in_time_and_holds_nobody_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, write = threading.Event(), Journal.write

    def hangs(journal: Journal, changes: Changes) -> None:
        goes_on.wait(20)
        write(journal, changes)

    monkeypatch.setattr(response_journal, "WAIT_S", 0.05)
    async with _running(path) as (journal, _):
        await journal.accept(replace(KEPT, id="resp_0"), [])
        monkeypatch.setattr(Journal, "write", hangs)
        with pytest.raises(CapacityError, match="its disk has not written for"):
            await journal.accept(KEPT, [])
        await journal.end("resp_0", ENDING)
        for _ in range(3):
            with pytest.raises(CapacityError):
                await journal.accept(replace(KEPT, id="resp_2"), [])
        goes_on.set()
        monkeypatch.setattr(response_journal, "WAIT_S", 20.0)
        await journal.forget("resp_0")
        await journal.write(with_tokens=True)
    assert await _found(path) == []


def _execute(path: Path, statement: str) -> None:
    link = sqlite3.connect(path)
    link.execute(statement)
    link.commit()
    link.close()


def _garbage(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)


@pytest.mark.parametrize(
    "damage",
    [
        _garbage,
        lambda path: _execute(path, f"PRAGMA user_version = {VERSION + 1}"),
        lambda path: _execute(path, "UPDATE tokens SET ids = x'0102'"),
        lambda path: _execute(path, "UPDATE notes SET value = x'7b' WHERE name = 'request'"),
        lambda path: _execute(path, "UPDATE notes SET value = '{}' WHERE name = 'request'"),
        lambda path: _execute(path, "UPDATE notes SET value = x'00' WHERE name = 'ending'"),
        lambda path: _execute(path, "DELETE FROM requests"),
    ],
)
async def test_a_file_that_cannot_be_read_is_kept_beside_a_new_one(path: Path, damage: Any) -> None:
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [1])
        await journal.accept(replace(KEPT, id="resp_2"), [])
        await journal.end("resp_2", ENDING)
    damage(path)
    before = _bytes(path)
    async with _running(path) as (journal, found):
        assert found == []
        await journal.accept(replace(KEPT, id="resp_3"), [])
        assert _shown(journal) == (True, 1)
    assert [kept.id for kept in await _found(path)] == ["resp_3"]
    assert _bytes(path.with_name("journal.unreadable")) == before


async def test_a_file_of_somebody_else_is_left_alone_and_the_service_goes_on_without(path: Path) -> None:
    _execute(path, "CREATE TABLE t (x)")
    before = _bytes(path)
    async with _running(path) as (journal, _):
        with pytest.raises(MdiqError, match="it is not a journal of mdiq; move it away, or give another journal"):
            await journal.accept(KEPT, [])
        await journal.end(KEPT.id, ENDING)
        await journal.forget(KEPT.id)
        assert _shown(journal) == (False, 0)
    assert _bytes(path) == before and _files(path.parent) == [path]


async def test_a_folder_that_is_not_there_or_a_file_that_another_has_is_opened_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [1])
    monkeypatch.setattr(response_journal, "REOPEN_S", 0.01)
    away = _moved(path.parent, path.parent.with_name("away"))
    async with _running(path) as (journal, found):
        with pytest.raises(MdiqError, match="journal: No such file or directory; journal must be in a folder"):
            await journal.accept(KEPT, [])
        with Journal(away / path.name):
            _moved(away, path.parent)
            await asyncio.sleep(0.05)
            with pytest.raises(MdiqError, match="another process has it"):
                await journal.accept(KEPT, [])
            assert found == []
        async with asyncio.timeout(20):
            while not found:  # noqa: ASYNC110  (nobody tells)
                await asyncio.sleep(0.01)
        assert found == [replace(KEPT, tokens=(1,))]
        await journal.accept(replace(KEPT, id="resp_2"), [])


async def test_only_what_has_ended_outlives_a_change_of_the_model(path: Path) -> None:
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [1])
        await journal.accept(replace(KEPT, id="resp_2"), [])
        await journal.end("resp_2", ENDING)
    running, ended = await _found(path, {**ABOUT, "weights": "int4"})
    assert running.obstacle == "the service was started with something else: weights is int4, and was int8; ask again"
    assert ended.ending is not None
    running, _ = await _found(path)
    assert running.obstacle == "", "back to what it was"


async def test_a_response_with_which_services_end_again_and_again_is_given_up(path: Path) -> None:
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [])
    for _ in range(2):
        for start in range(MAX_STARTS):
            async with _running(path) as (journal, (kept,)):
                assert kept.obstacle == "", start
                await journal.tries(kept.id)
        (kept,) = await _found(path)
        assert (
            kept.obstacle
            == f"the service has ended {MAX_STARTS} times before it gave a token; it is not computed again"
        )
        async with _running(path) as (journal, (kept,)):  # a token counts
            journal.follow(kept.id, [*kept.tokens, 5])


async def test_a_start_that_did_not_compute_it_does_not_count(path: Path) -> None:
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [])
    for _ in range(MAX_STARTS + 1):
        (kept,) = await _found(path)
        assert kept.obstacle == ""


def test_the_file_is_where_the_topology_says_or_in_the_services_state(tmp_path: Path) -> None:
    def file(line: str, **environ: str) -> Path | None:
        topology = tmp_path / "t.yaml"
        nodes = "nodes: [{name: desk, address: 127.0.0.1, role: starter}]"
        topology.write_text(f"version: 1\nmodel: {{path: m}}\n{nodes}\n{line}\n")
        return journal_file(load_topology(topology), environ)

    assert file("journal: kept") == tmp_path / "kept"
    assert file("journal: null", STATE_DIRECTORY="/var/lib/mdiq") is None
    assert file("", STATE_DIRECTORY="/var/lib/mdiq") == Path("/var/lib/mdiq/journal")
    assert file("journal: auto", STATE_DIRECTORY="/var/lib/a:/var/lib/b") == Path("/var/lib/a/journal")
    assert file("") is None and file("", STATE_DIRECTORY="") is None


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


async def test_a_request_that_is_nested_too_deeply_harms_nobody_else(path: Path) -> None:
    deep = replace(KEPT, id="resp_deep", about={**REQUEST, "shown": _nested(100_000)})
    async with _running(path) as (journal, _):
        with pytest.raises(ConfigError, match="nested too deeply"):
            await journal.accept(deep, [])
        await journal.accept(KEPT, [])
        await journal.accept(replace(KEPT, id="resp_2"), [])
        await journal.end("resp_2", replace(ENDING, whole=_nested(100_000)))
        assert _shown(journal) == (True, 2)
    value = json.dumps({"about": REQUEST, "at_s": 0}).replace("5", "[" * 100_000 + "]" * 100_000)
    _execute(path, f"INSERT INTO notes VALUES ('resp_3', 'request', CAST('{value}' AS BLOB))")
    assert [kept.id for kept in await _found(path)] == ["resp_1", "resp_2"]


async def test_what_is_kept_of_a_request_is_json(path: Path) -> None:
    async with _running(path) as (journal, _):
        await journal.accept(KEPT, [])
    with Journal(path) as journal_file_:
        request = json.loads(journal_file_.notes()["resp_1"]["request"])
    assert request["about"] == REQUEST and request["depends_on"] == ABOUT
