"""What packed weights cost in quality: perplexity on a text, beside f32, and what it may be."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mdiq.cache import cache_directory
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.quantize import best_format, chosen_format
from mdiq.engine.model.perplexity import losses
from mdiq.engine.model.stage_model import StageModel

_MAX = {"int8": 1.005, "int4": 1.04}
_MAX_OF_4_BITS = 1.01  # of a file of 4-bit types in 4 bits: its values are kept, and activations are rounded
_ERRORS = 2  # standard ones: by so many a ratio must be above what it may be, or it may be chance


def max_ratio(weights: str, best: str) -> float | None:
    """Return the maximum growth of perplexity that is allowed, as a factor, or None if there is no bound.

    best: the format that suits the file; see quantize.best_format.
    """
    return _MAX_OF_4_BITS if weights == best == "int4" else _MAX.get(weights)


@dataclass(frozen=True, slots=True)
class Row:
    """What one format gave.

    ratio: to f32. error: its standard error, over the tokens of the text. most: what it may be, where there is a bound.
    """

    weights: str
    mode: str
    perplexity: float
    ratio: float
    error: float
    most: float | None
    weight_bytes: int

    @property
    def is_within(self) -> bool:
        """Whether nothing says that the bound is missed: chance alone may explain the rest."""
        return self.most is None or self.ratio - _ERRORS * self.error <= self.most


class MeasuredWeights:
    """Measures formats of a model on one text; the first is to be "plain", beside which the others stand."""

    def __init__(self, model: Path, token_ids: Sequence[int], *, is_exact: bool) -> None:
        self._model = model
        self._token_ids = token_ids
        self._is_exact = is_exact
        self._plain: torch.Tensor | None = None

    def row(self, weights: str, progress: Callable[[str, int, int], object]) -> Row:
        """Return what a format gave. progress: called with what is done, and how much of how much."""
        with open_checkpoint(self._model) as checkpoint:
            best = best_format(checkpoint)
            weights = chosen_format(weights, checkpoint, torch.device("cpu"))
            model = StageModel(
                checkpoint,
                LayerRange(0, checkpoint.config.num_layers),
                owns_embedding_and_head=True,
                weights=WeightSettings(weights, exact=self._is_exact),
                folder=cache_directory(),
                progress=partial(progress, "loads"),
            )
        found = losses(model, self._token_ids, progress=partial(progress, "reads"))
        if self._plain is None:
            self._plain = found
        ratio, error = compared(found, self._plain)
        return Row(
            weights="f32" if weights == "plain" else weights,
            mode="exact" if self._is_exact else "fast",
            perplexity=math.exp(found.mean()),
            ratio=ratio,
            error=error,
            most=max_ratio(weights, best),
            weight_bytes=model.weight_bytes,
        )


def compared(found: torch.Tensor, plain: torch.Tensor) -> tuple[float, float]:
    """Return the ratio of perplexities of two rows of losses of the same tokens, and its standard error."""
    more = found - plain
    ratio = math.exp(more.mean())
    return ratio, ratio * float(more.std(correction=0)) / math.sqrt(len(more))
