"""Which core a Node is bound to."""

import os
import subprocess
import sys

import pytest

from mdiq.errors import ConfigError
from mdiq.runtime.placement import bind_to_core, core_of, usable_cores

CORES = sorted(os.sched_getaffinity(0))


def test_node_i_gets_the_ith_core_that_is_usable() -> None:
    assert [core_of(i) for i in range(usable_cores())] == CORES
    with pytest.raises(ConfigError, match="use fewer nodes"):
        core_of(len(CORES))


def test_a_core_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no core 9999"):
        bind_to_core(9999)


def test_a_child_of_a_bound_process_can_be_bound_to_another_core() -> None:
    """As the nodes of a ring are: the Starter binds itself before it starts them."""
    bind = (
        "from mdiq.runtime.placement import bind_to_core; import os, sys, subprocess; bind_to_core(int(sys.argv[1]));"
    )
    show = "print(sorted(os.sched_getaffinity(0)))"
    start = "subprocess.run([sys.executable, '-c', sys.argv[3], sys.argv[2]], check=True)"
    command = [sys.executable, "-c", bind + start, str(CORES[0]), str(CORES[-1]), bind + show]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([CORES[-1]])
