"""The cache folder on machines as they are: without locks, without room, without a home."""

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mdiq import cache
from mdiq.control.weight_store import try_lock
from mdiq.errors import CapacityError, ConfigError, ModelError

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]


@pytest.fixture(params=NO_LOCKS, ids=errno.errorcode.get)
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for a file system that has no file locks."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(cache, "_warned", set())


@pytest.mark.usefixtures("without_locks")
def test_a_lock_that_only_saves_work_is_gone_without_and_said_once(tmp_path: Path) -> None:
    with capture_logs() as lines:
        for name in ("a.lock", "b.lock"):
            with cache.locked(tmp_path / name):
                pass
    assert [line["event"] for line in lines] == ["no_file_locks"]
    assert lines[0]["path"] == str(tmp_path / "a.lock")


@pytest.mark.usefixtures("without_locks")
def test_a_folder_that_one_process_alone_may_fill_is_refused_without_locks(tmp_path: Path) -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ModelError, match="no file locks there .*set MDIQ_CACHE to a directory of a local disk"):
        try_lock(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_lock_that_another_holds_is_waited_for(tmp_path: Path) -> None:
    first = try_lock(tmp_path)
    assert first is not None and try_lock(tmp_path) is None
    os.close(first)
    second = try_lock(tmp_path)
    assert second is not None
    os.close(second)


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MDIQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", str)  # what it does where HOME is not set and no user entry is found
    with pytest.raises(ConfigError, match="there is no home directory; set MDIQ_CACHE"):
        cache.cache_directory()


def test_room_is_looked_at_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 7_000_000))
    cache.make_room(tmp_path, 7_000_000)
    with pytest.raises(CapacityError, match=rf"^no space left in {tmp_path}: 8 MB needed, 7 MB free; .*MDIQ_CACHE"):
        cache.make_room(tmp_path, 7_000_001)


def test_what_cannot_be_kept_is_made_in_a_temporary_folder_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_warned", set())
    (tmp_path / "file").touch()
    with capture_logs() as lines:
        found = [cache.scratch_directory(tmp_path / "file" / name) for name in "ab"]
    assert [str(path) for path in found] == [tempfile.gettempdir()] * 2
    assert [(line["event"], line["log_level"]) for line in lines] == [("cache_not_writable", "warning")]


def test_a_machine_without_any_folder_that_can_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", find)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no temporary folder; set MDIQ_CACHE"):
        cache.scratch_directory(tmp_path / "file" / "a")
