import json
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from mdiq.errors import ConfigError
from mdiq.report import png
from mdiq.report.evaluation_page import evaluation_page
from mdiq.report.trial_page import trial_page
from mdiq.report.write import check_folder, write
from tests.report.fakes import evaluation, trial


def test_a_document_becomes_pages_in_both_languages_with_their_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    files = {file.name for file in write(trial(), trial_page, ("en", "ja"), tmp_path, "report")}
    assert files == {file.name for file in tmp_path.iterdir()}
    assert {"report.json", "report.csv", "report.en.html", "report.ja.html", "report.en.md", "report.ja.md"} <= files
    names = {chart.name for chart in trial_page(trial(), "en").charts}
    assert names == {"throughput", "latency", "memory", "wire", "busy", "recovery"}
    assert {f"report-{name}.png" for name in names} <= files
    assert {f"report-{language}-{name}.svg" for name in names for language in ("en", "ja")} <= files
    assert json.loads((tmp_path / "report.json").read_text()) == trial()
    for file in tmp_path.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_everything_else_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not png.can_draw()
    files = write(evaluation().as_document(), evaluation_page, ("ja",), tmp_path, "evaluation")
    assert {file.suffix for file in files} == {".json", ".csv", ".html", ".md", ".svg"}
    assert not [file for file in files if ".en" in file.name or "-en-" in file.name]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out .*name a folder to write in"):
        check_folder(tmp_path / "file" / "pages", "report")
    (tmp_path / "report.ja.md").mkdir()
    with pytest.raises(ConfigError, match="--out .*name a folder to write in"):
        check_folder(tmp_path, "report")
    check_folder(tmp_path, "evaluation")
    with pytest.raises(ConfigError, match="--out .*name a folder to write in"):
        write(trial(), trial_page, ("en",), tmp_path / "nowhere", "report")


def test_a_name_that_is_not_unicode_or_looks_like_a_formula_loses_no_measurement(tmp_path: Path) -> None:
    document = trial()
    document["model"]["name"] = "m\udcff"
    document["stages"][-1]["devices"][0]["name"] = "$a^{$"
    files = write(document, trial_page, ("en",), tmp_path, "report")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["model"]["name"] == "m?"
    assert not png.can_draw() or tmp_path / "report-busy.png" in files


def test_what_was_measured_is_written_before_its_pages_are_made(tmp_path: Path) -> None:
    def fails(*_: object) -> NoReturn:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(trial(), fails, ("en",), tmp_path, "report")
    assert json.loads((tmp_path / "report.json").read_text()) == trial()
