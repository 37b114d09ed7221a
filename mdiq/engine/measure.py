"""What a Stage costs on this device: seconds of a forward as a + c * b for b Segments of one token."""

import statistics
import time

import torch

from mdiq.core.frame import Batch, Segment, TokenIds
from mdiq.core.types import Epoch, SeqId
from mdiq.engine.runner import StageRunner
from mdiq.engine.tensors import TensorRows

SIZES = (1, 8)
REPEATS = 3


def measure_cost(runner: StageRunner) -> tuple[float, float]:
    """Return (a_s, c_s), from medians at two batch sizes; the runner's cache is empty afterwards."""
    most = max(min(runner.kv_capacity_tokens // 64, SIZES[1]), 1)
    small = _median_s(runner, SIZES[0])
    if most == SIZES[0]:
        return small, 0.0
    large = _median_s(runner, most)
    slope_s = max((large - small) / (most - SIZES[0]), 0.0)
    return max(small - slope_s, 1e-6), slope_s


def _median_s(runner: StageRunner, num_segments: int) -> float:
    times: list[float] = []
    for position in range(REPEATS + 1):  # the first one warms up
        batch = _batch(runner, num_segments, position)
        start_s = time.perf_counter()
        output = runner.forward(batch)
        output.parts()  # a copy to the CPU waits for a GPU
        if runner.owns_embedding:
            runner.logits([output.rows(i, i + 1) for i in range(num_segments)])  # the head is the Starter's too
        times.append(time.perf_counter() - start_s)
    runner.reset()
    return statistics.median(times[1:])


def _batch(runner: StageRunner, num_segments: int, position: int) -> Batch:
    segments = tuple(Segment(SeqId(i), position, 1, wants_logits=True) for i in range(num_segments))
    if runner.owns_embedding:
        return Batch(Epoch(1), segments, tuple(TokenIds((0,)) for _ in segments))
    row = TensorRows(torch.zeros(1, runner.config.hidden_size))
    return Batch(Epoch(1), segments, (row,) * num_segments)
