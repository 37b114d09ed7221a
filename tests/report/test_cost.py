"""Expected values are calculated by hand in the comments."""

import pytest

from mdiq.report.cost import Prices, cost_of

ALL = Prices(per_million_tokens=2.0, device_cost=100.0, power_price=0.30, watts=10.0, lifetime_years=2.0)


def test_a_million_tokens_cost_their_part_of_devices_and_power() -> None:
    cost = cost_of(ALL, 3, 10.0)
    assert cost.watts == 30
    assert cost.joules_per_token == pytest.approx(3.0)  # 30 W / 10 tokens/s
    # 1e6 tokens take 1e5 s = 27.78 h; 30 W for that are 0.8333 kWh, and cost 0.25.
    assert cost.kwh_per_million == pytest.approx(0.83333, abs=1e-5)
    assert cost.power_per_million == pytest.approx(0.25)
    # 300 for 2 years of 8760 h: 0.0171233 an hour, 27.7778 hours.
    assert cost.devices_per_million == pytest.approx(0.475647, abs=1e-6)
    assert cost.per_million == pytest.approx(0.725647, abs=1e-6)
    # 2.00 - 0.25 are saved with each million: 300 / 1.75 = 171.43 millions, of 0.864 a day.
    assert cost.payback_days == pytest.approx(198.4127, abs=1e-4)


def test_what_stands_idle_makes_tokens_dearer() -> None:
    full, tenth = cost_of(ALL, 3, 10.0), cost_of(Prices(2.0, 100.0, 0.3, "EUR", 10.0, 2.0, 0.1), 3, 10.0)
    assert tenth.per_million == pytest.approx(10 * (full.per_million or 0))
    assert tenth.joules_per_token == pytest.approx(30.0)
    assert tenth.payback_days is None, "power alone costs 2.50 for a million, more than the 2.00 elsewhere"


def test_what_is_not_known_stays_unknown() -> None:
    cost = cost_of(Prices(), 2, 10.0)
    assert (cost.watts, cost.joules_per_token, cost.kwh_per_million, cost.power_per_million) == (None,) * 4
    assert (cost.devices_per_million, cost.per_million, cost.payback_days) == (None,) * 3
    without_power_price = cost_of(Prices(2.0, 100.0, None, watts=10.0), 2, 10.0)
    assert without_power_price.kwh_per_million is not None
    assert without_power_price.per_million is None


def test_measured_watts_count_where_the_user_gives_none() -> None:
    assert cost_of(Prices(), 2, 10.0, watts=44.0).watts == 44.0
    assert cost_of(Prices(watts=10.0), 2, 10.0, watts=44.0).watts == 20.0
