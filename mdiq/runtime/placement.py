"""Where a Node's threads run: counts and cores. Imported before torch, which reads the thread count only once."""

import os

from mdiq.errors import ConfigError
from mdiq.runtime.cpu_quota import own_quota

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CORES = tuple(sorted(os.sched_getaffinity(0)))  # before this process binds itself to one of them


def set_threads(threads: int) -> None:
    """Set the thread count that torch will find in the environment; call it before torch is imported."""
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads)


def core_of(node: int) -> int:
    """Return the core that Node ``node`` of a ring on this machine is bound to: the i-th that this process may use.

    Raises:
        ConfigError: it may use fewer.
    """
    if node >= len(_CORES):
        raise ConfigError(
            f"--pin: node {node} has no core: {len(_CORES)} are usable; use fewer nodes or leave --pin out"
        )
    return _CORES[node]


def bind_to_core(core: int) -> None:
    """Bind this process, and the threads and processes that it will start, to one core.

    A process that a bound one starts inherits the binding and may change it.

    Raises:
        ConfigError: there is no such core for this process.
    """
    try:
        os.sched_setaffinity(0, {core})
    except OSError:
        raise ConfigError(f"--pin: there is no core {core} for this process; leave --pin out") from None


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(_CORES)


def usable_threads() -> int:
    """Return how many threads can compute at once: the usable cores, or fewer where CPU time is rationed.

    Threads that have no CPU time wait in the midst of a matmul, and the others with them.
    """
    quota = own_quota()
    return len(_CORES) if quota is None else max(min(len(_CORES), int(quota)), 1)
