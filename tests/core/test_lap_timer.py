"""Deadlines follow the Laps that were measured."""

import random

import pytest

from mdiq.core.lap_timer import Flight, LapTimer


def _timer(min_s: float = 2.0) -> LapTimer:
    return LapTimer(min_s=min_s, limit_s=60.0, token_s=0.1, silence_s=2.5)


def _lap(timer: LapTimer, took_s: float, num_tokens: int = 1, *, is_decode: bool = True) -> Flight:
    flight = timer.sent(1, num_tokens, 0.0)
    timer.heard(took_s)
    timer.returned(flight, took_s, is_decode=is_decode)
    return flight


def test_until_a_lap_is_measured_it_may_take_all_the_time_there_is() -> None:
    timer = _timer()
    assert timer.sent(1, 100, 5.0).due == 75.0
    _lap(timer, 3.0, 100, is_decode=False)
    assert timer.sent(1, 100, 5.0).due == 75.0, "a prompt tells nothing of decode Laps"


@pytest.mark.parametrize(
    ("laps_s", "num_tokens", "num_replays", "low_s", "high_s"),
    [
        ([0.02] * 9, 1, 0, 2.0, 2.5),
        ([0.02] * 9, 1, 1, 4.0, 5.0),
        ([0.02] * 9, 1, 9, 60.1, 60.1),
        ([4.0], 0, 0, 20.0, 20.0),
        ([4.0] * 40, 0, 0, 12.0, 12.2),
        ([1.0, 7.0] * 20, 0, 0, 20.0, 30.0),
        ([30.0] * 9, 1, 0, 60.1, 60.1),
    ],
)
def test_a_lap_may_take_a_few_measured_ones(
    laps_s: list[float], num_tokens: int, num_replays: int, low_s: float, high_s: float
) -> None:
    timer = _timer()
    for lap_s in laps_s:
        _lap(timer, lap_s)
    assert low_s <= timer.sent(1, num_tokens, 0.0, num_replays).due <= high_s


def test_tokens_in_flight_add_what_prompts_were_seen_to_take() -> None:
    timer = _timer()
    _lap(timer, 1.0)
    for _ in range(3):
        _lap(timer, 11.0, 500, is_decode=False)  # 20 ms a token over a Lap of 1 s
    assert timer.sent(1, 100, 0.0).due == pytest.approx(5.0 + 4 * 0.02 * 100)
    decode = timer.sent(1, 0, 0.0)
    timer.followed(decode, 100)
    timer.followed(decode, 100)
    assert decode.due == pytest.approx(5.0 + 4 * 0.02 * 100), "one chunk may go before it, not every one that is sent"


def test_while_nothing_comes_round_nothing_is_given_up_and_what_comes_after_a_silence_begins_anew() -> None:
    timer = _timer()
    _lap(timer, 0.1)
    timer.heard(9.0)
    flight = timer.sent(1, 1, 10.0)
    assert not timer.is_overdue(flight, 12.4)
    assert flight.due == flight.limit == 70.1
    assert timer.heard(30.0)
    timer.begin_anew(flight, 30.0)
    assert not timer.is_overdue(flight, 31.9)
    assert timer.is_overdue(flight, 32.5)
    assert not timer.heard(32.5)


def test_a_silence_does_not_outlast_the_limit() -> None:
    timer = _timer()
    _lap(timer, 0.1)
    flight = timer.sent(1, 0, 10.0)
    assert not timer.is_overdue(flight, 69.9)
    assert timer.is_overdue(flight, 70.0)


@pytest.mark.parametrize("mean_s", [0.01, 0.5, 5.0])
def test_slow_and_uneven_laps_are_not_taken_for_lost(mean_s: float) -> None:
    timer, rng, now = _timer(), random.Random(3), 0.0
    for i in range(2_000):
        slowly = 1 + i / 1_000  # up to three times as slow in the end
        flight = timer.sent(1, 1, now)
        now += mean_s * slowly * rng.uniform(0.3, 1.7)
        timer.heard(now)
        assert not timer.is_overdue(flight, now)
        timer.returned(flight, now, is_decode=True)
