"""Metrics of a ring for Prometheus: the figures of `mdiq status --json`, in a registry of their own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
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
_KEY = (
    (GaugeMetricFamily, "mdiq_key_requests_running", "running", "Requests of a key in flight, each prompt counted."),
    (CounterMetricFamily, "mdiq_key_requests_total", "requests", "Requests of a key that were begun."),
    (CounterMetricFamily, "mdiq_key_requests_refused_total", "refused", "Requests that a key's own limit refused."),
    (CounterMetricFamily, "mdiq_key_prompt_tokens_total", "prompt_tokens", "Tokens of a key's prompts."),
    (CounterMetricFamily, "mdiq_key_answer_tokens_total", "answer_tokens", "Tokens of a key's answers."),
)
_JOURNAL = (
    (GaugeMetricFamily, "mdiq_journal_written", "is_written", "Whether the journal can be written."),
    (GaugeMetricFamily, "mdiq_journal_changes_waiting", "waiting", "Changes that wait to be written to the journal."),
    (CounterMetricFamily, "mdiq_journal_writes_total", "writes", "Writes of the journal, those that failed too."),
    (CounterMetricFamily, "mdiq_journal_write_failures_total", "failures", "Of these, writes that failed."),
    (CounterMetricFamily, "mdiq_journal_write_seconds_total", "write_s", "Seconds that these writes took."),
    (GaugeMetricFamily, "mdiq_journal_bytes", "bytes", "Size of the journal's files."),
)
_KV = (
    ("kv_reserved_tokens", "KV cache in use, in tokens, with cached prefixes."),
    ("kv_capacity_tokens", "KV cache of the ring, in tokens."),
)
_HOP = (
    ("mdiq_hop_delay_seconds", "delay_s", "One way of a small message, as measured when the ring was formed."),
    ("mdiq_hop_bytes_per_second", "bytes_per_s", "What a hop carries, as measured when the ring was formed."),
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
        if "noise" in status:
            yield from _noise(status["noise"])
        if (journal := status.get("journal")) is not None:
            yield from _journal(journal)
        for key, text in _KV:
            if key in status:
                yield GaugeMetricFamily(f"mdiq_{key}", text, status[key])
        if (hops_s := status.get("pace", {}).get("hops_s")) is not None:
            yield GaugeMetricFamily("mdiq_hops_seconds", "All hops of a lap together, without computing.", hops_s)
        for kind, name, key, text in _NODE:
            yield from _family(kind(name, text, labels=["node"]), "name", key, status["nodes"])
        for kind, name, key, text in _KEY:
            yield from _family(kind(name, text, labels=["key"]), "name", key, status.get("keys", []))
        for name, key, text in _HOP:
            # Nodes that stand by come last.
            hops = [{**hop, "sender": status["nodes"][i]["name"]} for i, hop in enumerate(status.get("hops", []))]
            yield from _family(GaugeMetricFamily(name, text, labels=["sender"]), "sender", key, hops)


def _journal(journal: Mapping[str, Any]) -> Iterator[Metric]:
    responses = GaugeMetricFamily(
        "mdiq_journal_responses", "Responses in the background that the journal keeps.", labels=["state"]
    )
    responses.add_metric(["running"], journal["running"])
    responses.add_metric(["ended"], journal["responses"] - journal["running"])
    yield responses
    for kind, name, key, text in _JOURNAL:
        yield kind(name, text, journal[key])


def _noise(noise: Mapping[str, Any]) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "mdiq_noise_rows_total", "Rows of activations that left the Starter, on a ring with noise.", noise["rows_sent"]
    )
    text = "Rows of the request that sent the most, with those of its cached prefix."
    yield GaugeMetricFamily("mdiq_noise_worst_request_rows", text, noise["worst_request_rows"])
    worst = GaugeMetricFamily(
        "mdiq_noise_worst_request_epsilon", "Epsilon of that request, by the promise of a node.", labels=["node"]
    )
    yield from _family(worst, "name", "worst_request_epsilon", noise["nodes"])


def _family(
    family: GaugeMetricFamily | CounterMetricFamily, label: str, key: str, rows: Iterable[Mapping[str, Any]]
) -> Iterator[Metric]:
    """Yield a metric of all rows that have the figure; nothing if none has."""
    for row in rows:
        if row.get(key) is not None:
            family.add_metric([row[label]], row[key])
    if family.samples:
        yield family


def metrics_registry(status: Callable[[], Mapping[str, Any]]) -> CollectorRegistry:
    """Return a registry of the ring's figures, without those of Prometheus' global registry about the process."""
    registry = CollectorRegistry()
    registry.register(RingCollector(status))
    return registry
