"""`mdiq check` of a routes file: everything that is wrong with it, and which files that it names cannot be used."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mdiq.config.document import MAX_BYTES, read_document
from mdiq.config.findings import Finding
from mdiq.config.routes import LoadedRoutes, check_routes, load_routes
from mdiq.errors import ConfigError
from mdiq.service.topology_values import Needs


def is_routes(file: Path) -> bool:
    """Return whether a file is for a router: it has servers where a topology has nodes."""
    try:
        found = read_document(_data(file)).data
    except OSError:
        return False  # who reads it as a topology says why
    return isinstance(found, dict) and "servers" in found and "nodes" not in found


def check(file: Path, *, as_json: bool) -> int:
    """Print what was found; return the exit code: 2 if the file cannot be used."""
    data = _data(file)
    routes, errors = check_routes(data)
    warnings = [] if routes is None else sorted(_warnings(LoadedRoutes(routes, file), data))
    if as_json:
        value = {
            "file": str(file),
            "ok": routes is not None,
            "errors": [asdict(finding) for finding in errors],
            "warnings": [asdict(finding) for finding in warnings],
        }
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        return 0 if routes is not None else 2
    for finding in errors:
        sys.stderr.write(f"mdiq: {finding.render(str(file))}\n")
    for finding in warnings:
        sys.stderr.write(f"mdiq: warning: {finding.render(str(file))}\n")
    if routes is None:
        sys.stderr.write(f"mdiq: {file}: {_count(len(errors), 'error')}\n")
        return 2
    more = f", {_count(len(warnings), 'warning')}" if warnings else ""
    sys.stdout.write(f"{file}: ok, {_count(len(routes.servers), 'server')}{more}\n")
    return 0


def since(file: Path, old: Path) -> Needs:
    """Return what a router needs when ``file`` takes the place of ``old``.

    Raises:
        ConfigError: ``file`` has errors.
    """
    new = load_routes(file).routes
    try:
        before = load_routes(old).routes
    except ConfigError:  # nothing of use runs with it
        return Needs.RESTART
    if before.api != new.api:
        return Needs.RESTART
    return Needs.NOTHING if before == new else Needs.RELOAD


def _warnings(loaded: LoadedRoutes, data: bytes) -> Iterator[Finding]:
    """Yield the files that cannot be used here: the router may run on another machine, or as another user."""
    from mdiq.route.service import certificate_of, keys_of, secrets_of

    document = read_document(data)
    for i, server in enumerate(loaded.routes.servers):
        try:
            secrets_of(loaded, server)
        except ConfigError as error:
            yield Finding(document.line_of(("servers", i)), f"servers[{i}]", str(error))
    for key, use in (("keys_file", keys_of), ("tls_cert", certificate_of)):
        try:
            use(loaded)
        except ConfigError as error:
            yield Finding(document.line_of(("api", key)), f"api.{key}", str(error))


def _data(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
