"""`mdiq keys` on topologies as operators write them: only the keys change."""

import difflib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mdiq.cli.main import app
from mdiq.errors import ConfigError
from mdiq.transport.keys import make_keys, public_of, read_private

TOPOLOGY = """\
# yaml-language-server: $schema=./topology.schema.json
version: 1
model: {path: smollm2-135m-instruct}   # name: of no node

nodes:
  - name: desk              # the old PC: "of the office"
    role: starter
    address: 192.168.1.10

  - role: worker
    name:   'pi1'
    public_key:             # none yet
    threads: auto
  - {name: pi2, role: worker, address: "::1"}   # ünïcode
  - name: nano
    public_key: null
    role: worker
# the end
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "topology.yaml"
    path.write_text(TOPOLOGY, encoding="utf-8")
    path.chmod(0o640)
    return path


def keys(*arguments: str | Path) -> str:
    """Run the command; return what it printed."""
    result = CliRunner().invoke(app, ["keys", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def public_keys(path: Path) -> dict[str, str | None]:
    return {node["name"]: node.get("public_key") for node in yaml.safe_load(path.read_bytes())["nodes"]}


def test_every_node_gets_a_key_and_all_else_stays_byte_for_byte(file: Path) -> None:
    keys(file)
    public = public_keys(file)
    for name, key in public.items():
        assert key == public_of(read_private(file.parent / "keys" / f"{name}.key"))
    assert len(set(public.values())) == 4
    expected = TOPOLOGY.replace('office"\n', f'office"\n    public_key: "{public["desk"]}"\n').replace(
        "public_key:   ", f'public_key: "{public["pi1"]}"   '
    )
    expected = expected.replace("{name: pi2,", f'{{name: pi2, public_key: "{public["pi2"]}",')
    expected = expected.replace("public_key: null", f'public_key: "{public["nano"]}"')
    assert file.read_text(encoding="utf-8") == expected
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(path.name for path in file.parent.iterdir()) == ["keys", "topology.yaml"]


def test_a_second_run_changes_nothing(file: Path) -> None:
    keys(file)
    before = file.read_bytes(), file.stat().st_ino
    assert "wrote 0 public keys, 4 stay" in keys(file)
    assert (file.read_bytes(), file.stat().st_ino) == before


def test_a_dry_run_says_what_would_be_done_and_does_nothing(file: Path) -> None:
    out = keys(file, "--dry-run")
    assert "would write 4 public keys" in out
    assert "desk: new private key" in out
    assert file.read_text(encoding="utf-8") == TOPOLOGY
    assert [path.name for path in file.parent.iterdir()] == ["topology.yaml"]


def test_rotate_makes_a_new_pair_for_that_node_alone(file: Path) -> None:
    keys(file)
    old_text, old = file.read_text(encoding="utf-8"), public_keys(file)
    keys(file, "--rotate", "pi1", "--rotate", "pi2")
    new = public_keys(file)
    assert {name for name in old if old[name] != new[name]} == {"pi1", "pi2"}
    assert new["pi1"] == public_of(read_private(file.parent / "keys" / "pi1.key"))
    changed = [line for line in difflib.ndiff(old_text.splitlines(), file.read_text().splitlines()) if line[0] in "+-"]
    assert len(changed) == 4


def test_keys_that_exist_and_another_folder_are_used(file: Path) -> None:
    file.write_text(TOPOLOGY + "security: {keys: ../secret}\n")
    made = make_keys(file.parent / ".." / "secret", ["pi2"])
    assert "pi2: public key of" in keys(file)
    assert public_keys(file)["pi2"] == made["pi2"]
    assert not (file.parent / "keys").exists()


def test_a_node_whose_private_key_lies_on_the_device_alone_is_left_as_it_is(file: Path) -> None:
    keys(file)
    before = file.read_bytes()
    (file.parent / "keys" / "pi1.key").unlink()
    keys(file)
    assert file.read_bytes() == before
    assert not (file.parent / "keys" / "pi1.key").exists()


def test_a_link_to_the_file_stays_a_link(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(file.name)
    keys(link)
    assert link.is_symlink()
    assert all(public_keys(file).values())


@pytest.mark.parametrize(
    "text",
    [
        "nodes:\n- name: a",
        "nodes:\r\n- name: a\r\n  role: worker\r\n- name: b\r\n",
        "\ufeffnodes: [{name: a}, {role: worker, name: b}]\n",
        'nodes: [\n  {name: a # why\n   , role: worker},\n  {"name": "b", "public_key": ""}]',
        "nodes:\n  -\n    name: !!str a\n    layers: 0-3\n",
        "nodes: [{name: a, public_key: ~ }]",
    ],
    ids=["no-newline", "crlf", "bom", "flow-lines", "tag", "tilde"],
)
def test_other_ways_to_write_it_are_edited_as_well(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
    keys(file)
    new = file.read_bytes().decode()
    public = public_keys(file)
    assert all(public.values())
    for line in difflib.ndiff(text.splitlines(True), new.splitlines(True)):
        assert line[0] != "-" or "name" in line or "public_key" in line
    if "\r" in text:
        assert new.count("\n") == new.count("\r\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "topology.yaml:1: not a topology"),
        ("- a", "topology.yaml:1: not a topology"),
        ("version: 1", "topology.yaml:1 nodes: a list of nodes must stand here"),
        ("version: 1\nnodes: {}\n", "topology.yaml:2 nodes: a list"),
        ("nodes:\n- role: worker", r"topology.yaml:2 nodes\[0\]: it has no name"),
        ("nodes: [desk]", r"topology.yaml:1 nodes\[0\]: a mapping"),
        ("nodes:\n- name: a\n- name: a", r"topology.yaml:3 nodes\[1\].name: line 2 has 'a' too"),
        ("nodes:\n- name: A", "node name 'A': use a-z"),
        ("nodes:\n- name: >-\n    a\n", "topology.yaml:2 a.name: write it out on one line"),
        ("x: &n a\nnodes:\n- name: *n\n", "topology.yaml:3 a.name: write it out on one line"),
        ("x: &k ''\nnodes:\n- name: a\n  public_key: *k", "topology.yaml:4 a.public_key: write it out on one line"),
        ("nodes:\n- name: a\n  public_key: nonsense", "topology.yaml:3 a.public_key: not a key of 40 characters"),
        ("nodes:\n- name: a\n  public_key: [x]", "topology.yaml:3 a.public_key: write public_key"),
        ("nodes:\n- name: a\nsecurity: {keys: [x]}", "topology.yaml:3 security.keys: write the folder"),
        ("nodes:\n- name: a\r- name: b\n", "cannot edit|topology.yaml:2"),
        ("nodes: [\n", "topology.yaml:2: not YAML"),
        ("nodes: [" + "[" * 5_000, "not YAML"),
        ("a\0b", "not YAML"),
    ],
)
def test_what_it_cannot_edit_is_refused_with_its_line_and_no_key_is_made(file: Path, text: str, message: str) -> None:
    file.write_bytes(text.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        keys(file)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == text.encode()
    assert [path.name for path in file.parent.iterdir()] == ["topology.yaml"]


def test_a_private_key_of_another_pair_is_refused(file: Path) -> None:
    keys(file)
    make_keys(file.parent / "keys", ["pi1"], replace=True)
    with pytest.raises(ConfigError, match=r"pi1.public_key: .*pi1.key belongs to another one; .*--rotate pi1"):
        keys(file)
    keys(file, "--rotate", "pi1")
    keys(file)


def test_an_unsafe_key_and_an_unknown_node_are_refused(file: Path) -> None:
    make_keys(file.parent / "keys", ["pi1"])
    (file.parent / "keys" / "pi1.key").chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        keys(file)
    with pytest.raises(ConfigError, match="--rotate pi9: .* has no such node; it has desk, pi1, pi2, nano"):
        keys(file, "--rotate", "pi9")
    assert file.read_text(encoding="utf-8") == TOPOLOGY


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe", "byte 0 is not UTF-8"), (b" " * (5 << 20), "over 4 MiB")]
)
def test_files_that_are_no_text_are_refused(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        keys(file)
    with pytest.raises(ConfigError, match="cannot read it: No such file"):
        keys(file.with_name("nowhere.yaml"))


def test_a_file_that_cannot_be_written_leaves_the_keys_for_the_next_run(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(os, "replace", fails)
        with pytest.raises(ConfigError, match="cannot write it: Permission denied; the keys are made"):
            keys(file)
    assert file.read_text(encoding="utf-8") == TOPOLOGY
    assert sorted(path.name for path in file.parent.iterdir()) == ["keys", "topology.yaml"]
    made = {path.name: path.read_bytes() for path in (file.parent / "keys").iterdir()}
    keys(file)
    assert {path.name: path.read_bytes() for path in (file.parent / "keys").iterdir()} == made


def test_private_keys_made_in_a_checkout_are_ignored_by_git() -> None:
    root = Path(__file__).parent.parent.parent
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("this is no checkout that git knows")
    made = ["keys/pi1.key", "configs/keys/pi1.key", "ring/keys/desk.key"]
    done = subprocess.run(["git", "check-ignore", "--no-index", *made], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == made
