"""A node's files of layers on disk: what is there after a kill or a power cut, and what has changed. No sockets."""

import errno
import hashlib
import os
import random
from pathlib import Path

import pytest

from mdiq.control.weight_store import StoredFile, file_errors, path_of, try_lock
from mdiq.core.weights import LayerFile
from mdiq.errors import CapacityError, ModelError

CONTENT = random.Random(3).randbytes(3 * 2**20 + 77)
FILE = LayerFile(3, len(CONTENT), hashlib.sha256(CONTENT).digest())


def _stored(folder: Path, content: bytes = CONTENT) -> StoredFile:
    """Return a file of which so much has come; it is closed."""
    stored = StoredFile(folder, FILE)
    stored.put(content)
    if len(content) == len(CONTENT):
        assert stored.finish() == (content == CONTENT)
    stored.close()
    return stored


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_a_file_of_which_all_has_come_has_its_name(tmp_path: Path) -> None:
    stored = _stored(tmp_path)
    assert stored.is_whole and stored.path == tmp_path / f"layer-003-{FILE.sha256.hex()}.safetensors"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [CONTENT]


def test_a_second_start_misses_nothing_and_writes_nothing(tmp_path: Path) -> None:
    before = _stored(tmp_path).path.stat()
    again = StoredFile(tmp_path, FILE)
    assert again.is_whole and not again.was_mended and again.num_bytes == FILE.num_bytes
    after = again.path.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**21 + 5, len(CONTENT) - 1])
def test_a_transfer_that_was_cut_goes_on_where_it_stopped(size: int, tmp_path: Path) -> None:
    _stored(tmp_path, CONTENT[:size])
    assert not path_of(tmp_path, FILE).exists(), "nobody may read what is not whole"
    again = StoredFile(tmp_path, FILE)
    assert (again.num_bytes, again.is_whole) == (size, False)
    again.put(CONTENT[size:])
    assert again.finish() and again.path.read_bytes() == CONTENT


def test_a_file_whose_process_was_killed_just_before_it_got_its_name_is_whole(tmp_path: Path) -> None:
    stored = StoredFile(tmp_path, FILE)
    stored.put(CONTENT)
    stored.close()
    again = StoredFile(tmp_path, FILE)
    assert again.is_whole and again.path.read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", bytes(len(CONTENT)), CONTENT + b"more"])
def test_what_a_power_cut_left_wrong_never_gets_the_name(content: bytes, tmp_path: Path) -> None:
    """Zeros where data had not reached the disk, say; or the file of another version."""
    path_of(tmp_path, FILE).with_suffix(".part").write_bytes(content)
    stored = StoredFile(tmp_path, FILE)
    assert (stored.num_bytes, stored.is_whole) == (0, False)
    stored.put(CONTENT)
    assert stored.finish() and stored.path.read_bytes() == CONTENT


def test_a_wrong_beginning_is_found_when_the_rest_has_come(tmp_path: Path) -> None:
    path_of(tmp_path, FILE).with_suffix(".part").write_bytes(bytes(1_000))
    stored = StoredFile(tmp_path, FILE)
    stored.put(CONTENT[1_000:])
    assert not stored.finish()
    assert (stored.num_bytes, stored.is_whole) == (0, False)
    stored.put(CONTENT)
    assert stored.finish() and stored.path.read_bytes() == CONTENT


@pytest.mark.parametrize("at", [0, 2**20, len(CONTENT) - 1])
def test_a_byte_that_changed_on_the_disk_is_found_by_the_files_time(at: int, tmp_path: Path) -> None:
    _flip(_stored(tmp_path).path, at)
    again = StoredFile(tmp_path, FILE)
    assert again.was_mended and (again.num_bytes, again.is_whole) == (0, False)
    assert not again.path.exists()


def test_a_file_that_was_only_touched_is_hashed_once_and_stays(tmp_path: Path) -> None:
    path = _stored(tmp_path).path
    right = path.stat().st_mtime
    os.utime(path, (5, 5))
    again = StoredFile(tmp_path, FILE)
    assert again.is_whole and not again.was_mended
    assert path.stat().st_mtime == right


def test_a_file_that_was_cut_is_fetched_again(tmp_path: Path) -> None:
    path = _stored(tmp_path).path
    os.truncate(path, 100)
    assert StoredFile(tmp_path, FILE).was_mended


def test_a_layers_new_file_takes_the_place_of_its_old_one_alone(tmp_path: Path) -> None:
    names = ["layer-003-" + "a" * 64 + end for end in (".safetensors", ".part")]
    other = tmp_path / ("layer-004-" + "a" * 64 + ".safetensors")
    for path in (*(tmp_path / name for name in names), other):
        path.write_bytes(b"old")
    stored = _stored(tmp_path)
    assert {*tmp_path.iterdir()} == {stored.path, other}


def test_a_link_that_somebody_put_there_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    path_of(tmp_path, FILE).with_suffix(".part").symlink_to(victim)
    with pytest.raises(ModelError, match="weights cannot be kept there"):
        StoredFile(tmp_path, FILE)
    assert victim.read_bytes() == b"mine"


def test_a_folder_is_filled_by_one_process_at_a_time(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "new")
    assert lock is not None
    assert try_lock(tmp_path / "new") is None
    os.close(lock)
    again = try_lock(tmp_path / "new")
    assert again is not None
    os.close(again)


def test_a_folder_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("mdiq.cache.files.fcntl.flock", refusing)
    with pytest.raises(ModelError, match="no file locks there .*; set MDIQ_CACHE to a directory of a local disk"):
        try_lock(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_that_says_what_to_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StoredFile(tmp_path, FILE)

    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(
            CapacityError, match="no space left for weights; free some there, or set MDIQ_CACHE"
        ) as error:
            stored.put(CONTENT)
    assert "\n" not in str(error.value)
    stored.close()
    assert StoredFile(tmp_path, FILE).num_bytes == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="weights cannot be kept there .*; make it writable, or set MDIQ_CACHE"):
        try_lock(tmp_path / "file" / "weights")
    with pytest.raises(ModelError, match="cannot be kept"), file_errors(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
