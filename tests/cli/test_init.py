"""`mdiq init` and `mdiq check`: from flags or answers to a file, and what is told of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mdiq.cli import init as init_command
from mdiq.cli.main import app
from mdiq.config.load import load_topology
from mdiq.config.schema import SCHEMA_FILE, schema_text
from mdiq.errors import ConfigError, MdiqError
from tests.config.generated import BROKEN, CONFIGS

WIDE = ["--node", "desk=192.168.1.10", "--node", "pi1=fd00::11,memory=700M,threads=1", "--spare", "pi2=pi2.lan"]
LOCAL = ["--node", "a=127.0.0.1,threads=1,memory=1G", "--node", "b=127.0.0.1,threads=1,memory=1G"]


def call(*arguments: str, typed: str | None = None) -> Result:
    result = CliRunner().invoke(app, [*arguments], input=typed)
    if isinstance(result.exception, MdiqError):
        raise result.exception
    return result


def test_flags_become_a_file_that_loads_and_its_schema_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "ring.yaml"
    result = call("init", *WIDE, "--model", "/srv/m.gguf", "--weights", "int4", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}: written, with {SCHEMA_FILE} beside it\n"
    assert f"next: mdiq keys {out}, then mdiq check {out}" in result.stderr
    assert (tmp_path / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text()
    topology = load_topology(out, without_keys=True).topology
    assert [(node.name, node.role, node.spare) for node in topology.nodes] == [
        ("desk", "starter", False),
        ("pi1", "worker", False),
        ("pi2", "worker", True),
    ]
    assert topology.node("pi1").memory_bytes == 700 << 20
    assert (topology.model.path, topology.model.weights) == ("/srv/m.gguf", "int4")


def test_a_ring_on_loopback_needs_no_keys(tmp_path: Path) -> None:
    out = tmp_path / "t.yaml"
    assert f"next: mdiq check {out}" in call("init", *LOCAL, "--out", str(out)).stderr
    result = call("check", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{out}: ok, 2 nodes, plain text\n"


def test_plain_text_beyond_loopback_is_said_and_warned_of(tmp_path: Path) -> None:
    out = tmp_path / "t.yaml"
    result = call("init", *WIDE, "--insecure", "--out", str(out))
    assert "security.insecure: prompts, answers and weights pass in plain text to desk" in result.stderr
    assert "mdiq keys" not in result.stderr.splitlines()[-1]
    assert call("check", str(out)).exit_code == 0


def test_a_file_that_exists_stays_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "t.yaml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="it exists; add --force"):
        call("init", *LOCAL, "--out", str(out))
    assert out.read_text() == "mine"
    assert call("init", *LOCAL, "--out", str(out), "--force").exit_code == 0
    assert load_topology(out).topology.starter.name == "a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "mdiq init: give the devices, the Starter first: --node desk="),
        (["--node", "desk"], "--node desk: no name and address; write for example --node desk=192.168.1.10"),
        (["--node", "desk="], "--node desk=: no name and address"),
        (["--node", "a=10.0.0.1,colour=blue"], "--node a=10.0.0.1,colour=blue: colour=blue is not one of data_port"),
        (["--node", "a=10.0.0.1,"], "nothing is not one of"),
        (["--node", "a=10.0.0.1,threads=1,threads=2"], "threads stands there twice"),
        (
            ["--node", "a=10.0.0.1,memory=700"],
            "--node a=10.0.0.1,memory=700: memory: 700 has no unit; write for example 700M",
        ),
        (["--node", "a=10.0.0", "--node", "A=10.0.0.2"], "--node a=10.0.0: address: 10.0.0 is not an IPv4 address"),
        (["--node", "a=10.0.0", "--node", "A=10.0.0.2"], "--node A=10.0.0.2: name: A is not a node's name"),
        (["--spare", "a=10.0.0.1"], "--spare a=10.0.0.1: spare: a is the Starter and cannot be spare"),
        (
            ["--node", "a=127.0.0.1", "--node", "b=10.0.0.1"],
            "--node a=127.0.0.1: address: 127.0.0.1 means a to a alone",
        ),
        (
            ["--node", "a=10.0.0.1", "--node", "a=10.0.0.2"],
            "--node a=10.0.0.2: name: a is the name of another node too",
        ),
        (["--node", "a=127.0.0.1", "--model", "x.bin"], "mdiq init: model.path: this kind of file is not read"),
    ],
)
def test_wrong_flags_are_told_and_nothing_is_written(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call("init", *arguments, "--out", str(tmp_path / "t.yaml"))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; give a file in a folder that exists"):
        call("init", *LOCAL, "--out", str(tmp_path / "gone" / "t.yaml"))


def test_on_a_terminal_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init_command, "is_terminal", lambda: True)
    out = tmp_path / "t.yaml"
    typed = "desk\n10.0.0.1\npi1\n10.0.0.2\n700M\nn\npi2\n10.0.0.3\n\ny\n\n/srv/m.gguf\n"
    assert call("init", "--out", str(out), typed=typed).exit_code == 0
    topology = load_topology(out, without_keys=True).topology
    assert [(node.name, node.address, node.memory_bytes, node.spare) for node in topology.nodes] == [
        ("desk", "10.0.0.1", None, False),
        ("pi1", "10.0.0.2", 700 << 20, False),
        ("pi2", "10.0.0.3", None, True),
    ]
    assert topology.model.path == "/srv/m.gguf"


def test_check_tells_all_mistakes_and_ends_with_two() -> None:
    file = next(file for file in BROKEN if "many-mistakes" in file.stem)
    result = call("check", str(file))
    told = file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    expected = [line.replace(file.name, str(file)) for line in told]
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[:-1] == [f"mdiq: {line}" for line in expected]
    assert result.stderr.splitlines()[-1] == f"mdiq: {file}: 10 errors, 3 warnings"


def test_check_tells_machines_as_json() -> None:
    file = next(file for file in BROKEN if "no-keys" in file.stem)
    result = call("check", str(file), "--json")
    value = json.loads(result.stdout)
    assert result.exit_code == 2
    assert (value["file"], value["ok"], value["warnings"]) == (str(file), False, [])
    (error,) = value["errors"]
    assert (error["line"], error["path"]) == (3, "nodes")
    assert error["message"].startswith("no node has a public_key")
    good = call("check", str(CONFIGS / "mixed-spare.yaml"), "--json")
    assert (good.exit_code, json.loads(good.stdout)["ok"]) == (0, True)


def test_check_sums_up_a_good_file() -> None:
    file = CONFIGS / "mixed-spare.yaml"
    assert call("check", str(file)).stdout == f"{file}: ok, 3 nodes and 1 spare, encrypted\n"


def test_check_of_no_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file; `mdiq init` writes one"):
        call("check", "gone.yaml")


def test_every_mistake_is_a_line_of_its_own_on_stderr(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mdiq", "init", "--node", "A=10.0.0", "--out", str(tmp_path / "t.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 2
    assert all(line.startswith("mdiq: --node A=10.0.0: ") for line in result.stderr.splitlines())


def test_a_run_without_a_topology_loads_nothing_of_it() -> None:
    code = "import sys, mdiq.cli.main, mdiq.cli.run, mdiq.cli.node; print({'yaml', 'pydantic'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert result.stdout == "set()\n"
