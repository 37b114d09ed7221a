"""Measure a Stage's cost on this device: seconds of a forward, by Segments of one token and by tokens of a prompt.

Also the cost of packing rows for a Hop.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from mdiq.core.frame import Batch, Segment, TokenIds
from mdiq.core.sequence import SamplingParams
from mdiq.core.types import Epoch, SeqId
from mdiq.core.wire_formats import SMALL, USUAL
from mdiq.engine.model.kv_cache import BLOCK_TOKENS
from mdiq.engine.model.sampler import SampleRow, sample
from mdiq.engine.runner import StageRunner
from mdiq.engine.tensors import TensorRows, to_tensor, to_wire
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost

CONTEXT_TOKENS = 96
"""A short question with its answer: attention over it is a seventh of a forward of SmolLM2 in 8 bits."""
ENOUGH_TOKENS = 2_048  # of KV cache: 16 Sequences with their context
DECODE_SIZES = (1, 2, 4, 8, 16)
PROMPT_SIZES = (16, 64, 192)
PACKING_SIZES = (1, 8, 64)
Progress = Callable[[int, int], object]
REPEATS = 3
AGREES = 1.25  # times that differ less are the same: forwards of a quiet machine vary by a tenth
ENOUGH_S = 1.0  # larger sizes are not measured once a forward takes this long: the curve is extrapolated
SUSTAINED_S = 0.3  # three periods of a quota, for each size
_DRAWS = [SampleRow(SamplingParams(temperature=1.0), (), i) for i in range(max(DECODE_SIZES))]
"""With the API's defaults; greedy sampling takes a little less."""
MAX_S = 0.25  # a size is not repeated when its forwards have taken this long: a long one varies little


