"""The file of the API's keys."""

from pathlib import Path

import pytest

from mdiq.api.keys import read_keys
from mdiq.errors import ConfigError

KEY = "0123456789abcdef"


def _file(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    file = tmp_path / "api.keys"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_lines_are_keys_and_comments_are_not(tmp_path: Path) -> None:
    assert read_keys(_file(tmp_path, f"# of the office\n  #another-comment-of-one-word\n\n {KEY} \n{KEY}2\n"), {}) == [
        KEY,
        KEY + "2",
    ]


def test_systemds_credential_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "api.keys").write_text(KEY + "x")
    (folder / "api.keys").chmod(0o440)  # as systemd makes it
    assert read_keys(_file(tmp_path, KEY), {"CREDENTIALS_DIRECTORY": str(folder)}) == [KEY + "x"]


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("# nothing\n", 0o600, "holds no key"),
        ("short\n", 0o600, "5 characters"),
        (f"{KEY} {KEY}\n", 0o600, "without spaces"),
        (KEY, 0o644, "chmod 600"),
        (KEY + "ä", 0o600, "ASCII"),
    ],
)
def test_a_file_that_is_not_safe_or_holds_no_key_is_refused(tmp_path: Path, text: str, mode: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_keys(_file(tmp_path, text, mode), {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: No such file.*api\.keys_file"):
        read_keys(tmp_path / "nowhere", {})
