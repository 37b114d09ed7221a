"""Spans of the loops, as a Chrome/Perfetto trace and as figures of overlap. No clock of its own, no sockets.

Times are seconds of CLOCK_MONOTONIC, which processes of one machine share; across machines they are not comparable.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COMPUTE = "compute"
MAX_SPANS = 200_000
"""Of one Node."""


@dataclass(frozen=True, slots=True)
class Span:
    """What one loop of a Node did from ``start_s`` to ``stop_s``. ``label`` holds counts only, never text."""

    loop: str
    label: str
    start_s: float
    stop_s: float


class Tracer:
    """Collects Spans, or nothing when it is off; the oldest are dropped when ``max_spans`` is reached."""

    def __init__(self, *, is_on: bool, max_spans: int = MAX_SPANS) -> None:
        self.is_on = is_on
        self._max_spans = max_spans
        self.spans: list[Span] = []

    def add(self, loop: str, label: str, start_s: float, stop_s: float) -> None:
        """Note one span."""
        if self.is_on:
            if len(self.spans) >= self._max_spans:
                del self.spans[: self._max_spans // 10]
            self.spans.append(Span(loop, label, start_s, stop_s))

    def clear(self) -> None:
        """Drop the Spans so far, such as those of the warm-up."""
        self.spans.clear()


def write_trace(path: Path, spans: Mapping[str, Sequence[Span]]) -> None:
    """Write the Spans of every Node as Chrome trace events: one process a Node, one thread a loop.

    Format: "Trace Event Format" (Chromium project), complete events ``"ph": "X"``, times in microseconds.
    """
    start_s = min((span.start_s for node in spans.values() for span in node), default=0.0)
    events: list[dict[str, object]] = []
    for pid, (node, node_spans) in enumerate(spans.items()):
        loops = {loop: tid for tid, loop in enumerate(sorted({span.loop for span in node_spans}))}
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": node}})
        events += [
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": loop}}
            for loop, tid in loops.items()
        ]
        events += [
            {
                "ph": "X",
                "name": span.label,
                "cat": span.loop,
                "pid": pid,
                "tid": loops[span.loop],
                "ts": round((span.start_s - start_s) * 1e6, 1),
                "dur": round((span.stop_s - span.start_s) * 1e6, 1),
            }
            for span in node_spans
        ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def overlap_shares(spans: Mapping[str, Sequence[Span]]) -> dict[str, float]:
    """Return for every Node the share of its compute time during which a neighbour in the Ring computed as well.

    ``spans`` is in ring order. A Node without neighbours or without compute spans has 0.
    """
    busy = [_merged((s.start_s, s.stop_s) for s in node if s.loop == COMPUTE) for node in spans.values()]
    shares: dict[str, float] = {}
    for i, node in enumerate(spans):
        neighbours = {(i - 1) % len(busy), (i + 1) % len(busy)} - {i}
        others = _merged(interval for j in neighbours for interval in busy[j])
        total = sum(stop - start for start, stop in busy[i])
        shares[node] = _common(busy[i], others) / total if total else 0.0
    return shares


Interval = tuple[float, float]


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _common(left: list[Interval], right: list[Interval]) -> float:
    """Return the length of the intersection of two lists of disjoint, sorted intervals."""
    common, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        common += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common
