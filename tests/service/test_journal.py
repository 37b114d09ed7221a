"""A journal after its process died at any step, and every way in which it cannot be used."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from mdiq.core.sequence import SamplingParams
from mdiq.errors import CapacityError, ConfigError
from mdiq.service.journal import VERSION, Begun, Changes, Journal

PARAMS = SamplingParams(
    max_tokens=7,
    temperature=0.1,
    top_k=3,
    top_p=0.7,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=-0.5,
    frequency_penalty=1.5,
    logit_bias=((3, -100.0), (2**31, 0.1)),
    min_tokens=2,
    stop=("END", "\n🦊"),
    stop_token_ids=(5, 2**31),
    ignore_eos=True,
    seed=2**64 - 1,
)
STEPS = (
    Changes(begun={"0": Begun((1, 2), PARAMS)}, tokens={"0": (0, (10,))}),
    Changes(begun={"7": Begun((3,), SamplingParams())}, tokens={"0": (1, (11, 12)), "7": (0, (20, 21))}),
    Changes(tokens={"0": (1, (11, 12, 13)), "7": (2, (22,))}),  # the first one again: its write seemed to fail
    Changes(tokens={"7": (3, (23,))}, ended=["0"]),
    Changes(ended=["7"]),
)
STATES: tuple[dict[str, Begun], ...] = (
    {},
    {"0": Begun((1, 2), PARAMS, (10,))},
    {"0": Begun((1, 2), PARAMS, (10, 11, 12)), "7": Begun((3,), SamplingParams(), (20, 21))},
    {"0": Begun((1, 2), PARAMS, (10, 11, 12, 13)), "7": Begun((3,), SamplingParams(), (20, 21, 22))},
    {"7": Begun((3,), SamplingParams(), (20, 21, 22, 23))},
    {},
)


def _wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _after_kill(path: Path, folder: Path) -> Path:
    """Copy what the disk has of a journal that is open: what a process that dies now leaves."""
    folder.mkdir()
    for file in (path, _wal(path)):
        if file.exists():
            shutil.copy(file, folder)
    return folder / path.name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl.journal"


def test_after_every_write_another_process_finds_all_of_it(path: Path, tmp_path: Path) -> None:
    with Journal(path) as journal:
        left = [_after_kill(path, tmp_path / "0")]
        for number, step in enumerate(STEPS, 1):
            journal.write(step)
            left.append(_after_kill(path, tmp_path / f"{number}"))
    for dead, state in zip(left, STATES, strict=True):
        with Journal(dead) as again:
            assert again.begun() == state
            again.write(Changes(begun={"9": Begun((1,), PARAMS)}, tokens={"9": (0, (1,))}))
            assert again.begun() == {**state, "9": Begun((1,), PARAMS, (1,))}


def test_a_write_that_was_cut_off_is_as_if_it_had_not_begun(path: Path, tmp_path: Path) -> None:
    ends = []
    with Journal(path) as journal:
        for step in STEPS:
            ends.append(_wal(path).stat().st_size)
            journal.write(step)
        whole = _after_kill(path, tmp_path / "whole")
    for number, (start, stop) in enumerate(zip(ends, [*ends[1:], _wal(whole).stat().st_size], strict=True)):
        for cut in (start + 1, stop - 1):
            dead = _after_kill(whole, tmp_path / f"{number}-{cut}")
            with _wal(dead).open("r+b") as file:
                file.truncate(cut)
            with Journal(dead) as again:
                assert again.begun() == STATES[number]


def test_a_process_that_died_while_it_made_a_journal_hinders_no_other(path: Path, tmp_path: Path) -> None:
    path.touch()
    with Journal(path) as journal:
        made = _after_kill(path, tmp_path / "made")
        assert journal.begun() == {}
    size = _wal(made).stat().st_size
    for cut in (0, 1, size // 3, size // 2, size - 1):
        dead = _after_kill(made, tmp_path / f"{cut}")
        with _wal(dead).open("r+b") as file:
            file.truncate(cut)
        with Journal(dead) as again:
            again.write(STEPS[0])
            assert again.begun() == STATES[1]


def test_only_one_process_has_it(path: Path) -> None:
    with Journal(path):
        with pytest.raises(ConfigError, match=r"out.jsonl.journal: another process has it; wait for that run"):
            Journal(path)
    Journal(path).close()


def test_what_the_requests_depend_on_must_be_the_same(path: Path) -> None:
    with Journal(path) as journal:
        journal.expect({"weights": "int8", "temperature": "0.7"})
    with Journal(path) as journal:
        journal.expect({"temperature": "0.7", "dtype": "f32"})
        with pytest.raises(ConfigError, match="temperature is 0.0, and was 0.7; dtype is bf16, and was f32. Go on"):
            journal.expect({"weights": "int8", "temperature": "0.0", "dtype": "bf16"})
        journal.expect_anything()
        journal.expect({"temperature": "0.0"})


def _garbage(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)


def _half(path: Path) -> None:
    with Journal(path) as journal:
        journal.write(Changes(begun={f"{key}": Begun((1,) * 100, PARAMS) for key in range(200)}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _gap(path: Path) -> None:
    with Journal(path) as journal:
        journal.write(Changes(begun={"4": Begun((1,), PARAMS)}, tokens={"4": (2, (7,))}))


def _newer(path: Path) -> None:
    Journal(path).close()
    _execute(path, f"PRAGMA user_version = {VERSION + 1}")


def _execute(path: Path, statement: str) -> None:
    link = sqlite3.connect(path)
    link.execute(statement)
    link.commit()
    link.close()


def _half_of_an_id(path: Path) -> None:
    with Journal(path) as journal:
        journal.write(STEPS[0])
    _execute(path, "UPDATE tokens SET ids = x'0102'")


def _no_params(path: Path) -> None:
    with Journal(path) as journal:
        journal.write(STEPS[0])
    _execute(path, "UPDATE requests SET params = '[]'")


DELETE = "delete it to go on without: finished answers stay, and the others begin anew"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_garbage, rf"it is damaged \(file is not a database\); {DELETE}"),
        (_half, rf"it is damaged \(.*\); {DELETE}"),
        (_gap, rf"it is damaged \(tokens of request 4 are missing\); {DELETE}"),
        (_half_of_an_id, rf"it is damaged \(token ids: .*\); {DELETE}"),
        (_no_params, rf"it is damaged \(params: .*\); {DELETE}"),
        (_newer, rf"a journal of version {VERSION + 1}, and this mdiq reads {VERSION}; .*{DELETE}"),
        (lambda path: _execute(path, "CREATE TABLE t (x)"), "it is not a journal of mdiq; move it away"),
        (Path.mkdir, "unable to open database file; --out must be in a folder that can be written"),
    ],
)
def test_one_that_cannot_be_used_says_what_to_do(path: Path, damage: object, words: str) -> None:
    assert callable(damage)
    damage(path)
    with pytest.raises(ConfigError, match=f"^{path}: {words}"):
        with Journal(path) as journal:
            journal.begun()


def test_a_foreign_database_is_left_as_it_is(path: Path) -> None:
    _execute(path, "CREATE TABLE t (x)")
    before = path.read_bytes()
    with pytest.raises(ConfigError):
        Journal(path)
    assert path.read_bytes() == before and not _wal(path).exists()


def test_a_full_disk_loses_nothing_that_was_written_and_room_helps(path: Path) -> None:
    with Journal(path) as journal:
        journal.write(STEPS[0])
        (pages,) = journal._link.execute("PRAGMA page_count").fetchone()
        journal._link.execute(f"PRAGMA max_page_count = {pages}")
        large = Changes(begun={"1": Begun(tuple(range(9_000)), PARAMS)}, ended=["0"])
        with pytest.raises(CapacityError, match="no space left on its disk; free some"):
            journal.write(large)
        assert journal.begun() == STATES[1]
        journal._link.execute("PRAGMA max_page_count = 1000000")
        journal.write(large)
        assert [*journal.begun()] == ["1"]


def test_nothing_is_left_of_one_that_is_removed(path: Path, tmp_path: Path) -> None:
    with Journal(path) as journal:
        journal.write(STEPS[0])
        journal.remove()
    assert [*tmp_path.iterdir()] == []


def test_notes_stay_after_the_end_of_a_request_until_it_is_forgotten(path: Path, tmp_path: Path) -> None:
    with Journal(path) as journal:
        journal.write(Changes(begun=STEPS[0].begun, notes={"0": {"a": b"1", "b": b"2"}, "1": {"a": b"3"}}))
        journal.write(Changes(ended=["0"], notes={"0": {"b": b"4"}}))
        dead = _after_kill(path, tmp_path / "dead")
        journal.write(Changes(forgotten=["0"]))
        assert journal.notes() == {"1": {"a": b"3"}}
        journal.write(Changes(begun=STEPS[0].begun, tokens={"0": (0, (1,))}, notes={"0": {"a": b"1"}}, forgotten=["0"]))
        assert journal.notes() == {"1": {"a": b"3"}} and journal.begun() == {}
    with Journal(dead) as again:
        assert again.notes() == {"0": {"a": b"1", "b": b"4"}, "1": {"a": b"3"}} and again.begun() == {}


def test_one_of_version_1_goes_on(path: Path) -> None:
    with Journal(path) as journal:
        journal.write(STEPS[0])
    for statement in ("DROP TABLE notes", "PRAGMA user_version = 1"):
        _execute(path, statement)
    for _ in range(2):
        with Journal(path) as journal:
            assert (journal.begun(), journal.notes()) == (STATES[1], {})
            journal.write(Changes(notes={"0": {"a": b"1"}}))
            journal.write(Changes(forgotten=["1"]))
            assert journal.notes() == {"0": {"a": b"1"}}
            journal.write(Changes(begun=STEPS[0].begun, tokens=STEPS[0].tokens, forgotten=[]))
            journal._link.execute("DELETE FROM notes")


def test_messages_name_the_setting_that_the_file_comes_from(path: Path) -> None:
    with Journal(path, setting="journal"), pytest.raises(ConfigError, match="or give another journal$"):
        Journal(path, setting="journal")
