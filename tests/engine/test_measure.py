"""What is measured of a Stage has the shape that the plan needs. How long anything takes is not asserted."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from mdiq.core.frame import Batch
from mdiq.core.types import LayerRange
from mdiq.engine import measure
from mdiq.engine.measure import DECODE_SIZES, PROMPT_SIZES, SUSTAINED_S, measure_cost, measure_head
from mdiq.engine.model.sampler import SampleRow
from mdiq.engine.runner import StageRunner
from tests.engine.tiny_models import make_model

PERIOD_S = 0.1  # of a quota, as Linux has it


@pytest.mark.parametrize("is_starter", [True, False])
@pytest.mark.parametrize(
    ("kv_tokens", "decode_sizes", "prompt_sizes"),
    [(512, DECODE_SIZES, PROMPT_SIZES), (64, (1, 2), PROMPT_SIZES[:2]), (32, (1,), PROMPT_SIZES[:1])],
)
def test_a_stage_is_measured_at_every_size_that_its_cache_and_the_context_allow(
    tmp_path: Path, is_starter: bool, kv_tokens: int, decode_sizes: tuple[int, ...], prompt_sizes: tuple[int, ...]
) -> None:
    make_model("llama-gqa-tied").save_pretrained(tmp_path)
    layers = LayerRange(0, 1) if is_starter else LayerRange(1, 2)
    runner = StageRunner.load(
        tmp_path,
        layers,
        is_last=False,
        owns_embedding_and_head=is_starter,
        kv_tokens=kv_tokens,
    )
    cost = measure_cost(runner)
    assert tuple(size for size, _ in cost.decode.points) == decode_sizes
    assert tuple(size for size, _ in cost.prompt.points) == prompt_sizes
    assert min(seconds for curve in (cost.decode, cost.prompt) for _, seconds in curve.points) > 0
    assert runner.kv_tokens_in_use == 0


def test_the_cost_of_the_head_counts_draws_at_the_temperature_that_clients_leave_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama-gqa-tied").save_pretrained(tmp_path)
    runner = StageRunner.load(
        tmp_path,
        LayerRange(0, 2),
        is_last=True,
        owns_embedding_and_head=True,
        kv_tokens=64,
    )
    drawn: list[tuple[int, float]] = []

    def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
        drawn.extend((len(logits), row.params.temperature) for row in rows[:1])
        return [0] * len(rows)

    monkeypatch.setattr(measure, "sample", sample)
    measure_head(runner)
    assert set(drawn) == {(size, 1.0) for size in DECODE_SIZES}
    drawn.clear()
    measure_cost(runner)
    assert {size for size, _ in drawn} == {1, 2}


class RationedDevice:
    """A device that computes for a share of each period and then stands still; its runner's forwards take its CPU."""

    owns_embedding, is_on_cpu = False, True
    kv_capacity_tokens = 4_096
    config = SimpleNamespace(context_tokens=2_048, hidden_size=1)

    def __init__(self, quota: float, start_s: float, row_s: float) -> None:
        self._share_s, self._row_s = quota * PERIOD_S, row_s
        self.now_s, self._left_s = start_s, self._share_s
        self.used_s = 0.0

    def cpu_s(self, num_rows: int) -> float:
        return self._row_s * (10 + num_rows)

    def forward(self, batch: Batch) -> "RationedDevice":
        left_s = self.cpu_s(sum(segment.length for segment in batch.segments))
        while left_s > 0:
            period_end_s = (self.now_s // PERIOD_S + 1) * PERIOD_S
            run_s = min(left_s, self._left_s, period_end_s - self.now_s)
            left_s, self._left_s = left_s - run_s, self._left_s - run_s
            self.now_s += run_s
            self.used_s += run_s
            if self._left_s <= 0 or self.now_s >= period_end_s:
                self.now_s, self._left_s = period_end_s + 1e-9, self._share_s
        return self

    def parts(self) -> None: ...

    def reset(self) -> None: ...

    def occupy(self, seq_id: object, num_tokens: int) -> None: ...


@pytest.mark.parametrize("row_s", [2e-5, 2e-4, 2e-3], ids=["a PC", "a board", "a slow board"])
@pytest.mark.parametrize("quota", [1.0, 0.5, 0.3])
@pytest.mark.parametrize(("num_threads", "error", "shape_error"), [(1, 0.08, 1e-6), (2, 0.25, 0.5)])
def test_a_quota_is_seen_at_every_size(
    quota: float, row_s: float, num_threads: int, error: float, shape_error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    for phase in range(20):
        device = RationedDevice(quota, phase / 20 * PERIOD_S, row_s)
        clocks = {"perf_counter": lambda it=device: it.now_s, "thread_time": lambda it=device: it.used_s}
        monkeypatch.setattr(measure, "time", SimpleNamespace(**clocks))
        cost = measure_cost(cast(StageRunner, device), min_s=SUSTAINED_S)
        assert cost.decode.points[0][0] == 1 and len(cost.decode.points) > 1
        for size, seconds in cost.decode.points + cost.prompt.points:
            assert seconds * quota == pytest.approx(device.cpu_s(size), rel=error), (phase, size)
            beside_s = cost.decode.seconds(1) / device.cpu_s(1)
            assert seconds / device.cpu_s(size) == pytest.approx(beside_s, rel=shape_error), (phase, size)


def test_a_pause_of_another_program_hits_no_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second in which the device does something else, at whatever size that comes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for at_s in (0.05, 0.4, 1.0, 2.0):
        device = RationedDevice(1.0, 0.0, 2e-4)
        paused: list[float] = []

        def now(it: RationedDevice = device, paused: list[float] = paused, at_s: float = at_s) -> float:
            if it.now_s >= at_s and not paused:
                paused.append(0.5)
            return it.now_s + sum(paused)

        clocks = {"perf_counter": now, "thread_time": lambda it=device: it.used_s}
        monkeypatch.setattr(measure, "time", SimpleNamespace(**clocks))
        cost = measure_cost(cast(StageRunner, device), min_s=SUSTAINED_S)
        for size, seconds in cost.decode.points + cost.prompt.points:
            assert seconds == pytest.approx(device.cpu_s(size), rel=0.3)
