"""Where a Node's threads run: counts and cores. Imported before torch, which reads the thread count only once."""

import os

from mdiq.errors import ConfigError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def set_threads(threads: int) -> None:
    """Set the thread count that torch will find in the environment; call it before torch is imported."""
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads)


def pin_to_core(core: int) -> None:
    """Bind this process and the threads it will start to one core.

    Raises:
        ConfigError: there is no such core for this process.
    """
    cores = sorted(os.sched_getaffinity(0))
    if core not in cores:
        raise ConfigError(f"--pin: there is no core {core} here (cores: {cores}); use fewer nodes or leave --pin out")
    os.sched_setaffinity(0, {core})


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
