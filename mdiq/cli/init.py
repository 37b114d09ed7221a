"""`mdiq init`: a topology file from flags, or from questions on a terminal."""

import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from mdiq.cli.check import print_findings
from mdiq.config.load import Report, check_bytes
from mdiq.config.sample import NODE_KEYS, Answers, NodeAnswer, topology_text
from mdiq.config.schema import SCHEMA_FILE, schema_text
from mdiq.config.topology import Topology
from mdiq.core.known_models import DEFAULT_MODEL
from mdiq.errors import ConfigError

EXAMPLE = "--node desk=192.168.1.10 --node pi1=192.168.1.11,memory=700M,threads=1"


def init(
    node_flags: Sequence[str],
    spare_flags: Sequence[str],
    model: str | None,
    weights: str,
    *,
    insecure: bool,
    out: Path,
    force: bool,
) -> int:
    """Write the file and its schema; return the exit code."""
    if out.exists() and not force:
        raise ConfigError(f"{out}: it exists; add --force to write over it, or give another file by --out")
    if node_flags or spare_flags:
        flags = [(f"--node {text}", text, False) for text in node_flags]
        flags += [(f"--spare {text}", text, True) for text in spare_flags]
        sources = [flag for flag, _, _ in flags]
        nodes = tuple(parse_node(flag, text, spare=spare) for flag, text, spare in flags)
        model = model or DEFAULT_MODEL.name
    elif is_terminal():
        nodes = ask_nodes()
        sources = [f"node {node.name}" for node in nodes]
        model = model or typer.prompt("Model (directory, .gguf file or known name)", DEFAULT_MODEL.name, err=True)
    else:
        raise ConfigError(f"mdiq init: give the devices, the Starter first: {EXAMPLE}; on a terminal it asks for them")
    text = topology_text(Answers(nodes, model, weights, insecure))
    report = check_bytes(text.encode(), out, without_keys=True)
    if report.topology is None:
        raise ConfigError("\n".join(_by_flag(report, sources)))
    _write(out, text, force=force)
    _write(out.parent / SCHEMA_FILE, schema_text(), force=True)
    print_findings(report)
    sys.stdout.write(f"{out}: written, with {SCHEMA_FILE} beside it\n")
    sys.stderr.write(f"next: {_next(report.topology, out)}\n")
    return 0


def parse_node(flag: str, text: str, *, spare: bool) -> NodeAnswer:
    """Return the device that ``name=address,key=value,...`` says. flag: what messages call it.

    Raises:
        ConfigError: it is written in another way, or a key is not one of a node.
    """
    first, *rest = text.split(",")
    name, equals, address = (part.strip() for part in first.partition("="))
    if not equals or not name or not address:
        raise ConfigError(f"{flag}: no name and address; write for example {EXAMPLE.partition(' --')[0]}")
    values: dict[str, str] = {}
    for part in rest:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in NODE_KEYS or not equals or not value:
            raise ConfigError(
                f"{flag}: {part.strip() or 'nothing'} is not one of {', '.join(NODE_KEYS)} with = and a value"
            )
        if key in values:
            raise ConfigError(f"{flag}: {key} stands there twice; remove one")
        values[key] = value
    return NodeAnswer(name, address, spare, values)


def ask_nodes() -> tuple[NodeAnswer, ...]:
    """Return the devices that the user names, the Starter first."""
    here = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().partition(".")[0].lower()).strip("-") or "desk"
    name = typer.prompt("Name of the Starter, the device that has the model", here, err=True)
    nodes = [NodeAnswer(name, typer.prompt(f"Address of {name}, for the other devices", err=True))]
    while name := typer.prompt(
        "Name of the next device (empty: that is all)", "", show_default=False, err=True
    ).strip():
        address = typer.prompt(f"Address of {name}", err=True)
        memory = typer.prompt("Max memory that mdiq may use there, for example 700M", "auto", err=True)
        spare = typer.confirm("Is it a spare, which steps in when another fails?", False, err=True)
        nodes.append(NodeAnswer(name, address, spare, {} if memory == "auto" else {"memory": memory}))
    return tuple(nodes)


def is_terminal() -> bool:
    """Return whether there is a user who can answer questions."""
    return sys.stdin.isatty()


def _by_flag(report: Report, sources: Sequence[str]) -> list[str]:
    """Return what is wrong, with the flag that said it instead of a line: the file was never written."""
    lines = []
    for finding in report.errors:
        match = re.match(r"nodes\[(\d+)\](?:\.(.*))?", finding.path)
        where = f"{sources[int(match[1])]}: {match[2] or 'node'}" if match else f"mdiq init: {finding.path}"
        lines.append(f"{where}: {re.sub(r' [(]line [0-9]+[)]', '', finding.message)}")
    return lines


def _next(topology: Topology, out: Path) -> str:
    keys = f"mdiq keys {out}, then " if topology.is_plain_text and not _may_be_plain(topology) else ""
    return f"{keys}mdiq check {out}"


def _may_be_plain(topology: Topology) -> bool:
    return topology.security.insecure or topology.is_on_loopback


def _write(path: Path, text: str, *, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: it exists; add --force to write over it") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file in a folder that exists and can be written") from None
