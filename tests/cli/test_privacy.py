"""mdiq privacy: what its flags mean, and what it prints."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mdiq.cli import privacy
from mdiq.cli.main import app
from mdiq.cli.privacy import PrivacyOptions, parse_epsilons
from mdiq.core.types import WeightSettings
from mdiq.engine.formats import model_source
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import ConfigError
from mdiq.report import privacy as measured
from mdiq.report.privacy import Texts, Wishes
from tests.report.test_privacy_plot import REPORT


def test_without_flags_it_has_the_options_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PrivacyOptions] = []
    monkeypatch.setattr(privacy, "execute", lambda options: asked.append(options) or 3)
    assert CliRunner().invoke(app, ["privacy"]).exit_code == 3
    assert CliRunner().invoke(app, ["privacy", "--model", "m.gguf", "--cut", "2", "--json"]).exit_code == 3
    assert asked == [PrivacyOptions(), PrivacyOptions("m.gguf", cut="2", as_json=True)]


class _Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Have nothing measured; what would be is noted."""
    asked: list[tuple[Any, ...]] = []

    def measure(*arguments: Any) -> Any:
        asked.append(arguments)
        return REPORT

    monkeypatch.setattr(privacy, "set_threads", lambda _: None)
    monkeypatch.setattr(measured, "measure", measure)
    monkeypatch.setattr(model_source, "find_model", lambda name, progress: Path(name))
    monkeypatch.setattr(Tokenizer, "load", lambda _: _Bytes())
    return asked


def test_a_missing_package_is_named_before_anything_is_measured(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    epsilon = "77.125"  # of no other test: what was computed is kept
    done = CliRunner().invoke(app, ["privacy", "--model", "m.gguf", "--epsilon", epsilon])
    assert isinstance(done.exception, ConfigError) and "pip install 'mdiq[privacy]'" in str(done.exception)
    assert asked == []


def test_flags_become_what_is_measured_on_texts_that_are_apart(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 512 + "b" * 128)
    flags = ["--cut", "1,4", "--epsilon", "10,1000", "--delta", "1e-5", "--clip", "4", "--weights", "int8"]
    sizes = ["--text", str(text), "--train-tokens", "512", "--test-tokens", "128"]
    done = CliRunner().invoke(app, ["privacy", "--model", "m.gguf", *flags, *sizes, "--json"])
    assert done.exit_code == 0, done.exception
    ((path, weights, texts, wishes, _),) = asked
    assert (path, weights) == (Path("m.gguf"), WeightSettings("int8"))
    assert texts == Texts((97,) * 512, (98,) * 128, (97,))
    assert wishes == Wishes((1, 4), (1_000.0, 10.0), 1e-5, 4.0)
    shown = json.loads(done.stdout)
    assert shown["rows"][1]["linear"] == 0.9 and shown["rows"][0]["epsilon"] is None


def test_the_table_shows_shares_and_costs(asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    shown = CliRunner().invoke(app, ["privacy", "--model", "m.gguf"]).stdout
    lines = [line.split() for line in shown.splitlines()]
    assert ["1", "no", "noise", "4", "0.5", "90.0%", "50.0%", "20", "10.0%"] in lines
    assert ["4", "1000", "4e+04", "4", "0.5", "22.5%", "12.5%", "80", "10.0%"] in lines
    assert "small.gguf, int8 weights; 256 tokens of the user in prompts of 128, 2048 of the attacker" in shown


def test_a_picture_is_written_where_it_is_wanted(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    assert CliRunner().invoke(app, ["privacy", "--model", "m.gguf", "--plot", str(tmp_path)]).exit_code == 0
    assert {file.name for file in tmp_path.iterdir()} == {"privacy.svg", "privacy.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epsilon", "0"], "each must be from 0.01 to 1,000,000"),
        (["--epsilon", "some"], "write for example 1000,100,8"),
        (["--delta", "0.5"], "--delta 0.5: it must be from 1e-12 to 0.1"),
        (["--clip", "-1"], "--clip -1: it must be from 1e-6 to 1e9"),
        (["--cut", "one"], "--cut one: not whole numbers"),
        (["--text", "missing.txt"], "--text missing.txt: No such file"),
    ],
)
def test_flags_that_cannot_be_say_what_to_do(asked: list[tuple[Any, ...]], flags: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["privacy", "--model", "m.gguf", *flags])
    assert isinstance(done.exception, ConfigError) and message in str(done.exception)
    assert asked == []


def test_epsilons_come_from_little_noise_to_much() -> None:
    assert parse_epsilons("8,1000,8,100") == (1_000.0, 100.0, 8.0)
