"""Options that several commands have, declared once."""

import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mdiq.core.known_models import DEFAULT_MODEL, KNOWN_MODELS
from mdiq.core.types import USUAL_WEIGHTS


class Dtype(StrEnum):
    """Number format of activations and KV cache, and of plain weights."""

    F32 = "f32"
    BF16 = "bf16"


class Weights(StrEnum):
    """How weights are held: as suits the file, as --dtype says, or packed; core.types.WeightFormat."""

    AUTO = "auto"
    PLAIN = "plain"
    INT8 = "int8"
    INT4 = "int4"


class LogLevel(StrEnum):
    """Minimum severity of log lines."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def make_stdout_utf8(is_json: bool) -> bool:
    """Return the flag; JSON is UTF-8, whatever the terminal or the file's reader expects of text."""
    if is_json and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    return is_json


Model = Annotated[
    str | None,
    typer.Option(
        help=f"Model directory, .gguf file, or a name (fetched once): {', '.join(KNOWN_MODELS)}. "
        f"[default: {DEFAULT_MODEL.name}]",
        show_default=False,
    ),
]
HeldAs = Annotated[
    Weights,
    typer.Option(
        help="How weights are held: auto (4 bits for a file of 4-bit types, else 8; plain on a GPU), plain "
        "(as --dtype says), int8 or int4.",
    ),
]
USUAL = Weights(USUAL_WEIGHTS)
Exact = Annotated[
    bool,
    typer.Option(
        "--exact/--fast",
        help="The same tokens on any number of nodes, alone and among other requests; "
        "or whatever kernel and hop is fastest.",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of activations, KV cache and plain weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or auto; the same for all nodes.")]
EvenSplit = Annotated[
    bool, typer.Option("--even-split", help="Share a topology's auto layers evenly instead of by the plan.")
]
Level = Annotated[LogLevel, typer.Option(help="Minimum severity of log lines.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.", callback=make_stdout_utf8)]
Topology = Annotated[Path, typer.Argument(help="The topology file.")]
