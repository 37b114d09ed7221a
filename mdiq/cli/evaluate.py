"""`mdiq evaluate`: the paper's evaluation on local rings, from flags to pages."""

import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer
from rich.console import Console

from mdiq.bench.shapes import MHA, find_shape, shape_file
from mdiq.bench.workload import FIRST_TOKEN
from mdiq.cli.flags import parse_numbers, parse_wires
from mdiq.cli.progress import shown_progress
from mdiq.cli.report_commands import EvaluateOptions, PageLanguage
from mdiq.cli.signals import run_until_signal
from mdiq.control.agent import HEARTBEAT_S
from mdiq.core.ring_settings import RingSettings
from mdiq.core.wire_formats import AUTO, WIRE_FORMATS
from mdiq.errors import ConfigError
from mdiq.report.evaluate import EXAMPLE_TOKENS, WIRE_NODES, Evaluation, Evaluator, Subject, kv_tokens, longest_text
from mdiq.report.evaluation_page import evaluation_page
from mdiq.report.page import LANGUAGES, Document, Language
from mdiq.report.png import can_draw, japanese_font
from mdiq.report.receipt import make_receipt
from mdiq.report.write import MakePage, check_folder, write
from mdiq.runtime.options import Outages, RingOptions
from mdiq.runtime.placement import set_threads, usable_cores, usable_threads
from mdiq.telemetry import logging
from mdiq.testbed.cpu_quota import MIN_CPU, check_quota
from mdiq.testbed.link_shape import LinkShape, parse_link

if TYPE_CHECKING:
    from mdiq.engine.model_config import ModelConfig
    from mdiq.report.measure import MeasurableRing

USUAL_MODELS = ("smollm2-135m", "gpt2")
REST_S = 1.5 * HEARTBEAT_S
"""After a Load, every Node's heartbeat has come."""


