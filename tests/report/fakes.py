"""Documents whose figures are made up, and easy to check by hand."""

from mdiq.bench.figures import LoadFigures
from mdiq.bench.runner import NodeShare
from mdiq.report.evaluate import Evaluation, Generation, HopBytes, ModelAbout, ModelRun, RingRun
from mdiq.report.measure import LoadRun
from mdiq.report.receipt import Receipt

RECEIPT = Receipt("2026-01-02T03:04:05+00:00", "mdiq <report>", "9.8.7", "abc123", True, {"cpu": "a & b", "cores": 2})
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
