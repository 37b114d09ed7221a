"""The command line: parses, wires, and turns every MdiqError into one line and an exit code. Heavy imports come late.

Exit codes: 0 ok, 1 failed, 2 bad usage or input, 130 interrupted (143 by SIGTERM).
"""

import contextlib
import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import mdiq
from mdiq.cache import NO_SPACE
from mdiq.cli.options import HeldAs, Json, LogLevelName, Model, Served, Topology, command
from mdiq.cli.privacy import PrivacyOptions
from mdiq.cli.report_commands import EvaluateOptions, ReportOptions
from mdiq.cli.ring_commands import BenchOptions, PerplexityOptions, RunOptions, ServeOptions
from mdiq.cli.simulate_options import SimulateOptions
from mdiq.core.types import USUAL_WEIGHTS
from mdiq.errors import MdiqError
from mdiq.plan.partition import Objective
from mdiq.telemetry import logging
from mdiq.transport.room import raise_descriptor_limit

app = typer.Typer(
    name="mdiq",
    help="Run a large language model on several cheap devices at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


_OF_THE_MACHINE = (*NO_SPACE, errno.EIO, errno.EMFILE, errno.ENFILE)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"mdiq {mdiq.__version__}")
        raise typer.Exit


for name, options in (
    ("run", RunOptions),
    ("perplexity", PerplexityOptions),
    ("privacy", PrivacyOptions),
    ("bench", BenchOptions),
    ("simulate", SimulateOptions),
):
    app.command(name)(command(options, f"mdiq.cli.{name}"))
app.command("evaluate")(command(EvaluateOptions, "mdiq.cli.evaluate"))
app.command("report")(command(ReportOptions, "mdiq.cli.report"))


@app.command()
def init(
    node: Annotated[
        list[str] | None,
        typer.Option(
            help="A device: name=address; after commas data_port, control_port, weights_port, device, threads, memory "
            "or layers, as in memory=700M. The Starter first; may be repeated."
        ),
    ] = None,
    spare: Annotated[
        list[str] | None, typer.Option(help="A device that stands by for one that fails; may be repeated.")
    ] = None,
    model: Model = None,
    weights: HeldAs = USUAL_WEIGHTS,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text on the network, without keys.")] = False,
    out: Annotated[Path, typer.Option(help="File to write; its schema is written beside it.")] = Path("topology.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write an annotated topology file. It is made from flags, or from questions on a terminal."""
    from mdiq.cli.init import init as execute

    raise typer.Exit(execute(node or (), spare or (), model, weights, insecure=insecure, out=out, force=force))


@app.command()
def check(
    file: Topology,
    as_json: Json = False,
    since: Annotated[
        Path | None,
        typer.Option(help="Say what the service of --name needs after a change from this older file."),
    ] = None,
    name: Annotated[str, typer.Option(help="A node of the file.")] = "",
) -> None:
    """List all errors of a topology or routes file at once. It also warns of what is allowed but will hurt."""
    from mdiq.cli.check import check as execute
    from mdiq.cli.check import since as execute_since

    if since is not None:
        raise typer.Exit(execute_since(file, since, name))
    raise typer.Exit(execute(file, as_json=as_json))


@app.command()
def keys(
    file: Annotated[Path, typer.Argument(help="The topology.")],
    rotate: Annotated[
        list[str] | None, typer.Option(help="Make a new pair for this node; may be repeated.", metavar="NAME")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
) -> None:
    """Make the key pairs of a topology's nodes. It writes the public keys into the file; keys that are there stay."""
    from mdiq.cli.keys import execute

    raise typer.Exit(execute(file, rotate or (), dry_run=dry_run))


@app.command("api-key")
def api_key(
    name: Annotated[str, typer.Argument(help="What logs and metrics call the key.")],
    file: Annotated[
        Path | None, typer.Option(help="Keys file (api.keys_file) to add it to. [default: show the line]")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight, each prompt counted. [default: no limit]")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompts and answers. [default: no limit]")
    ] = None,
    share: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of the ring while others wait too. [default: 1]")
    ] = None,
) -> None:
    """Make a key for clients of the HTTP API. It is shown once, and only its hash is kept."""
    from mdiq.cli.api_key import execute

    limits = {"max_requests": max_requests, "tokens_per_minute": tokens_per_minute, "share": share}
    raise typer.Exit(execute(name, file, {limit: value for limit, value in limits.items() if value is not None}))


@app.command()
def node(
    topology: Annotated[Path | None, typer.Argument(help="The topology file; the same as the Starter's.")] = None,
    name: Annotated[
        str, typer.Option(help="This node's name in the topology.", envvar="MDIQ_NAME", show_default=False)
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="End with the first ring instead of joining the next.")] = False,
    control: Annotated[str, typer.Option(hidden=True)] = "",
    listen: Annotated[str, typer.Option(hidden=True)] = "",
    threads: Annotated[int, typer.Option(min=1, hidden=True)] = 1,
    pin: Annotated[int | None, typer.Option(hidden=True)] = None,
    stdin_key: Annotated[bool, typer.Option("--stdin-key", hidden=True)] = False,
    log_level: Annotated[
        LogLevelName | None, typer.Option(help="Minimum severity of log lines. [default: info]", show_default=False)
    ] = None,
) -> None:
    """Serve one node of a topology. It serves ring after ring, until it is stopped."""
    from mdiq.cli.node import serve_node, serve_topology

    if topology is not None:
        logging.configure(log_level or "info", node=name)
        raise typer.Exit(serve_topology(topology, name, once=once))
    # A child of `mdiq run`: control is its endpoint, listen where this node takes activations.
    logging.configure(log_level or "warning", node=name)
    raise typer.Exit(serve_node(name, control, listen, threads, pin, stdin_key=stdin_key))


