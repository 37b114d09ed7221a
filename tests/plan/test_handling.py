"""What event loops take for a forward. Time is a number."""

import pytest

from mdiq.core.work import Work
from mdiq.plan.handling import MAX_HANDLING_S, MAX_WINDOW_S, MIN_FORWARDS, Handling


def served(num_forwards: int, handling_s: float) -> Work:
    return Work(decode_batches=num_forwards, decode_segments=num_forwards, handling_s=handling_s)


def test_handling_is_the_loop_s_time_over_the_forwards_of_a_window() -> None:
    handling = Handling()
    assert not handling.observe(0.0, {"desk": served(10, 5.0), "pi": served(10, 1.0)})  # loading took some of it
    assert handling.observe(2.0, {"desk": served(110, 5.2), "pi": served(110, 1.05)})
    assert handling.seconds == {"desk": pytest.approx(0.002), "pi": pytest.approx(0.0005)}


def test_a_loop_without_load_says_nothing() -> None:
    handling = Handling()
    for i in range(100):  # 1 ms of heartbeats and probes a second, and a forward now and then
        assert not handling.observe(2.0 * i, {"pi": served(i, 0.002 * i)})
    assert handling.seconds == {}


def test_what_a_loop_did_before_its_load_came_is_no_part_of_it() -> None:
    handling = Handling()
    for i in range(15):  # heartbeats, probes, a scrape of metrics
        assert not handling.observe(2.0 * i, {"desk": served(0, 0.02 * i)})
    assert handling.observe(30.0, {"desk": served(60, 0.02 * 14 + 60 * 0.001)})
    assert handling.seconds["desk"] == pytest.approx(0.001)


def test_few_forwards_of_a_slow_node_are_enough_within_the_longest_window() -> None:
    handling = Handling()
    is_news = [handling.observe(2.0 * i, {"pi": served(4 * i, 0.012 * i)}) for i in range(14)]
    assert is_news[-1] and not any(is_news[:-1])
    assert 4 * 12 < MIN_FORWARDS and 2.0 * 13 < MAX_WINDOW_S
    assert handling.seconds["pi"] == pytest.approx(0.003)


def test_small_changes_are_no_news_and_large_ones_come_in_steps() -> None:
    handling, work = Handling(), Work()
    found: list[float] = []
    for i, handling_s in enumerate([0.002] * 5 + [0.0021] * 5 + [0.004] * 10):
        if handling.observe(float(i), {"desk": work}):
            found.append(handling.seconds["desk"])
        work = served(work.decode_batches + 100, work.handling_s + 100 * handling_s)
    assert found[0] == pytest.approx(0.002)
    assert 1 < len(found) < 5 and found == sorted(found)
    assert found[-1] == pytest.approx(0.004, rel=0.25)


def test_a_node_that_counts_anew_begins_a_new_window() -> None:
    handling = Handling()
    handling.observe(0.0, {"desk": served(1_000, 10.0)})
    assert not handling.observe(1.0, {"desk": served(60, 0.06)})
    assert handling.observe(2.0, {"desk": served(160, 0.26)})
    assert handling.seconds["desk"] == pytest.approx(0.002)


def test_a_loop_that_does_other_things_counts_for_no_more_than_a_tenth_of_a_second() -> None:
    handling = Handling()
    handling.observe(0.0, {"desk": Work()})
    assert handling.observe(60.0, {"desk": served(MIN_FORWARDS, 50.0)})
    assert handling.seconds["desk"] == MAX_HANDLING_S
