"""The cache folder on machines as they are: without locks, without room, without a home."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mdiq import cache
from mdiq.control.weight_store import try_lock
from mdiq.errors import ModelError

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
