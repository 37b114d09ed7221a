"""What the rows of a Hop tell of a prompt, and what noise on them costs the user, by cut and by noise.

The text is cut into prompts. On the way through the model each cut gives the rows that a Hop there carries. The noise
is the mechanism of the Ring itself (engine/noise.py), so figures differ a little from run to run.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp
from pathlib import Path

import torch

from mdiq.cache import cache_directory
from mdiq.core.noise import NoisePromise
from mdiq.core.types import LayerRange, SeqId, WeightSettings
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.quantize import chosen_format
from mdiq.engine.model.kv_cache import BLOCK_TOKENS, KvCache
from mdiq.engine.model.layers import PlacedSegment
from mdiq.engine.model.stage_model import StageModel
from mdiq.engine.noise import noisy
from mdiq.errors import ConfigError
from mdiq.plan.privacy import promised, total_epsilon
from mdiq.report.privacy_attacks import LinearInversion, NearestNeighbour, Pairs, recovered

PROMPT_TOKENS = 128
"""Tokens of a prompt: attention does not reach from one prompt to the next."""
CANDIDATES = 2_048
"""Tokens that the nearest neighbour tries: the most common ones of the attacker's text."""

MAX_LOSS = 100.0
"""Nats a token; e to the power of more is no perplexity that says anything."""

