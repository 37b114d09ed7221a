"""A run in a folder whose files are named like modules."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.integration.tiny_model import NUM_LAYERS, write_tiny_model

SHADOWS = ("structlog", "zmq", "json")


def test_a_run_neither_executes_nor_trips_over_what_lies_in_its_working_directory(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    folder = tmp_path / "work"
    (folder / "mdiq").mkdir(parents=True)
    (folder / "mdiq" / "__init__.py").write_text("open('executed', 'w').close()")
    for name in SHADOWS:
        (folder / f"{name}.py").write_text("open('executed', 'w').close()")
    mdiq = shutil.which("mdiq", path=str(Path(sys.executable).parent))
    assert mdiq is not None
    command = [mdiq, "run", "hello", "--raw", "--model", model, "--nodes", "2", "--threads", "1", "--max-tokens", "4"]
    command += ["--kv-tokens", "256", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result, summary = (json.loads(line) for line in done.stdout.splitlines())
    assert len(result["token_ids"]) == 4
    assert [len(range(*node["layers"])) for node in summary["summary"]["nodes"]] == [NUM_LAYERS // 2] * 2
    assert not (folder / "executed").exists()
