"""What attackers recover, on data whose answers are known and on a tiny model; and what noise costs there."""

import random
from itertools import pairwise
from math import exp
from pathlib import Path

import pytest
import torch

from mdiq.core.noise import RowNoise
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.model.perplexity import losses
from mdiq.engine.model.stage_model import StageModel
from mdiq.engine.noise import noisy
from mdiq.errors import ConfigError
from mdiq.plan.privacy import promised, total_epsilon
from mdiq.report.privacy import PROMPT_TOKENS, PrivacyReport, Texts, Wishes, measure, texts_of
from mdiq.report.privacy_attacks import LinearInversion, NearestNeighbour, Pairs, recovered
from tests.engine.tiny_models import make_model

VOCABULARY, WIDTH = 200, 24
PLAIN = WeightSettings("plain")
MODEL = "llama-gqa-tied"
CLIP = 4.0  # about the largest norm of the tiny model's rows


def _embeddings() -> torch.Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(3))


def _turned(rows: torch.Tensor) -> torch.Tensor:
    """A layer that only turns and moves rows, so that it can be undone exactly."""
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4)))[0]
    return rows @ turn + 5.0


def _pairs(count: int, seed: int) -> Pairs:
    tokens = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    return Pairs(_turned(_embeddings()[tokens]), tokens)


def _linear(noise: RowNoise | None) -> LinearInversion:
    return LinearInversion(_pairs(2_000, 5), noise, lambda ids: _embeddings()[ids], VOCABULARY)


def test_what_only_turns_rows_hides_nothing() -> None:
    user, everything = _pairs(300, 6), torch.arange(VOCABULARY)
    nearest = NearestNeighbour(Pairs(_turned(_embeddings()), everything))
    assert recovered(nearest.tokens(user.rows), user.tokens) == 1.0
    assert recovered(_linear(None).tokens(user.rows), user.tokens) == 1.0


