"""The sampler: greedy, filters, penalties, and draws that depend on (seed, position) alone."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from mdiq.core.sequence import SamplingParams
from mdiq.engine.model.sampler import SampleRow, sample, uniform
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


def _kept(probabilities: np.ndarray, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Return what the filters leave, by sorting all: top_k, then the nucleus of what is left, then min_p."""
    order = np.argsort(-probabilities, kind="stable")[: top_k or len(probabilities)]
    wide = probabilities[order].astype(np.float64) / probabilities[order].sum(dtype=np.float64)
    order = order[(wide.cumsum() - wide < top_p) & (wide >= min_p * wide[0])]
    kept = np.zeros(len(probabilities))
    kept[order] = probabilities[order]
    return kept / kept.sum()


@pytest.mark.parametrize("num_tokens", [1, 7, 128, 1_000, 151_936])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 40},
        {"top_p": 0.95},
        {"top_p": 0.999999},
        {"top_k": 500, "top_p": 0.3},
        {"min_p": 0.05},
        {"top_p": 0.9, "min_p": 0.01},
        {"top_k": 1},
    ],
    ids=str,
)
def test_draws_are_those_of_the_filtered_distribution(num_tokens: int, filters: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, generator=generator) * 2.5
    kept = _kept(torch.softmax(logits / 0.8, -1).numpy(), **filters)
    expected = kept.cumsum()
    rows = [SampleRow(SamplingParams(temperature=0.8, seed=5, **filters), (), position) for position in range(20)]
    for position, token in enumerate(sample(logits.expand(20, -1), rows)):
        # Ids are in the order of the vocabulary, but those of top_k: the largest first.
        assert kept[token] > 0
        if "top_k" not in filters:
            draw = uniform(5, position)
            assert expected[token] - kept[token] - 1e-5 <= draw <= expected[token] + 1e-5


def test_equal_logits_count_in_the_order_of_their_ids() -> None:
    rows = [
        SampleRow(SamplingParams(temperature=1.0, **{name: value}), (), p)
        for p in range(50)
        for name, value in (("top_k", 3), ("top_p", 3 / 1_024))
    ]
    assert set(sample(torch.zeros(1, 1_024).expand(100, -1), rows)) == {0, 1, 2}


def test_a_vocabulary_is_sorted_only_where_an_order_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def argsort(values: np.ndarray, **options: Any) -> np.ndarray:
        sizes.append(len(values))
        return ARGSORT(values, **options)

    ARGSORT = np.argsort
    monkeypatch.setattr(np, "argsort", argsort)
    for sort in ("sort", "argsort", "topk"):
        monkeypatch.setattr(torch.Tensor, sort, None)
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1)) * 3
    sample(logits, [SampleRow(SamplingParams(temperature=1.0), (), 0)])
    sample(logits, [SampleRow(SamplingParams(temperature=1.0, min_p=0.1), (), 0)])
    assert not sizes
    for filters in ({"top_p": 0.95}, {"top_k": 40}):
        sample(logits, [SampleRow(SamplingParams(temperature=1.0, **filters), (), 0)])
    assert len(sizes) == 2 and max(sizes) < 1_000


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


def _expected(logits: torch.Tensor, answer: tuple[int, ...], presence: float, frequency: float) -> torch.Tensor:
    """OpenAI's formula as it stands in its API's description."""
    counts = torch.tensor([float(answer.count(token)) for token in range(len(logits))])
    return logits - counts * frequency - (counts > 0).float() * presence


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.75), (-1.0, 0.5), (2.0, -2.0)])
def test_tokens_of_the_answer_are_penalized_by_openais_formula_and_those_of_the_prompt_are_not(
    presence: float, frequency: float
) -> None:
    prompt, answer = (1, 1, 2), (0, 4, 0, 0)
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    expected = _expected(LOGITS, answer, presence, frequency)
    assert sample(LOGITS[None], [SampleRow(params, (*prompt, *answer), 7, answer)]) == [int(expected.argmax())]
    drawing = replace(params, temperature=1.0)
    rows = [SampleRow(drawing, (*prompt, *answer), position, answer) for position in range(4_000)]
    counts = Counter(sample(LOGITS.expand(4_000, -1), rows))
    for token, share in enumerate(torch.softmax(expected, 0).tolist()):
        assert abs(counts[token] / 4_000 - share) < 0.03
    assert sample(LOGITS[None], [SampleRow(params, prompt, 3)]) == [0], "there is no answer yet"


