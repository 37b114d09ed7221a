"""A Stage's cost on this device, cached between starts: measuring takes seconds and gives the same result.

The cost depends on the machine, the program and the Stage's shape, so these name the file. If a forward of one token
does not take the cached time, for example because the machine was busy then, everything is measured again.
"""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import torch

import mdiq
from mdiq.cache import cache_directory, keep_small
from mdiq.engine.device import cpu_name
from mdiq.engine.measure import ENOUGH_TOKENS, Progress, measure_cost
from mdiq.engine.program import engine_digest
from mdiq.engine.runner import StageRunner
from mdiq.errors import ConfigError
from mdiq.plan.micro_batches import Points
from mdiq.plan.pace import StageCost


def kept_cost(runner: StageRunner, *, progress: Progress = lambda *_: None) -> StageCost:
    """Return the Stage's cost, from the cache if that is still right; see measure_cost."""
    try:
        path = cache_directory() / "costs" / f"{hashlib.sha256(_key(runner).encode()).hexdigest()}.json"
    except ConfigError:  # a user without a home
        return measure_cost(runner, progress=progress)
    known = _read(path)
    cost = measure_cost(runner, known=known, progress=progress)
    if cost is not known:
        with contextlib.suppress(OSError):
            keep_small(path, json.dumps([cost.decode.points, cost.prompt.points]).encode())
    return cost


def _key(runner: StageRunner) -> str:
    return "|".join(
        (
            runner.shape,
            f"kv {min(runner.kv_capacity_tokens, ENOUGH_TOKENS)}",
            f"{torch.get_num_threads()} threads on {len(os.sched_getaffinity(0))} cores",
            cpu_name(),
            f"torch {torch.__version__}",
            f"mdiq {mdiq.__version__} {engine_digest()}",
        )
    )


def _read(path: Path) -> StageCost | None:
    try:
        decode, prompt = (_points(value) for value in json.loads(path.read_bytes()))
        return StageCost.of(decode, prompt)
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _points(value: list[tuple[int, float]]) -> Points:
    """Return the points of a curve; ValueError or TypeError if they are not points."""
    points = tuple((int(size), float(time_s)) for size, time_s in value)
    if not all(0 < time_s < math.inf for _, time_s in points):
        raise ValueError("not times")
    return points
