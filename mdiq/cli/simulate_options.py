"""Options of `mdiq simulate`, each with its help. simulate.py does the work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mdiq.cli.options import Exact, Json, Level
from mdiq.core.known_models import DEFAULT_MODEL
from mdiq.core.types import USUAL_WEIGHTS, WeightFormat
from mdiq.core.wire_formats import DtypeName

MAX_USERS = 100_000
MODEL = "llama-3-8b"
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """Predict rings of devices that you need not own. It has a catalogue of devices, links and models."""

    devices: Annotated[
        str,
        typer.Option(
            help="Kinds of devices with their numbers: pi5-8gb*4,office-pc-2015*2. --list shows them.",
            show_default=False,
        ),
    ] = ""
    model: Annotated[
        str | None,
        typer.Option(
            help="A model of the catalogue (--list), a name that mdiq fetches, a model directory or a .gguf file. "
            f"[default: {MODEL}; with --measure and --check {DEFAULT_MODEL.name}]",
            show_default=False,
        ),
    ] = None
    weights: Annotated[
        WeightFormat,
        typer.Option(help="How weights are held: auto, plain (as --dtype says), int8 or int4."),
    ] = USUAL_WEIGHTS
    dtype: Annotated[DtypeName, typer.Option(help="Numbers of the KV cache, of the hops, and of plain weights.")] = (
        "f32"
    )
    link: Annotated[
        str,
        typer.Option(help="The links between them: of the catalogue (--list), or as in delay=20ms,bandwidth=50mbit."),
    ] = "gigabit"
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Requests at once.")] = 1
    prompt: Annotated[int, typer.Option(min=1, max=1 << 20, help="Tokens of each prompt.")] = 512
    answer: Annotated[int, typer.Option(min=1, max=1 << 20, help="Tokens of each answer.")] = 256
    rings: Annotated[
        str, typer.Option(help="How many rings the devices form, with a router before them; auto: as is best.")
    ] = AUTO
    catalogue: Annotated[
        list[Path] | None, typer.Option(help="A catalogue of your own, beside mdiq's; may be repeated.")
    ] = None
    sources: Annotated[bool, typer.Option("--sources", help="List the figures that it rests on.")] = False
    list_all: Annotated[bool, typer.Option("--list", help="List devices, links and models.")] = False
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine with --model and write a catalogue with it.")
    ] = False
    name: Annotated[str, typer.Option(help="What --measure calls this machine.")] = "this"
    check: Annotated[
        bool,
        typer.Option("--check", help="Measure five rings on this machine, and print predicted and measured figures."),
    ] = False
    cpu: Annotated[
        float, typer.Option(min=0.3, max=64, help="Cores that the nodes of a ring of --check take together.")
    ] = 1.5
    exact: Exact = True
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Threads of --measure; --check has one. [default: cores]", show_default=False
        ),
    ] = None
    as_json: Json = False
    log_level: Level = "warning"
