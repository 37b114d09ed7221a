"""`mdiq report`: a staged trial on local rings, from flags to pages."""

import math
import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import psutil
from rich.console import Console

from mdiq.bench.shapes import shape_file
from mdiq.bench.workload import Load
from mdiq.cli.evaluate import REST_S, check_circumstances, check_model, parse_wire_list, write_pages
from mdiq.cli.flags import parse_numbers, parse_wires
from mdiq.cli.progress import shown_progress
from mdiq.cli.report_commands import ReportOptions
from mdiq.cli.signals import run_until_signal
from mdiq.config.units import parse_size
from mdiq.core.ring_settings import RingSettings
from mdiq.core.types import LayerRange
from mdiq.core.wire_formats import AUTO, WIRE_FORMATS
from mdiq.errors import ConfigError
from mdiq.plan.partition import Split
from mdiq.report.cost import Prices
from mdiq.report.drill import kill_child
from mdiq.report.evaluate import Subject, about, kv_tokens, longest_text
from mdiq.report.gates import Limits
from mdiq.report.receipt import Receipt, make_receipt
from mdiq.report.trial import Trial
from mdiq.report.trial_document import running_document, trial_document
from mdiq.report.trial_page import trial_page
from mdiq.report.write import check_folder
from mdiq.runtime.options import RingOptions
from mdiq.runtime.placement import set_threads, usable_threads
from mdiq.telemetry import logging
from mdiq.testbed.link_shape import LinkShape

if TYPE_CHECKING:
    from mdiq.report.trial import TriedRing


def execute(options: ReportOptions) -> int:
    """Try, weigh and write; return the exit code."""
    logging.configure(options.log_level, node="node-0")
    if options.model is not None and options.shape is not None:
        raise ConfigError("mdiq report: give --model or --shape, not both")
    if options.few > options.nodes:
        raise ConfigError(f"--few {options.few}: it is more than --nodes {options.nodes}; give at most as many")
    others = [f"node-{i}" for i in range(1, options.nodes)]
    if options.api is None and options.drill_node is not None and options.drill_node not in others:
        text = f"give one of {', '.join(others)}; node-0 measures, so it stays"
        raise ConfigError(f"--drill-node {options.drill_node}: {text}")
    lengths = tuple(sorted(set(parse_numbers("--lengths", options.lengths, 1 << 20))))
    wires = parse_wire_list(options.wires)
    link = check_circumstances(options.link, options.cpu)
    device_bytes = _device_bytes(options.device_memory)
    prices = _prices(options)
    check_folder(options.out, "report")
    receipt = make_receipt(sys.argv[1:])
    if options.api is not None:
        return _running(options, options.api, prices, receipt)
    threads = options.threads or max(usable_threads() // options.nodes, 1)
    set_threads(threads)
    console = Console(stderr=True)
    longest = longest_text(options.prompt_tokens, options.answer_tokens, lengths)
    subject = _subject(options, console, longest)
    with shown_progress(console) as progress:
        trial = _trial(options, subject, lengths, wires, threads, longest, link, device_bytes, progress)
        run = run_until_signal(trial.run())
    document = trial_document(
        receipt,
        _settings(options, threads, link, lengths, wires),
        about(subject, WIRE_FORMATS[options.dtype].element_bytes),
        run,
        prices,
        device_bytes or psutil.virtual_memory().total,
        is_device_given=device_bytes is not None,
        num_devices=options.nodes,
    )
    write_pages(document, trial_page, options.language, options.out, "report")
    return 0


def _running(options: ReportOptions, url: str, prices: Prices, receipt: Receipt) -> int:
    """Measure a ring that runs, and write; return the exit code."""
    from mdiq.report.running import RunningRing  # it needs aiohttp

    local = {
        "--model": options.model,
        "--shape": options.shape,
        "--link": options.link,
        "--cpu": options.cpu,
        "--device-memory": options.device_memory,
        "--drill-node": options.drill_node,
    }
    if given := [flag for flag, value in local.items() if value is not None]:
        raise ConfigError(f"{given[0]}: it is for rings on this machine; leave it out, or --api")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--api {url}: write the address with http:// or https://, as in http://127.0.0.1:8080")
    if "@" in url or "?" in url:  # the report shows the address
        raise ConfigError("--api: leave user, password and ? out of the address; the key is read from MDIQ_API_KEY")
    load = Load(options.users, options.prompt_tokens, options.answer_tokens, options.seed)
    ring = RunningRing(url, os.environ.get("MDIQ_API_KEY"))
    model, stage = run_until_signal(ring.measure(load, _limits(options), REST_S))
    kept = "users prompt_tokens answer_tokens seed".split()
    settings = {name: getattr(options, name) for name in kept} | {"is_local": False, "url": url}
    document = running_document(receipt, settings, model, stage, prices)
    write_pages(document, trial_page, options.language, options.out, "report")
    return 0


def _limits(options: ReportOptions) -> Limits:
    return Limits(
        min_tokens_per_s=options.min_tokens_per_s,
        max_token_s=options.max_token_ms / 1_000,
        max_recovery_s=options.max_recovery,
    )


def _device_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"--device-memory: {error}") from None


