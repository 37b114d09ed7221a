import subprocess
from pathlib import Path

import pytest

import mdiq
from mdiq.report.receipt import make_receipt


def test_a_receipt_names_command_machine_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = make_receipt(["report", "--model", "my model.gguf"])
    assert receipt.command == "mdiq report --model 'my model.gguf'"
    assert receipt.mdiq == mdiq.__version__
    assert receipt.machine["cores"]
    folder = Path(mdiq.__file__).parent
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert receipt.commit == (done.stdout.strip() if done.returncode == 0 else "")


def test_where_there_is_no_git_the_commit_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    receipt = make_receipt([])
    assert (receipt.commit, receipt.is_changed) == ("", False)
