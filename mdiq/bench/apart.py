"""Rings of one Node each, all at once on one machine, that exchange nothing: what its cores can do beside each other.

Nodes on one machine share its memory bus, its last cache and its power, which devices do not. So many rings apart are
slower than as many times one alone, for that reason only: what a ring of as many Nodes loses beyond that, it loses by
being a ring. The other side of the process is apart_ring.py.
"""

import asyncio
import contextlib
import json
import sys
from dataclasses import asdict, dataclass, replace

from mdiq.bench.apart_ring import READY
from mdiq.bench.figures import UserTimes
from mdiq.bench.programs import kill, result_of
from mdiq.bench.workload import Load
from mdiq.errors import RingError
from mdiq.runtime.options import RingOptions

PASSED_ON = ("threads", "kv_tokens", "log_level")
"""Options of a ring that JSON can hold as they are; those that are not sent are apart_ring.py's to choose."""


@dataclass(frozen=True, slots=True)
class RingsApart:
    """Rings of one Node that hold the whole model each.

    options: of a ring of one Node. cores: the i-th ring's core; empty leaves all unbound. program: what Python runs,
    apart_ring.py. cpu: CPU time of each in cores; None sets no limit.
    """

    options: RingOptions
    vocab_size: int
    cores: tuple[int, ...] = ()
    program: tuple[str, ...] = ("-m", "mdiq.bench.apart_ring")
    cpu: float | None = None

    async def run(self, rings: int, load: Load) -> list[UserTimes]:
        """Run the Load on each of ``rings`` rings at once, with a seed each; return the times of all users.

        Raises:
            RingError: one of them failed.
        """
        async with contextlib.AsyncExitStack() as stack:
            children = []
            for i in range(rings):
                child = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", *self.program),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C reaches this process alone
                )
                stack.push_async_callback(_end, child)
                children.append(child)
                assert child.stdin is not None  # PIPE was asked for
                child.stdin.write(json.dumps(self._spec(i, load)).encode() + b"\n")
            said = await asyncio.gather(*(_first_line(child) for child in children))
            for i, line in enumerate(said):
                if line != READY.encode():
                    out, errors = await children[i].communicate(b"")  # its input ends, and so does it
                    result_of(f"ring {i} apart", line + out, errors, children[i].returncode)
                    raise RingError(f"ring {i} apart: it began without waiting for the others")
            results = await asyncio.gather(*(child.communicate(b"\n") for child in children))
            return [
                user
                for i, ((out, errors), child) in enumerate(zip(results, children, strict=True))
                for user in result_of(f"ring {i} apart", out, errors, child.returncode)[0]
            ]

    def _spec(self, i: int, load: Load) -> dict[str, object]:
        return {
            "model": str(self.options.model),
            "layers": self.options.layers[0].stop,
            "vocab_size": self.vocab_size,
            "weights": asdict(self.options.weights),
            "options": {name: getattr(self.options, name) for name in PASSED_ON},
            "core": self.cores[i] if self.cores else None,
            "cpu": self.cpu,
            "load": asdict(replace(load, seed=load.seed + i)),
        }


async def _first_line(child: asyncio.subprocess.Process) -> bytes:
    assert child.stdout is not None  # PIPE was asked for
    return await child.stdout.readline()


async def _end(child: asyncio.subprocess.Process) -> None:
    kill(child)
    await child.wait()
