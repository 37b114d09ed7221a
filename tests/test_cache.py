"""The cache folder on machines as they are: without locks, without room, without a home."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from mdiq import cache
from mdiq.bench.shapes import shape_file
from mdiq.cache import files
from mdiq.control.weight_store import StoredFile, try_lock
from mdiq.core.weights import LayerFile
from mdiq.engine.formats.packed_file import written
from mdiq.errors import CapacityError, ConfigError, ModelError
from mdiq.service.public_keys import write_text
from mdiq.transport.keys import make_keys

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]


@pytest.fixture(params=NO_LOCKS, ids=errno.errorcode.get)
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for a file system that has no file locks."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(files, "_warned", set())


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
    monkeypatch.setattr(files, "_warned", set())
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


@dataclass
class Disk:
    """What was done to files, in order: by name, without what tempfile adds."""

    done: list[str] = field(default_factory=list)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk, synced = Disk(), os.fsync

    def fsync(handle: int) -> None:
        disk.done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "bytes")
        synced(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "link"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda own, path, call=call, **kw: (call(own, path, **kw), disk.done.append("name"))[0]
        )
    return disk


def _store(folder: Path) -> None:
    stored = StoredFile(folder, LayerFile(1, 3, hashlib.sha256(b"abc").digest()))
    stored.put(b"abc")
    assert stored.finish()


def _write_topology(folder: Path) -> None:
    (folder / "ring.yaml").touch()
    write_text(folder / "ring.yaml", "text")


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: cache.write_whole(folder / "a", b"x"),
        lambda folder: cache.keep_small(folder / "a", b"x"),
        lambda folder: written(folder / "a", {"x": torch.zeros(1)}, folder, about="x"),
        lambda folder: make_keys(folder, ["desk"]),
        lambda folder: make_keys(folder, ["desk"], replace=True),
        lambda _: shape_file("tiny"),
        _store,
        _write_topology,
    ],
)
def test_what_has_its_name_is_on_the_disk(
    write: Callable[[Path], object], disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, a name without its bytes would be a file of zeros."""
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    write(tmp_path)
    assert disk.done == ["bytes", "name", "folder"]


