"""The figures for Prometheus, as dashboards know them."""

from typing import Any

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families as families

from mdiq.api.metrics import metrics_registry

DESK = {"busy_share": 0.25, "rss_bytes": 123456789012, "weight_bytes": 9, "bytes_in": 10, "bytes_out": 11}
STATUS = {
    "is_serving": True,
    "rings_formed": 4,
    "requests": {
        "running": 1,
        "waiting": 9,
        "done": 2,
        "failed": 3,
        "left": 7,
        "cut_off": 10,
        "refused": {"busy": 5, "too_long": 6},
    },
    "counts": {"preemptions": 5, "recoveries": 8},
    "pauses": [{"after_s": 9.0}, {"unheard_s": 0.5, "back_s": 0.0, "loaded_s": 1.25, "after_s": 1.5, "sequences": 2}],
    "kv_reserved_tokens": 96,
    "kv_capacity_tokens": 2_048,
    "journal": {
        "is_written": True,
        "responses": 7,
        "running": 3,
        "waiting": 2,
        "writes": 50,
        "failures": 4,
        "write_s": 1.5,
        "bytes": 8192,
    },
    "pace": {"hops_s": 0.004},
    "hops": [
        {"wire": "bf16", "delay_s": 0.001, "bytes_per_s": 1e6},
        {"wire": "bf16", "delay_s": None, "bytes_per_s": None},
    ],
    "keys": [
        {"name": "office", "running": 1, "requests": 2, "refused": 3, "prompt_tokens": 4, "answer_tokens": 5},
        {"name": "lab", "running": 0, "requests": 0, "refused": 0, "prompt_tokens": 0, "answer_tokens": 0},
    ],
    "nodes": [{"name": "desk", **DESK}, {"name": "pi-1", "state": "drained"}],
}
EXPECTED = """\
# HELP mdiq_serving Whether the ring takes requests.
# TYPE mdiq_serving gauge
mdiq_serving 1
# HELP mdiq_rings_formed_total How often the ring was formed.
# TYPE mdiq_rings_formed_total counter
mdiq_rings_formed_total 4
# HELP mdiq_requests_running Requests that are not finished.
# TYPE mdiq_requests_running gauge
mdiq_requests_running 1
# HELP mdiq_requests_waiting Of these, requests that wait for a place in the ring.
# TYPE mdiq_requests_waiting gauge
mdiq_requests_waiting 9
# HELP mdiq_requests_done_total Requests that were answered.
# TYPE mdiq_requests_done_total counter
mdiq_requests_done_total 2
# HELP mdiq_requests_failed_total Requests that the ring failed to answer.
# TYPE mdiq_requests_failed_total counter
mdiq_requests_failed_total 3
# HELP mdiq_requests_left_total Requests whose client went away.
# TYPE mdiq_requests_left_total counter
mdiq_requests_left_total 7
# HELP mdiq_requests_cut_off_total Answers that were given up: nobody read them.
# TYPE mdiq_requests_cut_off_total counter
mdiq_requests_cut_off_total 10
# HELP mdiq_requests_refused_total Requests that were not taken.
# TYPE mdiq_requests_refused_total counter
mdiq_requests_refused_total{reason="busy"} 5
mdiq_requests_refused_total{reason="too_long"} 6
# HELP mdiq_preemptions_total Requests put back to make room for older ones.
# TYPE mdiq_preemptions_total counter
mdiq_preemptions_total 5
# HELP mdiq_recoveries_total How often the ring has paused for a node that was gone, and gone on.
# TYPE mdiq_recoveries_total counter
mdiq_recoveries_total 8
# HELP mdiq_last_pause_seconds Seconds of the newest pause, by step, after a loss was noticed; unheard: before that.
# TYPE mdiq_last_pause_seconds gauge
mdiq_last_pause_seconds{step="unheard"} 0.5
mdiq_last_pause_seconds{step="back"} 0.0
mdiq_last_pause_seconds{step="loaded"} 1.25
mdiq_last_pause_seconds{step="after"} 1.5
# HELP mdiq_journal_responses Responses in the background that the journal keeps.
# TYPE mdiq_journal_responses gauge
mdiq_journal_responses{state="running"} 3
mdiq_journal_responses{state="ended"} 4
# HELP mdiq_journal_written Whether the journal can be written.
# TYPE mdiq_journal_written gauge
mdiq_journal_written 1
# HELP mdiq_journal_changes_waiting Changes that wait to be written to the journal.
# TYPE mdiq_journal_changes_waiting gauge
mdiq_journal_changes_waiting 2
# HELP mdiq_journal_writes_total Writes of the journal, those that failed too.
# TYPE mdiq_journal_writes_total counter
mdiq_journal_writes_total 50
# HELP mdiq_journal_write_failures_total Of these, writes that failed.
# TYPE mdiq_journal_write_failures_total counter
mdiq_journal_write_failures_total 4
# HELP mdiq_journal_write_seconds_total Seconds that these writes took.
# TYPE mdiq_journal_write_seconds_total counter
mdiq_journal_write_seconds_total 1.5
# HELP mdiq_journal_bytes Size of the journal's files.
# TYPE mdiq_journal_bytes gauge
mdiq_journal_bytes 8192
# HELP mdiq_kv_reserved_tokens KV cache in use, in tokens, with cached prefixes.
# TYPE mdiq_kv_reserved_tokens gauge
mdiq_kv_reserved_tokens 96
# HELP mdiq_kv_capacity_tokens KV cache of the ring, in tokens.
# TYPE mdiq_kv_capacity_tokens gauge
mdiq_kv_capacity_tokens 2048
# HELP mdiq_hops_seconds All hops of a lap together, without computing.
# TYPE mdiq_hops_seconds gauge
mdiq_hops_seconds 0.004
# HELP mdiq_stage_busy_ratio Share of the time in which a node computes.
# TYPE mdiq_stage_busy_ratio gauge
mdiq_stage_busy_ratio{node="desk"} 0.25
# HELP mdiq_stage_resident_bytes Resident memory of a node's process.
# TYPE mdiq_stage_resident_bytes gauge
mdiq_stage_resident_bytes{node="desk"} 123456789012
# HELP mdiq_stage_weight_bytes Weights of a node's layers.
# TYPE mdiq_stage_weight_bytes gauge
mdiq_stage_weight_bytes{node="desk"} 9
# HELP mdiq_stage_received_bytes_total Bytes of activations that a node took in.
# TYPE mdiq_stage_received_bytes_total counter
mdiq_stage_received_bytes_total{node="desk"} 10
# HELP mdiq_stage_sent_bytes_total Bytes of activations that a node sent on.
# TYPE mdiq_stage_sent_bytes_total counter
mdiq_stage_sent_bytes_total{node="desk"} 11
# HELP mdiq_key_requests_running Requests of a key in flight, each prompt counted.
# TYPE mdiq_key_requests_running gauge
mdiq_key_requests_running{key="office"} 1
mdiq_key_requests_running{key="lab"} 0
# HELP mdiq_key_requests_total Requests of a key that were begun.
# TYPE mdiq_key_requests_total counter
mdiq_key_requests_total{key="office"} 2
mdiq_key_requests_total{key="lab"} 0
# HELP mdiq_key_requests_refused_total Requests that a key's own limit refused.
# TYPE mdiq_key_requests_refused_total counter
mdiq_key_requests_refused_total{key="office"} 3
mdiq_key_requests_refused_total{key="lab"} 0
# HELP mdiq_key_prompt_tokens_total Tokens of a key's prompts.
# TYPE mdiq_key_prompt_tokens_total counter
mdiq_key_prompt_tokens_total{key="office"} 4
mdiq_key_prompt_tokens_total{key="lab"} 0
# HELP mdiq_key_answer_tokens_total Tokens of a key's answers.
# TYPE mdiq_key_answer_tokens_total counter
mdiq_key_answer_tokens_total{key="office"} 5
mdiq_key_answer_tokens_total{key="lab"} 0
# HELP mdiq_hop_delay_seconds One way of a small message, as measured when the ring was formed.
# TYPE mdiq_hop_delay_seconds gauge
mdiq_hop_delay_seconds{sender="desk"} 0.001
# HELP mdiq_hop_bytes_per_second What a hop carries, as measured when the ring was formed.
# TYPE mdiq_hop_bytes_per_second gauge
mdiq_hop_bytes_per_second{sender="desk"} 1e+06
"""


