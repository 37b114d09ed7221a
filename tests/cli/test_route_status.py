"""`mdiq status` of a router: nothing that an operator has to copy is cut off."""

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
