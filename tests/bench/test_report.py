import json

from mdiq.bench.figures import LoadFigures
from mdiq.bench.report import DrawCost, Ratio, make_report
from mdiq.bench.runner import CellRun
from mdiq.bench.workload import ApartCell, Cell
from mdiq.runtime.options import HopFigures
from mdiq.testbed.link_shape import LinkShape
from tests.bench.fakes import make_measurements


def test_a_report_has_medians_scaling_and_ratios() -> None:
    report = make_report(make_measurements(), machine={"cpu": "x"}, settings={"model": "m"})
    assert [r.cell for r in report.cells] == [Cell(1, 1, 8), Cell(1, 2, 8), Cell(2, 1, 8), Cell(2, 2, 8)]
    assert report.cells[3].figures.decode_tokens_per_s == 40.0
    assert len(report.cells[3].nodes) == 2
    assert report.cells[0].hops == ()
    assert report.cells[3].hops == (HopFigures("i8", 0.02, 1e6),) * 2
    assert [peer.rss_bytes for peer in report.peer] == [9, 9]
    assert report.ratios[3] == Ratio(Cell(2, 2, 8), 1, 4.0, 2.0)
    assert (report.scaling[1].same_per_node, report.scaling[1].fixed_total) == (4.0, 2.0)
    assert [(each.cell, each.figures.decode_tokens_per_s) for each in report.apart] == [(ApartCell(2, 1, 8), 16.0)]
    assert report.scaling[1].apart == 1.6


def test_draws_are_compared_with_the_greedy_cell_of_the_same_load() -> None:
    measured = make_measurements()
    drawn = Cell(2, 2, 8, temperature=1.0)
    slower = LoadFigures(12.0, 30.0, 0.5, 0.6, 0.1, 0.2)
    measured.cells[drawn] = [CellRun(slower), CellRun(slower)]
    measured.cells[Cell(2, 5, 8, temperature=1.0)] = [CellRun(slower)]  # nothing to compare it with
    report = make_report(measured, machine={}, settings={})
    assert report.draws == (DrawCost(drawn, 0.75, 0.75),)
    # Nor with a ring of other draws.
    assert all(scaling.cell.temperature == 0 for scaling in report.scaling)


def test_a_report_is_json_with_every_repeat() -> None:
    links = (LinkShape(0.02, 0.001, 1e7),)
    value = json.loads(make_report(make_measurements(links), machine={}, settings={}).as_json())
    assert value["version"] == 1
    assert value["cells"][0]["cell"]["link"] is None
    assert value["cells"][3]["cell"]["link"] == {"delay_s": 0.02, "jitter_s": 0.001, "bandwidth_bit_per_s": 1e7}
    assert len(value["cells"][3]["repeats"]) == 2
    assert value["apart"][0]["cell"] == {"rings": 2, "users": 1, "prompt_tokens": 8, "temperature": 0.0}
    assert len(value["apart"][0]["repeats"]) == 2
    assert value["peer"][0]["cell"] == {"threads": 1, "users": 1, "prompt_tokens": 8}