def test_a_token_that_the_attacker_does_not_try_is_not_recovered() -> None:
    user, half = _pairs(300, 6), torch.arange(VOCABULARY // 2)
    found = NearestNeighbour(Pairs(_turned(_embeddings()[half]), half)).tokens(user.rows)
    assert torch.equal(found == user.tokens, user.tokens < VOCABULARY // 2)


def test_noise_hides_tokens_and_the_more_the_better() -> None:
    user, everything = _pairs(500, 6), torch.arange(VOCABULARY)
    nearest = NearestNeighbour(Pairs(_turned(_embeddings()), everything))
    clip = float(user.rows.norm(dim=1).max())
    shares = []
    for sigma in (0.1, 1.0, 3.0, 300.0):
        noise = RowNoise(clip, sigma)
        seen = noisy(user.rows, noise)
        shares.append(
            (recovered(nearest.tokens(seen), user.tokens), recovered(_linear(noise).tokens(seen), user.tokens))
        )
    for attack in zip(*shares, strict=True):
        assert attack[0] == 1.0 and attack[-1] < 0.05
        assert all(more >= less for more, less in pairwise(attack))


def test_the_inversion_is_the_one_that_much_noisy_text_would_teach() -> None:
    """Its training rows have no noise; what noise adds to the normal equations is known."""
    noise, train = RowNoise(1_000.0, 2.0), _pairs(2_000, 5)
    many = Pairs(
        torch.cat([noisy(train.rows, noise) for _ in range(200)]),
        train.tokens.repeat(200),
    )
    learnt = LinearInversion(many, None, lambda ids: _embeddings()[ids], VOCABULARY)._matrix
    known = _linear(noise)._matrix
    assert float((learnt - known).norm() / known.norm()) < 0.02


def test_the_attackers_text_and_the_users_have_nothing_in_common() -> None:
    text = [*range(1_000)]
    texts = texts_of(text, num_train=200, num_test=100)
    assert (texts.train, texts.test) == (tuple(range(256)), tuple(range(1_000 - PROMPT_TOKENS, 1_000)))
    assert not {*texts.common} & {*texts.test} and {*texts.common} == {*range(1_000 - PROMPT_TOKENS)}
    assert texts_of([5, 5, 6] * 200, num_train=1, num_test=1).common == (5, 6), "the most common first"
    with pytest.raises(ConfigError, match=r"has 300 tokens; 256 for the attacker and 128 for the user are needed"):
        texts_of([*range(300)], num_train=256, num_test=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers add little to what they are given, as trained ones do."""
    model = make_model(MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj.weight" in name or "down_proj.weight" in name:
                parameter.mul_(0.1)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def _texts(vocab_size: int = 97) -> Texts:
    rng = random.Random(8)
    text = [rng.randrange(3, vocab_size) for _ in range(12 * PROMPT_TOKENS)]
    return texts_of(text, num_train=8 * PROMPT_TOKENS, num_test=2 * PROMPT_TOKENS)


@pytest.fixture(scope="module")
def report(folder: Path) -> PrivacyReport:
    wishes = Wishes(cuts=(1, 3), epsilons=(1e6, 1_000.0, 1.0), delta=1e-6, clip=CLIP)
    return measure(folder, PLAIN, _texts(), wishes)


def test_without_noise_most_tokens_are_recovered_and_the_curve_falls_with_noise(report: PrivacyReport) -> None:
    assert [(row.cut, row.epsilon) for row in report.rows] == [
        (cut, epsilon) for cut in (1, 3) for epsilon in (None, 1e6, 1_000.0, 1.0)
    ]
    for cut in (1, 3):
        rows = [row for row in report.rows if row.cut == cut]
        assert rows[0].linear > 0.9 and rows[0].nearest > 0.4
        assert rows[-1].linear < 0.1 and rows[-1].nearest < 0.1
        # What is left at much noise is chance: a few tokens of 256, more or fewer.
        assert all(more.linear >= less.linear - 0.03 for more, less in pairwise(rows))


def test_noise_costs_the_user_answers(report: PrivacyReport, folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        whole = StageModel(
            checkpoint,
            LayerRange(0, 4),
            owns_embedding_and_head=True,
            weights=PLAIN,
            folder=folder,
            progress=lambda *_: None,
        )
    perplexity = exp(float(losses(whole, _texts().test, window=PROMPT_TOKENS).mean()))
    for cut in (1, 3):
        plain, *noised = (row for row in report.rows if row.cut == cut)
        assert plain.perplexity == pytest.approx(perplexity, rel=1e-4), "cuts change nothing"
        assert plain.changed == 0.0 and (plain.sigma, plain.clip, plain.prompt_epsilon) == (0.0, None, None)
        assert noised[0].changed < 0.3 < noised[-1].changed


def test_the_promise_of_a_row_and_of_a_prompt_stand_beside_each_other(report: PrivacyReport) -> None:
    row = report.rows[-1]
    promise = promised(1.0, 1e-6, CLIP)
    assert (row.clip, row.sigma) == (CLIP, promise.row.sigma)
    assert row.prompt_epsilon == total_epsilon(promise, PROMPT_TOKENS)
    assert (report.num_test, report.num_train, report.num_layers) == (2 * PROMPT_TOKENS, 8 * PROMPT_TOKENS, 4)


def test_rows_are_clipped_to_their_median_norm_by_itself(folder: Path) -> None:
    report = measure(folder, PLAIN, _texts(), Wishes(cuts=(2,), epsilons=(10.0,), delta=1e-6))
    assert report.rows[1].clip == pytest.approx(report.median_norms[2], abs=1e-3) and report.rows[0].clip is None


@pytest.mark.parametrize("cuts", [(), (0, 1), (2, 1), (1, 1), (4,)])
def test_a_cut_that_is_not_inside_the_model_is_refused(folder: Path, cuts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="a cut comes after 1 to 3 of the model's 4 layers"):
        measure(folder, PLAIN, _texts(), Wishes(cuts=cuts, epsilons=(), delta=1e-6))
