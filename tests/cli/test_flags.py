"""Flags whose values are texts with commas between, and files to write."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdiq.cli.flags import check_writable, parse_wires
from mdiq.cli.main import app
from mdiq.errors import ConfigError


def test_one_format_serves_all_hops_and_a_list_each() -> None:
    assert parse_wires("i8", 3) == ("i8",)
    assert parse_wires("bf16,i8,f32", 3) == ("bf16", "i8", "f32")
    assert parse_wires("bf16", 1) == ("bf16",)
    assert parse_wires("auto", 2) == ("auto",)
    assert parse_wires("auto,i8", 2) == ("auto", "i8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a format; use one of f32, bf16, i8, auto"),
        ("int8", "'int8' is not a format"),
        ("bf16,", "'' is not a format"),
        ("bf16,i8", "2 formats for 3 hops; give one, or one for each"),
    ],
)
def test_other_formats_and_numbers_of_them_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--wire {text}: {message}"):
        parse_wires(text, 3)


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("kept")
    for path in (new, old):
        check_writable("--json", path)
    assert not new.exists() and old.read_text() == "kept"


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable("--json", pipe)  # opening it would wait for a reader


@pytest.mark.parametrize("command", ["run Hello --trace", "bench --json"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(command: str, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere" / "file", tmp_path):
        error = CliRunner().invoke(app, [*command.split(), str(path)]).exception
        flag = command.split()[-1]
        assert isinstance(error, ConfigError) and str(error).startswith(f"{flag} {path}: "), error
        assert str(error).endswith("name a file that can be written")
