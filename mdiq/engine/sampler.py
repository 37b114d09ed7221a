"""Logits to tokens. Draws are keyed by (seed, position) alone, so a Replay or another batch draws the same."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mdiq.core.sequence import SamplingParams
from mdiq.errors import EngineError

# Below these f32 logits overflow, and a row of infinities draws nothing: all users' tokens are drawn in one call.
LEAST_TEMPERATURE = 1e-200  # greedy long before
LEAST_PENALTY = 1e-30


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How one row of logits becomes a token.

    history: the Sequence's tokens so far; read by the repetition penalty only.
    position: the new token's position.
    """

    params: SamplingParams
    history: Sequence[int]
    position: int


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Return one token id per row of logits: [n, vocab_size], f32.

    Raises:
        EngineError: a row holds NaN, or no finite number at all.
    """
    # One pass finds NaN and infinity: the largest logit of a sound row is finite.
    best, tokens = logits.max(dim=-1)
    if not bool(torch.isfinite(best).all()):
        raise EngineError("the logits are not numbers; the weights are damaged, or bf16 overflowed: try --dtype f32")
    picked = tokens.tolist()
    for i, row in enumerate(rows):
        if row.params.temperature > 0 or row.params.repetition_penalty != 1.0:
            picked[i] = _sample_row(logits[i], row)
    return picked


def uniform(seed: int, position: int) -> float:
    """Return the draw in [0, 1) that belongs to (seed, position): 53 bits of BLAKE2b."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53


def _sample_row(logits: torch.Tensor, row: SampleRow) -> int:
    params = row.params
    if params.repetition_penalty != 1.0 and row.history:
        logits = _penalized(logits, row.history, params.repetition_penalty)
    if params.temperature == 0:
        return int(logits.argmax())
    # f64: a small temperature must not overflow, and sums of many small probabilities must not drift.
    logits = logits.double() / max(params.temperature, LEAST_TEMPERATURE)
    if 0 < params.top_k < logits.numel():
        ordered, ids = logits.topk(params.top_k)
    else:
        ordered, ids = logits.sort(descending=True, stable=True)
    probabilities = torch.softmax(ordered, dim=-1)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if params.top_p < 1:
        # A token stays while those before it fall short of top_p: the one that reaches it included.
        keep &= probabilities.cumsum(0) - probabilities < params.top_p
    if params.min_p > 0:
        keep &= probabilities >= params.min_p * probabilities[0]
    cumulative = torch.where(keep, probabilities, 0.0).cumsum(0)
    draw = uniform(params.seed, row.position) * float(cumulative[-1])
    chosen = int(torch.searchsorted(cumulative, draw, right=True))
    return int(ids[min(chosen, int(keep.nonzero()[-1]))])


def _penalized(logits: torch.Tensor, history: Sequence[int], penalty: float) -> torch.Tensor:
    """Return logits with seen tokens made less likely (Keskar et al. 2019, CTRL, 4.1), as transformers does it."""
    seen = torch.tensor(sorted(set(history)))
    scores = logits[seen]
    logits = logits.clone()
    penalty = min(max(penalty, LEAST_PENALTY), 1 / LEAST_PENALTY)
    most = torch.finfo(scores.dtype).max
    logits[seen] = torch.where(scores < 0, scores * penalty, scores / penalty).clamp(-most, most)
    return logits
