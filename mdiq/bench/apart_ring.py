"""A ring of one Node as a program of its own, measured while others like it run: apart.py starts it.

One JSON object comes on standard input (see apart.py's RingsApart). When the ring is loaded and warm, "ready" goes to
standard output; when the next line comes, the load runs, and one JSON object goes out: submitted_s and tokens_s of each
user, on the machine's monotonic clock. What fails is {"error": ...} instead.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from mdiq.bench.runner import WARM_UP_TOKENS, run_load
from mdiq.bench.workload import Load
from mdiq.core.ring_settings import RingSettings
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.errors import MdiqError, first_of
from mdiq.runtime.options import RingOptions
from mdiq.runtime.placement import bind_to_core
from mdiq.telemetry.logging import configure
from mdiq.testbed.slow_ring import SlowRing

READY = "ready\n"


def main() -> None:
    """Load, wait for the others, run the load, write the times."""
    spec = json.loads(sys.stdin.readline())
    try:
        configure(spec["options"]["log_level"], node="apart")  # to standard error: the output is the parent's
        if spec["core"] is not None:
            bind_to_core(spec["core"])
        result = asyncio.run(_measured(spec))
    except* MdiqError as group:
        result = {"error": str(first_of(group))}
    sys.stdout.write(json.dumps(result) + "\n")


async def _measured(spec: dict[str, Any]) -> dict[str, Any]:
    from mdiq.runtime.ring_host import RingHost

    options = RingOptions(
        model=Path(spec["model"]),
        layers=(LayerRange(0, spec["layers"]),),
        weights=WeightSettings(**spec["weights"]),
        ring=RingSettings(prefix_tokens=0),
        slowdown=SlowRing(cpu=spec["cpu"]),
        **spec["options"],
    )
    load = Load(**spec["load"])
    warm_up = Load(load.users, load.prompt_tokens, WARM_UP_TOKENS, load.seed + 1, load.temperature)
    async with RingHost(options) as ring:
        await run_load(ring, warm_up, spec["vocab_size"], 0)
        sys.stdout.write(READY)
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)
        users = await run_load(ring, load, spec["vocab_size"], warm_up.users)
    return {
        "submitted_s": [user.submitted_s for user in users],
        "tokens_s": [user.tokens_s for user in users],
    }


if __name__ == "__main__":
    main()
