"""Noise for an epsilon and its totals, against the analytic Gaussian mechanism computed by hand."""

import builtins
import sys
from math import erfc, exp, sqrt
from typing import Any

import pytest

from mdiq.core.noise import NoisePromise
from mdiq.errors import ConfigError
from mdiq.plan import privacy
from mdiq.plan.privacy import promised, total_epsilon

ROWS = (1, 10, 1_000)


def phi(x: float) -> float:
    """Return the normal distribution function."""
    return 0.5 * erfc(-x / sqrt(2))


def delta_by_hand(epsilon: float, mu: float) -> float:
    """Return the least delta for an epsilon: Balle & Wang 2018, theorem 8, with mu = sensitivity / sigma."""
    return phi(mu / 2 - epsilon / mu) - exp(epsilon) * phi(-mu / 2 - epsilon / mu)


def epsilon_by_hand(delta: float, mu: float) -> float:
    low, high = 0.0, 650.0  # e^epsilon has no place in a float beyond that
    assert delta_by_hand(high, mu) < delta
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_by_hand(middle, mu) > delta else (low, middle)
    return high


def mu_of(promise: NoisePromise) -> float:
    """Return how far apart two clipped rows can be, in units of the noise: opposite ones, each as long as the clip."""
    return (promise.row.clip + promise.row.clip) / promise.row.sigma


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_the_noise_is_the_least_that_keeps_the_promise(epsilon: float, delta: float) -> None:
    promise = promised(epsilon, delta, clip=37.0)
    assert (promise.epsilon, promise.delta, promise.row.clip) == (epsilon, delta, 37.0)
    assert delta_by_hand(epsilon, mu_of(promise)) == pytest.approx(delta, rel=1e-4)
    assert delta_by_hand(epsilon, 1.001 * mu_of(promise)) > delta


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
@pytest.mark.parametrize("num_rows", ROWS)
def test_totals_equal_a_hand_calculation(epsilon: float, num_rows: int) -> None:
    promise = promised(epsilon, 1e-6, clip=5.0)
    # n rows with noise sigma are one row with noise sigma / sqrt(n).
    by_hand = epsilon_by_hand(1e-6, mu_of(promise) * sqrt(num_rows))
    assert total_epsilon(promise, num_rows) == pytest.approx(by_hand, rel=1e-6)
    if num_rows == 1:
        assert by_hand == pytest.approx(epsilon, rel=1e-6)


def test_the_total_is_less_than_what_single_rows_add_up_to_and_nothing_costs_nothing() -> None:
    promise = promised(0.5, 1e-6, clip=5.0)
    totals = [total_epsilon(promise, num_rows) for num_rows in (0, *ROWS)]
    assert totals == sorted(totals) and totals[0] == 0.0
    assert totals[2] < 10 * totals[1] and totals[3] < 1_000 * totals[1]


def test_the_hand_calculation_for_one_number_is_that_of_the_literature() -> None:
    """sigma for (1, 1e-5) and sensitivity 1 is 3.730632 by the authors' own program (analytic-gaussian-mechanism)."""
    promise = promised(1.0, 1e-5, clip=0.5)
    assert promise.row.sigma == pytest.approx(3.730632, rel=1e-5)


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_package(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "dp_accounting":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for cached in (privacy._ratio, privacy._total):
        cached.cache_clear()
    monkeypatch.delitem(sys.modules, "dp_accounting", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_package)
    with pytest.raises(ConfigError, match=r"pip install 'mdiq\[privacy\]'"):
        promised(1.0, 1e-5, 1.0)
