"""Metrics of a ring for Prometheus: the figures of `mdiq status --json`, in a registry of their own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mdiq.runtime.recovery_times import STEPS

_REQUESTS = (
    (GaugeMetricFamily, "mdiq_requests_running", "running", "Requests that are not finished."),
    (GaugeMetricFamily, "mdiq_requests_waiting", "waiting", "Of these, requests that wait for a place in the ring."),
    (CounterMetricFamily, "mdiq_requests_done_total", "done", "Requests that were answered."),
    (CounterMetricFamily, "mdiq_requests_failed_total", "failed", "Requests that the ring failed to answer."),
    (CounterMetricFamily, "mdiq_requests_left_total", "left", "Requests whose client went away."),
    (CounterMetricFamily, "mdiq_requests_cut_off_total", "cut_off", "Answers that were given up: nobody read them."),
)
_NODE = (
    (GaugeMetricFamily, "mdiq_stage_busy_ratio", "busy_share", "Share of the time in which a node computes."),
    (GaugeMetricFamily, "mdiq_stage_resident_bytes", "rss_bytes", "Resident memory of a node's process."),
    (GaugeMetricFamily, "mdiq_stage_weight_bytes", "weight_bytes", "Weights of a node's layers."),
    (CounterMetricFamily, "mdiq_stage_received_bytes_total", "bytes_in", "Bytes of activations that a node took in."),
    (CounterMetricFamily, "mdiq_stage_sent_bytes_total", "bytes_out", "Bytes of activations that a node sent on."),
)


_COUNTS = {
    "preemptions": "Requests put back to make room for older ones.",
    "recoveries": "How often the ring has paused for a node that was gone, and gone on.",
}


class RingCollector(Collector):
    """Reads the figures from the status at each scrape."""

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield GaugeMetricFamily("mdiq_serving", "Whether the ring takes requests.", status["is_serving"])
        yield CounterMetricFamily("mdiq_rings_formed_total", "How often the ring was formed.", status["rings_formed"])
        for kind, name, key, text in _REQUESTS:
            yield kind(name, text, status["requests"][key])
        refused = CounterMetricFamily("mdiq_requests_refused_total", "Requests that were not taken.", labels=["reason"])
        for reason, count in status["requests"]["refused"].items():
            refused.add_metric([reason], count)
        yield refused
        if "counts" in status:
            for key, text in _COUNTS.items():
                yield CounterMetricFamily(f"mdiq_{key}_total", text, status["counts"].get(key, 0))
        for pause in status.get("pauses", [])[-1:]:
            text = "Seconds of the newest pause, by step, after a loss was noticed; unheard: before that."
            steps = GaugeMetricFamily("mdiq_last_pause_seconds", text, labels=["step"])
            for step in STEPS:
                if step in pause:
                    steps.add_metric([step.removesuffix("_s")], pause[step])
            yield steps
        if "kv_reserved_tokens" in status:
            text = "KV cache in use, in tokens, with cached prefixes."
            yield GaugeMetricFamily("mdiq_kv_reserved_tokens", text, status["kv_reserved_tokens"])
        for kind, name, key, text in _NODE:
            family = kind(name, text, labels=["node"])
            for node in status["nodes"]:
                if key in node:
                    family.add_metric([node["name"]], node[key])
            if family.samples:
                yield family


def metrics_registry(status: Callable[[], Mapping[str, Any]]) -> CollectorRegistry:
    """Return a registry of the ring's figures, without those of Prometheus' global registry about the process."""
    registry = CollectorRegistry()
    registry.register(RingCollector(status))
    return registry
