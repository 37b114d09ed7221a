"""`mdiq status` of a router: nothing that an operator has to copy is cut off."""

from typing import Any

import pytest

from mdiq.cli.route import print_status


def test_address_and_model_are_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    server = {
        "name": "ring-a",
        "url": "https://ring-a.factory.example.org:8443",
        "state": "gone",
        "text": "ring-a: nobody answers at https://ring-a.factory.example.org:8443 (Connection refused)",
        "model": "qwen2.5-coder-1.5b-instruct",
        "running": 0,
        "places": 64,
        "drained": False,
    }
    print_status({"requests": {"running": 0, "max": 1024}, "servers": [server]})
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = ["".join(cell.strip() for cell in column) for column in zip(*rows, strict=True)]
    assert cells[0] == "ring-a" and cells[4] == server["model"] and cells[5] == server["url"]


def test_servers_whose_answers_no_other_one_goes_on_with_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*marks: str | None) -> str:
        common: dict[str, Any] = {"url": "http://x", "state": "serves", "text": "", "model": "m"}
        common |= {"running": 0, "places": 4, "drained": False}
        servers = [{"name": f"s{i}", "same_tokens": mark, **common} for i, mark in enumerate(marks)]
        print_status({"requests": {"running": 0, "max": 9}, "servers": servers})
        return " ".join(capsys.readouterr().out.split())

    assert "would break off" not in shown("x", "x") + shown(None)
    assert "an answer that s2 had begun would break off" in shown("x", "x", "y")
    assert "an answer that s0, s1 had begun would break off" in shown(None, None)
