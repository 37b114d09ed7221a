"""nodes/install.sh in its dry run: what it would do, and what it refuses. Booted devices run it for real."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

INSTALL = Path(__file__).parent.parent.parent / "nodes" / "install.sh"
KEY = "a private key of forty characters, oh!!!"


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "mdiq-1.2.3-py3-none-any.whl").write_bytes(b"mdiq")
    (folder / "torch-2.13.0-cp311-cp311-linux_x86_64.whl").write_bytes(b"torch")
    return folder


def install(*arguments: str | Path, home: Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    return subprocess.run([INSTALL, *map(str, arguments)], capture_output=True, text=True, env=environment, input=stdin)


def _release(done: "subprocess.CompletedProcess[str]") -> str:
    return next(line.split()[3] for line in done.stdout.splitlines() if "installs release" in line)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", INSTALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_says_each_step_and_writes_nothing(wheels: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = install("--user", "--name", "pi1", "--wheels", wheels, "--dry-run", home=home)
    assert done.returncode == 0, done.stderr
    for step in ("-m venv", "--no-index --find-links", "current.new", "node.env", "daemon-reload", "enable"):
        assert step in done.stdout
    assert list(home.iterdir()) == []


def test_with_wheels_pip_asks_no_network(wheels: Path, tmp_path: Path) -> None:
    done = install("--user", "--name", "pi1", "--wheels", wheels, "--dry-run", home=tmp_path)
    pip = next(line for line in done.stdout.splitlines() if "/bin/pip install" in line)
    assert f"--no-index --find-links {wheels} {wheels}/mdiq-1.2.3-py3-none-any.whl" in pip


def test_a_rebuilt_wheel_of_the_same_version_is_another_release(wheels: Path, tmp_path: Path) -> None:
    arguments = ("--user", "--name", "pi1", "--wheels", wheels, "--dry-run")
    first, again = (_release(install(*arguments, home=tmp_path)) for _ in range(2))
    (wheels / "mdiq-1.2.3-py3-none-any.whl").write_bytes(b"mdiq, rebuilt")
    rebuilt = _release(install(*arguments, home=tmp_path))
    assert first == again
    assert first.startswith("1.2.3-")
    assert rebuilt.startswith("1.2.3-")
    assert rebuilt != first


@pytest.mark.parametrize("arguments", [("--key", "-"), ("--key", "FILE")])
def test_a_key_is_never_shown(arguments: tuple[str, str], wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    key = tuple(str(tmp_path / "key") if part == "FILE" else part for part in arguments)
    common = ("--user", "--name", "pi1", "--wheels", wheels, "--dry-run")
    done = install(*common, *key, home=tmp_path, stdin=KEY)
    assert "-m 0600" in done.stdout
    assert KEY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--name", "Pi 1"), "a to z, 0 to 9"),
        (("--role", "boss"), "node or starter, or route"),
        (("--role", "route", "--topology", "x"), "not of a router"),
        (("--name", "pi1", "--routes", "x"), "give --role route"),
        (("--role", "route", "--routes", "/does/not/exist"), "cannot be read"),
        (("--role", "route", "--keys", "/does/not/exist"), "no such folder"),
        (("--frobnicate",), "unknown option --frobnicate"),
        (("--name",), "--name needs a value"),
        (("--name", "pi1", "--wheels", "/does/not/exist"), "--wheels"),
        (("--name", "pi1", "--topology", "/does/not/exist"), "cannot be read"),
        (("--name", "pi1", "--python", "/bin/false"), "python3-venv"),
        ((), "give --name NAME"),
    ],
)
def test_bad_usage_is_refused_with_advice(
    arguments: tuple[str, ...], complaint: str, wheels: Path, tmp_path: Path
) -> None:
    given = arguments if "--wheels" in arguments else ("--wheels", str(wheels), *arguments)
    done = install("--user", "--dry-run", *given, home=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_python_that_is_too_old_or_new_is_named(wheels: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.2 || exit 1\n')
    old.chmod(0o755)
    done = install("--user", "--name", "pi1", "--wheels", wheels, "--python", old, "--dry-run", home=tmp_path)
    assert done.returncode == 2
    assert "3.11 to 3.14" in done.stderr and "Python 3.10.2" in done.stderr


def test_nothing_in_the_working_directory_is_executed(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "venv.py").write_text("open('executed', 'w').close()")
    monkeypatch.chdir(tmp_path / "work")
    done = install("--user", "--name", "pi1", "--wheels", wheels, "--dry-run", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "work" / "executed").exists()


def test_two_wheels_of_mdiq_are_refused(wheels: Path, tmp_path: Path) -> None:
    (wheels / "mdiq-1.2.4-py3-none-any.whl").touch()
    done = install("--user", "--name", "pi1", "--wheels", wheels, "--dry-run", home=tmp_path)
    assert (done.returncode, "leave one" in done.stderr) == (2, True)


def test_there_is_no_way_back_before_the_first_release(tmp_path: Path) -> None:
    done = install("--user", "--rollback", "--dry-run", home=tmp_path)
    assert done.returncode == 1
    assert "no release before" in done.stderr


def test_the_help_names_every_option(tmp_path: Path) -> None:
    out = install("--help", home=tmp_path).stdout
    source = INSTALL.read_text()
    for option in (
        "--name",
        "--role",
        "--wheels",
        "--topology",
        "--routes",
        "--keys",
        "--key",
        "--user",
        "--prepare",
        "--rollback",
    ):
        assert option in out
        assert option in source


@pytest.mark.parametrize(("version", "has_credentials"), [("245 (245.4-4ubuntu3)", False), ("252 (252.39-1)", True)])
def test_where_systemd_knows_no_credentials_the_key_is_a_file_of_a_user_of_its_own(
    version: str, has_credentials: bool, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "systemd {version}"\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{systemctl.parent}{os.pathsep}{os.environ['PATH']}")
    done = install("--name", "pi1", "--wheels", wheels, "--key", "-", "--dry-run", home=tmp_path, stdin=KEY)
    assert done.returncode == 0, done.stderr
    assert ("/etc/mdiq/node.key.new" in done.stdout) is has_credentials
    assert ("useradd --system" in done.stdout) is not has_credentials
    assert ("/etc/mdiq/keys/pi1.key.new" in done.stdout) is not has_credentials


FAKE_PYTHON = """#!/bin/sh
# A venv whose mdiq is the one under test.
[ "$2" = -m ] || exit 0
mkdir -p "$4/bin"
printf '#!/bin/sh\\nexit 0\\n' >"$4/bin/pip"
printf '#!/bin/sh\\nPYTHONPATH={root} exec {python} -P -m mdiq "$@"\\n' >"$4/bin/mdiq"
chmod +x "$4/bin/pip" "$4/bin/mdiq"
"""
FAKE_SYSTEMCTL = """#!/bin/sh
case "$*" in
  *--version*) echo "systemd 252 (252.1)" ;;
  *is-active*) cut -d " " -f 1 {log}.unit ;;
  *SubState*) cut -d " " -f 2 {log}.unit ;;
  *) echo "$*" >>{log} ;;
