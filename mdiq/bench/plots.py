"""A Report as pictures, SVG and PNG: one for everything that was varied. Needs matplotlib, an optional extra."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mdiq.bench.report import CellReport, Report
from mdiq.bench.workload import Cell
from mdiq.errors import ConfigError
from mdiq.testbed.link_shape import LinkShape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEEDED = "--plot: matplotlib is not installed; run: pip install 'mdiq[plot]', or leave --plot out"
Place = Callable[[Cell], float | None]
"""Where a cell lies along an axis; None where it has no place there: a ring of one Node has no Hop."""


def _delay_ms(cell: Cell) -> float | None:
    return None if cell.nodes == 1 else cell.link.delay_s * 1e3 if cell.link else 0.0


def _bandwidth_mbit(cell: Cell) -> float | None:
    return cell.link.bandwidth_bit_per_s / 1e6 if cell.link and cell.link.bandwidth_bit_per_s else None


_AXES: dict[str, tuple[str, Place]] = {
    "users": ("users", lambda cell: cell.users),
    "nodes": ("nodes", lambda cell: cell.nodes),
    "prompt-tokens": ("prompt tokens", lambda cell: cell.prompt_tokens),
    "link-delay": ("one-way delay of a hop, ms", _delay_ms),
    "link-bandwidth": ("bandwidth of a hop, Mbit/s", _bandwidth_mbit),
}


def check_plots() -> None:
    """Raise ConfigError when matplotlib is missing; better before an hour of measuring than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(NEEDED) from None


def draw(report: Report, directory: Path) -> list[Path]:
    """Write the pictures, and return the files.

    Raises:
        ConfigError: matplotlib is missing, or the directory cannot be written.
    """
    check_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    files = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for axis in varied(report):
            figure = Figure(figsize=(15, 4.5), layout="constrained")
            FigureCanvasAgg(figure)
            panels = figure.subplots(1, 3)
            _draw_panels(report, axis, list(panels))
            figure.suptitle(f"{report.settings.get('model', '')}: {_AXES[axis][0]}")
            for suffix in ("svg", "png"):
                files.append(directory / f"{axis}.{suffix}")
                figure.savefig(files[-1], dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {directory}: {error.strerror or error}; name a directory to write in") from None
    return files


def varied(report: Report) -> list[str]:
    """Return what has more than one value; users if nothing has."""
    names = [name for name, (_, value) in _AXES.items() if len({value(r.cell) for r in report.cells} - {None}) > 1]
    return names or ["users"]


def _draw_panels(report: Report, axis: str, panels: "list[Axes]") -> None:
    label, value = _AXES[axis]
    figures: tuple[tuple[str, Callable[[CellReport], float], Callable[[CellReport], float] | None], ...] = (
        ("tokens/s while decoding", lambda r: r.figures.decode_tokens_per_s, None),
        ("time to first token, s", lambda r: r.figures.ttft_median_s, lambda r: r.figures.ttft_p95_s),
        ("inter-token latency, s", lambda r: r.figures.itl_median_s, lambda r: r.figures.itl_p95_s),
    )
    for panel, (title, median, p95) in zip(panels, figures, strict=True):
        for name, reports in _lines(report, axis):
            places = [place for r in reports if (place := value(r.cell)) is not None]
            (line,) = panel.plot(places, [median(r) for r in reports], marker="o", label=name)
            if p95 is not None:
                panel.plot(places, [p95(r) for r in reports], linestyle=":", color=line.get_color())
        panel.set(xlabel=label, ylabel=title + ("" if p95 is None else " (dotted: p95)"))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    if axis == "users":
        _draw_peer(report, panels)
    panels[0].legend(fontsize="small")


def _draw_peer(report: Report, panels: "list[Axes]") -> None:
    for threads, prompt in dict.fromkeys((peer.cell.threads, peer.cell.prompt_tokens) for peer in report.peer):
        peers = [peer for peer in report.peer if (peer.cell.threads, peer.cell.prompt_tokens) == (threads, prompt)]
        places = [peer.cell.users for peer in peers]
        for panel, figure in zip(panels, ("decode_tokens_per_s", "ttft_median_s", "itl_median_s"), strict=True):
            heights = [getattr(peer.figures, figure) for peer in peers]
            name = f"llama.cpp, {threads} threads, {prompt} prompt tokens"
            panel.plot(places, heights, linestyle="--", marker="x", label=name)


def _lines(report: Report, axis: str) -> Iterator[tuple[str, list[CellReport]]]:
    """Yield name and reports of each line: cells that differ in ``axis`` alone."""
    lines: dict[str, list[CellReport]] = {}
    links = list(dict.fromkeys(r.cell.link for r in report.cells if r.cell.nodes > 1)) or [None]
    for cell_report in report.cells:
        cell = cell_report.cell
        if _AXES[axis][1](cell) is None:
            continue
        parts = [f"{cell.nodes} nodes"] if axis != "nodes" else []
        parts += [f"{cell.users} users"] if axis != "users" else []
        parts += [f"{cell.prompt_tokens} prompt tokens"] if axis != "prompt-tokens" else []
        parts += [f"temperature {cell.temperature:g}"] if cell.temperature else []
        # A ring of one Node has no link: along the nodes it begins the line of every link.
        for link in links if axis == "nodes" and cell.nodes == 1 else [cell.link]:
            name = ", ".join([*parts, *_link_name(link, axis)])
            lines.setdefault(name, []).append(cell_report)
    for name, reports in lines.items():
        yield name, sorted(reports, key=lambda r: _AXES[axis][1](r.cell) or 0.0)


def _link_name(link: LinkShape | None, axis: str) -> list[str]:
    """Return what is fixed of a link along a line."""
    if link is None:
        return []
    if axis == "link-delay":
        return [f"{link.bandwidth_bit_per_s / 1e6:g} Mbit/s"] if link.bandwidth_bit_per_s else []
    return [f"{link.delay_s * 1e3:g} ms"] if axis == "link-bandwidth" else [str(link)]
