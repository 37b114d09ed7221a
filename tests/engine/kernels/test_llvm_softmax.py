"""Compiled weights of a vocabulary against f64's, and draws with and without them."""

import math

import numpy as np
import pytest
import torch

from mdiq.core.sequence import SamplingParams
from mdiq.engine.kernels.llvm_softmax import CompiledSoftmax
from mdiq.engine.model import sampler
from mdiq.engine.model.sampler import SampleRow, sample


def _logits(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(30, 4, count).astype(np.float32)


def _softmax() -> CompiledSoftmax:
    softmax = CompiledSoftmax.find()
    assert softmax is not None
    return softmax


@pytest.mark.parametrize("count", [1, 2, 15, 127, 128, 129, 400, 49_152, 151_936])
@pytest.mark.parametrize("temperature", [1e-30, 0.5, 1.0, 7.0])
def test_weights_are_powers_of_e_and_sums_are_theirs(count: int, temperature: float) -> None:
    softmax, logits = _softmax(), _logits(count)
    weights, sums = softmax.weights(logits, logits.max(), temperature)
    wide = logits.astype(np.float64)
    exact = np.exp((wide - wide.max()) / temperature)
    # The power itself is rounded to f32: to 2^-24 of up to 88.
    assert np.allclose(weights, exact, rtol=88 * 2.0**-23, atol=1e-37)
    assert weights.max() == 1.0
    expected = [weights[i : i + softmax.block].sum(dtype=np.float64) for i in range(0, count, softmax.block)]
    assert np.allclose(sums, expected, rtol=1e-6)
    assert np.array_equal(softmax.sums(logits, logits.max(), temperature), sums)


def test_a_part_of_the_weights_has_the_bits_of_all() -> None:
    softmax, logits = _softmax(), _logits(5_000)
    every = softmax.weights(logits, logits.max(), 0.7)[0].copy()
    for start in range(0, 5_000, softmax.block):
        part = logits[start : start + softmax.block]
        assert np.array_equal(softmax.weights(part, logits.max(), 0.7)[0], every[start : start + softmax.block])


def test_a_logit_of_minus_infinity_weighs_nothing() -> None:
    logits = np.full(300, -math.inf, np.float32)
    logits[[5, 290]] = 1.0, 2.0
    weights, _ = _softmax().weights(logits, 2.0, 1.0)
    assert weights.nonzero()[0].tolist() == [5, 290]


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 0.999])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_top_p_keeps_the_largest_that_reach_it(
    spread: float, top_p: float, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_compiled:
        monkeypatch.setattr(CompiledSoftmax, "find", lambda: None)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    kept_of = sampler._kept

    def kept(weights: np.ndarray, total: float, top_p: float, min_p: float) -> np.ndarray:
        seen.append((weights.copy(), kept_of(weights, total, top_p, min_p)))
        return seen[-1][1]

    monkeypatch.setattr(sampler, "_kept", kept)
    logits = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(3)) * spread
    sample(logits, [SampleRow(SamplingParams(temperature=1.0, top_p=top_p), (), 0)])
    ((every, found),) = seen
    order = np.argsort(-every, kind="stable")
    reached = every[order].cumsum(dtype=np.float64) >= every.sum(dtype=np.float64) * top_p
    nucleus = order[: int(reached.argmax()) + 1 if reached.any() else None]
    assert np.array_equal(found, np.sort(nucleus))


@pytest.mark.parametrize("filters", [{}, {"top_k": 30}, {"top_p": 0.8}, {"min_p": 0.02}], ids=str)
def test_draws_are_the_same_where_nothing_can_be_compiled(
    filters: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.from_numpy(_logits(5_000)).expand(40, -1)
    rows = [SampleRow(SamplingParams(temperature=0.9, seed=3, **filters), (), position) for position in range(40)]
    found = sample(logits, rows)
    monkeypatch.setattr(CompiledSoftmax, "find", lambda: None)
    assert sample(logits, rows) == found