_PAIRS = 32  # texts of two tokens that run at once

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What to measure. cuts: after how many Layers. epsilons: of a row, each with ``delta``; besides: no noise at all.

    clip: None: the median norm of the rows of each cut.
    """

    cuts: tuple[int, ...]
    epsilons: tuple[float, ...]
    delta: float
    clip: float | None = None


@dataclass(frozen=True, slots=True)
class Texts:
    """Tokens of the attacker and of the user, which have no sentence in common.

    train: what the attacker runs itself. common: tokens that it tries alone, the most common first.
    """

    train: tuple[int, ...]
    test: tuple[int, ...]
    common: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrivacyRow:
    """What one cut and one noise give. epsilon: of a row; None: neither clip nor noise, and no promise.

    prompt_epsilon: of all rows of a prompt together. nearest, linear: shares of prompt tokens that these attacks
    recover. perplexity: of the user's text. changed: share of its most likely next tokens that become others.
    """

    cut: int
    epsilon: float | None
    prompt_epsilon: float | None
    clip: float | None
    sigma: float
    nearest: float
    linear: float
    perplexity: float
    changed: float


@dataclass(frozen=True, slots=True)
class PrivacyReport:
    """All rows, by cut, without noise first. median_norms: L2 norm of rows without noise, by cut."""

    model: str
    weights: str
    num_layers: int
    delta: float
    num_train: int
    num_test: int
    prompt_tokens: int
    median_norms: dict[int, float]
    rows: tuple[PrivacyRow, ...]


def texts_of(token_ids: Sequence[int], *, num_train: int, num_test: int) -> Texts:
    """Return a text's first tokens for the attacker and its last for the user.

    Raises:
        ConfigError: there are too few tokens.
    """
    num_train, num_test = (-(-number // PROMPT_TOKENS) * PROMPT_TOKENS for number in (num_train, num_test))
    if len(token_ids) < num_train + num_test:
        raise ConfigError(
            f"the text has {len(token_ids):,} tokens; {num_train:,} for the attacker and {num_test:,} for the user are "
            "needed: give a longer text, or take less with --train-tokens and --test-tokens"
        )
    counts = Counter(token_ids[:-num_test])
    common = sorted(counts, key=counts.__getitem__, reverse=True)[:CANDIDATES]
    return Texts(tuple(token_ids[:num_train]), tuple(token_ids[-num_test:]), tuple(common))


def measure(
    path: Path, weights: WeightSettings, texts: Texts, wishes: Wishes, progress: Progress = lambda *_: None
) -> PrivacyReport:
    """Return what each cut and noise give. progress: called with what is done, and how much of how much.

    Raises:
        ConfigError: a cut is not inside the model.
        MdiqError: the model cannot be loaded.
    """
    with torch.inference_mode():
        model = _CutModel(path, weights, wishes.cuts, progress)
        train = model.rows(texts.train, lambda *done: progress("the attacker's text", *done))
        single = model.single_tokens(texts.common, lambda *done: progress("single tokens", *done))
        test = model.rows(texts.test, lambda *done: progress("the user's text", *done))
        wanted = torch.tensor(texts.test)
        plain = model.answers(len(wishes.cuts) - 1, test[-1], wanted)
        norms = {cut: float(rows.norm(dim=1).median()) for cut, rows in zip(wishes.cuts, train, strict=True)}
        found: list[PrivacyRow] = []
        levels: list[float | None] = [None, *wishes.epsilons]
        for i, cut in enumerate(wishes.cuts):
            pairs = Pairs(train[i], torch.tensor(texts.train))
            nearest = NearestNeighbour(Pairs(single[i], torch.tensor(texts.common)))
            for epsilon in levels:
                progress(f"cut {cut}", len(found), len(levels) * len(wishes.cuts))
                promise = None
                seen, answers = test[i], plain
                if epsilon is not None:
                    promise = promised(epsilon, wishes.delta, wishes.clip or norms[cut])
                    seen = noisy(test[i], promise.row)
                    answers = model.answers(i, seen, wanted)
                linear = LinearInversion(pairs, promise.row if promise else None, model.embed, model.vocab_size)
                shares = (recovered(nearest.tokens(seen), wanted), recovered(linear.tokens(seen), wanted))
                found.append(_row(cut, promise, shares, answers, plain))
    return PrivacyReport(
        model=str(path),
        weights=model.weights,
        num_layers=model.num_layers,
        delta=wishes.delta,
        num_train=len(texts.train),
        num_test=len(texts.test),
        prompt_tokens=PROMPT_TOKENS,
        median_norms={cut: round(norm, 4) for cut, norm in norms.items()},
        rows=tuple(found),
    )


@dataclass(frozen=True, slots=True)
class _Answers:
    """best: the most likely next token after each one: i64 [n]. perplexity: of the text."""

    best: torch.Tensor
    perplexity: float


def _row(
    cut: int, promise: NoisePromise | None, shares: tuple[float, float], answers: _Answers, plain: _Answers
) -> PrivacyRow:
    row = PrivacyRow(
        cut=cut,
        epsilon=None,
        prompt_epsilon=None,
        clip=None,
        sigma=0.0,
        nearest=shares[0],
        linear=shares[1],
        perplexity=answers.perplexity,
        changed=float((answers.best != plain.best).double().mean()),
    )
    if promise is None:
        return row
    return replace(
        row,
        epsilon=promise.epsilon,
        prompt_epsilon=total_epsilon(promise, PROMPT_TOKENS),
        clip=promise.row.clip,
        sigma=promise.row.sigma,
    )


class _CutModel:
    """A model in pieces, cut after so many Layers; each with its own KV cache, as Stages have them."""

    def __init__(self, path: Path, weights: WeightSettings, cuts: Sequence[int], progress: Progress) -> None:
        with open_checkpoint(path) as checkpoint:
            self._config = config = checkpoint.config
            self.num_layers, self.vocab_size = config.num_layers, config.vocab_size
            if list(cuts) != sorted(set(cuts)) or not cuts or not 1 <= cuts[0] <= cuts[-1] < config.num_layers:
                raise ConfigError(
                    f"--cut {','.join(map(str, cuts))}: a cut comes after 1 to {config.num_layers - 1} of the model's "
                    f"{config.num_layers} layers; give growing numbers, for example 1,{config.num_layers // 2}"
                )
            self.weights = chosen_format(weights.format, checkpoint, torch.device("cpu"))
            pieces = [
                StageModel(
                    checkpoint,
                    LayerRange(start, stop),
                    owns_embedding_and_head=not start,
                    weights=replace(weights, format=self.weights),
                    folder=cache_directory(),
                    progress=lambda done, total: progress("loads", done, total),
                )
                for start, stop in pairwise([0, *cuts, config.num_layers])
            ]
        self._pieces = [
            (piece, self._cache(stop - start))
            for piece, (start, stop) in zip(pieces, pairwise([0, *cuts, config.num_layers]), strict=True)
        ]
        self._ends = pieces[0]

    def _cache(self, num_layers: int) -> KvCache:
        room = max(PROMPT_TOKENS, _PAIRS * BLOCK_TOKENS)  # each text begins a block of its own
        config = self._config
        return KvCache(num_layers, room, config.num_kv_heads, config.head_dim, torch.float32, torch.device("cpu"))

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings: f32 [n, width]."""
        return self._ends.embed(token_ids, torch.zeros_like(token_ids)).float()

    def rows(self, token_ids: Sequence[int], progress: Callable[[int, int], object]) -> list[torch.Tensor]:
        """Return the rows at each cut, f32 [n, width], of prompts of PROMPT_TOKENS."""
        found: list[list[torch.Tensor]] = [[] for _ in self._pieces[1:]]
        ids = torch.tensor(token_ids).view(-1, PROMPT_TOKENS)
        for done, prompt in enumerate(ids):
            progress(done, len(ids))
            for rows, hidden in zip(found, self._through(prompt), strict=True):
                rows.append(hidden)
        return [torch.cat(rows) for rows in found]

    def single_tokens(self, token_ids: Sequence[int], progress: Callable[[int, int], object]) -> list[torch.Tensor]:
        """Return the row of each token at each cut, after one other token: the first row of a text is like no other."""
        first = token_ids[0]
        found: list[list[torch.Tensor]] = [[] for _ in self._pieces[1:]]
        for start in range(0, len(token_ids), _PAIRS):
            progress(start, len(token_ids))
            tokens = token_ids[start : start + _PAIRS]
            ids = torch.tensor([each for token in tokens for each in (first, token)])
            for rows, hidden in zip(found, self._through(ids, length=2), strict=True):
                rows.append(hidden[1::2])
        return [torch.cat(rows) for rows in found]

    def answers(self, cut: int, rows: torch.Tensor, tokens: torch.Tensor) -> _Answers:
        """Return what the model makes of prompts whose rows at a cut, counted from 0, are these. tokens: i64 [n]."""
        best: list[torch.Tensor] = []
        losses: list[torch.Tensor] = []
        prompts = zip(torch.split(rows, PROMPT_TOKENS), torch.split(tokens, PROMPT_TOKENS), strict=True)
        for hidden, ids in prompts:
            for i in range(cut + 1, len(self._pieces)):
                hidden = self._run(i, hidden, PROMPT_TOKENS)
            logits = self._ends.logits(hidden)
            best.append(logits.argmax(1))
            # The last row of a prompt has no token after it.
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").double())
        return _Answers(torch.cat(best), exp(min(float(torch.cat(losses).mean()), MAX_LOSS)))

    def _through(self, ids: torch.Tensor, length: int = PROMPT_TOKENS) -> Iterator[torch.Tensor]:
        """Yield the rows at each cut of texts of ``length`` tokens."""
        hidden = self._ends.embed(ids, torch.arange(len(ids)) % length)
        for i in range(len(self._pieces) - 1):
            hidden = self._run(i, hidden, length)
            yield hidden

    def _run(self, i: int, hidden: torch.Tensor, length: int) -> torch.Tensor:
        piece, cache = self._pieces[i]
        cache.reset()
        placed = [
            PlacedSegment(start, length, 0, cache.extend(SeqId(start), 0, length))
            for start in range(0, len(hidden), length)
        ]
        return piece.run(hidden, torch.arange(len(hidden)) % length, cache, placed).float()
