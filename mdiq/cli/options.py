"""Options that several commands have, declared once."""

import inspect
import io
import sys
from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from mdiq.core.known_models import DEFAULT_MODEL, KNOWN_MODELS
from mdiq.core.types import WeightFormat
from mdiq.core.wire_formats import DtypeName

LogLevelName = Literal["debug", "info", "warning", "error"]


class Weights(StrEnum):
    """core.types.WeightFormat for options that may be repeated, of which typer knows no Literal."""

    AUTO = "auto"
    PLAIN = "plain"
    INT8 = "int8"
    INT4 = "int4"


def command(options: type, module: str) -> Callable[..., None]:
    """Return a command whose parameters are the fields of a dataclass, and whose help is its docstring.

    module: has ``execute``, which is called with an instance and returns the exit code; imported when the command runs.
    """

    def run(**values: Any) -> None:
        raise typer.Exit(import_module(module).execute(options(**values)))

    run.__doc__, run.__annotations__ = options.__doc__, get_type_hints(options, include_extras=True)
    vars(run)["__signature__"] = inspect.signature(options)
    return run


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
    WeightFormat,
    typer.Option(
        help="How weights are held: auto (4 bits for a file of 4-bit types, else 8; plain on a GPU), plain "
        "(as --dtype says), int8 or int4.",
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact/--fast",
        help="The same tokens on any number of nodes, alone and among other requests; "
        "or whatever kernel and hop is fastest.",
    ),
]
Dtype = Annotated[DtypeName, typer.Option(help="Number format of activations, KV cache and plain weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or auto; the same for all nodes.")]
EvenSplit = Annotated[
    bool, typer.Option("--even-split", help="Share a topology's auto layers evenly instead of by the plan.")
]
Level = Annotated[LogLevelName, typer.Option(help="Minimum severity of log lines.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.", callback=make_stdout_utf8)]
Topology = Annotated[Path, typer.Argument(help="The topology file.")]
Served = Annotated[Path, typer.Argument(help="The file of the service: a topology, or the routes of a router.")]
