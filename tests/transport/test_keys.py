"""Key files: made once, readable by their owner alone, and refused otherwise."""

import os
import stat
from pathlib import Path

import pytest
import zmq

from mdiq.errors import ConfigError
from mdiq.transport.keys import is_public_key, key_file, make_keys, private_of, public_of, read_private


def test_keys_are_made_for_their_owner_alone_and_belong_together(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "keys"
    umask = os.umask(0)
    try:
        public = make_keys(folder, ["desk", "pi1"])
    finally:
        os.umask(umask)
    assert set(public) == {"desk", "pi1"}
    assert public["desk"] != public["pi1"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["desk.key", "pi1.key"]
    for name, key in public.items():
        assert stat.S_IMODE(key_file(folder, name).stat().st_mode) == 0o600
        private = private_of(folder, name, {})
        assert public_of(private) == key == zmq.curve_public(private).decode()
        assert is_public_key(key)


def test_a_key_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    first = make_keys(tmp_path, ["pi1"])
    assert make_keys(tmp_path, ["pi1"]) == first
    new = make_keys(tmp_path, ["pi1"], replace=True)
    assert new != first
    assert public_of(read_private(tmp_path / "pi1.key")) == new["pi1"]
    assert [path.name for path in tmp_path.iterdir()] == ["pi1.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o601, 0o644, 0o660, 0o666])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    make_keys(tmp_path, ["pi1"])
    path = tmp_path / "pi1.key"
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"pi1.key: mode {mode:04o} lets others .* chmod 600 it"):
        read_private(path)


@pytest.mark.parametrize("mode", [0o400, 0o440])
def test_systemds_credential_comes_first_with_the_mode_that_it_has_there(tmp_path: Path, mode: int) -> None:
    make_keys(tmp_path, ["pi1"])
    folder = tmp_path / "credentials"
    make_keys(folder, ["node"])
    environ = {"CREDENTIALS_DIRECTORY": str(folder)}
    (folder / "node.key").chmod(mode)
    assert private_of(tmp_path, "pi1", environ) == (folder / "node.key").read_bytes().strip()
    (folder / "node.key").chmod(0o444)
    with pytest.raises(ConfigError, match="mode 0444"):
        private_of(tmp_path, "pi1", environ)
    (folder / "node.key").unlink()
    assert private_of(tmp_path, "pi1", environ) == (tmp_path / "pi1.key").read_bytes().strip()


def test_a_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_keys(tmp_path, ["pi1"])
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match=r"pi1.key: owned by another user \(uid \d+\); chown it"):
        read_private(tmp_path / "pi1.key")


@pytest.mark.parametrize(
    "content", [b"", b"short", b"x" * 41, b"#" * 40, b"x" * 39 + b" x", b"\xff" * 40, b"x" * 10_000]
)
def test_a_file_that_holds_no_key_is_refused_without_its_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pi1.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="pi1.key: not a private key") as caught:
        read_private(path)
    assert "x" * 9 not in str(caught.value).replace(str(tmp_path), "")


def test_a_missing_key_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pi1.key: no such key; make it with mdiq keys"):
        private_of(tmp_path, "pi1", {})


def test_a_pipe_in_the_place_of_a_key_does_not_hang_us(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pi1.key", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_private(tmp_path / "pi1.key")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "Pi", "-x", "x" * 64, "a.b", "a\n"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="node name"):
        make_keys(tmp_path, [name])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the key"):
        make_keys(tmp_path / "file", ["pi1"])


@pytest.mark.parametrize("text", ["", "x" * 39, "#" * 40, "ü" * 40, " " * 40, "x" * 41])
def test_texts_that_are_no_public_key(text: str) -> None:
    assert not is_public_key(text)