def test_a_file_that_may_not_be_replaced_is_not_and_leaves_nothing(tmp_path: Path) -> None:
    cache.write_whole(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        cache.write_whole(tmp_path / "a", b"second", replaces=False)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_of_small_files_those_that_were_used_last_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_SMALL_FILES", 3)
    for i in range(5):
        cache.keep_small(tmp_path / "code" / f"{i}.o", b"x")
        os.utime(tmp_path / "code" / f"{i}.o", (9 if i == 1 else i, i))
    cache.keep_small(tmp_path / "code" / "last.o", b"x")
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == ["1.o", "4.o", "last.o"]


MB = 10**6
PACKED = "0123456789abcdef-18ec5e20f48adbba-int8-v5"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder, which may hold 4 MB."""
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MDIQ_CACHE_GB", "0.004")
    for kind in ("models", "packed", "weights", "shapes"):
        (tmp_path / "cache" / kind).mkdir(parents=True)
    return tmp_path / "cache"


@pytest.fixture
def add(root: Path) -> Callable[[str, int], Path]:
    """Return what adds an entry of 0.98 MB that was used so many seconds after 1970."""

    def add(name: str, used_s: int) -> Path:
        path = file = root / name
        if path.parent.name in ("packed", "weights"):
            path.mkdir()
            file = path / "file"
        file.write_bytes(bytes(980_000))
        os.utime(path, (used_s, used_s))
        if path.parent.name == "models":
            path.with_name(path.name + ".lock").touch()
        return path

    return add


def _names(root: Path) -> list[str]:
    return [entry.name for entry in cache.entries(root)]


def _is_used(path: Path) -> bool:
    found = {entry.path: entry for entry in cache.entries(path.parent.parent)}
    return cache.state_of(found[path]) is cache.State.IN_USE


def test_what_was_used_longest_ago_is_forgotten_and_no_more_than_is_needed(
    root: Path, add: Callable[[str, int], Path]
) -> None:
    add("models/a.gguf", 3)
    add(f"packed/{PACKED}", 1)
    add(f"weights/{64 * 'a'}-int4", 2)
    add("shapes/tiny-q8_0-v1.gguf", 4)
    cache.make_room(root / "models", 50_000)
    assert len(_names(root)) == 4
    cache.make_room(root / "packed", 1_500_000)
    assert _names(root) == ["models/a.gguf", "shapes/tiny-q8_0-v1.gguf"]
    cache.make_room(root / "packed", 2_900_000)
    assert _names(root) == ["shapes/tiny-q8_0-v1.gguf"]
    assert not list((root / "models").iterdir())  # the lock that it was fetched under is gone too


def test_what_a_killed_process_left_is_forgotten_first(root: Path, add: Callable[[str, int], Path]) -> None:
    add(f"packed/{PACKED}", 1)
    for name in ("models/fetch-x_1", "packed/measure-abc", "shapes/write-q"):
        (root / name).mkdir()
        (root / name / "file").write_bytes(bytes(980_000))
    with cache.temporary(root / "packed", "measure-") as living:
        cache.make_room(root, 2_900_000)
        assert {root / name for name in _names(root)} == {root / "packed" / PACKED, living}
    assert not living.exists()


def test_what_an_earlier_layout_left_is_listed_and_forgotten_before_what_is_of_use(
    root: Path, add: Callable[[str, int], Path]
) -> None:
    (root / "hashes").mkdir()
    old = [add(f"weights/{64 * 'b'}", 8), add(f"hashes/{32 * 'c'}", 9)]
    used = [add(f"packed/{PACKED}", 1), add(f"weights/{64 * 'a'}-int4", 2)]
    assert [entry.path for entry in cache.entries(root)] == [*old, *used]
    cache.make_room(root, 2_000_000)
    assert [entry.path for entry in cache.entries(root)] == used


def test_a_temporary_folder_takes_the_place_of_those_that_killed_processes_left(root: Path) -> None:
    (root / "packed" / "measure-left").mkdir()
    (root / "packed" / "measure-left" / "matrix.safetensors").touch()
    (root / "models" / "fetch-left").mkdir()
    with cache.temporary(root / "packed", "measure-") as first, cache.temporary(root / "packed", "measure-") as second:
        assert set((root / "packed").iterdir()) == {first, second}
    assert _names(root) == ["models/fetch-left"]


def test_what_is_used_is_not_forgotten_until_its_user_ends(root: Path, add: Callable[[str, int], Path]) -> None:
    path = add(f"packed/{PACKED}", 1)
    add("shapes/tiny-q8_0-v1.gguf", 2)
    code = f"from mdiq import cache; from pathlib import Path; u = cache.use(Path({str(path)!r})); print(); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        try:
            assert user.stdout is not None and user.stdout.readline()
            assert path.stat().st_mtime > 1e9  # used now
            os.utime(path, (1, 1))
            cache.make_room(root, 2_900_000)
            assert _names(root) == [f"packed/{PACKED}"] and _is_used(path)
            with pytest.raises(CapacityError, match="MDIQ_CACHE_GB is 0.004; raise it; 1 MB in the cache stay"):
                cache.make_room(root, 3_100_000)
        finally:
            user.kill()
    cache.make_room(root, 3_100_000)
    assert _names(root) == []


def test_a_use_ends_with_the_last_reference_and_leaves_a_files_time_of_change(
    root: Path, add: Callable[[str, int], Path]
) -> None:
    path = add("models/a.gguf", 7)
    in_use = cache.use(path)
    assert _is_used(path)
    del in_use
    assert not _is_used(path)
    assert path.stat().st_mtime == 7 and path.stat().st_atime > 1e9


def test_nothing_is_forgotten_where_that_would_not_make_enough_room(
    root: Path, add: Callable[[str, int], Path]
) -> None:
    add(f"packed/{PACKED}", 1)
    with pytest.raises(CapacityError, match=r"5 MB needed, and MDIQ_CACHE_GB is .* would not do \(mdiq cache list\)"):
        cache.make_room(root / "packed", 4_100_000)
    assert _names(root) == [f"packed/{PACKED}"]


def test_the_usual_limit_is_half_of_what_there_is_and_gives_way_to_what_is_in_use(
    root: Path, add: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MDIQ_CACHE_GB")
    add("shapes/a-q8_0-v1.gguf", 1)
    path = add("shapes/b-q8_0-v1.gguf", 2)
    held = sum(entry.num_bytes for entry in cache.entries(root))
    free = 3 * MB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, free))
    assert cache.limit_bytes(root, held) == ((held + free) // 2, False)
    with cache.use(path):
        cache.make_room(root, 2_900_000)
        assert _names(root) == ["shapes/b-q8_0-v1.gguf"]
        with pytest.raises(CapacityError, match="4 MB needed, 3 MB free; .*; 1 MB in the cache stay"):
            cache.make_room(root, 3_100_000)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400", "many", "1,5"])
def test_a_limit_that_is_not_a_number_is_said(value: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE_GB", value)
    with pytest.raises(ConfigError, match=f"^MDIQ_CACHE_GB={value}: not a number above 0"):
        cache.make_room(root, 1)


def test_what_others_put_there_is_left_alone(root: Path, tmp_path: Path) -> None:
    (root / "models" / "mine.gguf").write_bytes(bytes(980_000))
    (root / "packed" / "notes").mkdir()
    (root / "weights" / "x.txt").touch()
    (root / "shapes" / "write-up.md").touch()
    (tmp_path / "elsewhere").mkdir()
    (root / "packed" / PACKED).symlink_to(tmp_path / "elsewhere")
    cache.make_room(root, 3_900_000)  # they do not count either
    before = _names(root)
    for entry in cache.entries(root):
        assert cache.forget(entry) is cache.State.FOREIGN
    assert _names(root) == before and len(before) == 5 and (tmp_path / "elsewhere").exists()


@pytest.mark.usefixtures("without_locks")
def test_nothing_is_forgotten_without_locks_and_that_is_said_once(root: Path, add: Callable[[str, int], Path]) -> None:
    add(f"packed/{PACKED}", 1)
    path = add("shapes/a-q8_0-v1.gguf", 2)
    with capture_logs() as lines:
        for _ in range(2):
            with cache.use(path), pytest.raises(CapacityError):
                cache.make_room(root, 3_900_000)
    assert len(_names(root)) == 2
    assert [line["event"] for line in lines] == ["cache_never_forgets"]


def test_an_entry_that_goes_meanwhile_is_none(root: Path, add: Callable[[str, int], Path]) -> None:
    path = add("shapes/a-q8_0-v1.gguf", 1)
    (entry,) = cache.entries(root)
    path.unlink()
    assert cache.forget(entry) is cache.state_of(entry) is cache.State.GONE
    with pytest.raises(FileNotFoundError):
        cache.use(path)


def test_whoever_comes_while_an_entry_is_forgotten_makes_it_anew(
    root: Path, add: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add(f"packed/{PACKED}", 1)
    (entry,) = cache.entries(root)
    found: list[cache.Use] = []
    user = threading.Thread(target=lambda: found.append(cache.use(path, lambda: path.mkdir(exist_ok=True))))
    remove = shutil.rmtree

    def slowly(folder: Path) -> None:
        user.start()
        user.join(0.1)
        assert not found
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", slowly)
    assert cache.forget(entry) is cache.State.FREE
    user.join()
    assert found and not list(path.iterdir()) and _is_used(path)


def test_two_that_make_room_at_once_forget_no_more_than_one(root: Path, add: Callable[[str, int], Path]) -> None:
    for i in range(4):
        add(f"shapes/{i}-q8_0-v1.gguf", i)
    both = threading.Barrier(2)

    def make_room() -> None:
        both.wait()
        cache.make_room(root, 900_000)

    threads = [threading.Thread(target=make_room) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _names(root) == [f"shapes/{i}-q8_0-v1.gguf" for i in (1, 2, 3)]


def test_a_lock_that_was_removed_while_it_was_waited_for_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    is_in = threading.Event()

    def wait() -> None:
        with cache.locked(path):
            if path.exists():
                is_in.set()

    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not is_in.wait(0.1)
        path.unlink()
    waiter.join()
    assert is_in.is_set()


def test_what_this_process_runs_with_is_kept(
    root: Path, add: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_kept", {})
    path = add("models/a.gguf", 1)
    cache.keep(path)
    cache.keep(path)
    cache.keep(root / "models" / "missing.gguf")
    cache.keep(root.parent / "other.gguf")
    assert _is_used(path) and list(files._kept) == [path]
