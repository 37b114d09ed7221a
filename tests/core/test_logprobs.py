"""The values of a prompt are kept compactly, and come back as they were."""

import pytest

from mdiq.core.logprobs import Logprobs, TokenLogprob

VALUES = [TokenLogprob(7, -0.5, ((1, -0.25), (7, -0.5))), TokenLogprob(2**31, -9999.0, ((3, 0.0), (4, -1.5)))]


def test_values_come_back_in_their_order() -> None:
    kept = Logprobs(VALUES[:1])
    kept.extend(VALUES[1:])
    assert len(kept) == 2 and list(kept) == VALUES and kept[1] == VALUES[1]
    assert len(Logprobs()) == 0 and list(Logprobs()) == []


@pytest.mark.parametrize("place", [-1, 2])
def test_there_is_none_past_the_end(place: int) -> None:
    with pytest.raises(IndexError, match="of 2 log-probabilities"):
        Logprobs(VALUES)[place]


def test_values_without_alternatives_are_kept_too() -> None:
    alone = [TokenLogprob(token, -token / 4) for token in range(5)]
    assert list(Logprobs(alone)) == alone
