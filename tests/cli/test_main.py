"""What every command has in common: text for a terminal of any encoding, and JSON in UTF-8."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from mdiq.cli import main as cli
from mdiq.cli import run
from mdiq.cli.output import AnswerPrinter, Result

CONFIG = Path(__file__).parent.parent.parent / "configs" / "loopback-3.yaml"


def _main(monkeypatch: pytest.MonkeyPatch, encoding: str, *words: str) -> tuple[int | str | None, bytes, bytes]:
    """Return exit code, stdout and stderr of a command on a terminal of this encoding, as strict as Python makes it."""
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding, "strict"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding, "strict"))
    monkeypatch.setattr(sys, "argv", ["mdiq", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sys.stdout.flush()
    sys.stderr.flush()
    return ended.value.code, out.getvalue(), err.getvalue()


def _answer(options: run.RunOptions) -> int:
    printer = AnswerPrinter(sys.stdout, as_json=options.as_json, is_single=True, has_file=False)
    printer.text("hé 🦊!")
    printer.finished(Result(0, (1,), 0.0, [2], "hé 🦊!"))
    sys.stderr.write("🦊\n")
    return 0


@pytest.mark.parametrize(
    ("encoding", "shown"), [("latin-1", b"h\xe9 ?!\n"), ("ascii", b"h? ?!\n"), ("cp1252", b"h\xe9 ?!\n")]
)
def test_an_answer_is_shown_with_question_marks_where_the_terminal_lacks_its_letters(
    encoding: str, shown: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "execute", _answer)
    assert _main(monkeypatch, encoding, "run", "hello") == (0, shown, b"\\U0001f98a\n")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-16"])
def test_json_is_utf_8_on_every_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "execute", _answer)
    _, out, _ = _main(monkeypatch, encoding, "run", "hello", "--json")
    assert json.loads(out.decode("utf-8"))["text"] == "hé 🦊!"


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_file_name_of_another_encoding_ends_no_command(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "\udcff🦊.yaml"  # a byte that is no UTF-8
    shutil.copy(CONFIG, file)
    code, out, _ = _main(monkeypatch, "latin-1", "check", str(file), *flags)
    assert code == 0
    assert (json.loads(out.decode("utf-8"))["file"] if flags else out.decode("latin-1")).count("?") >= 1


def test_a_command_needs_no_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "argv", ["mdiq", "check", str(CONFIG)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    sys.stdout.close()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "trace.json"), b"mdiq: trace.json: Permission denied\n"),
        (OSError(30, "Read-only file system", "/x/trace.json"), b"mdiq: /x/trace.json: Read-only file system\n"),
        (OSError(28, "No space left on device"), b"mdiq: output: No space left on device\n"),
        (OSError(24, "Too many open files"), b"mdiq: this process: Too many open files\n"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(
    error: OSError, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: run.RunOptions) -> int:
        raise error

    monkeypatch.setattr(run, "execute", fail)
    assert _main(monkeypatch, "utf-8", "run", "hello") == (1, b"", line)


@pytest.mark.parametrize("group", [[], ["cache"]])
def test_the_list_of_commands_cuts_no_sentence_off_on_a_narrow_terminal(
    group: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = _main(monkeypatch, "utf-8", *group, "--help")
    _, _, commands = out.decode().partition("Commands:\n")
    assert code == 0 and len(commands.splitlines()) >= 2
    assert all(line.endswith(".") and not line.endswith("...") for line in commands.splitlines())
