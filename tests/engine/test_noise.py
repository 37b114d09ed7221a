"""The Gaussian mechanism on rows, and that a Stage without noise sends what it always sent."""

import os
from collections.abc import Callable
from math import erf, sqrt
from pathlib import Path

import pytest
import torch

from mdiq.core.frame import Batch, Segment, TokenIds
from mdiq.core.noise import RowNoise
from mdiq.core.types import Epoch, LayerRange, SeqId
from mdiq.engine import noise as engine_noise
from mdiq.engine import runner as engine_runner
from mdiq.engine.noise import clipped, noisy, normal
from mdiq.engine.runner import StageRunner
from mdiq.engine.tensors import to_wire
from tests.engine.tiny_models import make_model

TOKENS = (5, 9, 2, 40, 7)


def test_numbers_are_normal_and_independent() -> None:
    numbers = normal((400, 501)).flatten()
    # 200,400 numbers: five standard deviations of each figure.
    assert abs(numbers.mean()) < 5 / sqrt(200_400)
    assert abs(numbers.var() - 1) < 5 * sqrt(2 / 200_400)
    for limit in (-2.0, -0.5, 0.0, 1.0, 3.0):
        share = 0.5 * (1 + erf(limit / sqrt(2)))
        assert abs((numbers < limit).double().mean() - share) < 5 * sqrt(share * (1 - share) / 200_400)
    halves = numbers[:100_200], numbers[100_200:]  # the two of a pair
    assert abs((halves[0] * halves[1]).mean()) < 5 / sqrt(100_200)
    assert normal((0, 3)).shape == (0, 3) and normal((1, 1)).shape == (1, 1)


def test_every_bit_comes_from_the_operating_system_and_none_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def urandom(size: int) -> bytes:
        asked.append(size)
        return bytes(size)

    torch.manual_seed(1)
    first = noisy(torch.zeros(2, 4), RowNoise(1.0, 1.0))
    torch.manual_seed(1)
    assert not torch.equal(noisy(torch.zeros(2, 4), RowNoise(1.0, 1.0)), first), "no seed repeats it"
    monkeypatch.setattr(os, "urandom", urandom)
    largest = engine_noise.normal((3, 3))
    assert asked == [16 * 5]
    assert largest.max() == pytest.approx(8.572, abs=1e-3), "all bits 0 is the largest number that there is"


def test_rows_are_clipped_to_the_norm_and_shorter_ones_stay_as_they_are() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [-30.0, 40.0]], dtype=torch.float64)
    expected = torch.tensor([[1.2, 1.6], [0.3, 0.4], [0.0, 0.0], [-1.2, 1.6]], dtype=torch.float64)
    assert torch.allclose(clipped(rows, 2.0), expected, atol=1e-15)
    assert torch.equal(clipped(rows, 2.0)[1:3], rows[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_its_standard_deviation_about_the_clipped_row(dtype: torch.dtype) -> None:
    rows = torch.full((2_000, 16), 5.0, dtype=dtype)  # of norm 20
    found = noisy(rows, RowNoise(clip=4.0, sigma=0.5))
    assert found.dtype == dtype and found.shape == rows.shape
    away = found.double() - 1.0
    assert abs(away.mean()) < 5 * 0.5 / sqrt(32_000) + 1e-3
    assert away.std() == pytest.approx(0.5, rel=0.03)
    assert torch.equal(rows, torch.full_like(rows, 5.0)), "the Stage's own rows stay"


def test_numbers_that_are_not_finite_do_not_pass() -> None:
    rows = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]])
    assert torch.allclose(noisy(rows, RowNoise(1.0, 1e-9)), torch.tensor([[0.0, 1.0], [0.0, 1.0]]), atol=1e-6)


def _stage(folder: Path, *, wire: str) -> Callable[[], tuple[StageRunner, Batch]]:
    make_model("llama-gqa-tied").save_pretrained(folder)

    def load() -> tuple[StageRunner, Batch]:
        runner = StageRunner.load(
            folder, LayerRange(0, 1), is_last=False, owns_embedding_and_head=True, kv_tokens=64, wire=wire
        )
        segment = Segment(SeqId(0), 0, len(TOKENS))
        return runner, Batch(Epoch(1), (segment,), (TokenIds(TOKENS),), ())

    return load


@pytest.mark.parametrize("wire", ["f32", "bf16", "i8"])
def test_a_stage_without_noise_sends_the_same_bytes_and_draws_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wire: str
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("there is no noise")

    load = _stage(tmp_path, wire=wire)
    monkeypatch.setattr(engine_runner, "noisy", never)
    runner, batch = load()
    sent = runner.forward(batch).parts()
    runner.reset()
    with torch.inference_mode():
        expected = to_wire(runner._forward(batch), wire).parts()
    assert sent[:2] == expected[:2] and bytes(sent[2][0]) == bytes(expected[2][0])
    assert "noise" not in runner.shape


@pytest.mark.parametrize("wire", ["f32", "bf16", "i8"])
def test_noise_comes_before_the_format_of_the_hop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wire: str) -> None:
    monkeypatch.setattr(engine_noise, "normal", lambda shape: torch.ones(shape, dtype=torch.float64))
    runner, batch = _stage(tmp_path, wire=wire)()
    with torch.inference_mode():
        plain = runner._forward(batch)
    runner.reset()
    runner.noise = RowNoise(clip=0.5 * float(plain.norm(dim=1).min()), sigma=0.25)
    sent = runner.forward(batch).parts()
    rows = (clipped(plain.double(), runner.noise.clip) + 0.25).float()
    expected = to_wire(rows, wire).parts()
    assert sent[:2] == expected[:2] and bytes(sent[2][0]) == bytes(expected[2][0])
    assert "noise" in runner.shape, "its forwards take longer"


def test_the_kv_cache_of_the_sender_has_no_noise(tmp_path: Path) -> None:
    load, found = _stage(tmp_path, wire="f32"), []
    for noise in (None, RowNoise(1.0, 10.0)):
        runner, batch = load()
        runner.noise = noise
        with torch.inference_mode():
            for cached in runner._cache.keys:
                cached.zero_()  # what nobody has written may be anything
        runner.forward(batch)
        found.append(torch.stack(runner._cache.keys))
    assert found[0].any() and torch.equal(*found)
