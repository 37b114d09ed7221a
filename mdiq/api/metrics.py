"""Figures of a ring in Prometheus' text format."""

from collections.abc import Iterator, Mapping
from typing import Any

_REQUESTS = (
    ("mdiq_requests_running", "gauge", "running", "Requests that are not finished."),
    ("mdiq_requests_done_total", "counter", "done", "Requests that were answered."),
    ("mdiq_requests_failed_total", "counter", "failed", "Requests that the ring failed to answer."),
    ("mdiq_requests_refused_total", "counter", "refused", "Requests that can never fit."),
    ("mdiq_requests_left_total", "counter", "left", "Requests whose client went away."),
)
_NODE = (
    ("mdiq_stage_busy_ratio", "gauge", "busy_share", "Share of the time in which a node computes."),
    ("mdiq_stage_resident_bytes", "gauge", "rss_bytes", "Resident memory of a node's process."),
    ("mdiq_stage_weight_bytes", "gauge", "weight_bytes", "Weights of a node's layers."),
    ("mdiq_stage_received_bytes_total", "counter", "bytes_in", "Bytes of activations that a node took in."),
    ("mdiq_stage_sent_bytes_total", "counter", "bytes_out", "Bytes of activations that a node sent on."),
)


def metrics_text(status: Mapping[str, Any]) -> str:
    """Return what `mdiq status --json` shows as metrics."""
    return "\n".join(_lines(status)) + "\n"


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    yield from _head("mdiq_serving", "gauge", "Whether the ring takes requests.")
    yield f"mdiq_serving {int(status['is_serving'])}"
    yield from _head("mdiq_rings_formed_total", "counter", "How often the ring was formed.")
    yield f"mdiq_rings_formed_total {status['rings_formed']}"
    for name, kind, key, text in _REQUESTS:
        yield from _head(name, kind, text)
        yield f"{name} {status['requests'][key]}"
    if "counts" in status:
        yield from _head("mdiq_preemptions_total", "counter", "Requests put back to make room for older ones.")
        yield f"mdiq_preemptions_total {status['counts'].get('preemptions', 0)}"
    for name, kind, key, text in _NODE:
        nodes = [node for node in status["nodes"] if key in node]
        if nodes:
            yield from _head(name, kind, text)
        for node in nodes:
            yield f'{name}{{node="{node["name"]}"}} {node[key]}'


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
