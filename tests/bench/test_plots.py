import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mdiq.bench.plots import _lines, check_plots, draw, varied
from mdiq.bench.report import Report, make_report
from mdiq.bench.workload import Cell
from mdiq.errors import ConfigError
from mdiq.testbed.link_shape import LinkShape
from tests.bench.fakes import make_measurements


def report(links: tuple[LinkShape | None, ...] = (None,), nodes: tuple[int, ...] = (1, 2)) -> Report:
    return make_report(make_measurements(links, nodes), machine={}, settings={"model": "tiny"})


def test_a_picture_is_made_for_what_was_varied() -> None:
    assert varied(report()) == ["users", "nodes"]
    assert varied(report(nodes=(2,))) == ["users"]
    fast, slow, far = LinkShape(0.01, 0.0, 1e8), LinkShape(0.01, 0.0, 1e7), LinkShape(0.02, 0.0, 1e7)
    assert varied(report((fast, slow, far), (2,))) == ["users", "link-delay", "link-bandwidth"]


def test_a_ring_of_one_node_and_a_link_without_a_limit_have_no_place_on_the_axes_of_links() -> None:
    assert varied(report((None, LinkShape(0.02, 0.0, 1e7)))) == ["users", "nodes", "link-delay"]
    assert varied(report((LinkShape(0.02, 0.0, 1e7),))) == ["users", "nodes"]


def test_cells_of_two_temperatures_are_lines_of_their_own() -> None:
    measured = make_measurements(nodes=(1,))
    measured.cells |= {replace(cell, temperature=0.7): runs for cell, runs in measured.cells.items()}
    lines = dict(_lines(make_report(measured, machine={}, settings={}), "users"))
    assert {name: [r.cell for r in reports] for name, reports in lines.items()} == {
        "1 nodes, 8 prompt tokens": [Cell(1, 1, 8), Cell(1, 2, 8)],
        "1 nodes, 8 prompt tokens, temperature 0.7": [
            Cell(1, 1, 8, temperature=0.7),
            Cell(1, 2, 8, temperature=0.7),
        ],
    }


def test_pictures_come_as_svg_and_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    files = draw(report((LinkShape(0.01, 0.0, 1e8), LinkShape(0.02, 0.0, 1e7))), tmp_path / "new")
    assert {file.name for file in files} == {
        f"{name}.{suffix}" for name in ("users", "nodes", "link-delay", "link-bandwidth") for suffix in ("svg", "png")
    }
    for file in files:
        start = file.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if file.suffix == ".png" else b"<?xml" in start


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--plot .*name a directory"):
        draw(report(), tmp_path / "file")


def test_a_missing_matplotlib_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'mdiq\[plot\]'"):
        check_plots()