esac
"""
TOPOLOGY = """version: 1
model: {path: model.gguf}
security: {insecure: true}
nodes:
- {name: desk, role: starter, address: 127.0.0.1, threads: 1}
- {name: pi1, address: 127.0.0.2, threads: 1}
- {name: pi2, address: 127.0.0.3, threads: 1}
"""


@pytest.fixture
def device(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], list[str]]:
    """Install a topology on a device that has a stand-in for systemd; return how its unit is told."""
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    (tmp_path / "log.unit").write_text("active running\n")
    texts = {
        "python": FAKE_PYTHON.format(root=INSTALL.parents[1], python=sys.executable),
        "systemctl": FAKE_SYSTEMCTL.format(log=log),
    }
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def put(role: str, name: str, text: str) -> list[str]:
        log.write_text("")
        (tmp_path / "new.yaml").write_text(text)
        (tmp_path / name).mkdir(exist_ok=True)
        arguments = ("--user", "--role", role, "--name", name, "--wheels", wheels, "--topology", tmp_path / "new.yaml")
        done = install(*arguments, "--python", programs / "python", home=tmp_path / name)
        assert done.returncode == 0, done.stderr
        return [line for line in log.read_text().splitlines() if "restart" in line or "reload " in line]

    return put


def test_a_changed_topology_restarts_only_what_reads_the_change_and_cannot_take_it_over(
    device: Callable[[str, str, str], list[str]],
) -> None:
    def told(text: str) -> dict[str, str]:
        all_of_them = {name: device("starter" if name == "desk" else "node", name, text) for name in ("desk", "pi1")}
        return {name: lines[0].split()[1] for name, lines in all_of_them.items() if lines}

    assert told(TOPOLOGY) == {"desk": "restart", "pi1": "restart"}
    assert told(TOPOLOGY) == {}
    assert told(f"{TOPOLOGY}ring: {{users: 4}}\n") == {"desk": "reload"}
    moved = TOPOLOGY.replace("127.0.0.3", "127.0.0.4")
    assert told(moved) == {"desk": "reload", "pi1": "reload"}
    more_threads = moved.replace("127.0.0.2, threads: 1", "127.0.0.2, threads: 2")
    assert told(more_threads) == {"desk": "reload", "pi1": "restart"}
    assert told(more_threads.replace("model.gguf", "other.gguf")) == {"desk": "restart"}


@pytest.mark.parametrize(
    ("unit", "is_told"),
    [("activating start", False), ("activating auto-restart", True), ("failed failed", True)],
)
def test_a_unit_that_has_failed_is_started_without_a_change_and_one_that_waits_for_its_ring_is_left_alone(
    device: Callable[[str, str, str], list[str]], tmp_path: Path, unit: str, is_told: bool
) -> None:
    assert device("node", "pi1", TOPOLOGY)
    (tmp_path / "log.unit").write_text(f"{unit}\n")
    assert bool(device("node", "pi1", TOPOLOGY)) is is_told


ROUTES = """version: 1
servers:
- {name: ring-a, url: "http://127.0.0.1:8080", key_file: keys/ring-a.key}
"""


@pytest.fixture
def routed(device: Callable[[str, str, str], list[str]], wheels: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Install a router on a device that has a stand-in for systemd; return what systemd is asked."""
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "ring-a.key").write_text(KEY)
    (keys / "api.keys").write_text("of clients")

    def put(text: str) -> list[str]:
        (tmp_path / "log").write_text("")
        (tmp_path / "routes.yaml").write_text(text)
        arguments = ("--user", "--role", "route", "--wheels", wheels, "--routes", tmp_path / "routes.yaml")
        python = tmp_path / "bin" / "python"
        done = install(*arguments, "--keys", keys, "--python", python, home=tmp_path / "desk")
        assert done.returncode == 0, done.stderr
        assert KEY not in done.stdout + done.stderr
        return (tmp_path / "log").read_text().splitlines()

    return put


