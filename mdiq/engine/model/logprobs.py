"""Logits to log-probabilities: the model's own, before temperature, penalties and filters."""

from collections.abc import Sequence

import numpy as np
import torch

from mdiq.core.logprobs import TokenLogprob
from mdiq.engine.model.sampler import largest
from mdiq.errors import EngineError

MIN_LOGPROB = -9999.0
"""What OpenAI's API gives for a token that cannot come; JSON has no infinity."""


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """Return the log-probability of tokens[i] in row i of logits: [n, vocab_size], f32, on the CPU.

    top: how many alternatives each gets; of equal ones the lower ids.

    Raises:
        EngineError: a row holds NaN, or no finite number at all.
    """
    rows = torch.log_softmax(logits, dim=-1).numpy()
    if not np.isfinite(rows.max(axis=-1)).all():  # the maximum of a row with a NaN is NaN
        raise EngineError("the logits are not numbers; the weights are damaged, or bf16 overflowed: try --dtype f32")
    return [_scored(row, token, count) for row, token, count in zip(rows, tokens, top, strict=True)]


def _scored(row: np.ndarray, token: int, count: int) -> TokenLogprob:
    likeliest = largest(row, min(count, len(row))) if count else np.empty(0, dtype=np.int64)
    top = tuple((int(each), max(float(row[each]), MIN_LOGPROB)) for each in likeliest)
    return TokenLogprob(token, max(float(row[token]), MIN_LOGPROB), top)
