import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, cast

import pytest

from mdiq.errors import ConfigError
from mdiq.report import png
from mdiq.report.evaluation_page import evaluation_page
from mdiq.report.page import Chart, Language
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
    assert {f"report-en-{name}.png" for name in names} <= files
    assert {f"report-{language}-{name}.svg" for name in names for language in ("en", "ja")} <= files
    assert json.loads((tmp_path / "report.json").read_text()) == trial()
    for file in tmp_path.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("font", "languages", "drawn"),
    [
        ("Gothic", ("en", "ja"), {"en": None, "ja": "Gothic"}),
        ("Gothic", ("ja",), {"ja": "Gothic"}),
        (None, ("en", "ja"), {"en": None}),
        (None, ("ja",), {"en": None}),
    ],
)
def test_png_files_speak_japanese_where_a_font_does(
    font: str | None,
    languages: tuple[Language, ...],
    drawn: dict[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, tuple[list[str], str | None]] = {}

    def draw(charts: Sequence[Chart], folder: Path, prefix: str, font: str | None = None) -> list[Path]:
        asked[prefix] = [chart.title for chart in charts], font
        return []

    monkeypatch.setattr(png, "can_draw", lambda: True)
    monkeypatch.setattr(png, "japanese_font", lambda: font)
    monkeypatch.setattr(png, "draw", draw)
    write(trial(), trial_page, languages, tmp_path, "report")
    expected = {
        f"report-{language}-": ([chart.title for chart in trial_page(trial(), cast(Language, language)).charts], its)
        for language, its in drawn.items()
    }
    assert asked == expected


def test_a_picture_has_the_labels_of_its_chart_in_the_font_that_is_given(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    charts = trial_page(trial(), "ja").charts
    for chart in charts:
        figure = png.figure_of(chart)
        (axes,) = figure.axes
        assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (chart.title, chart.x_label, chart.y_label)
    if (font := png.japanese_font()) is None:
        pytest.skip("no Japanese font is installed")
    # A sign that a font lacks would be a warning, which is an error here.
    assert len(png.draw(charts, tmp_path, "report-ja-", font)) == len(charts)


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
    assert not png.can_draw() or tmp_path / "report-en-busy.png" in files


def test_what_was_measured_is_written_before_its_pages_are_made(tmp_path: Path) -> None:
    def fails(*_: object) -> NoReturn:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(trial(), fails, ("en",), tmp_path, "report")
    assert json.loads((tmp_path / "report.json").read_text()) == trial()
