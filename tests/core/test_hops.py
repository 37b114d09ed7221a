"""Probes tell how long the way round the Ring is."""

from mdiq.core.hops import WINDOW, HopMeter


def test_the_first_probe_that_is_back_is_news() -> None:
    meter = HopMeter()
    assert meter.hops_s is None
    number = meter.send(1.0)
    assert meter.returned(number, 1.15) == meter.hops_s
    assert round(meter.hops_s or 0, 6) == 0.15
    assert meter.returned(number, 1.2) is None, "a second copy tells nothing"
    assert meter.returned(99, 1.2) is None


def test_a_probe_that_waited_for_something_else_changes_nothing() -> None:
    meter = HopMeter()
    meter.returned(meter.send(0.0), 0.1)
    assert meter.returned(meter.send(1.0), 1.9) is None
    assert meter.hops_s == 0.1


def test_a_longer_way_is_news_when_all_of_the_newest_probes_say_so() -> None:
    meter = HopMeter()
    meter.returned(meter.send(0.0), 0.1)
    told = [meter.returned(meter.send(float(i)), i + 0.3) for i in range(1, WINDOW + 1)]
    assert told[:-1] == [None] * (WINDOW - 1)
    assert round(told[-1] or 0, 6) == 0.3


def test_a_shorter_way_is_news_at_once_and_a_trifle_is_none() -> None:
    meter = HopMeter()
    meter.returned(meter.send(0.0), 0.1)
    assert meter.returned(meter.send(0.0), 0.09) is None
    assert meter.returned(meter.send(0.0), 0.05) == 0.05
    short = HopMeter()
    short.returned(short.send(0.0), 0.0019)
    assert short.returned(short.send(0.0), 0.0001) is None


def test_probes_that_never_come_back_are_forgotten() -> None:
    meter = HopMeter()
    first = meter.send(0.0)
    for _ in range(100):
        meter.send(0.0)
    assert meter.returned(first, 1.0) is None
