"""`mdiq bench`: a grid of loads on local rings, and on a peer beside them; tables, JSON and plots."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mdiq.bench.figures import LoadFigures
from mdiq.bench.machine import machine
from mdiq.bench.plots import check_plots, draw
from mdiq.bench.report import WHAT_APART_SHOWS, WHY_FIXED_TOTAL_IS_LOWER, Report, make_report
from mdiq.bench.runner import WARM_UP_TOKENS, Bench, PeerCell
from mdiq.bench.workload import ApartCell, Cell, grid
from mdiq.cli.flags import check_writable, parse_numbers, parse_temperatures, parse_wires
from mdiq.cli.progress import shown_progress
from mdiq.cli.ring_commands import BenchOptions
from mdiq.cli.signals import run_until_signal
from mdiq.control.agent import HEARTBEAT_S
from mdiq.core.ring_settings import RingSettings
from mdiq.errors import ConfigError
from mdiq.runtime.options import Outages, RingOptions
from mdiq.runtime.placement import bind_to_core, core_of, set_threads, usable_cores, usable_threads
from mdiq.telemetry import logging
from mdiq.testbed.cpu_quota import MIN_CPU, check_quota
from mdiq.testbed.link_shape import LinkShape, parse_link

if TYPE_CHECKING:  # torch is imported after set_threads
    from mdiq.engine.model_config import ModelConfig

NO_LINK = "none"
MAX_NODES = 64
MAX_USERS = 1024  # a Frame has no room for more Segments
KV_STEP = 32  # tokens of a KvBlock
PLAIN_WIDTH = 140  # of tables that go to a file or a pipe
_LOAD = ("nodes", "users", "prompt")
_DRAWS = "temp."  # a column where a load draws
_FIGURES = ("tokens/s", "with prompts", "first token", "next token")
REST_S = 1.5 * HEARTBEAT_S  # after a Load, every Node's heartbeat has come


def execute(options: BenchOptions) -> int:
    """Measure, print and write; return the exit code."""
    logging.configure(options.log_level, node="node-0")
    console = Console(stderr=True)
    cells = _cells(options)
    _check(options, cells)
    nodes = sorted({cell.nodes for cell in cells})
    threads = options.threads or max(usable_threads() // nodes[-1], 1)
    set_threads(threads)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    from mdiq.engine.model_config import read_config

    model = _model(options, console)
    config = read_config(model)
    _check_model(options, cells, config, model)
    if options.pin:
        bind_to_core(core_of(0))
    peer_threads = _peer_threads(options, nodes, threads)
    with shown_progress(console) as progress:
        bench = _bench(options, cells, model, config, threads, peer_threads, cores, progress)
        measured = run_until_signal(bench.run())
    kept = "weights exact wire dtype device pin answer_tokens repeats seed peer".split()
    settings: dict[str, object] = {"model": model.name, "threads_per_node": threads, "cpu_per_node": options.cpu}
    settings |= {name: getattr(options, name) for name in kept}
    report = make_report(measured, machine=machine(), settings=settings)
    print_report(Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH), report)
    if options.json_file is not None:
        _write(options.json_file, report)
    if options.plot is not None:
        for file in draw(report, options.plot):
            console.print(f"{file}", style="dim", highlight=False)
    return 0


def _bench(
    options: BenchOptions,
    cells: Sequence[Cell],
    model: Path,
    config: "ModelConfig",
    threads: int,
    peer_threads: Sequence[int],
    cores: tuple[int, ...],
    progress: Callable[[str], None],
) -> Bench:
    from mdiq.bench.apart import RingsApart
    from mdiq.bench.peer import Peer
    from mdiq.plan.split import split_layers
    from mdiq.runtime.ring_host import RingHost
    from mdiq.testbed.slow_ring import SlowRing

    layers = {count: split_layers(config.num_layers, count, config.head_layers) for count in {c.nodes for c in cells}}

    def of_ring(nodes: int, link: LinkShape | None = None) -> RingOptions:
        return RingOptions(
            model=model,
            layers=layers[nodes],
            weights=options.held,
            threads=threads,
            pin=options.pin,
            kv_tokens=options.kv_tokens or _kv_tokens(cells, nodes, options.answer_tokens),
            log_level=options.log_level,
            wires=parse_wires(options.wire, 1),
            slowdown=SlowRing(link, options.cpu),
            # Every round asks the same prompts: each is to be computed each time.
            ring=RingSettings(prefix_tokens=0),
            outages=Outages(tolerance_s=0.0),  # what is measured while a node starts again says nothing
        )

    peer = Peer(
        python=options.peer_python or sys.executable,
        model=model,
        vocab_size=config.vocab_size,
        cores=cores if options.pin else (),
        cpu=options.cpu,
    )
    # What is measured apart has a ring of one Node to be measured against.
    bound = cores if options.pin else ()
    apart = RingsApart(of_ring(1), config.vocab_size, bound, cpu=options.cpu) if options.apart else None
    return Bench(
        cells=cells,
        answer_tokens=options.answer_tokens,
        repeats=options.repeats,
        seed=options.seed,
        vocab_size=config.vocab_size,
        rest_s=REST_S,
        open_ring=lambda nodes, link: RingHost(of_ring(nodes, link)),
        peer_cells=[
            PeerCell(count, users, prompt)
            for count in peer_threads
            for users, prompt in sorted({(cell.users, cell.prompt_tokens) for cell in cells})
        ],
        run_peer=peer.run,
        apart_cells=_apart_cells(cells) if apart else (),
        run_apart=apart.run if apart else None,
        progress=progress,
    )


def _cells(options: BenchOptions) -> tuple[Cell, ...]:
    if options.users is not None and options.users_per_node is not None:
        raise ConfigError("mdiq bench: give --users or --users-per-node, not both")
    users = options.users if options.users is not None or options.users_per_node is not None else "1,4"
    per_node = options.users_per_node
    return grid(
        parse_numbers("--nodes", options.nodes, MAX_NODES),
        () if users is None else parse_numbers("--users", users, MAX_USERS),
        () if per_node is None else parse_numbers("--users-per-node", per_node, MAX_USERS),
        parse_numbers("--prompt-tokens", options.prompt_tokens, 1 << 20),
        [None if text == NO_LINK else parse_link(text) for text in options.link or ()] or [None],
        parse_temperatures(options.temperature),
    )


def _apart_cells(cells: Sequence[Cell]) -> tuple[ApartCell, ...]:
    """Return what is measured apart: of each ring's cell that one Node has with as many users a Node."""
    beside = dict.fromkeys(ApartCell.beside(cell) for cell in cells)
    return tuple(
        apart
        for apart in beside
        if apart and Cell(1, apart.users, apart.prompt_tokens, temperature=apart.temperature) in cells
    )