def test_a_bias_is_added_as_in_transformers_and_100_decides() -> None:
    biases = {1: 1.25, 3: -2.0, 4: 2.5}
    expected = SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases.items()})(
        torch.tensor([[0]]), LOGITS[None].clone()
    )[0]
    bias = tuple(biases.items())
    assert sample(LOGITS[None], [SampleRow(SamplingParams(logit_bias=bias), (), 0)]) == [int(expected.argmax())]
    counts = _draws({"temperature": 1.0, "logit_bias": bias})
    for token, share in enumerate(torch.softmax(expected, 0).tolist()):
        assert abs(counts[token] / 4_000 - share) < 0.03
    assert set(_draws({"temperature": 1.0, "logit_bias": ((3, 100.0),)})) == {3}
    assert 0 not in _draws({"temperature": 1.0, "logit_bias": ((0, -100.0),)})


def test_biases_come_before_the_penalties_and_those_of_the_answer_last() -> None:
    params = SamplingParams(
        temperature=1.0, logit_bias=((0, -3.0), (2, 1.0)), repetition_penalty=2.0, presence_penalty=0.5
    )
    biased = LOGITS + torch.tensor([-3.0, 0.0, 1.0, 0.0, 0.0])
    penalized = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[0, 2]]), biased[None].clone())[0]
    expected = _expected(penalized, (2,), 0.5, 0.0)
    rows = [SampleRow(params, (0, 2), position, (2,)) for position in range(4_000)]
    counts = Counter(sample(LOGITS.expand(4_000, -1), rows))
    for token, share in enumerate(torch.softmax(expected, 0).tolist()):
        assert abs(counts[token] / 4_000 - share) < 0.03


def test_barred_tokens_cannot_come_as_in_transformers() -> None:
    expected = MinNewTokensLengthLogitsProcessor(0, 5, [0, 1])(torch.tensor([[0]]), LOGITS[None].clone())[0]
    barred = {0, 1, 7}  # the model has no 7
    assert sample(LOGITS[None], [SampleRow(SamplingParams(), (), 0, barred=barred)]) == [int(expected.argmax())]
    for params in ({"temperature": 1e38}, {"temperature": 1.0, "top_k": 4}, {"temperature": 1.0, "min_p": 0.01}):
        rows = [SampleRow(SamplingParams(**params), (), position, barred=barred) for position in range(200)]
        assert set(sample(LOGITS.expand(200, -1), rows)) <= {2, 3, 4}
    alone = LOGITS.masked_fill(torch.tensor([False, True, True, True, True]), -torch.inf)  # a grammar has ended
    assert sample(alone[None], [SampleRow(SamplingParams(temperature=1.0), (), 0, barred=barred)]) == [0]
    everything = SampleRow(SamplingParams(temperature=1.0), (), 0, barred=range(5))
    assert sample(LOGITS[None], [everything]) == sample(LOGITS[None], [replace(everything, barred=())])


def test_what_one_request_wants_of_its_logits_changes_no_other_row() -> None:
    logits = LOGITS.repeat(3, 1)
    wanted = SamplingParams(logit_bias=((4, 50.0),), frequency_penalty=2.0)
    plain = SampleRow(SamplingParams(), (), 0)
    assert sample(logits, [plain, SampleRow(wanted, (), 0, (4,), barred=(4,)), plain]) == [0, 0, 0]
    assert torch.equal(logits, LOGITS.repeat(3, 1))
    assert sample(logits, [plain, SampleRow(wanted, (), 0, (4,)), plain]) == [0, 4, 0]


class Mask:
    """A Form that knows its tokens; num_asked: how often it was asked for all of them."""

    def __init__(self, mask: np.ndarray) -> None:
        self._mask = mask
        self.num_asked = 0

    def takes(self, token: int) -> bool:
        return bool(self._mask[token])

    def allowed(self) -> np.ndarray:
        self.num_asked += 1
        return self._mask


