"""Compiled weights of a vocabulary against f64's, and draws with and without them."""

import math

import numpy as np
import pytest
import torch

from mdiq.core.sequence import SamplingParams
from mdiq.engine.kernels.llvm_softmax import CompiledSoftmax
from mdiq.engine.model import sampler
from mdiq.engine.model.sampler import SampleRow, sample


def _logits(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)) * 4 + 30


@pytest.mark.parametrize("count", [1, 2, 15, 127, 128, 129, 400, 49_152, 151_936])
@pytest.mark.parametrize("temperature", [1e-30, 0.5, 1.0, 7.0])
def test_weights_are_powers_of_e_and_sums_are_theirs(count: int, temperature: float) -> None:
    softmax = CompiledSoftmax.find()
    assert softmax is not None
    logits = _logits(count)
    weights, sums = softmax(logits, temperature)
    wide = logits.double()
    exact = ((wide - wide.amax()) / temperature).exp()
    # The power itself is rounded to f32: to 2^-24 of up to 88.
    assert torch.allclose(weights.double(), exact, rtol=88 * 2.0**-23, atol=1e-37)
    assert weights.amax() == 1.0
    expected = torch.stack([block.double().sum() for block in weights.split(softmax.block)])
    assert torch.allclose(sums.double(), expected, rtol=1e-6)


def test_a_logit_of_minus_infinity_weighs_nothing() -> None:
    softmax = CompiledSoftmax.find()
    assert softmax is not None
    logits = torch.full((300,), -math.inf)
    logits[[5, 290]] = torch.tensor([1.0, 2.0])
    weights, _ = softmax(logits, 1.0)
    assert weights.nonzero().flatten().tolist() == [5, 290]


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 6.0])
@pytest.mark.parametrize("count", [1, 7, 1_000, 49_152])
def test_sums_of_like_weights_are_numpys_to_the_bit(spread: float, count: int) -> None:
    softmax = CompiledSoftmax.find()
    assert softmax is not None
    weights, _ = softmax(_logits(count), 4 / spread if spread else 1e30)
    for least in (0.0, 1e-30, float(weights.median())):
        counted = np.where(weights < least, np.float32(0), weights)
        expected = np.bincount(weights.numpy().view(np.int32) >> 16, weights=counted)
        found = softmax.class_sums(weights, least).numpy()
        assert np.array_equal(found[: len(expected)], expected) and not found[len(expected) :].any()


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 0.999])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_top_p_keeps_the_largest_that_reach_it(
    spread: float, top_p: float, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_compiled:
        monkeypatch.setattr(CompiledSoftmax, "find", lambda: None)
    seen: list[np.ndarray] = []
    draw = sampler._draw

    def drawn(weights: np.ndarray, sums: np.ndarray, share: float) -> int:
        seen.append(weights.copy())
        return draw(weights, sums, share)

    monkeypatch.setattr(sampler, "_draw", drawn)
    logits = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(3)) * spread
    for wish in (1.0, top_p):
        sample(logits, [SampleRow(SamplingParams(temperature=1.0, top_p=wish), (), 0)])
    every, kept = seen
    order = np.argsort(-every, kind="stable")
    reached = every[order].cumsum(dtype=np.float64) >= every.sum(dtype=np.float64) * top_p
    nucleus = order[: int(reached.argmax()) + 1 if reached.any() else None]
    assert np.array_equal(kept[nucleus], every[nucleus])
    assert np.count_nonzero(kept) == len(nucleus)


@pytest.mark.parametrize("filters", [{}, {"top_k": 30}, {"top_p": 0.8}, {"min_p": 0.02}], ids=str)
def test_draws_are_the_same_where_nothing_can_be_compiled(
    filters: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = _logits(5_000).expand(40, -1)
    rows = [SampleRow(SamplingParams(temperature=0.9, seed=3, **filters), (), position) for position in range(40)]
    found = sample(logits, rows)
    monkeypatch.setattr(CompiledSoftmax, "find", lambda: None)
    assert sample(logits, rows) == found
