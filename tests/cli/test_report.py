"""`mdiq report` and `mdiq evaluate`: what they refuse, before anything is measured."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdiq.cli.evaluate import languages_of, parse_wire_list
from mdiq.cli.main import app
from mdiq.cli.report_commands import PageLanguage
from mdiq.errors import ConfigError, UsageError


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # the commands set them; they are put back


def refused(*arguments: str) -> str:
    """Run a command; return why it was refused."""
    result = CliRunner().invoke(app, [*arguments])
    assert isinstance(result.exception, UsageError), result.output
    return str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "tiny", "--model", "x.gguf"], "give --model or --shape, not both"),
        (["--shape", "tiny", "--few", "3", "--nodes", "2"], "--few 3: it is more than --nodes 2"),
        (["--shape", "tiny", "--nodes", "5"], "--nodes 5: the model has 4 layers"),
        (["--shape", "none"], "--shape none: no such shape"),
        (["--shape", "tiny", "--lengths", "600"], "the longest text has 609 tokens; the context of tiny has 512"),
        (["--lengths", "0"], "--lengths 0: each must be from 1"),
        (["--wires", "f32,f8"], "--wires f32,f8: 'f8' is not a format"),
        (["--link", "slow"], "--link slow: 'slow' is not delay"),
        (["--cpu", "0.01"], "--cpu 0.01: give 0.05 to"),
        (["--device-memory", "4GB"], "--device-memory: 4GB is not how a size is written here; write 4G"),
        (["--watts", "inf"], "--watts inf: give a finite number"),
        (["--min-tokens-per-s", "inf"], "--min-tokens-per-s inf: give a finite number"),
        (["--max-token-ms", "inf"], "--max-token-ms inf: give a finite number"),
        (["--drill-node", "node-3"], "--drill-node node-3: give one of node-1, node-2; node-0 measures, so it stays"),
        (["--drill-node", "node-0"], "--drill-node node-0: give one of node-1, node-2"),
        (["--api", "http://127.0.0.1:9", "--drill-node", "node-1"], "--drill-node: it is for rings on this machine"),
        (["--api", "http://127.0.0.1:9", "--cpu", "0.5"], "--cpu: it is for rings on this machine"),
        (["--api", "pi0:8080"], "--api pi0:8080: write the address with http://"),
        (["--api", "http://me:secret@127.0.0.1:9"], "--api: leave user, password and ? out of the address"),
        (["--api", "http://127.0.0.1:9"], "give the address of a ring's API"),
    ],
)
def test_what_cannot_be_tried_is_refused_at_once(arguments: list[str], message: str) -> None:
    assert message in refused("report", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny", "--nodes", "5"], "--nodes 5: the model has 4 layers"),
        (["--model", "nothing"], "nothing: neither a path nor a known model"),
        (["--model", "tiny", "--answer-tokens", "600"], "the longest text has 616 tokens; the context of tiny has 512"),
        (["--model", "tiny", "--wires", ""], "--wires : '' is not a format"),
        (["--model", "tiny", "--link", "delay=20"], "--link delay=20: delay must be a number with one of the units"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_once(arguments: list[str], message: str) -> None:
    assert message in refused("evaluate", *arguments)


@pytest.mark.parametrize("command", ["report", "evaluate"])
def test_a_folder_that_cannot_be_made_is_said_before_anything_is_measured(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "name a folder to write in" in refused(command, "--out", "file/pages")


def test_languages_and_formats_are_read() -> None:
    assert languages_of(PageLanguage.BOTH) == ("en", "ja")
    assert languages_of(PageLanguage.JA) == ("ja",)
    assert parse_wire_list("i8,f32,i8") == ("i8", "f32")
    with pytest.raises(ConfigError):
        parse_wire_list("auto")
