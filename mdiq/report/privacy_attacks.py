"""What an attacker who reads the rows of a Hop makes of them. Two attacks, neither the strongest that there is.

Both know the model, the cut, and the clip and strength of the noise, as a Node does. Better ones are published: they
optimize a whole prompt through the layers (Qu et al. 2025, arXiv:2503.09022). So what these recover is a lower bound.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mdiq.core.noise import RowNoise
from mdiq.engine.noise import clipped

_RIDGES = (1e-6, 1e-4, 1e-2)  # of the mean square of an input: the attacker keeps what does best on rows set aside
_SET_ASIDE = 5  # every so many rows
_BLOCK = 8_192  # tokens of the vocabulary at once

Embed = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [n] -> their embeddings, f32 [n, width]."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows that an attacker has of its own text, with its tokens. rows: f32 [n, width]; tokens: i64 [n]."""

    rows: torch.Tensor
    tokens: torch.Tensor


class NearestNeighbour:
    """Compares a row with those of single tokens that went through the same layers.

    candidates: one row for each token that the attacker tries.
    """

    def __init__(self, candidates: Pairs) -> None:
        self._tokens = candidates.tokens
        self._centre = candidates.rows.mean(0)
        self._directions = _directions(candidates.rows - self._centre)

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the most likely token of each row: i64 [n]."""
        scores = _directions(rows - self._centre) @ self._directions.T
        return self._tokens[scores.argmax(1)]


class LinearInversion:
    """Maps rows back to embeddings by a matrix that is fitted to the attacker's own text, then takes the nearest token.

    The matrix is the best one for noisy rows: noise of variance v adds n v to each diagonal element of the normal
    equations, so it is exact without drawing any noise. train: rows without noise.
    """

    def __init__(self, train: Pairs, noise: RowNoise | None, embed: Embed, vocab_size: int) -> None:
        self._embed, self._vocab_size = embed, vocab_size
        rows = train.rows.double()
        if noise is not None:
            rows = clipped(rows, noise.clip)
        wanted = embed(train.tokens).double()
        self._from, self._to = rows.mean(0), wanted.mean(0)
        aside = torch.arange(len(rows)) % _SET_ASIDE == 0
        rows, wanted = rows - self._from, wanted - self._to
        variance = 0.0 if noise is None else noise.sigma**2
        errors: list[tuple[float, float]] = []
        for ridge in _RIDGES:
            matrix = _ridge(rows[~aside], wanted[~aside], variance, ridge)
            error = (rows[aside] @ matrix - wanted[aside]).square().mean() + variance * matrix.square().sum() / len(
                matrix
            )
            errors.append((float(error), ridge))
        self._matrix = _ridge(rows, wanted, variance, min(errors)[1])

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the most likely token of each row, of the whole vocabulary: i64 [n]."""
        # Directions are compared: noise makes the guesses short.
        guesses, centre = ((rows.double() - self._from) @ self._matrix).float(), self._to.float()
        best = torch.full((len(rows),), -torch.inf)
        found = torch.zeros(len(rows), dtype=torch.int64)
        for ids in _blocks(self._vocab_size):
            scores, places = (guesses @ _directions(self._embed(ids) - centre).T).max(1)
            better = scores > best
            best, found = torch.where(better, scores, best), torch.where(better, ids[places], found)
        return found


def recovered(guesses: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return the share of tokens that were guessed."""
    return float((guesses == tokens).double().mean())


def _ridge(rows: torch.Tensor, wanted: torch.Tensor, variance: float, ridge: float) -> torch.Tensor:
    squares = rows.T @ rows
    more = len(rows) * variance + ridge * float(squares.diagonal().mean())
    squares.diagonal().add_(more)
    matrix: torch.Tensor = torch.linalg.solve(squares, rows.T @ wanted)
    return matrix


def _directions(rows: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.div(norms.clamp_min(1e-12))


def _blocks(size: int) -> Iterator[torch.Tensor]:
    for start in range(0, size, _BLOCK):
        yield torch.arange(start, min(start + _BLOCK, size))
