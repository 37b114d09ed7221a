"""`mdiq run`: a ring on this machine or over a topology, from prompts to answers and figures."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from mdiq.cli.flags import check_writable, hand_split, parse_wires
from mdiq.cli.output import AnswerPrinter, Result, Summary, print_table
from mdiq.cli.prompts import read_finished, read_prompts
from mdiq.cli.ring_commands import RunOptions
from mdiq.cli.signals import run_until_signal
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import FinishReason, Sequence
from mdiq.errors import ConfigError, MdiqError
from mdiq.plan.micro_batches import MAX_LIVE
from mdiq.runtime.options import RingOptions
from mdiq.runtime.placement import bind_to_core, core_of, set_threads, usable_cores, usable_threads
from mdiq.service.batch import Batch, about
from mdiq.service.recorder import Recorder
from mdiq.service.requests import PromptLine, Requests
from mdiq.telemetry import logging
from mdiq.telemetry.trace import overlap_shares, write_trace

if TYPE_CHECKING:  # torch and the tokenizer are imported after set_threads, and what reads topologies if there is one
    from mdiq.config.load import LoadedTopology
    from mdiq.engine.model_config import ModelConfig
    from mdiq.runtime.ring_host import RingHost
    from mdiq.runtime.starter_service import StreamEvent
    from mdiq.service.topology_rings import TopologyRings

DEFAULT_NODES = 2
MAX_SUBMITTED = MAX_LIVE + 64  # requests of a file that are with the ring at once: what it takes, and some that wait


def execute(options: RunOptions) -> int:
    """Run the command and return its exit code."""
    logging.configure(options.log_level, node="node-0")
    console = Console(stderr=True)
    lines = _read_requests(options)
    if options.trace is not None:
        check_writable("--trace", options.trace)
    loaded: LoadedTopology | None = None
    name = options.model
    if options.topology is not None:
        from mdiq.service.topology_values import model_of, threads_of

        loaded = _topology(options, options.topology)
        name, threads = model_of(loaded), threads_of(loaded.topology, loaded.topology.starter)
    else:
        split = hand_split(options.layers, options.nodes)
        num_nodes = len(split) or options.nodes or DEFAULT_NODES
        wires = parse_wires(options.wire, num_nodes)
        threads = options.threads or max(usable_threads() // num_nodes, 1)
        if options.pin and not options.in_process and num_nodes > usable_cores():
            raise ConfigError(f"--pin: {num_nodes} nodes need as many cores; there are {usable_cores()}")
    set_threads(threads)
    if options.pin:
        bind_to_core(core_of(0))
    with contextlib.ExitStack() as opened:
        batch: Batch | None = None
        todo = lines
        if options.out is not None:
            batch = Batch(options.out, resume=options.resume, is_journalled=options.prompts is not None)
            opened.enter_context(batch)
            todo = _todo(batch, lines, console)
            if not todo:
                return 0
        from mdiq.engine.formats.model_source import find_model
        from mdiq.engine.model_config import read_config
        from mdiq.engine.text.tokenizer import Tokenizer

        model = find_model(name, progress=lambda text: console.print(text, style="dim"))
        config = read_config(model)
        rings: TopologyRings | None = None
        if loaded is None:
            ring_options = local_ring(options, model, config, split or num_nodes, wires, threads)
        else:
            from mdiq.service import topology_rings

            rings = topology_rings.TopologyRings(
                loaded,
                model,
                config,
                threads=threads,
                join_wait_s=options.join_wait,
                even_split=options.even_split,
                on_note=lambda note: console.print(f"mdiq: {note}", markup=False, highlight=False),
            )
            ring_options = rings.options()
        requests = Requests(Tokenizer.load(model), config, raw=options.raw)
        if batch is not None:
            batch.expect(about(lines, options.params, ring_options, raw=options.raw))
        run = _Run(options, ring_options, requests, todo, console, batch, rings)
        return run_until_signal(run.main())


def local_ring(
    options: RunOptions,
    model: Path,
    config: "ModelConfig",
    split: AbstractSequence[int] | int,
    wires: tuple[str, ...],
    threads: int,
) -> RingOptions:
    """Return the Ring that the flags ask for. split: the Layers of each Node, or how many Nodes share them."""
    from mdiq.plan.split import check_split, split_layers

    return RingOptions(
        model=model,
        layers=split_layers(config.num_layers, split, config.head_layers, min_first=options.min_starter_layers)
        if isinstance(split, int)
        else check_split(split, config.num_layers, min_first=options.min_starter_layers),
        weights=options.held,
        wires=wires,
        threads=threads,
        pin=options.pin,
        in_process=options.in_process,
        kv_tokens=options.kv_tokens,
        base_port=options.base_port,
        pace=options.pace,
        trace=options.trace is not None,
        log_level=options.log_level,
        ring=RingSettings(prefix_tokens=0 if options.no_prefix_reuse else None),
    )


class _Run:
    """One run: requests in, results out."""

    def __init__(
        self,
        options: RunOptions,
        ring_options: RingOptions,
        requests: Requests,
        lines: list[PromptLine],
        console: Console,
        batch: Batch | None,
        rings: "TopologyRings | None",
    ) -> None:
        self._options = options
        self._rings = rings
        self._ring_options = ring_options
        self._requests = requests
        self._lines = lines
        self._console = console
        self._is_single = options.prompts is None
        self._printer = AnswerPrinter(
            sys.stdout, as_json=options.as_json, is_single=self._is_single, has_file=batch is not None
        )
        self._batch = batch
        self._recorder: Recorder | None = None
        if batch is not None:
            self._recorder = Recorder(batch.results, batch.journal, on_trouble=self._say)
        self._results: list[Result] = []
        self._start_s = 0.0

    async def main(self) -> int:
        from mdiq.runtime.ring_host import RingHost
        from mdiq.service.forming import formed

        self._requests.check(self._lines, is_single=self._is_single)
        if self._batch is not None and self._batch.begun:
            await asyncio.to_thread(self._batch.expect_model, self._ring_options.model)
        if self._ring_options.is_survey and self._rings is not None:
            with _loading_bars(self._console) as on_loading:
                survey = await formed(lambda: RingHost(self._ring_options, on_loading=on_loading))
                try:
                    self._rings.keep(await survey.measured(), is_survey=True)
                finally:
                    await survey.aclose()
            self._ring_options = self._rings.options()
        if self._rings is not None:
            self._ring_options = replace(
                self._ring_options,
                kv_tokens=self._options.kv_tokens,
                trace=self._options.trace is not None,
                log_level=self._options.log_level,
            )
        with _loading_bars(self._console) as on_loading:
            pipe, grammars = self._requests.pipe, self._requests.grammars
            ring = await formed(
                lambda: RingHost(self._ring_options, make_pipe=pipe, on_loading=on_loading, grammars=grammars)
            )
        try:
            if self._batch is not None:  # torch is here now
                await asyncio.to_thread(self._batch.expect_model, self._ring_options.model)
            self._start_s = time.monotonic()
            await self.serve_all(ring)
            await self._finish(ring)
        finally:
            await ring.aclose()
        if any(result.finish_reason is FinishReason.ERROR for result in self._results):
            return 1
        if self._batch is not None:
            self._batch.end()
        return 0

    async def serve_all(self, ring: "RingHost") -> None:
        """Answer every request; MAX_SUBMITTED of them are with the ring at once."""
        # A ring that holds every request of a long file spends its time on those that wait.
        lines = iter(self._lines)
        async with _recording(self._recorder), asyncio.TaskGroup() as tasks:
            for i in range(min(len(self._lines), max(MAX_SUBMITTED, self._ring_options.pace.max_live or 0))):
                tasks.create_task(self._serve_each(ring, lines), name=f"requests-{i}")

    async def _serve_each(self, ring: "RingHost", lines: Iterator[PromptLine]) -> None:
        for line in lines:
            await self._serve(ring, line)

    async def _serve(self, ring: "RingHost", line: PromptLine) -> None:
        result = Result(line.index, (), submitted_s=self._now(), request=line.digest)
        self._results.append(result)
        sequence: Sequence | None = None
        try:
            sequence = await self._sequence(line, result, ring.context_tokens)
            if sequence.finish_reason is None:
                await self._follow(ring.stream(sequence), result)
            else:  # an earlier run had all of its tokens
                result.finish_reason, result.finished_s = sequence.finish_reason, self._now()
        except MdiqError as error:
            if self._is_single:
                raise
            result.finish_reason, result.finished_s = FinishReason.ERROR, self._now()
            result.error = str(error)
            self._say(f"request {line.index}: {error}")
        if sequence is not None:
            result.cached_prompt_tokens = sequence.cached_prompt_tokens
        if self._recorder is not None:
            is_final = result.finish_reason is not FinishReason.ERROR
            await self._recorder.end(str(line.index), result.as_json(), is_final=is_final)
        self._printer.finished(result)

    async def _follow(self, events: "AsyncIterator[StreamEvent]", result: Result) -> None:
        async for event in events:
            at_s = event.at_s - self._start_s
            if event.step.token is not None:
                result.token_ids.append(event.step.token)
                result.first_token_s = at_s if result.first_token_s is None else result.first_token_s
            result.text += event.text
            self._printer.text(event.text)
            if event.step.finish_reason is not None:
                result.finish_reason, result.finished_s = event.step.finish_reason, at_s
                result.error = None if event.step.error is None else str(event.step.error)
                if self._is_single and event.step.error is not None:
                    raise event.step.error

    async def _sequence(self, line: PromptLine, result: Result, room: int) -> Sequence:
        """Return the Sequence of a request, with the tokens of an earlier run."""
        begun = None if self._batch is None else self._batch.begun.get(line.index)
        # In a thread: a template and a long text take longer than other requests' tokens can wait.
        if begun is None:
            sequence = await asyncio.to_thread(self._requests.sequence, line, room)
        else:
            sequence, result.text = await asyncio.to_thread(self._requests.resumed, line, begun)
            result.token_ids, result.num_resumed = [*sequence.generated], len(sequence.generated)
        result.prompt_token_ids = sequence.prompt
        if self._recorder is not None:
            self._recorder.begin(str(line.index), sequence, is_journalled=begun is not None)
        return sequence

    async def _finish(self, ring: "RingHost") -> None:
        wall_s = max((result.finished_s for result in self._results), default=0.0)
        if self._rings is not None and ring.options == self._ring_options:  # else some have never been measured
            self._rings.keep(await ring.measured())
        await ring.drain()
        overlap: Mapping[str, float] | None = None
        if self._options.trace is not None:
            spans = ring.spans()
            write_trace(self._options.trace, spans)
            overlap = overlap_shares(spans)
        summary = Summary(
            model=str(self._ring_options.model),
            dtype=self._ring_options.weights.dtype,
            wall_s=wall_s,
            results=self._results,
            nodes=ring.figures(),
            counts=ring.service.ring.counts,
            pace=ring.pace(),
            hops=ring.hops(),
            wire_check_nats=ring.wire_check_nats,
            prefill=ring.service.ring.prefill,
            overlap=overlap,
        )
        self._printer.summary(summary)
        if not self._options.as_json:
            print_table(self._console, summary)

    def _say(self, text: str) -> None:
        self._console.print(f"mdiq: {text}", markup=False, highlight=False, soft_wrap=True)

    def _now(self) -> float:
        return time.monotonic() - self._start_s


@contextlib.asynccontextmanager
async def _recording(recorder: Recorder | None) -> AsyncIterator[None]:
    """Record while requests are served; what came before the end, or before a signal, is on the disk afterwards."""
    if recorder is None:
        yield
        return
    try:
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(recorder.run(), name="record")
            yield
            running.cancel()
    finally:
        await recorder.write(with_tokens=True)


def _topology(options: RunOptions, file: Path) -> "LoadedTopology":
    """Return the topology of a file, and see that no flag contradicts it."""
    from mdiq.config.load import load_topology
    from mdiq.service.topology_values import secret_of

    given = {
        "--nodes": options.nodes,
        "--layers": options.layers,
        "--in-process": options.in_process,
        "--pin": options.pin,
        "--base-port": options.base_port,
    }
    if wrong := [flag for flag, value in given.items() if value]:
        raise ConfigError(f"{wrong[0]}: it is for rings on this machine; leave it out, or --topology")
    loaded = load_topology(file)
    secret_of(loaded, loaded.topology.starter)  # a wrong key is reported before torch is loaded
    logging.configure(options.log_level, node=loaded.topology.starter.name)
    return loaded


def _read_requests(options: RunOptions) -> list[PromptLine]:
    if (options.prompt is None) == (options.prompts is None):
        raise ConfigError('mdiq run: give a prompt or --prompts FILE, one of them: mdiq run "Why is the sky blue?"')
    if options.prompts is None:
        return [PromptLine(0, "prompt", options.params, text=options.prompt)]
    return read_prompts(options.prompts, options.params)


def _todo(batch: Batch, lines: list[PromptLine], console: Console) -> list[PromptLine]:
    """Return the requests without a result, and say how many there are in a run that goes on."""
    out = batch.results.path
    finished = read_finished(out, lines) if batch.results.is_regular else set()
    batch.results.drop_cut_line()
    todo = [line for line in lines if line.index not in finished]
    begun = [batch.begun[line.index] for line in todo if line.index in batch.begun]
    if not todo:
        console.print(f"{out}: all {len(lines)} requests are done already")
        batch.end()
    elif finished or begun:
        num_tokens = sum(len(each.tokens) for each in begun)
        console.print(
            f"{out}: {len(finished)} of {len(lines)} requests are done; {len(begun)} go on after {num_tokens} tokens",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return todo


@contextlib.contextmanager
def _loading_bars(console: Console) -> Iterator["_LoadingBars"]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _LoadingBars(progress)


class _LoadingBars:
    """One progress bar a Node."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def __call__(self, node: str, done: int, total: int) -> None:
        if node not in self._bars:
            self._bars[node] = self._progress.add_task(f"{node} loads", total=total)
        self._progress.update(self._bars[node], completed=done, total=total)
