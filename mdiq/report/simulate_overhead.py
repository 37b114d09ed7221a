"""What a forward costs a Node of a ring beside its Layers and head: frames, event loop, sampling, streams.

A ring of two processes with a model that computes next to nothing runs under two loads; the CPU time of each process by
its forwards, and by their rows, is that cost.
"""

import time
from dataclasses import dataclass, replace

import psutil

from mdiq.bench.runner import run_load
from mdiq.bench.shapes import SHAPES, shape_file
from mdiq.bench.workload import Load
from mdiq.core.ring_settings import RingSettings
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.plan.micro_batches import Curve
from mdiq.report.catalogue import Figure, Mark
from mdiq.report.simulate_measure import Machine
from mdiq.runtime.options import NodeFigures, Outages, RingOptions
from mdiq.runtime.ring_host import RingHost

SHAPE = "tiny"
PROMPT_TOKENS = 8
ANSWER_TOKENS = 192
USERS = (1, 16)
"""Of the two loads: frames of one row, and of several."""
_KV_TOKENS = 8_192


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU time of a process under one load, and what it did: forwards and their rows."""

    cpu_s: float
    forwards: int
    rows: int


@dataclass(frozen=True, slots=True)
class Overhead:
    """CPU seconds of a Node for each forward and each row, the Starter's and another's."""

    starter_forward_s: float
    starter_row_s: float
    forward_s: float
    row_s: float


def fitted(one: Spent, many: Spent) -> tuple[float, float]:
    """Return the seconds of a forward and of a row: f and r with cpu_s = f forwards + r rows under both loads."""
    determinant = one.forwards * many.rows - many.forwards * one.rows
    if not determinant:
        return one.cpu_s / max(one.forwards, 1), 0.0
    row_s = (one.forwards * many.cpu_s - many.forwards * one.cpu_s) / determinant
    row_s = max(row_s, 0.0)
    return max((one.cpu_s - row_s * one.rows) / max(one.forwards, 1), 0.0), row_s


async def measure_overhead() -> Overhead:
    """Return what forwards cost beside Layers on this machine.

    Raises:
        MdiqError: the ring failed.
    """
    layers = SHAPES[SHAPE].num_layers
    options = RingOptions(
        model=shape_file(SHAPE),
        layers=(LayerRange(0, 1), LayerRange(1, layers)),
        weights=WeightSettings("int8"),
        kv_tokens=_KV_TOKENS,
        ring=RingSettings(prefix_tokens=0),
        outages=Outages(tolerance_s=0.0),
    )
    before = {child.pid for child in psutil.Process().children()}
    async with RingHost(options) as ring:
        (worker,) = (child for child in psutil.Process().children() if child.pid not in before)
        index, spent = 0, []
        for users in (USERS[0], *USERS):  # the first one warms up
            starter_s, worker_s, first = time.process_time(), _cpu_s(worker), ring.figures()[0]
            await run_load(ring, Load(users, PROMPT_TOKENS, ANSWER_TOKENS, seed=users), SHAPES[SHAPE].vocab_size, index)
            index += users
            # Both Stages have the same forwards; the Starter's own figures are never old.
            forwards, rows = _done(first, ring.figures()[0])
            spent.append(
                (
                    Spent(time.process_time() - starter_s, forwards, rows),
                    Spent(_cpu_s(worker) - worker_s, forwards, rows),
                )
            )
    (starter_one, worker_one), (starter_many, worker_many) = spent[1:]
    return Overhead(*fitted(starter_one, starter_many), *fitted(worker_one, worker_many))


def with_overhead(machine: Machine, overhead: Overhead) -> Machine:
    """Return a machine whose forwards cost what they do in a ring; what the Starter's cost more is in the head."""
    more_s = max(overhead.starter_forward_s - overhead.forward_s, 0.0)
    row_s = max(overhead.starter_row_s - overhead.row_s, 0.0)

    def in_ring(curve: Curve) -> Curve:
        return Curve(tuple((size, time_s + more_s + size * row_s) for size, time_s in curve.points))

    device = machine.device
    source = f"mdiq simulate --measure: CPU time of a ring of two with a model of {SHAPE} layers"
    return replace(
        machine,
        device=replace(
            device,
            forward_s=Figure(overhead.forward_s + overhead.row_s, Mark.MEASURED, source),
            layers=tuple(replace(layers, head=in_ring(layers.head)) for layers in device.layers),
        ),
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _done(before: NodeFigures, after: NodeFigures) -> tuple[int, int]:
    """Return forwards and rows between two figures of a Node; a chunk of a prompt counts as one row."""
    forwards = after.work.decode_batches - before.work.decode_batches
    prompts = after.work.prompt_batches - before.work.prompt_batches
    return forwards + prompts, after.work.decode_segments - before.work.decode_segments + prompts
