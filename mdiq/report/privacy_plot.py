"""A PrivacyReport as a picture, SVG and PNG. Needs matplotlib, an optional extra."""

from pathlib import Path

from mdiq.bench.plots import check_plots
from mdiq.errors import ConfigError
from mdiq.report.privacy import PrivacyReport, PrivacyRow

_TITLES = ("prompt tokens recovered, %", "perplexity", "most likely tokens changed, %")
NAME = "privacy"


def draw(report: PrivacyReport, directory: Path) -> list[Path]:
    """Write the picture, and return the files.

    Raises:
        ConfigError: matplotlib is missing, or the directory cannot be written.
    """
    check_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    levels = list(dict.fromkeys(row.epsilon for row in report.rows))
    for cut in dict.fromkeys(row.cut for row in report.rows):
        rows = [row for row in report.rows if row.cut == cut]
        places = [levels.index(row.epsilon) for row in rows]
        name = f"after layer {cut}"
        (line,) = panels[0].plot(places, [100 * row.linear for row in rows], marker="o", label=f"{name}, linear")
        nearest = [100 * row.nearest for row in rows]
        panels[0].plot(places, nearest, marker="x", linestyle=":", color=line.get_color(), label=f"{name}, nearest")
        panels[1].plot(places, [row.perplexity for row in rows], marker="o", label=name)
        panels[2].plot(places, [100 * row.changed for row in rows], marker="o", label=name)
    for panel, title in zip(panels, _TITLES, strict=True):
        panel.set(xlabel="epsilon of each row", ylabel=title)
        panel.set_xticks(range(len(levels)), [level_text(level) for level in levels])
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    panels[0].set_ylim(0, 100)
    panels[1].set_yscale("log")
    panels[2].set_ylim(0, 100)
    figure.suptitle(f"{Path(report.model).name}: what a node sees, and what noise costs")
    files = [directory / f"{NAME}.{suffix}" for suffix in ("svg", "png")]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file in files:
            figure.savefig(file, dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {directory}: {error.strerror or error}; name a directory to write in") from None
    return files


def level_text(epsilon: float | None) -> str:
    """Return a noise as tables and pictures show it."""
    return "no noise" if epsilon is None else f"{epsilon:g}"


def of_prompt(row: PrivacyRow) -> str:
    """Return the epsilon of a whole prompt in few characters."""
    return "" if row.prompt_epsilon is None else f"{row.prompt_epsilon:.3g}"
