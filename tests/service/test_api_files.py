"""The files that the API needs, as `mdiq check` finds them."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from mdiq.cli.main import app
from mdiq.config.load import load_topology
from mdiq.errors import ConfigError
from mdiq.service import api_files
from mdiq.service.api_files import ApiFiles
from tests.api.certificates import make_certificate

TOPOLOGY = """\
version: 1
model: {path: smollm2-135m-instruct}
nodes:
  - {name: desk, role: starter, address: 127.0.0.1}
api:
  host: 0.0.0.0
  keys_file: api-keys
  tls_cert: tls/api.crt
  tls_key: tls/api.key
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "topology.yaml"
    file.write_text(TOPOLOGY)
    make_certificate(tmp_path / "tls")
    assert CliRunner().invoke(app, ["api-key", "office", "--file", str(tmp_path / "api-keys")]).exit_code == 0
    return file


def test_a_service_takes_over_files_that_have_changed_and_none_that_cannot_be_used(file: Path) -> None:
    files = ApiFiles(load_topology(file))
    assert [key.name for key in files.keys] == ["office"] and files.certificate is not None
    before, tls = files.keys, files.certificate.context
    assert CliRunner().invoke(app, ["api-key", "lab", "--file", str(file.parent / "api-keys")]).exit_code == 0
    (file.parent / "tls" / "api.crt").write_text("diary")
    with pytest.raises(ConfigError, match="not a PEM certificate"):
        files.read_again()
    assert files.keys is before
    make_certificate(file.parent / "tls")
    files.read_again()
    assert [key.name for key in files.keys] == ["office", "lab"]
    assert files.certificate.context is tls, "it is what the socket uses"


def _checked(file: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["check", str(file)])
    return done.exit_code, done.output


def test_files_that_can_be_used_are_not_mentioned(file: Path) -> None:
    code, told = _checked(file)
    assert code == 0 and "api." not in told, told


def test_what_only_the_starter_has_is_a_warning_elsewhere(file: Path) -> None:
    (file.parent / "api-keys").unlink()
    (file.parent / "tls" / "api.key").unlink()
    code, told = _checked(file)
    assert code == 0
    assert f"warning: {file}:7 api.keys_file: {file.parent}/api-keys is not here" in told
    assert f"warning: {file}:8 api.tls_cert: {file.parent}/tls/api.key is not here" in told


@pytest.mark.parametrize(
    ("days", "code", "words"),
    [
        (15, 0, None),
        (20, 0, "warning: {0}:8 api.tls_cert: {1}/tls/api.crt: it expires in 10.0 days; renew it"),
        (31, 2, "{0}:8 api.tls_cert: {1}/tls/api.crt: it has expired ("),
        (-1, 2, "{0}:8 api.tls_cert: {1}/tls/api.crt: it is not valid before "),
    ],
)
def test_the_days_of_a_certificate_are_looked_at(
    file: Path, monkeypatch: pytest.MonkeyPatch, days: int, code: int, words: str | None
) -> None:
    then_s = time.time() + days * 86_400
    monkeypatch.setattr(api_files, "time", SimpleNamespace(time=lambda: then_s))
    found, told = _checked(file)
    assert found == code
    assert "tls_cert" not in told if words is None else words.format(file, file.parent) in told


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "api-keys").chmod(0o644), ":7 api.keys_file: {}/api-keys: others can read it"),
        (
            lambda folder: (folder / "api-keys").write_text("office sha256:0\n"),
            "{}/api-keys:1: sha256:",
        ),
        (lambda folder: (folder / "tls" / "api.key").chmod(0o604), ":8 api.tls_cert: {}/tls/api.key: others can read"),
        (lambda folder: make_certificate(folder / "tls", password="secret"), "/tls/api.key: it is encrypted"),
    ],
)
def test_what_the_service_would_refuse_is_an_error(file: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(file.parent)
    code, told = _checked(file)
    assert code == 2 and words.format(file.parent) in told and "1 error" in told
