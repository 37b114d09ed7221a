"""The peer from outside: starts its program for each Load, and reads what it says. The program is peer_llama_cpp.py."""

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mdiq.bench.figures import UserTimes
from mdiq.bench.programs import kill, result_of
from mdiq.bench.workload import Load
from mdiq.errors import ConfigError, RingError
from mdiq.testbed.cpu_quota import CpuQuota

PROGRAM = Path(__file__).with_name("peer_llama_cpp.py")
INSTALL = "install llama-cpp-python there (pip install 'mdiq[peer]'), or name another interpreter with --peer-python"


@dataclass(frozen=True, slots=True)
class Peer:
    """llama.cpp on the same file.

    python: an interpreter that has llama-cpp-python. cores: what it may run on; empty sets no limit.
    cpu: CPU time in cores for each of its threads, as for a Node; None sets no limit.
    """

    python: str
    model: Path
    vocab_size: int
    cores: tuple[int, ...] = ()
    cpu: float | None = None
    program: Path = PROGRAM

    async def run(self, threads: int, load: Load) -> tuple[Sequence[UserTimes], int]:
        """Run a Load in a process of its own; return the users' times and its resident memory.

        Raises:
            RingError: it failed. ConfigError: the interpreter cannot be started.
        """
        spec = {
            "model": str(self.model),
            "threads": threads,
            "cores": self.cores[:threads],
            "prompts": load.prompts(self.vocab_size),
            "answer_tokens": load.answer_tokens,
        }
        # The Starter's thread settings are not the peer's.
        environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        try:
            child = await asyncio.create_subprocess_exec(
                self.python,
                str(self.program),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
            )
        except OSError as error:
            raise ConfigError(f"--peer-python {self.python}: {error.strerror}; name a Python interpreter") from None
        with contextlib.ExitStack() as stack:
            stack.callback(kill, child)
            if self.cpu is not None:
                quota = stack.enter_context(contextlib.closing(CpuQuota.create("peer", self.cpu * threads)))
                stack.callback(kill, child)  # before its control group can go
                quota.add(child.pid)
            out, errors = await child.communicate(json.dumps(spec).encode() + b"\n")
        try:
            users, result = result_of("peer llama-cpp", out, errors, child.returncode)
        except RingError as error:
            if "No module named" in str(error):
                raise ConfigError(f"{error}; {INSTALL}") from None
            raise
        return users, int(result["rss_bytes"])
