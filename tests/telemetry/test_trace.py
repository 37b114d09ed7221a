"""Spans: what is kept, the figures of overlap against hand-counted ones, and the trace file."""

import json
from pathlib import Path

import pytest

from mdiq.telemetry.trace import COMPUTE, Span, Tracer, overlap_shares, write_trace


def computing(*intervals: tuple[float, float]) -> list[Span]:
    return [Span(COMPUTE, "1 segments", start, stop) for start, stop in intervals]


def test_a_tracer_that_is_off_keeps_nothing() -> None:
    tracer = Tracer(is_on=False)
    tracer.add(COMPUTE, "x", 0.0, 1.0)
    assert tracer.spans == []


def test_the_oldest_spans_go_when_there_are_too_many() -> None:
    tracer = Tracer(is_on=True, max_spans=10)
    for i in range(25):
        tracer.add(COMPUTE, str(i), i, i + 1)
    assert len(tracer.spans) <= 10
    assert [span.label for span in tracer.spans] == [str(i) for i in range(25 - len(tracer.spans), 25)]


def test_overlap_of_two_nodes_is_the_share_of_their_common_time() -> None:
    # node-0 computes 0-4 and 6-8 (6 s), node-1 computes 3-7 (4 s): 3-4 and 6-7 are common, 2 s.
    shares = overlap_shares({"node-0": computing((0, 4), (6, 8)), "node-1": computing((3, 7))})
    assert shares == {"node-0": pytest.approx(2 / 6), "node-1": pytest.approx(2 / 4)}


def test_overlap_counts_either_neighbour_once_and_no_farther_node() -> None:
    shares = overlap_shares(
        {
            "node-0": computing((0, 10)),
            "node-1": computing((0, 2), (1, 4)),  # its own spans overlap: 4 s
            "node-2": computing((3, 5)),
            "node-3": computing((4, 6)),
        }
    )
    # node-0 has neighbours 1 (0-4) and 3 (4-6): together 0-6. node-2 has 1 and 3: 3-4 and 4-5.
    assert shares == {
        "node-0": pytest.approx(0.6),
        "node-1": pytest.approx(1.0),
        "node-2": pytest.approx(1.0),
        "node-3": pytest.approx(1.0),
    }


def test_overlap_ignores_other_loops_and_nodes_without_work() -> None:
    sending = [Span("send", "1 segments", 0.0, 9.0)]
    assert overlap_shares({"node-0": computing((0, 1)), "node-1": sending}) == {"node-0": 0.0, "node-1": 0.0}
    assert overlap_shares({"node-0": computing((0, 1))}) == {"node-0": 0.0}
    assert overlap_shares({}) == {}


def test_the_trace_file_has_a_process_a_node_and_a_thread_a_loop(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, {"node-0": [*computing((10.0, 10.5)), Span("send", "2 segments", 10.25, 10.375)], "node-1": []})
    events = json.loads(path.read_text())["traceEvents"]
    names = [(e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names == [(0, "node-0"), (0, "compute"), (0, "send"), (1, "node-1")]
    spans = [(e["name"], e["cat"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    # Microseconds from the first span on.
    assert spans == [("1 segments", "compute", 0, 0.0, 500_000.0), ("2 segments", "send", 1, 250_000.0, 125_000.0)]