def execute(options: EvaluateOptions) -> int:
    """Measure and write; return the exit code."""
    logging.configure(options.log_level, node="node-0")
    lengths = tuple(sorted(set(parse_numbers("--lengths", options.lengths, 1 << 20))))
    wires = parse_wire_list(options.wires)
    link = check_circumstances(options.link, options.cpu)
    check_folder(options.out, "evaluation")
    receipt = make_receipt(sys.argv[1:])
    threads = options.threads or max(usable_threads() // options.nodes, 1)
    set_threads(threads)
    console = Console(stderr=True)
    names = tuple(dict.fromkeys(options.model or USUAL_MODELS))
    longest = longest_text(options.prompt_tokens, options.answer_tokens, lengths)
    subjects = [_subject(name, options, console, longest) for name in names]
    with shown_progress(console) as progress:
        evaluator = _evaluator(options, lengths, wires, threads, longest, link, progress)
        models = run_until_signal(evaluator.run(subjects))
    settings = {
        "nodes": options.nodes,
        "prompt_tokens": options.prompt_tokens,
        "answer_tokens": options.answer_tokens,
        "uncached_tokens": evaluator.uncached_tokens,
        "lengths": list(lengths),
        "wires": list(wires),
        "weights": options.weights,
        "dtype": options.dtype,
        "threads_per_node": threads,
        "cpu_per_node": options.cpu,
        "link": None if link is None else str(link),
        "seed": options.seed,
        "example_tokens": EXAMPLE_TOKENS,
    }
    document = Evaluation(receipt, settings, models).as_document()
    write_pages(document, evaluation_page, options.language, options.out, "evaluation")
    return 0


def check_circumstances(link: str | None, cpu: float | None) -> LinkShape | None:
    """Return the link's shape, and see that the machine allows the quota.

    Raises:
        ConfigError: it does not, or a value is wrong.
    """
    if cpu is not None:
        if not MIN_CPU <= cpu <= usable_cores():
            raise ConfigError(f"--cpu {cpu:g}: give {MIN_CPU:g} to {usable_cores()} cores for each node")
        check_quota()
    return None if link is None else parse_link(link)


def check_model(config: "ModelConfig", nodes: int, longest: int, name: str, given: str) -> None:
    """Check that a model can be measured on so many nodes, with texts of up to ``longest`` tokens.

    name: of the model. given: how errors name what the user gave.

    Raises:
        ConfigError: it cannot.
    """
    from mdiq.plan.split import split_layers

    split_layers(config.num_layers, nodes, config.head_layers)  # refuses more nodes than layers
    if longest > config.context_tokens:
        raise ConfigError(
            f"--answer-tokens, --lengths: the longest text has {longest} tokens; "
            f"the context of {name} has {config.context_tokens}"
        )
    if config.vocab_size <= FIRST_TOKEN:
        raise ConfigError(f"{given}: its vocabulary of {config.vocab_size} tokens is too small for a load")


def parse_wire_list(text: str) -> tuple[str, ...]:
    """Return the formats of a list like f32,bf16,i8, each once."""
    wires = tuple(dict.fromkeys(text.split(",")))
    for wire in wires:
        if wire not in WIRE_FORMATS:
            raise ConfigError(f"--wires {text}: {wire!r} is not a format; use some of {', '.join(WIRE_FORMATS)}")
    return wires


def write_pages(document: Document, make_page: MakePage, language: PageLanguage, folder: Path, name: str) -> None:
    """Write a document and its pages, and say which files there are."""
    for file in write(document, make_page, languages_of(language), folder, name):
        typer.echo(str(file))
    if not can_draw():
        typer.echo("no PNG files: matplotlib is not installed; run: pip install 'mdiq[plot]'", err=True)
    elif language is not PageLanguage.EN and japanese_font() is None:
        typer.echo("PNG files in English only: no Japanese font is here; install one, such as fonts-ipafont", err=True)


def languages_of(language: PageLanguage) -> tuple[Language, ...]:
    """Return the languages of the pages."""
    return LANGUAGES if language is PageLanguage.BOTH else (cast(Language, language.value),)


def _subject(name: str, options: EvaluateOptions, console: Console, longest: int) -> Subject:
    from mdiq.engine.formats.model_source import find_model
    from mdiq.engine.model_config import read_config

    def progress(text: str) -> None:
        console.print(text, style="dim")

    shape = find_shape(name)
    path = find_model(name, progress) if shape is None else shape_file(name, options.bits, progress)
    config = read_config(path)
    check_model(config, options.nodes, longest, name, f"--model {name}")
    full = None
    if shape is not None and shape.num_kv_heads < shape.num_heads:
        full_path = shape_file(name + MHA, options.bits, progress)
        full = Subject(name + MHA, full_path, read_config(full_path), is_random=True)
    return Subject(name if shape else path.name, path, config, shape is not None, full)


def _evaluator(
    options: EvaluateOptions,
    lengths: tuple[int, ...],
    wires: tuple[str, ...],
    threads: int,
    longest: int,
    link: LinkShape | None,
    progress: Callable[[str], None],
) -> Evaluator:
    from mdiq.engine.model_config import read_config
    from mdiq.plan.split import split_layers
    from mdiq.runtime.ring_host import RingHost
    from mdiq.testbed.slow_ring import SlowRing

    def open_ring(model: Path, nodes: int, wire: str) -> "AbstractAsyncContextManager[MeasurableRing]":
        config = read_config(model)
        return RingHost(
            RingOptions(
                model=model,
                layers=split_layers(config.num_layers, nodes, config.head_layers),
                weights=options.held,
                threads=threads,
                kv_tokens=kv_tokens(max(nodes, 2), longest),
                log_level=options.log_level,
                wires=parse_wires(wire, 1),
                slowdown=SlowRing(link, options.cpu),
                ring=RingSettings(prefix_tokens=0),
                outages=Outages(tolerance_s=0.0),
            )
        )

    delay_s = 0.0 if link is None else link.delay_s + link.jitter_s
    return Evaluator(
        nodes=range(1, options.nodes + 1),
        prompt_tokens=options.prompt_tokens,
        answer_tokens=options.answer_tokens,
        uncached_tokens=options.answer_tokens if options.no_kv_cache else 0,
        lengths=lengths,
        wires=wires,
        usual_wire=AUTO,
        item_bytes=WIRE_FORMATS[options.dtype].element_bytes,
        seed=options.seed,
        rest_s=REST_S,
        lap_s=max(options.nodes, WIRE_NODES) * delay_s,
        open_ring=open_ring,
        progress=progress,
    )
