"""`mdiq cache` on folders as they are found."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mdiq import cache
from mdiq.cli.main import app

NAMES = ["packed/0123456789abcdef-18ec-int8-v5", "shapes/tiny-q8_0-v1.gguf"]
FOREIGN = "weights/my\nnotes"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache with two entries and a file of somebody else's."""
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path))
    monkeypatch.setenv("MDIQ_CACHE_GB", "1.5")
    (tmp_path / NAMES[0]).mkdir(parents=True)
    (tmp_path / NAMES[0] / "ends.safetensors").write_bytes(bytes(200_000))
    (tmp_path / "shapes").mkdir()
    (tmp_path / NAMES[1]).write_bytes(bytes(100_000))
    (tmp_path / "weights").mkdir()
    (tmp_path / FOREIGN).touch()
    for i, name in enumerate([*NAMES, FOREIGN]):
        os.utime(tmp_path / name, (i, i))
    (tmp_path / "kernels.json").touch()
    return tmp_path


def _mdiq(*words: str) -> Result:
    return CliRunner().invoke(app, ["cache", *words])


def test_the_list_has_names_sizes_times_and_what_is_in_use(root: Path) -> None:
    found = json.loads(_mdiq("list", "--json").output)
    assert (found["folder"], found["limit_bytes"]) == (str(root), 1_500_000_000)
    assert found["bytes"] == sum(entry.pop("bytes") for entry in found["entries"]) >= 300_000
    assert [entry["name"] for entry in found["entries"]] == [*NAMES, FOREIGN]
    assert found["entries"][0] == {
        "name": NAMES[0],
        "kind": "packed",
        "last_used": "1970-01-01T00:00:00+00:00",
        "state": "free",
    }
    with cache.use(root / NAMES[1]):
        done = _mdiq("list")
    lines = [line.split() for line in done.output.splitlines()]
    assert done.exit_code == 0
    assert {line[-1]: " ".join(line[4:-1]) for line in lines[:-1]} == {
        NAMES[0]: "free",
        repr(FOREIGN): "foreign",
        NAMES[1]: "in use",
    }
    assert done.output.splitlines()[-1].startswith(f"{root}: 0.3 MB of 1,500.0 MB (MDIQ_CACHE_GB)")


def test_clear_removes_what_nobody_uses_and_says_what_stays(root: Path) -> None:
    with cache.use(root / NAMES[1]):
        dry = _mdiq("clear", "--dry-run")
        assert (root / NAMES[0]).exists() and f"would remove {NAMES[0]}" in dry.output and dry.exit_code == 0
        done = _mdiq("clear")
    assert not (root / NAMES[0]).exists() and (root / NAMES[1]).exists() and (root / "kernels.json").exists()
    assert done.exit_code == 0 and (root / FOREIGN).exists()
    assert f"stays: {NAMES[1]}: it is in use" in done.output and "mdiq did not put it there" in done.output


@pytest.mark.parametrize("name", [NAMES[1], "tiny-q8_0-v1.gguf", "shapes", "shapes/"])
def test_clear_takes_names_and_folders(name: str, root: Path) -> None:
    with cache.use(root / NAMES[1]):
        assert _mdiq("clear", name).exit_code == 1
    assert _mdiq("clear", name).exit_code == 0
    assert (root / NAMES[0]).exists() and not (root / NAMES[1]).exists()


def test_a_name_that_is_not_there_is_said(root: Path) -> None:
    error = _mdiq("clear", NAMES[0], f"../{root.name}").exception
    assert str(error) == f"../{root.name}: nothing of that name is in {root}; see mdiq cache list"
    assert (root / NAMES[0]).exists()


@pytest.mark.parametrize("words", [("list",), ("clear",)])
def test_a_cache_that_does_not_exist_is_empty(words: tuple[str, ...], root: Path) -> None:
    shutil.rmtree(root)
    done = _mdiq(*words)
    assert done.exit_code == 0 and f"{root}: " in done.output and not root.exists()


def test_an_entry_that_cannot_be_removed_does_not_keep_the_others(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path / "file"))

    monkeypatch.setattr(shutil, "rmtree", fail)
    done = _mdiq("clear")
    assert done.exit_code == 1 and f"{root / NAMES[0]}/file: Permission denied" in done.output
    assert not (root / NAMES[1]).exists()
