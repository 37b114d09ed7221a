"""Logits to tokens. Draws are keyed by (seed, position) alone, so a Replay or another batch draws the same."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mdiq.core.sequence import SamplingParams
from mdiq.engine.kernels.llvm_softmax import CompiledSoftmax
from mdiq.errors import EngineError

# A smaller one would make infinities of f32 logits; greedy long before.
MIN_TEMPERATURE = 1e-30
MIN_PENALTY = 1e-30
_BLOCK = 128  # weights that are summed together before one of them is looked for


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
    # numpy finds the largest of 150,000 logits in a twentieth of the time that torch takes; a NaN counts as largest.
    tokens = [int(values.argmax()) for values in logits.numpy()]
    if not bool(torch.isfinite(logits[range(len(rows)), tokens]).all()):
        raise EngineError("the logits are not numbers; the weights are damaged, or bf16 overflowed: try --dtype f32")
    for i, row in enumerate(rows):
        if row.params.temperature > 0 or row.params.repetition_penalty != 1.0:
            tokens[i] = _sample_row(logits[i], row)
    return tokens


def uniform(seed: int, position: int) -> float:
    """Return the draw in [0, 1) that belongs to (seed, position): 53 bits of BLAKE2b."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53


def _sample_row(logits: torch.Tensor, row: SampleRow) -> int:
    params = row.params
    if params.repetition_penalty != 1.0 and row.history:
        logits = _penalized(logits, row.history, params.repetition_penalty)
    if params.temperature == 0:
        return int(logits.numpy().argmax())
    ids: np.ndarray | None = None  # those of the tokens that are left, where they are not all
    if 0 < params.top_k < logits.numel():
        ids = _largest(logits, params.top_k)
        logits = logits[ids]
    weights, sums = _softened(logits, max(params.temperature, MIN_TEMPERATURE))
    if params.top_p < 1:
        _keep_nucleus(weights, float(sums.sum(dtype=np.float64)), params.top_p)
    if params.min_p > 0:  # of the largest, which is 1
        weights = np.where(weights < np.float32(params.min_p), np.float32(0), weights)
    if params.top_p < 1 or params.min_p > 0:
        sums = _sums(weights)
    chosen = _draw(weights, sums, uniform(params.seed, row.position))
    return chosen if ids is None else int(ids[chosen])


def _largest(logits: torch.Tensor, count: int) -> np.ndarray:
    """Return the ids of the ``count`` largest logits, the largest first; of equal ones the lower ids."""
    # Each of the count blocks with the largest maxima holds one that is as large as the least of these maxima.
    num_blocks = len(logits) // _BLOCK
    candidates = np.arange(len(logits))
    if count <= num_blocks:
        maxima = logits[: num_blocks * _BLOCK].view(num_blocks, _BLOCK).amax(1).numpy()
        candidates = np.flatnonzero(logits.numpy() >= np.partition(maxima, -count)[-count])
    return candidates[np.argsort(-logits.numpy()[candidates], kind="stable")[:count]]


def _softened(logits: torch.Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Return e^((logit - largest) / temperature), f32 [n], and the sums of their blocks; read them before the next."""
    if (compiled := CompiledSoftmax.find()) is not None:
        weights, sums = compiled(logits, temperature)
        return weights.numpy(), sums.numpy()
    # The largest is taken away first: it must stay finite.
    found: np.ndarray = ((logits - logits.amax()) / temperature).exp_().numpy()
    return found, _sums(found)


def _sums(weights: np.ndarray) -> np.ndarray:
    """Return the sums of each _BLOCK of weights, and of the rest if there is one."""
    whole = len(weights) // _BLOCK * _BLOCK
    blocks = torch.from_numpy(weights[:whole]).view(-1, _BLOCK).sum(1).numpy()  # numpy takes three times as long
    return np.append(blocks, weights[whole:].sum()) if whole < len(weights) else blocks


def _keep_nucleus(weights: np.ndarray, total: float, top_p: float) -> None:
    """Set weights to 0 that are not needed to reach ``top_p`` of their total, largest first.

    See Holtzman et al. 2020, 3.1. The token that reaches it stays.
    """
    # All below any token of the nucleus, with it, weigh over 1 - top_p: so it has more than its share of that. Half of
    # it, since the total is rounded.
    least = np.float32(total * (1 - top_p) / len(weights) / 2)
    # No order of all is needed: positive floats lie in the order of their bits, and one of the classes that the upper
    # bits make holds the token that reaches top_p. In it alone order counts.
    lowest, num_classes = (int(number.view(np.int32)) >> 16 for number in (least, weights.max()))
    sums = _class_sums(weights, least)[lowest : num_classes + 1]
    reached = np.append(0.0, sums[::-1].cumsum())
    num_above = min(int(np.searchsorted(reached[1:], total * top_p)), len(sums) - 1)
    edges = (np.array([0, 1], np.int32) + (lowest + len(sums) - 1 - num_above) << 16).view(np.float32)
    ids = np.flatnonzero((weights >= max(edges[0], least)) & (weights < edges[1]))
    within = weights[ids]
    order = np.argsort(-within, kind="stable")
    cumulative = reached[num_above] + within[order].cumsum(dtype=np.float64)
    needed = order[: int(np.searchsorted(cumulative, total * top_p)) + 1]
    np.multiply(weights, weights >= edges[1], out=weights)
    weights[ids[needed]] = within[needed]


def _class_sums(weights: np.ndarray, least: np.float32) -> np.ndarray:
    """Return the sums of weights that have the same upper 16 bits, f64; those under ``least`` do not count."""
    if (compiled := CompiledSoftmax.find()) is not None:
        return compiled.class_sums(torch.from_numpy(weights), float(least)).numpy()
    return np.bincount(weights.view(np.int32) >> 16, weights=np.where(weights < least, np.float32(0), weights))


def _draw(weights: np.ndarray, sums: np.ndarray, share: float) -> int:
    """Return the index at which the sum of ``weights`` exceeds ``share``, in [0, 1), of the sum of all.

    sums: of their blocks.
    """
    before = np.append(0.0, sums.cumsum(dtype=np.float64))
    target = share * before[-1]
    block = _first_over(before[1:], target)
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    return block * _BLOCK + _first_over(inside, target - before[block])


def _first_over(cumulative: np.ndarray, target: float) -> int:
    """Return the first index whose sum is over ``target``, or where rounding left none, the last that adds to it."""
    return int(min(np.searchsorted(cumulative, target, side="right"), np.searchsorted(cumulative, cumulative[-1])))


def _penalized(logits: torch.Tensor, history: Sequence[int], penalty: float) -> torch.Tensor:
    """Return logits with seen tokens made less likely (Keskar et al. 2019, CTRL, 4.1), as transformers does it."""
    seen = torch.tensor(sorted(set(history)))
    scores = logits[seen]
    logits = logits.clone()
    penalty = min(max(penalty, MIN_PENALTY), 1 / MIN_PENALTY)
    most = torch.finfo(scores.dtype).max
    logits[seen] = torch.where(scores < 0, scores * penalty, scores / penalty).clamp(-most, most)
    return logits