@app.command()
def plan(
    topology: Topology,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also show other splits, and what one device more or less would bring.")
    ] = False,
    objective: Annotated[
        Objective | None,
        typer.Option(help="Plan for several users, or for one. [default: as the topology says]", show_default=False),
    ] = None,
    users: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Users at once, with throughput. [default: as the topology says]", show_default=False
        ),
    ] = None,
    min_starter_layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Layers that stay on the Starter. [default: as the topology says]",
            show_default=False,
        ),
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Forget what the nodes measured; they measure again before the next ring.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show which layers go where, and why. It needs what the nodes measured in an earlier ring."""
    from mdiq.cli.plan import forget as execute_forget
    from mdiq.cli.plan import plan as execute

    if forget:
        raise typer.Exit(execute_forget(topology))
    raise typer.Exit(
        execute(
            topology,
            objective=objective,
            users=users,
            min_starter_layers=min_starter_layers,
            with_more=explain,
            as_json=as_json,
        )
    )


app.command("serve")(command(ServeOptions, "mdiq.cli.serve"))


@app.command()
def route(
    file: Annotated[Path, typer.Argument(help="The routes file: the servers, and the address.")],
    log_level: Annotated[LogLevelName, typer.Option(help="Minimum severity of log lines.")] = "info",
) -> None:
    """Serve one address for several rings and copies. Each is an mdiq serve; requests are spread over them."""
    from mdiq.cli.route import execute

    execute(file, log_level)


@app.command()
def status(topology: Served, as_json: Json = False) -> None:
    """Show the ring or the router that runs here. It exits with 1 while it does not serve."""
    from mdiq.cli.admin import status as execute

    raise typer.Exit(execute(topology, as_json=as_json))


@app.command()
def drain(
    topology: Served,
    node: Annotated[str, typer.Argument(help="A node of the ring, or a server of the router.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let it in again.")] = False,
) -> None:
    """Take a node out of the ring, or a server from a router. The others take its work; running requests go on."""
    from mdiq.cli.admin import drain as execute

    raise typer.Exit(execute(topology, node, undo=undo))


@app.command()
def reload(topology: Served) -> None:
    """Have mdiq serve or mdiq route read its file again. A node that is no longer in it is cut off."""
    from mdiq.cli.admin import reload as execute

    raise typer.Exit(execute(topology))


_cache = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(_cache, name="cache", help="Show what the cache holds, or clear it.")


@_cache.command("list")
def cache_list(as_json: Json = False) -> None:
    """Show what the cache holds. The next to be removed comes first: models, packed weights, fetched layers."""
    from mdiq.cli.cache import show

    raise typer.Exit(show(as_json=as_json))


@_cache.command("clear")
def cache_clear(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names as mdiq cache list shows them, or folders such as packed. [default: all]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
) -> None:
    """Remove everything from the cache that no process uses."""
    from mdiq.cli.cache import clear

    logging.configure("warning", node="")
    raise typer.Exit(clear(names or (), dry_run=dry_run))


def main() -> None:
    """Run the command line; errors that mdiq raises on purpose, and those of files and disks, are a line on stderr."""
    _show_any_text()
    raise_descriptor_limit()
    try:
        app(standalone_mode=True)
    except MdiqError as error:
        sys.stderr.writelines(f"mdiq: {line}\n" for line in str(error).splitlines())
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("mdiq: interrupted\n")
        sys.exit(130)
    except OSError as error:
        if error.filename is None and error.errno not in _OF_THE_MACHINE:
            raise
        where = error.filename or ("this process" if error.errno in (errno.EMFILE, errno.ENFILE) else "output")
        sys.stderr.write(f"mdiq: {where}: {error.strerror}\n")
        if error.filename is None:  # Python writes what is left in stdout's buffer once more when it ends
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _show_any_text() -> None:
    """Have stdout and stderr show what their encoding lacks as ? or as an escape, in place of an error."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before this process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
