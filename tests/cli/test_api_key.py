"""`mdiq api-key`: the key is shown once, and its hash is kept."""

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdiq.api.keys import find_key, parse_keys, read_keys
from mdiq.cli.main import app
from mdiq.errors import ConfigError


def _made(*arguments: str | Path) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["api-key", *map(str, arguments)])
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout.strip(), result.stderr


def test_keys_are_added_to_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    file = tmp_path / "api-keys"
    first, told = _made("office", "--file", file, "--max-requests", "4", "--tokens-per-minute", "6000", "--share", "2")
    assert "added office" in told and first not in told
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text(file.read_text().rstrip("\n"))  # as some editors leave it
    second, _ = _made("lab", "--file", file)
    text = file.read_text()
    assert first not in text and second not in text
    office, lab = read_keys(file, {})
    assert (office.name, office.max_requests, office.tokens_per_minute, office.share) == ("office", 4, 6_000, 2)
    assert (lab.name, lab.max_requests, lab.tokens_per_minute, lab.share) == ("lab", None, None, 1)
    assert find_key([office, lab], first.encode()) is office and find_key([office, lab], second.encode()) is lab


def test_without_a_file_the_line_is_shown() -> None:
    key, told = _made("office")
    [read] = parse_keys(told.splitlines()[0], "k")
    assert find_key([read], key.encode()) is read


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        ("office", 0o600, "api-keys:1: office is there already"),
        ("lab", 0o640, "chmod 600"),
        ("a b", 0o600, "or digit$"),
    ],
)
def test_what_cannot_be_added_changes_nothing(tmp_path: Path, name: str, mode: int, words: str) -> None:
    file = tmp_path / "api-keys"
    _made("office", "--file", file)
    file.chmod(mode)
    before = file.read_text()
    with pytest.raises(ConfigError, match=words):
        _made(name, "--file", file)
    assert file.read_text() == before


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "diary"
    file.write_text("Today I went out.\n")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="diary:1: "):
        _made("office", "--file", file)
    assert file.read_text() == "Today I went out.\n"
