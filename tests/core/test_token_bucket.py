"""The limit of bytes a second: what has to wait, and for how long."""

import pytest

from mdiq.core.token_bucket import TokenBucket


def test_a_burst_goes_out_at_once_and_what_follows_at_the_rate() -> None:
    bucket = TokenBucket(rate_per_s=100, burst=50)
    assert bucket.take(50, now=10.0) == 0.0
    assert bucket.take(100, now=10.0) == 1.0
    assert bucket.take(100, now=10.5) == 1.5  # the half second has paid for half of the first


def test_a_silence_saves_up_no_more_than_a_burst() -> None:
    bucket = TokenBucket(rate_per_s=100, burst=50)
    bucket.take(50, now=0.0)
    assert bucket.take(50, now=1_000.0) == 0.0
    assert bucket.take(50, now=1_000.0) == 0.5


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_a_limit_that_lets_nothing_through_is_refused(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="TokenBucket"):
        TokenBucket(rate, burst)


def test_the_wait_for_some_is_told_without_taking_them() -> None:
    bucket = TokenBucket(rate_per_s=10, burst=60)
    assert bucket.wait_s(60, now=5.0) == 0.0
    bucket.take(80, now=5.0)
    assert bucket.wait_s(1, now=5.0) == 2.1
    assert bucket.wait_s(1, now=5.0) == 2.1
    assert bucket.wait_s(1, now=7.25) == 0.0
    assert bucket.wait_s(1_000, now=7.0) == 6.0, "more than a burst is never there: a full bucket is enough"
