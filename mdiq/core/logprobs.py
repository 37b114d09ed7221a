"""Log-probabilities of tokens: what a request wants of them, and the values that it gets. No tensors.

They are natural logarithms of the model's own probabilities: before temperature, penalties and filters.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_TOP = 20
"""Maximum number of alternatives to each token."""


@dataclass(frozen=True, slots=True)
class LogprobsWanted:
    """What a Sequence wants for each generated token: its log-probability.

    top: how many of the likeliest tokens are given beside it, at most MAX_TOP.
    of_prompt: the prompt's tokens get theirs as well, all but the first one, which nothing comes before.
    """

    top: int = 0
    of_prompt: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability. top: the likeliest tokens in its place with theirs, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that was drawn, with its log-probability if the Sequence wants that."""

    token: int
    logprob: TokenLogprob | None = None


class Logprobs:
    """TokenLogprobs in their order, each with as many alternatives; 8 bytes for each value, since prompts are long."""

    def __init__(self, values: Iterable[TokenLogprob] = ()) -> None:
        self._ids, self._values = array("I"), array("f")
        self._width = 0  # of one token: itself and its alternatives
        self.extend(values)

    def __len__(self) -> int:
        return len(self._ids) // self._width if self._width else 0

    def __iter__(self) -> Iterator[TokenLogprob]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, place: int) -> TokenLogprob:
        if not 0 <= place < len(self):
            raise IndexError(f"place {place} of {len(self)} log-probabilities")
        first = place * self._width
        ids, values = self._ids[first : first + self._width], self._values[first : first + self._width]
        return TokenLogprob(ids[0], values[0], tuple(zip(ids[1:], values[1:], strict=True)))

    def extend(self, values: Iterable[TokenLogprob]) -> None:
        """Add values at the end."""
        for value in values:
            self._width = self._width or 1 + len(value.top)
            assert self._width == 1 + len(value.top)  # one request, one number of alternatives
            self._ids.append(value.token)
            self._values.append(value.logprob)
            for token, logprob in value.top:
                self._ids.append(token)
                self._values.append(logprob)
