"""What is measured of a Stage has the shape that the plan needs. How long anything takes is not asserted."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mdiq.core.types import LayerRange
from mdiq.engine import measure
from mdiq.engine.measure import DECODE_SIZES, PROMPT_SIZES, measure_cost, measure_head
from mdiq.engine.model.sampler import SampleRow
from mdiq.engine.runner import StageRunner
from tests.engine.tiny_models import make_model


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
