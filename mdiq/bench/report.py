"""A measurement as values: medians over the repeats, how they scale, how they compare with the peer. JSON as well."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from mdiq.bench.figures import LoadFigures, Scaling, median_figures, median_ratio, scalings
from mdiq.bench.runner import CellRun, Measurements, NodeShare, PeerCell
from mdiq.bench.workload import ApartCell, Cell
from mdiq.runtime.options import HopFigures

VERSION = 1
WHY_FIXED_TOTAL_IS_LOWER = (
    "With a fixed total of users each node works on fewer of them at a time, and a pass over its weights costs about "
    "the same for few as for many."
)
WHAT_APART_SHOWS = (
    "Rings apart: as many rings of one node at once, with the same users each, that exchange nothing. What they fall "
    "short of the count of nodes is the machine's doing, whose cores share memory; devices do not."
)


@dataclass(frozen=True, slots=True)
class CellReport:
    """A cell: medians of its repeats, and every repeat.

    hops: medians of what was measured, with the formats of the last repeat (``--wire auto`` may choose otherwise).
    """

    cell: Cell
    figures: LoadFigures
    nodes: tuple[NodeShare, ...]
    repeats: tuple[LoadFigures, ...]
    hops: tuple[HopFigures, ...] = ()


@dataclass(frozen=True, slots=True)
class ApartReport:
    """Rings apart, likewise: figures of all their users together."""

    cell: ApartCell
    figures: LoadFigures
    repeats: tuple[LoadFigures, ...]


@dataclass(frozen=True, slots=True)
class PeerReport:
    """A cell of the peer, likewise."""

    cell: PeerCell
    figures: LoadFigures
    rss_bytes: int
    repeats: tuple[LoadFigures, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A cell against the peer's with the same Load: tokens/s of mdiq over the peer's."""

    cell: Cell
    peer_threads: int
    decode: float | None
    total: float | None


@dataclass(frozen=True, slots=True)
class DrawCost:
    """A cell with draws against the greedy cell of the same load: its tokens/s over those of the greedy one."""

    cell: Cell
    decode: float | None
    total: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """All of it. ``machine`` and ``settings`` say under which circumstances."""

    machine: Mapping[str, str | int]
    settings: Mapping[str, object]
    cells: tuple[CellReport, ...]
    apart: tuple[ApartReport, ...]
    scaling: tuple[Scaling, ...]
    peer: tuple[PeerReport, ...]
    ratios: tuple[Ratio, ...]
    draws: tuple[DrawCost, ...]
    version: int = VERSION

    def as_json(self) -> str:
        """Return it as a JSON object."""
        return json.dumps(asdict(self), indent=1)


def make_report(measured: Measurements, *, machine: Mapping[str, str | int], settings: Mapping[str, object]) -> Report:
    """Return the Report of a measurement."""
    runs = {cell: [run.figures for run in cell_runs] for cell, cell_runs in measured.cells.items()}
    peer_runs = {cell: [run.figures for run in cell_runs] for cell, cell_runs in measured.peer.items()}
    return Report(
        machine=machine,
        settings=settings,
        cells=tuple(
            CellReport(
                cell, median_figures(runs[cell]), _median_shares(cell_runs), tuple(runs[cell]), _median_hops(cell_runs)
            )
            for cell, cell_runs in measured.cells.items()
        ),
        apart=tuple(ApartReport(cell, median_figures(each), tuple(each)) for cell, each in measured.apart.items()),
        scaling=tuple(scalings(runs, measured.apart)),
        peer=tuple(
            PeerReport(
                cell,
                median_figures(peer_runs[cell]),
                max(run.rss_bytes for run in cell_runs),
                tuple(peer_runs[cell]),
            )
            for cell, cell_runs in measured.peer.items()
        ),
        ratios=tuple(
            Ratio(
                cell,
                peer_cell.threads,
                median_ratio(runs[cell], peer_runs[peer_cell]),
                median_ratio(runs[cell], peer_runs[peer_cell], "total_tokens_per_s"),
            )
            for cell in runs
            for peer_cell in peer_runs
            if (cell.users, cell.prompt_tokens) == (peer_cell.users, peer_cell.prompt_tokens)
        ),
        draws=tuple(
            DrawCost(cell, median_ratio(runs[cell], greedy), median_ratio(runs[cell], greedy, "total_tokens_per_s"))
            for cell in runs
            if cell.temperature and (greedy := runs.get(replace(cell, temperature=0.0)))
        ),
    )


def _median_shares(runs: Sequence[CellRun]) -> tuple[NodeShare, ...]:
    """Return each Node's medians over the repeats; its largest memory."""
    return tuple(
        NodeShare(
            name=node[0].name,
            layers=node[-1].layers,
            rss_bytes=max(share.rss_bytes for share in node),
            weight_bytes=node[-1].weight_bytes,
            busy_share=statistics.median(share.busy_share for share in node),
            waiting_share=statistics.median(share.waiting_share for share in node),
            bytes_per_token=statistics.median(share.bytes_per_token for share in node),
        )
        for node in zip(*(run.nodes for run in runs), strict=True)
    )


def _median_hops(runs: Sequence[CellRun]) -> tuple[HopFigures, ...]:
    return tuple(
        HopFigures(hop[-1].wire, _median([h.delay_s for h in hop]), _median([h.bytes_per_s for h in hop]))
        for hop in zip(*(run.hops for run in runs), strict=True)
    )


def _median(values: Sequence[float | None]) -> float | None:
    """Return the median of those that were measured."""
    return statistics.median(known) if (known := [value for value in values if value is not None]) else None
