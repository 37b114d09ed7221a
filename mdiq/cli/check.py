"""`mdiq check`: everything that is wrong with a topology file or a routes file, and what will hurt."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from mdiq.cli import check_routes
from mdiq.config.load import LoadedTopology, Report, check_file, load_topology
from mdiq.config.topology import Topology
from mdiq.errors import ConfigError
from mdiq.service.api_files import api_file_problems
from mdiq.service.topology_values import Needs, needs_of


def check(file: Path, *, as_json: bool) -> int:
    """Print what was found; return the exit code: 2 if the file cannot be used."""
    if check_routes.is_routes(file):
        return check_routes.check(file, as_json=as_json)
    report = check_file(file)
    if report.topology is not None:
        report = report.with_more(*api_file_problems(LoadedTopology(report.topology, file)))
    if as_json:
        value = {
            "file": str(file),
            "ok": report.topology is not None,
            "errors": [asdict(finding) for finding in report.errors],
            "warnings": [asdict(finding) for finding in report.warnings],
        }
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    else:
        print_findings(report)
        if report.topology is not None:
            sys.stdout.write(f"{file}: {_summary(report.topology)}{_count(', ', report.warnings, 'warning')}\n")
        else:
            counts = _count("", report.errors, "error") + _count(", ", report.warnings, "warning")
            sys.stderr.write(f"mdiq: {file}: {counts}\n")
    return 0 if report.topology is not None else 2


def since(file: Path, old: Path, name: str) -> int:
    """Print what the service of a node needs when ``file`` takes the place of ``old``; return the exit code."""
    if check_routes.is_routes(file):
        sys.stdout.write(f"{check_routes.since(file, old)}\n")
        return 0
    new = load_topology(file).topology
    try:
        before = load_topology(old).topology
    except ConfigError:  # nothing of use runs with it
        needs = Needs.RESTART
    else:
        needs = needs_of(before, new, name)
    sys.stdout.write(f"{needs}\n")
    return 0


def print_findings(report: Report) -> None:
    """Print errors, then warnings, on stderr."""
    for line in report.lines():
        sys.stderr.write(f"mdiq: {line}\n")
    for line in report.warning_lines():
        sys.stderr.write(f"mdiq: warning: {line}\n")


def _summary(topology: Topology) -> str:
    nodes = f"{len(topology.ring_nodes)} node{'s' if len(topology.ring_nodes) > 1 else ''}"
    spares = f" and {len(topology.spares)} spare" if topology.spares else ""
    return f"ok, {nodes}{spares}, {'plain text' if topology.is_plain_text else 'encrypted'}"


def _count(before: str, findings: tuple[object, ...], noun: str) -> str:
    return f"{before}{len(findings)} {noun}{'s' if len(findings) > 1 else ''}" if findings else ""