def text_of(status: dict[str, Any]) -> str:
    return generate_latest(metrics_registry(lambda: status)).decode()


def test_names_types_labels_and_values_are_those_that_dashboards_know() -> None:
    assert list(families(text_of(STATUS))) == list(families(EXPECTED))


def test_figures_that_nobody_knows_yet_are_left_out() -> None:
    unknown = ("counts", "pauses", "journal", "kv_reserved_tokens", "kv_capacity_tokens", "pace", "hops", "keys")
    status = {key: value for key, value in STATUS.items() if key not in unknown} | {"nodes": [{"name": "pi-1"}]}
    left_out = {family.name for family in families(EXPECTED)} - {family.name for family in families(text_of(status))}
    assert {name for name in left_out if "journal" in name} == {
        "mdiq_journal_responses",
        "mdiq_journal_written",
        "mdiq_journal_changes_waiting",
        "mdiq_journal_writes",
        "mdiq_journal_write_failures",
        "mdiq_journal_write_seconds",
        "mdiq_journal_bytes",
    }
    assert {name for name in left_out if "journal" not in name} == {
        "mdiq_preemptions",
        "mdiq_recoveries",
        "mdiq_last_pause_seconds",
        "mdiq_kv_reserved_tokens",
        "mdiq_kv_capacity_tokens",
        "mdiq_hops_seconds",
        "mdiq_hop_delay_seconds",
        "mdiq_hop_bytes_per_second",
        "mdiq_key_requests_running",
        "mdiq_key_requests",
        "mdiq_key_requests_refused",
        "mdiq_key_prompt_tokens",
        "mdiq_key_answer_tokens",
        "mdiq_stage_busy_ratio",
        "mdiq_stage_resident_bytes",
        "mdiq_stage_weight_bytes",
        "mdiq_stage_received_bytes",
        "mdiq_stage_sent_bytes",
    }


def test_figures_are_read_when_they_are_asked_for_and_two_services_share_nothing() -> None:
    serving = [True]
    registries = [metrics_registry(lambda: {**STATUS, "is_serving": serving[0]}), metrics_registry(lambda: STATUS)]
    serving[0] = False
    assert [registry.get_sample_value("mdiq_serving") for registry in registries] == [0, 1]
    assert REGISTRY.get_sample_value("mdiq_serving") is None


def test_noise_is_counted_where_there_is_some() -> None:
    nodes = [{"name": "pi-1", "worst_request_epsilon": 34.055}]
    noise = {"rows_sent": 12, "worst_request_rows": 10, "hops": [], "nodes": nodes}
    registry = metrics_registry(lambda: {**STATUS, "noise": noise})
    assert registry.get_sample_value("mdiq_noise_rows_total") == 12
    assert registry.get_sample_value("mdiq_noise_worst_request_rows") == 10
    assert registry.get_sample_value("mdiq_noise_worst_request_epsilon", {"node": "pi-1"}) == 34.055
