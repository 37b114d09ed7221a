"""What a million tokens cost on owned devices, and when the devices have paid for themselves. Pure arithmetic.

A device that is bought is paid for over its lifetime, whether it computes or not, and it takes its power all the time.
Tokens come only during ``load_share`` of it. So, with n devices, over any time:

    cost of a million tokens = (n * device_cost / lifetime + n * power * power_price) / tokens * 1e6
"""

from dataclasses import dataclass

HOURS_PER_YEAR = 8_760.0
_SECONDS_PER_HOUR = 3_600.0
_MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Prices:
    """What the user says; None: nothing.

    per_million_tokens: what the tokens cost elsewhere. device_cost: of one device. power_price: of a kWh.
    currency: of all of them. watts: of one device, all the time. lifetime_years: over which a device is paid for.
    load_share: of the time in which the ring answers, 0 to 1.
    """

    per_million_tokens: float | None = None
    device_cost: float | None = None
    power_price: float | None = None
    currency: str = "EUR"
    watts: float | None = None
    lifetime_years: float = 3.0
    load_share: float = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What follows for some devices at a rate; None: a price or the power is not known, or there is no such time.

    watts: of all devices. kwh_per_million, power_per_million, devices_per_million, per_million: of a million tokens.
    joules_per_token: of all devices, while they answer and while they wait.
    payback_days: until what the tokens would have cost elsewhere, less the power, is what the devices have cost.
    """

    devices: int
    tokens_per_s: float
    load_share: float
    watts: float | None
    joules_per_token: float | None
    kwh_per_million: float | None
    power_per_million: float | None
    devices_per_million: float | None
    per_million: float | None
    payback_days: float | None


def cost_of(prices: Prices, devices: int, tokens_per_s: float, watts: float | None = None) -> Cost:
    """Return the Cost of so many devices at a rate that is over 0.

    watts: measured, of all devices together; the user's figure wins.
    """
    total_watts = watts if prices.watts is None else devices * prices.watts
    tokens_per_hour = tokens_per_s * prices.load_share * _SECONDS_PER_HOUR
    millions_per_hour = tokens_per_hour / _MILLION
    kwh = None if total_watts is None else total_watts / 1_000 / millions_per_hour
    power = None if kwh is None or prices.power_price is None else kwh * prices.power_price
    owned = None
    if prices.device_cost is not None:
        owned = devices * prices.device_cost / (prices.lifetime_years * HOURS_PER_YEAR) / millions_per_hour
    payback_days = None
    if prices.device_cost is not None and prices.per_million_tokens is not None and power is not None:
        saved = prices.per_million_tokens - power
        if saved > 0:
            payback_days = devices * prices.device_cost / saved / millions_per_hour / 24
    return Cost(
        devices=devices,
        tokens_per_s=tokens_per_s,
        load_share=prices.load_share,
        watts=total_watts,
        joules_per_token=None if total_watts is None else total_watts / (tokens_per_s * prices.load_share),
        kwh_per_million=kwh,
        power_per_million=power,
        devices_per_million=owned,
        per_million=None if power is None or owned is None else power + owned,
        payback_days=payback_days,
    )
