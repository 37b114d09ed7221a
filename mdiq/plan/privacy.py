"""How much noise an (epsilon, delta) needs, and what many rows tell together: the Gaussian mechanism, by dp-accounting.

Theory. A row that is clipped to norm C may differ from any other such row by 2 C, the mechanism's sensitivity. Noise of
standard deviation sigma then gives (epsilon, delta) with

    delta = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu),    mu = 2 C / sigma

and no smaller sigma does (Balle & Wang 2018, theorem 8). n rows, each with its own noise, tell exactly as much as one
row with noise of sigma / sqrt(n), also if later rows depend on what was seen of earlier ones (Dong, Roth & Su 2022,
corollary 3.3). So a total is not a bound by some composition theorem but exact.

"One row" is the unit because the rows of one token are not independent: from layer 1 on, attention spreads each token
over all later rows. A total over all rows of a request holds for any change of its text.
"""

from functools import lru_cache
from math import sqrt

from mdiq.core.noise import NoisePromise, RowNoise
from mdiq.errors import ConfigError

SENSITIVITY = 2.0
"""Of a clipped row, in units of the clip."""


def promised(epsilon: float, delta: float, clip: float) -> NoisePromise:
    """Return the promise of (epsilon, delta) for each row, with the least noise that keeps it.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    return NoisePromise(epsilon, delta, RowNoise(clip, clip * _ratio(epsilon, delta)))


def total_epsilon(promise: NoisePromise, num_rows: int) -> float:
    """Return the epsilon of so many rows together, at the delta of the promise; 0 for none.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    return _total(promise.row.ratio, promise.delta, num_rows) if num_rows else 0.0


@lru_cache(maxsize=64)
def _ratio(epsilon: float, delta: float) -> float:
    try:
        from dp_accounting import get_sigma_gaussian
    except ImportError:
        raise _missing() from None
    return SENSITIVITY * float(get_sigma_gaussian(epsilon, delta))


@lru_cache(maxsize=64)
def _total(ratio: float, delta: float, num_rows: int) -> float:
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError:
        raise _missing() from None
    return float(get_epsilon_gaussian(ratio / SENSITIVITY / sqrt(num_rows), delta))


def _missing() -> ConfigError:
    return ConfigError(
        "noise needs the package dp-accounting; run pip install 'mdiq[privacy]' (of a ring: on its Starter)"
    )
