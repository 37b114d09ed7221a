"""Charts as PNG files, for slides. Needs matplotlib, an optional extra, and a font of this machine for Japanese."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdiq.report.page import Chart
from mdiq.report.svg import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
JAPANESE_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "IPAGothic", "IPAPGothic", "TakaoGothic", "VL Gothic"),
    *("Hiragino Sans", "Hiragino Kaku Gothic Pro", "Yu Gothic", "Meiryo", "MS Gothic", "Noto Serif CJK JP"),
)
"""The first one that is installed is used: of Linux, macOS and Windows."""


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def japanese_font() -> str | None:
    """Return the name of a font of this machine that has Japanese; ``can_draw`` is true."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    # Its list is made once and kept in a file: a font that came later is not in it.
    known = {font.fname for font in fontManager.ttflist}
    for file in findSystemFonts():
        if file not in known:
            with contextlib.suppress(OSError, RuntimeError):  # not a font that it can read
                fontManager.addfont(file)
    installed = {font.name for font in fontManager.ttflist}
    return next((name for name in JAPANESE_FONTS if name in installed), None)


def draw(charts: Sequence[Chart], folder: Path, prefix: str, font: str | None = None) -> list[Path]:
    """Write a file for each chart, and return them; ``can_draw`` is true. prefix: their names begin with it.

    font: of the labels; None: matplotlib's own, which has no Japanese.
    """
    from matplotlib import rc_context

    files = []
    with rc_context({} if font is None else {"font.family": [font, "DejaVu Sans"]}):
        for chart in charts:
            files.append(folder / f"{prefix}{chart.name}.png")
            figure_of(chart).savefig(files[-1], dpi=DPI)
    return files


def figure_of(chart: Chart) -> "Figure":
    """Return a chart as matplotlib's figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    (_lines if chart.kind == "line" else _bars)(chart, axes)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
    return figure


def _lines(chart: Chart, axes: "Axes") -> None:
    for i, series in enumerate(chart.series):
        axes.plot(
            [float(point.x) for point in series.points],
            [point.y for point in series.points],
            color=COLORS[i % len(COLORS)],
            linestyle="--" if series.is_predicted else "-",
            marker="osD^"[i % 4] if len(series.points) <= 30 else "",
            label=series.name,
        )
    places = sorted({float(point.x) for series in chart.series for point in series.points})
    if len(places) <= 8:
        axes.set_xticks(places)
    for mark in chart.marks:
        axes.axvline(mark.at, color=COLORS[4], linestyle=":", label=mark.text)


def _bars(chart: Chart, axes: "Axes") -> None:
    names = list(dict.fromkeys(str(point.x) for series in chart.series for point in series.points))
    below = dict.fromkeys(names, 0.0)
    is_stacked = chart.kind == "stacked"
    width = 0.6 if is_stacked else 0.8 / max(len(chart.series), 1)
    for i, series in enumerate(chart.series):
        color = COLORS[i % len(COLORS)]
        places = [names.index(str(p.x)) + (0.0 if is_stacked else width * (i + 0.5) - 0.4) for p in series.points]
        bottoms = [below[str(point.x)] if is_stacked else 0.0 for point in series.points]
        look = {"fill": False, "edgecolor": color, "linestyle": "--"} if series.is_predicted else {"color": color}
        axes.bar(places, [p.y for p in series.points], width, bottom=bottoms, label=series.name, **look)
        for point in series.points:
            below[str(point.x)] += point.y
    axes.set_xticks(range(len(names)), [name.replace("$", r"\$") for name in names])  # no name is a formula
