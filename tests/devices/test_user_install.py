"""A user without root installs a node with install.sh --user and runs it under the user's own systemd."""

from pathlib import Path

import pytest

from tests.devices.conftest import HERE, ROOT, Shelf, must

NAME, USER = "desk", "op"


@pytest.fixture(scope="module")
def desk(shelf: Shelf, wheels: Path) -> Shelf:
    shelf.up(NAME, 1.0, "1G")
    # The devices have no logind that would set this up at a login.
    drop_in = b"[Service]\nEnvironment=XDG_RUNTIME_DIR=/run/user/1000\n"
    shelf.write(NAME, "/run/systemd/system/user@1000.service.d/50-test.conf", drop_in)
    shelf.sh(NAME, f"useradd --create-home --uid 1000 --shell /bin/bash {USER}")
    shelf.sh(NAME, "systemctl daemon-reload && systemctl start user@1000")
    for file in (ROOT / "nodes").rglob("*"):
        if file.is_file():
            shelf.write(NAME, f"/home/{USER}/nodes/{file.relative_to(ROOT / 'nodes')}", file.read_bytes())
    for wheel in wheels.glob("*.whl"):
        shelf.write(NAME, f"/home/{USER}/wheels/{wheel.name}", wheel.read_bytes())
    shelf.write(NAME, f"/home/{USER}/notify_program.py", (HERE / "notify_program.py").read_bytes())
    shelf.sh(NAME, f"chmod +x /home/{USER}/nodes/install.sh; chown -R {USER}: /home/{USER}")
    return shelf


def as_user(shelf: Shelf, script: str) -> str:
    preamble = "cd; export XDG_RUNTIME_DIR=/run/user/1000;"
    return must(shelf.try_sh(NAME, f"su --login {USER} -c bash", stdin=f"{preamble} {script}".encode()))


def test_a_user_installs_without_root_and_again_without_a_change(desk: Shelf) -> None:
    out = as_user(desk, "./nodes/install.sh --user --name desk --wheels wheels")
    assert "put the topology in" in out
    assert "is there already" in as_user(desk, "./nodes/install.sh --user --name desk --wheels wheels")
    assert as_user(desk, ".local/lib/mdiq/current/bin/mdiq --version").startswith("mdiq ")
    desk.sh(NAME, "test ! -e /opt/mdiq -a ! -e /etc/mdiq -a ! -e /etc/systemd/system/mdiq-node.service")


def test_the_users_unit_has_no_fault(desk: Shelf) -> None:
    assert as_user(desk, "systemd-analyze --user verify --man=no .config/systemd/user/mdiq-node.service 2>&1") == ""
    assert as_user(desk, "systemctl --user is-enabled mdiq-node").strip() == "enabled"


def test_the_users_service_gets_ready_and_stops(desk: Shelf) -> None:
    drop_in = ".config/systemd/user/mdiq-node.service.d"
    as_user(
        desk,
        f"mkdir -p {drop_in}; printf '[Service]\\nExecStart=\\nExecStart=%%h/.local/lib/mdiq/current/bin/python "
        f"%%h/notify_program.py desk\\n' >{drop_in}/50-test.conf; systemctl --user daemon-reload; "
        "systemctl --user start --no-block mdiq-node",
    )
    wait = "timeout 60 bash -c 'until systemctl --user show -p StatusText mdiq-node | grep -q {}; do sleep 0.2; done'"
    as_user(desk, wait.format("loading"))
    as_user(desk, "touch $(find .config .local -name facts -printf %h)/ready; " + wait.format("serving"))
    assert as_user(desk, "systemctl --user is-active mdiq-node").strip() == "active"
    as_user(desk, "systemctl --user stop mdiq-node")
    assert as_user(desk, "systemctl --user show -p Result mdiq-node").strip() == "Result=success"