def _check(options: BenchOptions, cells: Sequence[Cell]) -> None:
    """Refuse what would fail later, before anything is loaded."""
    nodes = max(cell.nodes for cell in cells)
    if options.model is not None and options.shape is not None:
        raise ConfigError("mdiq bench: give --model or --shape, not both")
    users = max(cell.users for cell in cells)
    if users > MAX_USERS:
        raise ConfigError(f"--users-per-node: {users} users on {nodes} nodes; a ring takes up to {MAX_USERS}")
    if options.pin and nodes > usable_cores():
        raise ConfigError(f"--pin: {nodes} nodes need as many cores; there are {usable_cores()}")
    if options.apart and not _apart_cells(cells):
        raise ConfigError("--apart: it goes with rings of one and of more nodes; add --nodes 1,2 --users-per-node 4")
    if options.plot is not None:
        check_plots()
    if options.cpu is not None:
        if not MIN_CPU <= options.cpu <= usable_cores():
            raise ConfigError(f"--cpu {options.cpu:g}: give {MIN_CPU:g} to {usable_cores()} cores for each node")
        check_quota()
    if options.json_file is not None:
        check_writable("--json", options.json_file)
    if options.peer is not None and options.peer != "llama-cpp":
        raise ConfigError(f"--peer {options.peer}: no such peer; known is llama-cpp")
    if options.peer is not None and any(cell.temperature for cell in cells):
        raise ConfigError("--temperature: the peer answers greedily only; leave --temperature or --peer out")
    if options.peer is None and (options.peer_python is not None or options.peer_threads is not None):
        raise ConfigError("mdiq bench: --peer-python and --peer-threads go with --peer llama-cpp; add it")


def _check_model(options: BenchOptions, cells: Sequence[Cell], config: "ModelConfig", model: Path) -> None:
    longest = max(cell.prompt_tokens for cell in cells) + max(options.answer_tokens, WARM_UP_TOKENS)
    if longest > config.context_tokens:
        raise ConfigError(
            f"--prompt-tokens: the longest prompt and its answer have {longest} tokens; "
            f"the context of {model.name} has {config.context_tokens}"
        )
    if options.peer is not None and model.suffix.lower() != ".gguf":
        raise ConfigError(f"--peer {options.peer}: it reads .gguf files only; give one with --model, or --shape")


def _model(options: BenchOptions, console: Console) -> Path:
    from mdiq.bench.shapes import shape_file
    from mdiq.engine.formats.model_source import find_model

    def progress(text: str) -> None:
        console.print(text, style="dim")

    return shape_file(options.shape, options.bits, progress) if options.shape else find_model(options.model, progress)


def _peer_threads(options: BenchOptions, nodes: Sequence[int], threads: int) -> tuple[int, ...]:
    """Return the peer's thread counts: as asked, else what the Nodes of each ring have together."""
    if options.peer is None:
        return ()
    if options.peer_threads is not None:
        return tuple(sorted(set(parse_numbers("--peer-threads", options.peer_threads, 1024))))
    return tuple(sorted({count * threads for count in nodes}))