def _prices(options: ReportOptions) -> Prices:
    numbers = {
        "--watts": options.watts,
        "--device-cost": options.device_cost,
        "--power-price": options.power_price,
        "--price-per-million-tokens": options.price_per_million_tokens,
        "--lifetime-years": options.lifetime_years,
        "--min-tokens-per-s": options.min_tokens_per_s,
        "--max-token-ms": options.max_token_ms,
        "--max-recovery": options.max_recovery,
    }
    for flag, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"{flag} {number}: give a finite number")
    return Prices(
        per_million_tokens=options.price_per_million_tokens,
        device_cost=options.device_cost,
        power_price=options.power_price,
        currency=options.currency,
        watts=options.watts,
        lifetime_years=options.lifetime_years,
        load_share=options.load_share,
    )


def _subject(options: ReportOptions, console: Console, longest: int) -> Subject:
    from mdiq.engine.formats.model_source import find_model
    from mdiq.engine.model_config import read_config

    def progress(text: str) -> None:
        console.print(text, style="dim")

    is_random = options.shape is not None
    path = shape_file(options.shape, options.bits, progress) if options.shape else find_model(options.model, progress)
    config = read_config(path)
    check_model(config, options.nodes, longest, options.shape or path.name, path.name)
    return Subject(options.shape or path.name, path, config, is_random)


def _trial(
    options: ReportOptions,
    subject: Subject,
    lengths: tuple[int, ...],
    wires: tuple[str, ...],
    threads: int,
    longest: int,
    link: LinkShape | None,
    device_bytes: int | None,
    progress: Callable[[str], None],
) -> Trial:
    from mdiq.runtime.ring_host import RingHost
    from mdiq.testbed.slow_ring import SlowRing

    capacity = kv_tokens(options.users, longest)

    def open_ring(split: Split, wire: str | None) -> "AbstractAsyncContextManager[TriedRing]":
        starts = pairwise(accumulate(split, initial=0))
        return RingHost(
            RingOptions(
                model=subject.path,
                layers=tuple(LayerRange(start, stop) for start, stop in starts),
                weights=options.held,
                threads=threads,
                kv_tokens=capacity,
                log_level=options.log_level,
                wires=parse_wires(wire or AUTO, 1),
                slowdown=SlowRing(link, options.cpu),
                ring=RingSettings(prefix_tokens=0),
            )
        )

    delay_s = 0.0 if link is None else link.delay_s + link.jitter_s
    return Trial(
        num_layers=subject.config.num_layers,
        head_layers=subject.config.head_layers,
        vocab_size=subject.config.vocab_size,
        weights=options.weights,
        nodes=options.nodes,
        few=options.few,
        users=options.users,
        prompt_tokens=options.prompt_tokens,
        answer_tokens=options.answer_tokens,
        seed=options.seed,
        kv_tokens=capacity,
        device_bytes=device_bytes,
        limits=_limits(options),
        keeps_going=options.keep_going,
        wires=wires,
        lengths=lengths,
        rest_s=REST_S,
        lap_s=options.nodes * delay_s,
        open_ring=open_ring,
        kill=kill_child,
        drill_node=options.drill_node,
        progress=progress,
    )


def _settings(
    options: ReportOptions, threads: int, link: LinkShape | None, lengths: tuple[int, ...], wires: tuple[str, ...]
) -> dict[str, object]:
    kept = "nodes few users prompt_tokens answer_tokens weights dtype seed keep_going drill_node".split()
    return {name: getattr(options, name) for name in kept} | {
        "is_local": True,
        "threads_per_node": threads,
        "cpu_per_node": options.cpu,
        "link": None if link is None else str(link),
        "lengths": list(lengths),
        "wires": list(wires),
    }
