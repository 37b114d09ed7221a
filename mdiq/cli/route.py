"""`mdiq route`: one address for several rings and copies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from mdiq.cli.options import LogLevelName
from mdiq.cli.signals import run_service
from mdiq.config.routes import load_routes
from mdiq.runtime.lifecycle import Notifier
from mdiq.telemetry import logging


def execute(file: Path, log_level: LogLevelName) -> NoReturn:
    """Route until a signal comes; end the process then."""
    logging.configure(log_level, node="router")
    loaded = load_routes(file)
    from mdiq.route.service import RouteService

    run_service(RouteService(loaded, Notifier.from_environment()).run())


def print_status(found: Mapping[str, Any]) -> None:
    """Show the servers of a router."""
    console = Console()
    requests = found["requests"]
    console.print(f"requests: {requests['running']} open, at most {requests['max']}", highlight=False)
    table = Table("server", "state", "running", "places")
    for text in ("model", "address"):  # whole on several lines where the terminal is narrow, or is a pipe
        table.add_column(text, overflow="fold")
    for server in found["servers"]:
        state = f"{server['state']}{', drained' if server['drained'] else ''}"
        text = "" if server["state"] == "serves" else f": {server['text']}"
        table.add_row(
            server["name"],
            state + text,
            str(server["running"]),
            "" if server["places"] is None else str(server["places"]),
            server["model"] or "",
            server["url"],
        )
    console.print(table)
    if alone := _alone(found["servers"]):
        text = (
            f"an answer that {', '.join(alone)} had begun would break off: no other server here gives the same tokens"
        )
        console.print(text, highlight=False, markup=False)


def _alone(servers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the servers whose answers no other one could go on with."""
    marks = [(server["model"], server.get("same_tokens")) for server in servers]
    return [
        server["name"]
        for server, mark in zip(servers, marks, strict=True)
        if len(servers) > 1 and server["model"] and (mark[1] is None or marks.count(mark) == 1)
    ]
