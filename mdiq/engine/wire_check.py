"""Measure the loss of quality from a Hop's format: tokens to try it with, and the divergence of two sets of logits."""

from pathlib import Path

import torch

from mdiq.engine.text.sample_text import sample_text
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import ModelError

_TEXT = slice(1_000, 3_000)  # characters of the sample text, after its first headings
_STRIDE = 7_919  # a prime: neighbours are far apart in any vocabulary


def check_tokens(model: Path, count: int, vocab_size: int) -> list[int]:
    """Return ``count`` tokens of real English, or of the whole vocabulary where the model has no tokenizer."""
    try:
        tokens = Tokenizer.load(model).encode(sample_text()[_TEXT])
    except ModelError:
        tokens = []
    return tokens[:count] if len(tokens) >= count else [i * _STRIDE % vocab_size for i in range(count)]


def divergence_nats(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of ``other`` from ``reference``, both logits [n, vocab_size].

    It is the increase of the log loss per token on text that the model itself would write. NaN gives infinity.
    """
    expected, found = (logits.double().log_softmax(-1) for logits in (reference, other))
    nats = float((expected.exp() * (expected - found)).sum(-1).mean())
    return nats if nats == nats else float("inf")
