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
    "requests": {"running": 1, "waiting": 0, "done": 2, "failed": 0, "refused": {"busy": 3}, "left": 0, "cut_off": 0},
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


def test_the_status_shows_the_newest_pause_and_what_a_spare_has_on_its_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spare = {"name": "pi3", "state": "stands by", "reason": "it is a spare", "on_disk": [4, 5, 6, 9]}
    pauses = [{"ago_s": 9e3, "reason": "pi1"}, {"ago_s": 61.4, "reason": "pi2: gone", "unheard_s": 0.7, "after_s": 1.5}]
    found = {**STATUS, "nodes": [*STATUS["nodes"], spare], "pauses": pauses}
    monkeypatch.setattr(admin, "ask", lambda *_: found)
    monkeypatch.setenv("COLUMNS", "140")
    admin.status(Path("t.yaml"), as_json=False)
    shown = capsys.readouterr().out
    assert "last pause, 61 s ago: pi2: gone; unheard of for 0.7 s, went on after 1.5 s" in shown
    assert "stands by: it is a spare; on its disk: layers 4-6, 9-9" in shown


def test_the_status_tells_what_noise_has_been_spent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = {"name": "pi2", "epsilon": 8.0, "delta": 1e-6, "worst_request_epsilon": 34.055}
    noise = {"rows_sent": 12_345, "worst_request_rows": 10, "hops": ["pi1 > pi2"], "nodes": [node]}
    monkeypatch.setattr(admin, "ask", lambda *_: {**STATUS, "noise": noise})
    monkeypatch.setenv("COLUMNS", "200")
    admin.status(Path("t.yaml"), as_json=False)
    shown = capsys.readouterr().out
    assert (
        "noise on pi1 > pi2; answers differ from run to run, and a replay spends again; 12,345 rows sent, at most 10 "
        "of one request\n  pi2 is promised epsilon 8 for each row, delta 1e-06; that request: epsilon 34.05\n" in shown
    )
    noise["hops"] = []
    admin.status(Path("t.yaml"), as_json=False)
    assert "noise on no hop of this ring; " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("journal", "says_so"), [(None, False), ({"is_written": True}, False), ({"is_written": False}, True)]
)
def test_the_status_says_when_the_journal_cannot_be_written(
    journal: object, says_so: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(admin, "ask", lambda *_: {**STATUS, "journal": journal})
    admin.status(Path("t.yaml"), as_json=False)
    assert ("the journal cannot be written" in capsys.readouterr().out) == says_so
