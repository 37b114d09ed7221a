"""The interface between the Starter and its compute."""

from collections.abc import Sequence as AbstractSequence
from typing import Protocol

from mdiq.core.frame import Engine, Payload
from mdiq.core.logprobs import Drawn, TokenLogprob
from mdiq.core.sequence import Sequence


class StarterEngine(Engine, Protocol):
    """What the Starter needs beyond a Stage's engine: rows of the last Stage become tokens and log-probabilities."""

    def sample(self, rows: AbstractSequence[Payload], sequences: AbstractSequence[Sequence]) -> list[Drawn]:
        """Return what each row gives, with its log-probability where the Sequence wants that.

        rows: of one row each; row i continues sequences[i].

        Raises:
            EngineError: a row is not a number.
        """
        ...

    def score(self, rows: Payload, sequence: Sequence, start: int) -> list[TokenLogprob]:
        """Return the log-probabilities of the prompt's tokens from ``start + 1`` on, one for each row.

        Raises:
            EngineError: a row is not a number.
        """
        ...
