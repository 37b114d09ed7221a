"""What an operator reads of a ring."""

import json
from pathlib import Path
from typing import Any

import pytest

from mdiq.cli import admin
from mdiq.service.replanning import with_load

STATUS: dict[str, Any] = {
    "is_serving": True,
    "state": "serves on desk, pi1, pi2",
    "model": "m",
    "nodes": [{"name": name, "state": "serves", "layers": [0, 4]} for name in ("desk", "pi1", "pi2")],
    "requests": {"running": 1, "done": 2, "failed": 0, "refused": 0, "left": 0},
    "rings_formed": 1,
    "last_error": None,
}


def _ask(_: Path, question: object) -> Any:
    return with_load(STATUS, {"desk": 1.0, "pi1": 1.2, "pi2": 1.8765})


def test_the_status_names_a_node_that_takes_longer_than_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(admin, "ask", _ask)
    monkeypatch.setenv("COLUMNS", "140")
    assert admin.status(Path("t.yaml"), as_json=False) == 0
    shown = capsys.readouterr().out
    assert "serves; takes 1.9 times as long as it measured alone" in shown
    assert shown.count("times as long") == 1, "a fifth is within what figures vary"


def test_programs_read_all_factors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(admin, "ask", _ask)
    admin.status(Path("t.yaml"), as_json=True)
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert [node.get("under_load") for node in nodes] == [1.0, 1.2, 1.88]
    assert [node.get("under_load") for node in with_load(STATUS, {})["nodes"]] == [None] * 3
