"""What a request changes in its logits before a token is chosen: biases, penalties, and tokens that cannot come yet.

The order is that of vLLM: biases, the repetition penalty, the penalties for presence and frequency; barred tokens last.
"""

from collections.abc import Collection, Sequence

import numpy as np

from mdiq.core.sequence import SamplingParams

MIN_PENALTY = 1e-30  # a smaller one would make infinities of f32 logits
_MAX_FLOAT = np.finfo(np.float32).max


def changed(
    logits: np.ndarray, params: SamplingParams, history: Sequence[int], answer: Sequence[int], barred: Collection[int]
) -> np.ndarray:
    """Return a row of logits as a request wants them: f32 [vocab_size]; the model's stay as they are.

    history: all tokens so far; answer: those of them that the model has generated. barred: see SampleRow; if nothing
    else were left, they are not.
    """
    logits = logits.copy()
    if params.logit_bias:
        biased, biases = zip(*params.logit_bias, strict=True)
        logits[list(biased)] += np.array(biases, np.float32)
    if params.repetition_penalty != 1.0 and history:
        _penalize_repetition(logits, history, params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and answer:
        # OpenAI: mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
        seen, counts = np.unique(np.array(answer), return_counts=True)
        counts = counts.astype(np.float32)
        logits[seen] -= counts * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
    tokens = [token for token in barred if 0 <= token < len(logits)]
    if tokens:
        before = logits[tokens]
        logits[tokens] = -np.inf
        if logits.max() == -np.inf:
            logits[tokens] = before
    return logits


def _penalize_repetition(logits: np.ndarray, history: Sequence[int], penalty: float) -> None:
    """Make seen tokens less likely (Keskar et al. 2019, CTRL, 4.1), as transformers does it."""
    seen = sorted(set(history))
    scores = logits[seen]
    penalty = min(max(penalty, MIN_PENALTY), 1 / MIN_PENALTY)
    with np.errstate(over="ignore"):
        scores = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    # A token that the answer's form does not allow stays impossible.
    logits[seen] = np.where(np.isneginf(logits[seen]), -np.inf, np.clip(scores, -_MAX_FLOAT, _MAX_FLOAT))
