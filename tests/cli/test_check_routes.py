"""`mdiq check` of a routes file."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mdiq.cli.main import app
from mdiq.errors import ConfigError

ROUTES: dict[str, Any] = {
    "version": 1,
    "servers": [{"name": "ring-a", "url": "http://192.168.1.10:8080"}, {"name": "desk", "url": "http://desk:8080"}],
}


def _file(folder: Path, name: str = "routes.yaml", **changes: Any) -> Path:
    (folder / name).write_text(yaml.safe_dump({**ROUTES, **changes}, sort_keys=False))
    return folder / name


def test_a_routes_file_that_can_be_used_is_ok(tmp_path: Path) -> None:
    file = _file(tmp_path)
    done = CliRunner().invoke(app, ["check", str(file)])
    assert (done.exit_code, done.stdout) == (0, f"{file}: ok, 2 servers\n")


def test_all_errors_of_a_routes_file_are_listed_with_their_lines(tmp_path: Path) -> None:
    servers = [{"name": "ring-a", "url": "ftp://x"}, {"name": "desk", "uri": "http://desk:8080"}]
    file = _file(tmp_path, servers=servers)
    done = CliRunner().invoke(app, ["check", str(file)])
    assert done.exit_code == 2
    assert f"{file}:4 servers[0].url: ftp://x is not the address of an API" in done.stderr
    assert f"{file}:6 servers[1].uri: it is not a key here; did you mean url?" in done.stderr
    found = json.loads(CliRunner().invoke(app, ["check", str(file), "--json"]).stdout)
    assert found["ok"] is False and {each["line"] for each in found["errors"]} == {4, 5, 6}


def test_files_that_are_not_here_are_warned_of(tmp_path: Path) -> None:
    servers = [{"name": "ring-a", "url": "http://x", "key_file": "none.key"}]
    file = _file(tmp_path, servers=servers, api={"port": 8000, "keys_file": "api.keys"})
    done = CliRunner().invoke(app, ["check", str(file)])
    assert done.exit_code == 0 and "1 server, 2 warnings" in done.stdout
    assert f"warning: {file}:3 servers[0]: {tmp_path}/none.key: No such file" in done.stderr
    assert f"warning: {file}:8 api.keys_file: {tmp_path}/api.keys" in done.stderr


@pytest.mark.parametrize(
    ("changes", "needs"),
    [({}, "nothing"), ({"max_requests": 9}, "reload"), ({"api": {"port": 8001}}, "restart")],
)
def test_what_a_router_needs_after_a_change_is_said(tmp_path: Path, changes: dict[str, Any], needs: str) -> None:
    new, old = _file(tmp_path, **changes), _file(tmp_path, "old.yaml")
    done = CliRunner().invoke(app, ["check", str(new), "--since", str(old)])
    assert (done.exit_code, done.stdout) == (0, f"{needs}\n")
    old.write_text("servers: 3")
    assert CliRunner().invoke(app, ["check", str(new), "--since", str(old)]).stdout == "restart\n"
    done = CliRunner().invoke(app, ["check", str(old), "--since", str(new)])
    assert isinstance(done.exception, ConfigError)
