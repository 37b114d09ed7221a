"""Logits to tokens. Draws are keyed by (seed, position) alone, so a Replay or another batch draws the same."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mdiq.core.sequence import SamplingParams
from mdiq.engine.kernels.llvm_softmax import CompiledSoftmax
from mdiq.engine.model.logit_changes import changed
from mdiq.errors import EngineError

# A smaller one would make infinities of f32 logits; greedy long before.
MIN_TEMPERATURE = 1e-30
_BLOCK = 128  # weights that are summed together before one of them is looked for


class Form(Protocol):
    """What may come next in an answer that has to have a form."""

    def takes(self, token: int) -> bool:
        """Return whether it is known that this token may come. Takes a hundredth of the time of ``allowed``."""
        ...

    def allowed(self) -> np.ndarray:
        """Return which tokens may come: [vocab_size], bool.

        Raises:
            EngineError: nothing may.
        """
        ...


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How one row of logits becomes a token.

    history: the Sequence's tokens so far; read by the repetition penalty only.
    position: the new token's position.
    answer: the tokens of the answer so far; read by the penalties for presence and frequency only.
    barred: tokens that cannot be chosen. form: of the answer; None: any token may come.
    """

    params: SamplingParams
    history: Sequence[int]
    position: int
    answer: Sequence[int] = ()
    barred: Collection[int] = ()
    form: Form | None = None


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Return one token id per row of logits: [n, vocab_size], f32, on the CPU.

    Raises:
        EngineError: a row holds NaN, or no finite number at all, or none of a token that is allowed.
    """
    values = logits.contiguous().numpy()
    # numpy finds the largest of 150,000 logits in a twentieth of the time that torch takes; a NaN counts as largest.
    tokens = [int(row.argmax()) for row in values]
    if not np.isfinite(values[range(len(rows)), tokens]).all():
        raise EngineError("the logits are not numbers; the weights are damaged, or bf16 overflowed: try --dtype f32")
    for i, row in enumerate(rows):
        logits_of_row = values[i]  # the model's stay as they are: log-probabilities are those of the model
        if row.form is not None:
            # Most of the time a model follows the form by itself: then the best token is the best of those allowed.
            if row.params.temperature == 0 and (best := _best(logits_of_row, tokens[i], row)) is not None:
                tokens[i] = best
                continue
            logits_of_row = np.where(row.form.allowed(), values[i], -np.inf)
            tokens[i] = int(logits_of_row.argmax())
            if not np.isfinite(logits_of_row[tokens[i]]):
                raise EngineError("no token that the answer's form allows is likely at all; ask for another form")
        if row.params.temperature > 0 or row.params.changes_logits or row.barred:
            tokens[i] = _sample_row(logits_of_row, tokens[i], row)
    return tokens


def uniform(seed: int, position: int) -> float:
    """Return the draw in [0, 1) that belongs to (seed, position): 53 bits of BLAKE2b."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53


def _best(logits: np.ndarray, best: int, row: SampleRow) -> int | None:
    """Return the greedy token of a row with a form if the form takes it. best: the id of its largest logit."""
    if row.params.changes_logits or row.barred:
        logits = changed(logits, row.params, row.history, row.answer, row.barred)
        best = int(logits.argmax())
    assert row.form is not None  # the caller has looked
    return best if np.isfinite(logits[best]) and row.form.takes(best) else None


def _sample_row(logits: np.ndarray, best: int, row: SampleRow) -> int:
    """Return the token of one row; best: the id of its largest logit."""
    params = row.params
    if params.changes_logits or row.barred:
        logits = changed(logits, params, row.history, row.answer, row.barred)
        best = int(logits.argmax())
    if params.temperature == 0:
        return best
    softmax = _Softmax(float(logits[best]), max(params.temperature, MIN_TEMPERATURE))
    share = uniform(params.seed, row.position)
    ids: np.ndarray | None = None  # those of the tokens that are left, where they are not all
    if 0 < params.top_k < logits.size:
        ids = largest(logits, params.top_k)
        logits = logits[ids]
    if params.top_p == 1 and params.min_p == 0:
        chosen = _draw(softmax, logits, share)
    else:
        weights, sums = softmax.weights(logits)
        left = _kept(weights, float(sums.sum(dtype=np.float64)), params.top_p, params.min_p)
        chosen = int(left[_first_over(weights[left].cumsum(dtype=np.float64), share)])
    return chosen if ids is None else int(ids[chosen])


def largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the ``count`` largest logits, the largest first; of equal ones the lower ids."""
    # Each of the count groups with the largest maxima holds one that is as large as the least of these maxima. Group i
    # has every num_groups-th logit from i: numpy compares neighbours' groups at once.
    num_groups = len(logits) // _BLOCK
    if count <= num_groups:
        maxima = logits[: num_groups * _BLOCK].reshape(_BLOCK, num_groups).max(0)
        candidates = np.flatnonzero(logits >= np.partition(maxima, -count)[-count])
    else:
        candidates = np.arange(len(logits))
    return candidates[np.argsort(-logits[candidates], kind="stable")[:count]]


class _Softmax:
    """e^((logit - largest) / temperature), f32, and sums of blocks of them."""

    def __init__(self, largest: float, temperature: float) -> None:
        self._largest, self._temperature = largest, temperature
        self._compiled = CompiledSoftmax.find()
        assert self._compiled is None or self._compiled.block == _BLOCK

    def sums(self, logits: np.ndarray) -> np.ndarray:
        """Return the sums of the weights of each _BLOCK, and of the rest if there is one."""
        if self._compiled is not None:
            return self._compiled.sums(logits, self._largest, self._temperature)
        return self.weights(logits)[1]

    def weights(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights, and what ``sums`` returns; read the weights before the next call."""
        if self._compiled is not None:
            return self._compiled.weights(logits, self._largest, self._temperature)
        # The largest is taken away first: it must stay finite.
        weights: np.ndarray = ((torch.from_numpy(logits) - self._largest) / self._temperature).exp_().numpy()
        whole = len(weights) // _BLOCK * _BLOCK
        blocks = weights[:whole].reshape(-1, _BLOCK).sum(1)
        return weights, np.append(blocks, weights[whole:].sum()) if whole < len(weights) else blocks


def _kept(weights: np.ndarray, total: float, top_p: float, min_p: float) -> np.ndarray:
    """Return the indices that top_p and min_p leave, in their order: [n], int64.

    top_p: the largest weights that are needed to reach this share of their total (Holtzman et al. 2020, 3.1), and the
    one that reaches it. min_p: weights of at least this; the largest is 1.
    """
    if top_p == 1:
        return np.flatnonzero(weights >= np.float32(min_p))
    # A weight of the nucleus and all smaller ones are over 1 - top_p of the total. It is the largest of these n or
    # fewer, so it is over (1 - top_p) / n of the total; half of that here, since the total is rounded.
    min_weight = np.float32(max(total * (1 - top_p) / len(weights) / 2, min_p))
    candidates = np.flatnonzero(weights >= min_weight)
    within = weights[candidates]
    # No order of all is needed: positive floats lie in the order of their bits, and one of the classes that the upper
    # bits make holds the weight that reaches top_p. In it alone order counts.
    classes = within.view(np.int32) >> 16
    lowest = int(classes.min())
    sums = np.bincount(classes - lowest, weights=within)
    reached = np.append(0.0, sums[::-1].cumsum())
    num_above = min(int(np.searchsorted(reached[1:], total * top_p)), len(sums) - 1)
    edge = lowest + len(sums) - 1 - num_above
    at_edge = np.flatnonzero(classes == edge)
    order = at_edge[np.argsort(-within[at_edge], kind="stable")]
    cumulative = reached[num_above] + within[order].cumsum(dtype=np.float64)
    is_kept = classes > edge
    is_kept[order[: int(np.searchsorted(cumulative, total * top_p)) + 1]] = True
    return candidates[is_kept]


def _draw(softmax: _Softmax, logits: np.ndarray, share: float) -> int:
    """Return the index at which the sum of the weights exceeds ``share``, in [0, 1), of the sum of all."""
    before = np.append(0.0, softmax.sums(logits).cumsum(dtype=np.float64))
    target = share * before[-1]
    block = _index_over(before[1:], target)
    inside = softmax.weights(logits[block * _BLOCK : (block + 1) * _BLOCK])[0].cumsum(dtype=np.float64)
    return block * _BLOCK + _index_over(inside, target - before[block])


def _first_over(cumulative: np.ndarray, share: float) -> int:
    """Return the first index whose sum is over this share of all."""
    return _index_over(cumulative, share * cumulative[-1])


def _index_over(cumulative: np.ndarray, target: float) -> int:
    """Return the first index whose sum is over ``target``, or where rounding left none, the last that adds to it."""
    return int(min(np.searchsorted(cumulative, target, side="right"), np.searchsorted(cumulative, cumulative[-1])))
