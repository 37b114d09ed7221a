from pathlib import Path

import pytest

from mdiq.errors import ConfigError
from mdiq.report.privacy import PrivacyReport, PrivacyRow
from mdiq.report.privacy_plot import draw, level_text, of_prompt

ROWS = tuple(
    PrivacyRow(cut, epsilon, epsilon and 40 * epsilon, 4.0, 0.5, 0.5 / cut, 0.9 / cut, 20.0 * cut, 0.1)
    for cut in (1, 4)
    for epsilon in (None, 1_000.0, 10.0)
)
REPORT = PrivacyReport("models/small.gguf", "int8", 30, 1e-6, 2_048, 256, 128, {1: 4.0, 4: 8.0}, ROWS)


def test_the_picture_names_model_cuts_and_noise_and_comes_as_svg_and_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        svg, png = draw(REPORT, tmp_path / "new")
    assert (svg.name, png.name) == ("privacy.svg", "privacy.png") and png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text(encoding="utf-8")
    for shown in ("small.gguf", "after layer 1, linear", "after layer 4, nearest", "no noise", "1000", "perplexity"):
        assert shown in text


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--plot .*name a directory"):
        draw(REPORT, tmp_path / "file")


def test_noise_is_shown_in_few_characters() -> None:
    assert [level_text(row.epsilon) for row in ROWS[:3]] == ["no noise", "1000", "10"]
    assert [of_prompt(row) for row in ROWS[:3]] == ["", "4e+04", "400"]