def _kv_tokens(cells: Sequence[Cell], nodes: int, answer_tokens: int) -> int:
    """Return the KV cache that the largest Load of a ring needs."""
    of_ring = [cell for cell in cells if cell.nodes == nodes]
    # The warm-up asks with the most users and the longest prompt at once.
    users = max(cell.users for cell in of_ring)
    longest = max(cell.prompt_tokens for cell in of_ring) + max(answer_tokens, WARM_UP_TOKENS)
    return users * -(-longest // KV_STEP) * KV_STEP


def _write(path: Path, report: Report) -> None:
    try:
        path.write_text(report.as_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror or error}; name a file that can be written") from None


def print_report(console: Console, report: Report) -> None:
    """Print the tables: cells, how they scale, the peer and the ratios."""
    draws = any(r.cell.temperature for r in report.cells)
    for link in dict.fromkeys(r.cell.link for r in report.cells):
        columns = [*_LOAD, *([_DRAWS] if draws else []), *_FIGURES, "busy", "work waited", "wire", "bytes/token"]
        table = _table(f"mdiq, {report.settings['model']}" + (f", every hop {link}" if link else ""), columns)
        for r in report.cells:
            if r.cell.link == link:
                busy = " ".join(f"{node.busy_share:.0%}" for node in r.nodes)
                waited = max((node.waiting_share for node in r.nodes), default=0.0)
                num_bytes = max((node.bytes_per_token for node in r.nodes), default=0.0)
                table.add_row(
                    *_load(r.cell),
                    *([_temperature(r.cell)] if draws else []),
                    *_figures(r.figures),
                    busy,
                    f"{waited:.1%}",
                    " ".join(dict.fromkeys(hop.wire for hop in r.hops)) or "-",
                    f"{num_bytes:.0f}" if num_bytes else "-",
                )
        console.print(table)
    console.print("first and next token: ms, median and in brackets 95th percentile", style="dim", highlight=False)
    _print_draws(console, report)
    _print_scaling(console, report)
    if report.peer:
        _print_peer(console, report)


def _print_draws(console: Console, report: Report) -> None:
    if not report.draws:
        return
    table = _table("tokens/s against temperature 0", [*_LOAD, _DRAWS, "link", "tokens/s", "with prompts"])
    for cost in report.draws:
        link = str(cost.cell.link or "-")
        table.add_row(*_load(cost.cell), _temperature(cost.cell), link, _ratio(cost.decode), _ratio(cost.total))
    console.print(table)


def _print_scaling(console: Console, report: Report) -> None:
    if not report.scaling:
        return
    least = min(r.cell.nodes for r in report.cells)
    columns = [*_LOAD, _DRAWS, "link", "same users per node", "rings apart", "same users in all"]
    table = _table(f"tokens/s against {least} node{'s' if least > 1 else ''}", columns)
    for scaling in report.scaling:
        ratios = (scaling.same_per_node, scaling.apart, scaling.fixed_total)
        link = str(scaling.cell.link or "-")
        table.add_row(*_load(scaling.cell), _temperature(scaling.cell), link, *map(_ratio, ratios))
    console.print(table)
    if any(scaling.apart is not None for scaling in report.scaling):
        console.print(WHAT_APART_SHOWS, style="dim", highlight=False)
    if any(scaling.fixed_total is not None for scaling in report.scaling):
        console.print(WHY_FIXED_TOTAL_IS_LOWER, style="dim", highlight=False)


def _print_peer(console: Console, report: Report) -> None:
    columns = ["threads", "users", "prompt", *_FIGURES, "memory"]
    table = _table("llama.cpp, the same file and prompts", columns)
    for peer in report.peer:
        cell = peer.cell
        load = (str(cell.threads), str(cell.users), str(cell.prompt_tokens))
        table.add_row(*load, *_figures(peer.figures), f"{peer.rss_bytes / 1e6:.0f} MB")
    console.print(table)
    columns = [*_LOAD, "link", "llama.cpp's threads", "tokens/s", "with prompts"]
    table = _table("mdiq / llama.cpp", columns)
    for ratio in report.ratios:
        link, threads = str(ratio.cell.link or "-"), str(ratio.peer_threads)
        table.add_row(*_load(ratio.cell), link, threads, _ratio(ratio.decode), _ratio(ratio.total))
    console.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=column == "link")
    return table


def _load(cell: Cell) -> tuple[str, str, str]:
    return str(cell.nodes), str(cell.users), str(cell.prompt_tokens)


def _temperature(cell: Cell) -> str:
    return f"{cell.temperature:g}"


def _figures(figures: LoadFigures) -> tuple[str, ...]:
    return (
        f"{figures.decode_tokens_per_s:.1f}",
        f"{figures.total_tokens_per_s:.1f}",
        f"{figures.ttft_median_s * 1e3:.0f} ({figures.ttft_p95_s * 1e3:.0f})",
        f"{figures.itl_median_s * 1e3:.0f} ({figures.itl_p95_s * 1e3:.0f})",
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
