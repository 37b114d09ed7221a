"""Compiled weights of a vocabulary against f64's, and draws with and without them."""

import math

import pytest
import torch

from mdiq.core.sequence import SamplingParams
from mdiq.engine.llvm_softmax import CompiledSoftmax
from mdiq.engine.sampler import SampleRow, sample


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


@pytest.mark.parametrize("filters", [{}, {"top_k": 30}, {"top_p": 0.8}, {"min_p": 0.02}], ids=str)
def test_draws_are_the_same_where_nothing_can_be_compiled(
    filters: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = _logits(5_000).expand(40, -1)
    rows = [SampleRow(SamplingParams(temperature=0.9, seed=3, **filters), (), position) for position in range(40)]
    found = sample(logits, rows)
    monkeypatch.setattr(CompiledSoftmax, "find", lambda: None)
    assert sample(logits, rows) == found