def measure_cost(
    runner: StageRunner,
    *,
    min_s: float = 0.0,
    known: StageCost | None = None,
    progress: Progress = lambda *_: None,
) -> StageCost:
    """Return the Stage's cost, from medians, or from means with ``min_s``; the runner's cache is empty afterwards.

    progress: called after each forward with (forwards so far, 0): their total is unknown.
    known: an earlier measurement; it is returned if its time for a forward of one token still holds.
    min_s: measure each size for at least this long, one after the other: a device with a CPU quota computes in bursts,
    and a short measurement sees only a burst. One thread is measured by the CPU time of each size, times how much
    longer all sizes together took by the clock: a pause of the quota, or of another program, then hits no size alone.
    Decoding is measured after CONTEXT_TOKENS of each Sequence, or as many as the cache holds.
    """
    most = max(runner.kv_capacity_tokens // BLOCK_TOKENS, 1)
    max_tokens = min(runner.kv_capacity_tokens, runner.config.context_tokens)

    def context(num_segments: int) -> int:
        room = min(most // num_segments * BLOCK_TOKENS, runner.config.context_tokens) - (REPEATS + 1)
        return max(min(CONTEXT_TOKENS, room), 0)

    def decode(num_segments: int, i: int) -> Batch:
        if not i and context(num_segments):
            for j in range(num_segments):
                runner.occupy(SeqId(j), context(num_segments))
        return _batch(runner, num_segments, 1, context(num_segments) + i)

    if known is not None:
        now = _curve(runner, [1], decode, min_s, progress, _Runs())
        now_s, then_s = now.seconds(1), known.decode.seconds(1)
        if then_s / AGREES <= now_s <= then_s * AGREES:
            return known
    runs = _Runs(by_cpu_time=min_s > 0 and torch.get_num_threads() == 1 and runner.is_on_cpu)
    curves = [
        _curve(runner, sizes, make_batch, min_s, progress, runs)
        for sizes, make_batch in (
            ([n for n in DECODE_SIZES if n <= most], decode),
            ([n for n in PROMPT_SIZES if n <= max_tokens] or [1], lambda n, i: _batch(runner, 1, n, 0, seq_id=i)),
        )
    ]
    return StageCost(*(curve.scaled(runs.stretch) for curve in curves))


class _Runs:
    """The forwards of one measurement, by the clock and by the CPU time of the thread that runs them.

    by_cpu_time: means are those of CPU time, to be multiplied by ``stretch``.
    """

    def __init__(self, *, by_cpu_time: bool = False) -> None:
        self._by_cpu_time = by_cpu_time
        self._wall_s = self._cpu_s = 0.0

    def mean_s(self, times: Sequence[tuple[float, float]]) -> float:
        """Return the mean of some forwards. times: (by the clock, of CPU) of each."""
        wall_s, cpu_s = sum(wall_s for wall_s, _ in times), sum(cpu_s for _, cpu_s in times)
        self._wall_s += wall_s
        self._cpu_s += cpu_s
        return (cpu_s if self._by_cpu_time else wall_s) / len(times)

    @property
    def stretch(self) -> float:
        """How many times as long forwards take by the clock."""
        return self._wall_s / self._cpu_s if self._by_cpu_time and self._cpu_s > 0 else 1.0


def measure_head(runner: StageRunner, *, min_s: float = 0.0, progress: Progress = lambda *_: None) -> Curve:
    """Return the seconds of the Starter's head and draws, by rows. The arguments are those of measure_cost."""
    row = TensorRows(torch.zeros(1, runner.config.hidden_size))

    def seconds(size: int) -> float:
        times: list[float] = []
        while len(times) <= REPEATS or sum(times) < min_s:
            start_s = time.perf_counter()
            _draw(runner.logits([row] * size))
            times.append(time.perf_counter() - start_s)
            progress(len(times), 0)
        return statistics.fmean(times[1:]) if min_s else statistics.median(times[1:])

    return Curve(tuple((size, seconds(size)) for size in DECODE_SIZES))


def measure_packing(width: int) -> Curve:
    """Return the additional seconds of i8 over bf16 for rows of a Hop: packing at one end, unpacking at the other."""
    cpu = torch.device("cpu")

    def median_s(rows: torch.Tensor, wire: str) -> float:
        times = []
        for _ in range(2 * REPEATS + 1):
            start_s = time.perf_counter()
            to_tensor(to_wire(rows, wire), width, torch.float32, cpu)
            times.append(time.perf_counter() - start_s)
        return statistics.median(times[1:])

    with torch.inference_mode():
        points = [
            (size, max(median_s(rows, SMALL) - median_s(rows, USUAL), 0.0))
            for size, rows in ((size, torch.randn(size, width)) for size in PACKING_SIZES)
        ]
    return Curve(tuple(points))


def _curve(
    runner: StageRunner,
    sizes: list[int],
    make_batch: Callable[[int, int], Batch],
    min_s: float,
    progress: Progress,
    runs: _Runs,
) -> Curve:
    _forward_s(runner, make_batch(sizes[0], 0))  # pays for pages that are not in memory yet
    num_run = 1
    progress(num_run, 0)
    runner.reset()

    def run(size: int, i: int) -> tuple[float, float]:
        nonlocal num_run
        cpu_s = time.thread_time()
        time_s = _forward_s(runner, make_batch(size, i))
        cpu_s = time.thread_time() - cpu_s
        num_run += 1
        progress(num_run, 0)
        return time_s, cpu_s

    points = (
        _one_after_another(sizes, run, runner.reset, min_s, runs)
        if min_s
        else _in_turns(sizes, lambda size, i: run(size, i)[0], runner.reset)
    )
    return Curve(tuple(points))


def _one_after_another(
    sizes: list[int],
    run: Callable[[int, int], tuple[float, float]],
    reset: Callable[[], object],
    min_s: float,
    runs: _Runs,
) -> Iterator[tuple[int, float]]:
    """Yield the sizes with their means, each of forwards that follow each other.

    In turns, the pauses of a CPU quota, each as long as tens of forwards, would hit some sizes and pass over others.
    """
    for size in sizes:
        times: list[tuple[float, float]] = []
        num_run = 0
        left_s = min_s
        while left_s > 0:
            i = num_run % (REPEATS + 1)
            num_run += 1
            time_s, cpu_s = run(size, i)
            # The first one warms up. It counts if it took so long that it will not be repeated.
            if num_run > 1 or time_s >= min_s:
                times.append((time_s, cpu_s))
                left_s -= time_s
            if i == REPEATS:
                reset()
        reset()
        yield size, runs.mean_s(times)
        if times[-1][0] > ENOUGH_S:
            break


def _in_turns(
    sizes: list[int], forward_s: Callable[[int, int], float], reset: Callable[[], object]
) -> Iterator[tuple[int, float]]:
    """Yield the sizes with their medians, measured in turns, so that a short disturbance does not hit one alone."""
    times: dict[int, list[float]] = {size: [] for size in sizes}
    left = sizes
    while left:
        for size in left:
            # The first forward of a size warms up. It counts if it took so long that it will not be repeated.
            for i in range(2 if not times[size] else 1):
                time_s = forward_s(size, i)
                if i or times[size] or time_s > MAX_S:
                    times[size].append(time_s)
                if time_s > MAX_S:
                    break
            reset()
            if times[size][-1] > ENOUGH_S:
                larger = [other for other in sizes if other > size]
                times = {other: taken for other, taken in times.items() if other not in larger}
                break
        left = [size for size, taken in times.items() if len(taken) < REPEATS and sum(taken) < MAX_S]
    yield from ((size, statistics.median(taken)) for size, taken in times.items())


def _forward_s(runner: StageRunner, batch: Batch) -> float:
    start_s = time.perf_counter()
    output = runner.forward(batch)
    output.parts()  # a copy to the CPU waits for a GPU
    if runner.owns_embedding:
        # The head is the Starter's too: a row of every Segment goes there.
        stops = [sum(s.length for s in batch.segments[: j + 1]) for j in range(len(batch.segments))]
        last = output.num_rows == len(batch.segments)
        rows = [output.rows(j, j + 1) if last else output.rows(s - 1, s) for j, s in enumerate(stops)]
        _draw(runner.logits(rows))
    return time.perf_counter() - start_s


def _draw(logits: torch.Tensor) -> None:
    # Their values do not change the time, but arbitrary bytes in the cache may make them NaN.
    sample(torch.zeros_like(logits), _DRAWS[: len(logits)])


def _batch(runner: StageRunner, num_segments: int, length: int, start: int, *, seq_id: int = 0) -> Batch:
    segments = tuple(Segment(SeqId(seq_id + i), start, length, wants_logits=True) for i in range(num_segments))
    # A prompt is measured several times; the cache of the previous one is freed each time.
    releases = (SeqId(seq_id - 1),) if seq_id else ()
    if runner.owns_embedding:
        return Batch(Epoch(1), segments, tuple(TokenIds((0,) * length) for _ in segments), releases)
    row = TensorRows(torch.zeros(length, runner.config.hidden_size))
    return Batch(Epoch(1), segments, (row,) * num_segments, releases)
