"""`mdiq simulate`: what a ring of devices would do, before they are bought."""

import re
from pathlib import Path

import typer
from rich.console import Console

from mdiq.cli.progress import shown_progress
from mdiq.cli.simulate_options import AUTO, MODEL, SimulateOptions
from mdiq.core.known_models import KNOWN_MODELS
from mdiq.errors import ConfigError
from mdiq.report.catalogue import Catalogue, Device, Figure, LinkKind, Mark, Shape, read_catalogues
from mdiq.report.simulate import simulate
from mdiq.report.simulate_nodes import Held, held_as
from mdiq.report.simulate_rings import MAX_DEVICES, Question
from mdiq.report.simulate_text import as_json, render
from mdiq.runtime.placement import set_threads, usable_threads
from mdiq.telemetry import logging
from mdiq.testbed.link_shape import parse_link


def execute(options: SimulateOptions) -> int:
    """Do what the flags say; return the exit code.

    Raises:
        MdiqError: a flag, a catalogue or a model cannot be used.
    """
    catalogue = read_catalogues(options.catalogue or ())
    if options.measure or options.check:
        return _measure(options, catalogue)
    if options.list_all:
        typer.echo("\n".join(_listed(catalogue)))
        return 0
    question = question_of(options, catalogue)
    found = simulate(question, catalogue, rings_of(options.rings, len(question.devices)))
    if options.as_json:
        typer.echo(as_json(found, catalogue))
    else:
        typer.echo(render(found, catalogue, with_sources=options.sources), nl=False)
    return 0 if found.layout is not None else 1


def question_of(options: SimulateOptions, catalogue: Catalogue) -> Question:
    """Return what the flags ask.

    Raises:
        ConfigError: a name is not known, or a number is out of range.
        ModelError: a model's file cannot be used.
    """
    shape, held = model_of(options.model or MODEL, options.weights, options.dtype, catalogue)
    return Question(
        shape,
        held,
        devices_of(options.devices, catalogue),
        link_of(options.link, catalogue),
        options.users,
        options.prompt,
        options.answer,
    )


def devices_of(text: str, catalogue: Catalogue) -> tuple[Device, ...]:
    """Return the devices that a text like ``pi5-8gb*4,office-pc-2015*2`` names.

    Raises:
        ConfigError: a kind or a number is not right.
    """
    if not text:
        raise ConfigError("--devices: give some, for example pi5-8gb*4,office-pc-2015*2; --list shows the kinds")
    devices: list[Device] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^*\s]+)(?:\*(\d{1,4}))?\s*", part)
        if match is None:
            raise ConfigError(f"--devices {text}: {part!r} is not a kind with a number; write for example pi5-8gb*4")
        device = catalogue.devices.get(match[1])
        if device is None:
            known = ", ".join(catalogue.devices)
            raise ConfigError(f"--devices {text}: {match[1]!r} is not known; use one of {known}, or --catalogue FILE")
        devices += [device] * int(match[2] or 1)
        if len(devices) > MAX_DEVICES:
            raise ConfigError(f"--devices {text}: more than {MAX_DEVICES:,} devices; take fewer")
    if not devices:
        raise ConfigError(f"--devices {text}: no device is left; give at least one")
    return tuple(devices)


def link_of(text: str, catalogue: Catalogue) -> LinkKind:
    """Return a link of the catalogue, or one that a text like ``delay=20ms,bandwidth=50mbit`` describes.

    Raises:
        ConfigError: it is neither.
    """
    if text in catalogue.links:
        return catalogue.links[text]
    if "=" not in text:
        known = ", ".join(catalogue.links)
        raise ConfigError(f"--link {text}: not known; use one of {known}, or write delay=20ms,bandwidth=50mbit")
    shape = parse_link(text)
    source = f"--link {text}"
    # Without a limit: faster than any frame of a ring shows.
    rate = Figure((shape.bandwidth_bit_per_s or 1e12) / 8, Mark.GIVEN, source)
    return LinkKind("given", f"links of {shape}", rate, Figure(shape.delay_s, Mark.GIVEN, source))


def model_of(text: str, weights: str, dtype: str, catalogue: Catalogue) -> tuple[Shape, Held]:
    """Return a model's shape and how mdiq would hold it; of a file the header is read.

    Raises:
        ConfigError: it is neither a name nor a file.
        ModelError: the file cannot be used.
    """
    if text in catalogue.models:
        return catalogue.models[text], held_as("int8" if weights == AUTO else weights, dtype)
    path = Path(text)
    if text not in KNOWN_MODELS and not path.exists():
        known = ", ".join(catalogue.models)
        raise ConfigError(f"--model {text}: no such file, and no such name; use one of {known}")
    from mdiq.engine.formats.model_source import find_model
    from mdiq.report.simulate_files import held_of_file, shape_of_file

    path = find_model(text, lambda progress: typer.echo(progress, err=True))
    return shape_of_file(path), held_of_file(path, weights, dtype)


def rings_of(text: str, num_devices: int) -> int | None:
    """Return the number of rings, or None where the best is wanted.

    Raises:
        ConfigError: it is not a number from 1 to that of the devices.
    """
    if text == AUTO:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= num_devices:
        raise ConfigError(f"--rings {text}: give auto, or a number from 1 to that of the devices, {num_devices}")
    return int(text)


def _listed(catalogue: Catalogue) -> list[str]:
    lines = ["devices"]
    for device in catalogue.devices.values():
        lines.append(f"  {device.name:<22}{device.title}")
    lines.append("links")
    for link in catalogue.links.values():
        lines.append(f"  {link.name:<22}{link.title}")
    lines.append("models")
    for shape in catalogue.models.values():
        mixture = f", {shape.active_experts} of {shape.num_experts} experts" if shape.num_experts else ""
        lines.append(f"  {shape.name:<22}{shape.params / 1e9:.2f} billion weights, {shape.num_layers} layers{mixture}")
    return lines


def _measure(options: SimulateOptions, catalogue: Catalogue) -> int:
    """Measure this machine, or rings on it; torch is imported from here on."""
    logging.configure(options.log_level, node="node-0")
    threads = 1 if options.check else options.threads or usable_threads()
    set_threads(threads)
    from mdiq.cli.signals import run_until_signal
    from mdiq.report.simulate_check import cases, check, check_json, check_text, measured_in_part, prepare
    from mdiq.report.simulate_measure import Machine, as_yaml, measure_machine
    from mdiq.report.simulate_overhead import measure_overhead, with_overhead

    console = Console(stderr=True)
    model = _model_file(options, console)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", options.name):
        raise ConfigError(f"--name {options.name}: use small letters, digits, dots and dashes, up to 64")
    with shown_progress(console) as progress:
        progress("measuring this machine")

        def measure() -> Machine:
            return measure_machine(
                model,
                options.name,
                weights=options.weights,
                dtype=options.dtype,
                exact=options.exact,
                progress=progress,
            )

        rings = cases(options.cpu)
        if options.check:
            prepare(rings)
        # As a Node of the rings has it.
        machine = measured_in_part(measure, options.cpu / 3) if options.check else measure()
        progress("measuring a ring of two")
        machine = with_overhead(machine, run_until_signal(measure_overhead()))
        if not options.check:
            typer.echo(as_yaml(machine), nl=False)
            return 0
        results = run_until_signal(check(machine, model, rings, progress=progress))
    typer.echo(check_json(machine, results) if options.as_json else check_text(machine, results))
    return 0


def _model_file(options: SimulateOptions, console: Console) -> Path:
    from mdiq.engine.formats.model_source import find_model

    return find_model(options.model, lambda text: console.print(text, style="dim"))