class TestForms:
    ALLOWED = np.array([False, True, False, True, True])

    def test_the_best_that_is_allowed_is_taken(self) -> None:
        logits = torch.stack([LOGITS, LOGITS])
        rows = [SampleRow(SamplingParams(), (), 0, form=Mask(self.ALLOWED)), SampleRow(SamplingParams(), (), 0)]
        assert sample(logits, rows) == [1, 0]

    def test_all_tokens_are_asked_for_only_where_the_best_is_not_allowed_or_one_is_drawn(self) -> None:
        for best, params, num_asked in (
            (1, SamplingParams(), 0),
            (0, SamplingParams(), 1),
            (1, SamplingParams(temperature=1.0), 1),
            (0, SamplingParams(logit_bias=((3, 100.0),)), 0),
            (1, SamplingParams(logit_bias=((0, 100.0),)), 1),
        ):
            logits, form = LOGITS.clone(), Mask(self.ALLOWED)
            logits[best] = 20.0
            token = sample(logits[None], [SampleRow(params, (), 0, form=form)])[0]
            assert self.ALLOWED[token] and form.num_asked == num_asked

    @pytest.mark.parametrize("seed", range(40))
    def test_greedy_tokens_are_those_of_a_model_that_has_only_the_allowed_ones(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        logits = torch.from_numpy(rng.integers(-4, 5, 200).astype(np.float32))  # with many that are equal
        mask = rng.random(200) < rng.choice([0.02, 0.5, 0.98])
        mask[rng.integers(200)] = True
        history, answer = tuple(rng.integers(0, 200, 50).tolist()), tuple(rng.integers(0, 200, 20).tolist())
        wishes = [{}, {"repetition_penalty": 1.7}, {"presence_penalty": 1.5, "logit_bias": ((5, 2.0), (9, -3.0))}]
        for wish in wishes:
            params = SamplingParams(**wish)
            barred = [int(token) for token in rng.integers(0, 200, 3)]
            only = torch.where(torch.from_numpy(mask), logits, -torch.inf)
            expected = sample(only[None].clone(), [SampleRow(params, history, 0, answer, barred)])
            assert sample(logits[None].clone(), [SampleRow(params, history, 0, answer, barred, Mask(mask))]) == expected

    def test_draws_are_those_of_a_model_that_has_only_these_tokens(self) -> None:
        rows = [SampleRow(SamplingParams(temperature=1.0), (), i, form=Mask(self.ALLOWED)) for i in range(4_000)]
        counts = Counter(sample(LOGITS.repeat(4_000, 1), rows))
        shares = torch.softmax(LOGITS[torch.from_numpy(self.ALLOWED)], 0).tolist()
        assert counts.keys() == {1, 3, 4}
        for token, share in zip((1, 3, 4), shares, strict=True):
            assert abs(counts[token] / 4_000 - share) < 0.03

    @pytest.mark.parametrize(
        "params",
        [
            {"temperature": 1.0},
            {"temperature": 1.0, "top_k": 3},
            {"temperature": 1.0, "top_k": 300},
            {"temperature": 1.3, "top_p": 0.9},
            {"temperature": 1.0, "min_p": 0.001},
            {"temperature": 5e-324},
            {"temperature": 1.0, "repetition_penalty": 1.3},
            {"temperature": 0.0, "repetition_penalty": 1e30},
            {"temperature": 1.0, "top_k": 5, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 0.5},
        ],
    )
    @pytest.mark.parametrize("allowed", [[7], [999], [3, 500, 501], [*range(600, 700)]])
    def test_only_allowed_tokens_are_drawn_however_unlikely(self, params: dict[str, float], allowed: list[int]) -> None:
        logits = torch.randn(1_000, generator=torch.Generator().manual_seed(1)) * 5
        logits[allowed] -= 60
        mask = np.zeros(1_000, bool)
        mask[allowed] = True
        history = tuple(range(0, 1_000, 3))
        rows = [SampleRow(SamplingParams(**params), history, i, form=Mask(mask)) for i in range(50)]
        assert {*sample(logits.repeat(50, 1), rows)} <= {*allowed}

    def test_weights_that_are_no_numbers_are_seen_where_they_are_not_allowed_too(self) -> None:
        logits = LOGITS.clone()
        logits[0] = float("nan")
        with pytest.raises(EngineError, match="not numbers"):
            sample(logits[None], [SampleRow(SamplingParams(), (), 0, form=Mask(self.ALLOWED))])

    def test_a_form_without_a_likely_token_is_an_error(self) -> None:
        logits = LOGITS.clone()
        logits[[1, 3, 4]] = -torch.inf
        for mask in (self.ALLOWED, np.zeros(5, bool)):
            with pytest.raises(EngineError, match="no token that the answer's form allows"):
                sample(logits[None].clone(), [SampleRow(SamplingParams(), (), 0, form=Mask(mask))])

    def test_what_is_not_allowed_stays_so_whatever_else_a_request_wants(self) -> None:
        """Where only tokens that cannot come yet are allowed, the form decides. The model's logits stay as they are."""
        logits = LOGITS[None].clone()
        params = SamplingParams(repetition_penalty=1e30, logit_bias=((0, 100.0),), presence_penalty=2.0)
        row = SampleRow(params, (0, 1, 2, 3, 4), 0, (0, 1), barred=(1, 3, 4), form=Mask(self.ALLOWED))
        for each in (row, replace(row, params=replace(params, temperature=2.0))):
            assert sample(logits, [each])[0] in (1, 3, 4)
        assert torch.equal(logits[0], LOGITS)
