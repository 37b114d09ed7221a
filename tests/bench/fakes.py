"""Measurements that are made up."""

from mdiq.bench.figures import LoadFigures
from mdiq.bench.runner import CellRun, Measurements, NodeShare, PeerCell, PeerRun
from mdiq.bench.workload import ApartCell, Cell
from mdiq.runtime.options import HopFigures
from mdiq.testbed.link_shape import LinkShape


def make_measurements(links: tuple[LinkShape | None, ...] = (None,), nodes: tuple[int, ...] = (1, 2)) -> Measurements:
    """Return made-up measurements of one and two users, with the peer's."""
    measured = Measurements()
    for link in links:
        for count in nodes:
            for users in (1, 2):
                figures = LoadFigures(8.0 * users, 10.0 * users * count, 0.5, 0.6, 0.1, 0.2)
                share = NodeShare("node-0", "0-3", 10**9, 10**8, 0.5, 0.01, 130.0)
                measured.cells[Cell(count, users, 8, link if count > 1 else None)] = [
                    CellRun(figures, (share,) * count, (HopFigures(wire, delay_s, rate),) * count if count > 1 else ())
                    for wire, delay_s, rate in (("bf16", 0.01, 1e6), ("i8", 0.03, None))
                ]
    measured.apart[ApartCell(2, 1, 8)] = [LoadFigures(14.0, rate, 0.5, 0.6, 0.1, 0.2) for rate in (15.0, 17.0)]
    for users in (1, 2):
        figures = LoadFigures(4.0 * users, 5.0 * users, 0.5, 0.6, 0.1, 0.2)
        measured.peer[PeerCell(1, users, 8)] = [PeerRun(figures, 7), PeerRun(figures, 9)]
    return measured
