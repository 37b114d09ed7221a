"""`mdiq status`, `mdiq drain`, `mdiq reload`: an operator talks to an `mdiq serve` or `mdiq route` of this machine."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from mdiq.cli.route import print_status
from mdiq.plan.drift import SHOWN
from mdiq.runtime.admin import ask
from mdiq.runtime.recovery_times import STEPS


def status(topology: Path, *, as_json: bool) -> int:
    """Show the ring; return 0 if it serves, else 1."""
    found = ask(topology, {"do": "status"})
    if as_json:
        typer.echo(json.dumps(found))
    elif "servers" in found:
        print_status(found)
    else:
        _print(found)
    return 0 if found["is_serving"] else 1


def drain(topology: Path, node: str, *, undo: bool) -> int:
    """Take a node out of the ring, or let it in again."""
    typer.echo(ask(topology, {"do": "drain", "node": node, "undo": undo}))
    return 0


def reload(topology: Path) -> int:
    """Have the topology read again."""
    typer.echo(ask(topology, {"do": "reload"}))
    return 0


def _print(found: Mapping[str, Any]) -> None:
    console = Console()
    requests = found["requests"]
    console.print(f"{found['state']}; model {found['model']}", highlight=False, markup=False)
    console.print(
        f"requests: {requests['running']} running, {requests['waiting']} of them waiting; {requests['done']} done, "
        f"{requests['failed']} failed, {_refused(requests['refused'])}, {requests['left']} left by their clients, "
        f"{requests['cut_off']} not read; "
        f"rings formed: {found['rings_formed']}",
        highlight=False,
    )
    if (journal := found.get("journal")) and not journal["is_written"]:
        text = "the journal cannot be written, so nothing is taken in the background; the log says why"
        console.print(text, highlight=False, markup=False)
    if found["last_error"]:
        console.print(f"last error: {found['last_error']}", highlight=False, markup=False)
    for pause in found.get("pauses", [])[-1:]:
        steps = ", ".join(f"{text} {pause[name]:g} s" for name, text in STEPS.items() if name in pause)
        console.print(
            f"last pause, {pause['ago_s']:.0f} s ago: {pause['reason']}; {steps}", highlight=False, markup=False
        )
    if "noise" in found:
        _print_noise(console, found["noise"])
    table = Table("node", "state", "layers", "memory", "weights", "busy", "hop out of it")
    hops = found.get("hops", [])
    for i, node in enumerate(found["nodes"]):
        layers = node.get("layers")
        table.add_row(
            node["name"],
            _state(node),
            f"{layers[0]}-{layers[1] - 1}" if layers else "",
            _megabytes(node.get("rss_bytes")),
            _megabytes(node.get("weight_bytes")),
            f"{node['busy_share']:.0%}" if "busy_share" in node else "",
            _hop(hops[i]) if i < len(hops) else "",
        )
    console.print(table)


def _print_noise(console: Console, noise: Mapping[str, Any]) -> None:
    console.print(
        f"noise on {', '.join(noise['hops']) or 'no hop of this ring'}; answers differ from run to run, and a replay "
        f"spends again; {noise['rows_sent']:,} rows sent, at most {noise['worst_request_rows']:,} of one request",
        highlight=False,
        markup=False,
    )
    for node in noise["nodes"]:
        console.print(
            f"  {node['name']} is promised epsilon {node['epsilon']:g} for each row, delta {node['delta']:g}; that "
            f"request: epsilon {node['worst_request_epsilon']:,.4g}",
            highlight=False,
            markup=False,
        )


def _refused(reasons: Mapping[str, int]) -> str:
    found = ", ".join(f"{reason} {count}" for reason, count in reasons.items() if count)
    return f"{sum(reasons.values())} refused" + (f" ({found})" if found else "")


def _state(node: Mapping[str, Any]) -> str:
    if node["state"] == "loads":
        return f"loads, {node['loaded']} of {node['to_load']}"
    if "reason" in node:
        ready = f"; on its disk: layers {_spans(node['on_disk'])}" if "on_disk" in node else ""
        return f"{node['state']}: {node['reason']}{ready}"
    factor = node.get("under_load", 1.0)
    if 1 / SHOWN < factor < SHOWN:
        return str(node["state"])
    return f"{node['state']}; takes {factor:.1f} times as long as it measured alone"


def _spans(layers: Sequence[int]) -> str:
    """Return layers in words: 0-3, 7-11."""
    ends = [layer for layer in layers if layer + 1 not in layers]
    starts = [layer for layer in layers if layer - 1 not in layers]
    return ", ".join(f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f} MB"


def _hop(hop: Mapping[str, Any]) -> str:
    if hop["delay_s"] is None:
        return str(hop["wire"])
    rate = "" if hop["bytes_per_s"] is None else f", {hop['bytes_per_s'] * 8 / 1e6:.0f} Mbit/s"
    return f"{hop['wire']}, {hop['delay_s'] * 1e3:.1f} ms{rate}"
