"""Documents whose figures are made up, and easy to check by hand."""

from typing import Any

from mdiq.bench.figures import LoadFigures
from mdiq.bench.runner import NodeShare
from mdiq.plan.explain import WhatIf
from mdiq.report.cost import Prices
from mdiq.report.drill import Drill, Progress
from mdiq.report.evaluate import Evaluation, Generation, HopBytes, ModelAbout, ModelRun, RingRun
from mdiq.report.gates import Gate, GateName
from mdiq.report.measure import LoadRun
from mdiq.report.receipt import Receipt
from mdiq.report.trial import Energy, Outlook, Predicted, StageRun, TrialRun
from mdiq.report.trial_document import trial_document
from mdiq.runtime.options import HopFigures

RECEIPT = Receipt(
    "2026-01-02T03:04:05+00:00", "mdiq <report>", "9.8.7", "abc123", True, {"cpu": "a & b", "cores": 2}, 1.5
)
MIB = 1 << 20


def load_run(nodes: int, users: int, rate: float, answers: tuple[tuple[int, ...], ...] = ()) -> LoadRun:
    """Return a made-up run at a rate while decoding."""
    share = NodeShare("node-0", "0-1", 300 * MIB, 40 * MIB, 0.5, 0.01, 130.0)
    figures = LoadFigures(0.8 * rate, rate, 0.5, 0.6, users / rate, 1.5 * users / rate)
    return LoadRun(users, 8, 4, 2.0, figures, (share,) * nodes, answers or ((7, 8, 9, 10),) * users)


def hop_bytes(wire: str, length: int, *, has_kv_cache: bool) -> HopBytes:
    """Return made-up counts: a row of 100 bytes and a frame of 50."""
    rows, num_tokens = (1, 8) if has_kv_cache else (length, 1)
    first = (50 + 100 * rows) * num_tokens
    return HopBytes(wire, has_kv_cache, length, num_tokens, first, 150 * num_tokens, first / num_tokens, 150.0)


def evaluation(*, is_same: bool = True) -> Evaluation:
    """Return a made-up evaluation of one model with GQA, on one and two Nodes."""
    about = ModelAbout("m <1>", "llama", True, 2, 64, 4, 2, 320, 1024, 4096 * 1024)
    full = ModelAbout("m-mha", "llama", True, 2, 64, 4, 4, 320, 2048, 4096 * 2048)
    generations = (
        Generation(True, 8, (0.1, 0.2, 0.3), is_same),
        Generation(False, 8, (0.1, 0.3, 0.6), is_same),
    )
    rings = tuple(
        RingRun(
            nodes,
            ("0-0", "1-1")[:nodes],
            (512,) * nodes,
            load_run(nodes, 1, 10.0),
            load_run(nodes, nodes, 10.0 * nodes),
            generations,
            300 * MIB,
            float(nodes),
        )
        for nodes in (1, 2)
    )
    wire = tuple(hop_bytes("f32", length, has_kv_cache=has) for has in (True, False) for length in (8, 32))
    settings = {"prompt_tokens": 8, "answer_tokens": 4, "example_tokens": 4096, "link": None, "wires": ["f32", "i8"]}
    return Evaluation(RECEIPT, settings, (ModelRun(about, rings, wire, full, wire),))


def stage(name: str, nodes: int, rate: float, *, passes: bool = True, error: str = "", equal: int = 2) -> StageRun:
    """Return a made-up stage with two users."""
    found = None
    if nodes > 1:
        found = Drill(
            node="node-1",
            users=2,
            killed_s=1.5,
            noticed_s=1.75,
            recovered_s=None if error else 4.0,
            gap_s=3.5,
            equal=0 if error else 2,
            error=error,
            timeline={} if error else {"back_s": 2.0, "loaded_s": 3.0, "first_token_s": 3.5, "replayed_s": 3.75},
            progress=tuple(Progress(0.5 * i, i) for i in range(1, 9)),
        )
    return StageRun(
        name=name,
        nodes=nodes,
        split=(4,) * nodes,
        is_planned=name in ("tuned", "all"),
        one=load_run(nodes, 1, rate / 2),
        many=load_run(nodes, 2, rate),
        part=load_run(nodes, 1, 6.0) if name == "alone" else None,
        equal=equal,
        predicted=Predicted(rate / 2, rate * 1.25, 2 / (rate * 1.25)),
        devices=load_run(nodes, 2, rate).nodes,
        kv_bytes=(3 * MIB,) * nodes,
        hops=(HopFigures("f32", 0.02, 1.25e6),) * nodes if nodes > 1 else (),
        energy=Energy("", None, None, None),
        drill=found,
        gates=() if name == "alone" else (Gate(GateName.ANSWERS, equal / 2, 1.0, True, equal == 2),),
        passes=passes,
    )


def trial_run(*stages: StageRun) -> TrialRun:
    """Return a made-up trial; by default of three stages that pass."""
    outlook = Outlook(
        planned=16.0,
        num_needed=2,
        left_out=("node-2",),
        one_more=(WhatIf("node-0", 20.0), WhatIf("node-1", None, "3 layers would not fit")),
        gains=(1.25, None),
        limited_by="hop",
        limit="node-0 > node-1",
    )
    usual = (stage("few", 2, 10.0), stage("tuned", 2, 12.0), stage("all", 3, 15.0))
    wire = tuple(hop_bytes("f32", length, has_kv_cache=has) for has in (True, False) for length in (8, 32))
    return TrialRun(stage("alone", 1, 8.0), stages or usual, 3, wire, outlook)


PRICES = Prices(2.0, 100.0, 0.3, "JPY", 10.0, 2.0, 1.0)


def trial(run: TrialRun | None = None, device_bytes: int = 100 * MIB, prices: Prices = PRICES) -> dict[str, Any]:
    """Return the document of a made-up trial of three devices, each with so much memory."""
    about = ModelAbout("m <2>", "qwen2", True, 12, 64, 8, 2, 320, 1024, 4096 * 1024)
    settings = {"nodes": 3, "users": 2, "prompt_tokens": 8, "answer_tokens": 4, "link": "delay=20ms"}
    settings |= {"cpu_per_node": 0.6, "is_local": True}
    return trial_document(
        RECEIPT, settings, about, run or trial_run(), prices, device_bytes, is_device_given=True, num_devices=3
    )
