"""The sampler: greedy, filters, penalties, and draws that depend on (seed, position) alone."""

from collections import Counter

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from mdiq.core.sequence import SamplingParams
from mdiq.engine.sampler import SampleRow, sample, uniform
from mdiq.errors import EngineError

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


def _draws(params: dict[str, float], count: int = 4_000, history: tuple[int, ...] = ()) -> Counter[int]:
    rows = [SampleRow(SamplingParams(**params), history, position) for position in range(count)]
    return Counter(sample(LOGITS.expand(count, -1), rows))


def test_temperature_zero_takes_the_best_of_every_row() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    assert sample(logits, [SampleRow(SamplingParams(), (), 0)] * 2) == [0, 4]


@pytest.mark.parametrize(
    ("params", "history", "token"),
    [
        ({"temperature": 1e-320, "top_p": 0.5}, (), 0),
        ({"temperature": 5e-324, "min_p": 0.1}, (), 0),
        ({"temperature": 5e-324, "top_k": 2, "top_p": 0.9}, (), 0),
        ({"temperature": 1.0, "repetition_penalty": 5e-324, "top_p": 0.5}, (1,), 1),
        ({"temperature": 1.0, "repetition_penalty": 1e-39, "min_p": 0.5}, (1, 3), 1),
        ({"temperature": 5e-324, "repetition_penalty": 5e-324, "top_p": 0.5}, (1,), 1),
    ],
)
def test_extreme_wishes_still_draw_a_token(params: dict[str, float], history: tuple[int, ...], token: int) -> None:
    logits = torch.tensor([[300.0, 250.0, 0.5, 0.0, -1.0]])
    assert sample(logits, [SampleRow(SamplingParams(**params), history, 7)]) == [token]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    counts = _draws({"temperature": temperature})
    for token, share in enumerate(torch.softmax(LOGITS / temperature, 0).tolist()):
        assert abs(counts[token] / 4_000 - share) < 0.03


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_k": 50}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {0}),  # the best has 0.55
        ({"top_p": 0.6}, {0, 1}),
        ({"min_p": 0.3}, {0, 1}),  # 1.0 below the best: e^-1 = 0.37 of it
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.2}, {0, 1, 2}),
    ],
)
def test_filters_keep_what_they_say(params: dict[str, float], allowed: set[int]) -> None:
    assert set(_draws({"temperature": 1.0, **params})) == allowed


def test_a_draw_depends_on_seed_and_position_and_on_nothing_else() -> None:
    params = SamplingParams(temperature=1.0, seed=11)
    alone = [sample(LOGITS[None], [SampleRow(params, (), position)])[0] for position in range(50)]
    together = sample(LOGITS.expand(50, -1), [SampleRow(params, (), position) for position in range(50)])
    assert alone == together
    assert alone != [sample(LOGITS[None], [SampleRow(SamplingParams(temperature=1.0), (), p)])[0] for p in range(50)]
    values = [uniform(1, position) for position in range(2_000)]
    assert all(0 <= value < 1 for value in values) and abs(sum(values) / 2_000 - 0.5) < 0.03
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    history = (0, 4, 4)
    expected = RepetitionPenaltyLogitsProcessor(3.0)(torch.tensor([history]), LOGITS[None].clone())[0]
    assert sample(LOGITS[None], [SampleRow(SamplingParams(repetition_penalty=3.0), history, 3)]) == [
        int(expected.argmax())
    ]
    counts = _draws({"temperature": 1.0, "repetition_penalty": 3.0}, history=history)
    for token, share in enumerate(torch.softmax(expected, 0).tolist()):
        assert abs(counts[token] / 4_000 - share) < 0.03


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert set(_draws({"temperature": 1e-300}, 10)) == {0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    logits = LOGITS.clone()
    logits[3] = value
    with pytest.raises(EngineError, match="not numbers"):
        sample(logits[None], [SampleRow(SamplingParams(), (), 0)])