def test_a_router_gets_its_file_its_keys_and_its_unit(routed: Callable[[str], list[str]], tmp_path: Path) -> None:
    (tmp_path / "desk").mkdir()
    asked = routed(ROUTES)
    assert [line.split()[1] for line in asked if "restart" in line or "enable" in line] == ["enable", "restart"]
    assert all("mdiq-route" in line for line in asked if "reload" not in line)
    config = tmp_path / "desk" / ".config"
    assert (config / "mdiq" / "routes.yaml").read_text() == ROUTES
    key = config / "mdiq" / "keys" / "ring-a.key"
    assert key.read_text() == KEY and key.stat().st_mode & 0o777 == 0o600
    units = config / "systemd" / "user"
    unit = (units / "mdiq-route.service").read_text()
    assert "WantedBy=default.target" in unit and "multi-user" not in unit and "DynamicUser" not in unit
    lines = (units / "mdiq-route.service.d" / "keys.conf").read_text().splitlines()
    assert lines == [
        "[Service]",
        f"LoadCredential=ring-a.key:{key}",
        f"LoadCredential=api.keys:{key.parent}/api.keys",
    ]


def test_a_router_reads_again_or_restarts_as_its_file_and_its_keys_say(
    routed: Callable[[str], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "desk").mkdir()

    def told(text: str) -> list[str]:
        return [line.split()[1] for line in routed(text) if line.split()[1] in ("restart", "reload")]

    assert told(ROUTES) == ["restart"]
    assert told(ROUTES) == []
    assert told(f"{ROUTES}max_requests: 9\n") == ["reload"]
    assert told(f"{ROUTES}api: {{port: 8001}}\n") == ["restart"]
    (tmp_path / "keys" / "ring-a.key").write_text("another")
    assert told(f"{ROUTES}api: {{port: 8001}}\n") == ["restart"], "systemd hands over keys at a start"


def test_a_router_and_a_node_live_on_one_device_and_run_the_same_release(
    device: Callable[[str, str, str], list[str]], routed: Callable[[str], list[str]], wheels: Path, tmp_path: Path
) -> None:
    assert (
        len(
            device(
                "node",
                "desk",
                TOPOLOGY.replace("desk, role: starter", "pi9, role: starter, ")
                + ("- {name: desk, address: 127.0.0.9, threads: 1}\n"),
            )
        )
        == 1
    )
    routed(ROUTES)
    units = tmp_path / "desk" / ".config" / "systemd" / "user"
    assert (units / "mdiq-node.service").exists() and (units / "mdiq-route.service").exists()
    (wheels / "mdiq-1.2.3-py3-none-any.whl").write_bytes(b"mdiq, rebuilt")
    restarted = {line.split()[-1] for line in routed(ROUTES) if "restart" in line}
    assert restarted == {"mdiq-route", "mdiq-node"}
    rolled = install("--user", "--rollback", home=tmp_path / "desk")
    assert rolled.returncode == 0, rolled.stderr
    assert "starts mdiq-route" in rolled.stdout and "starts mdiq-node" in rolled.stdout
