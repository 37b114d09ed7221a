"""A routes file: the servers that one address stands for, each a ring or a whole copy with an `mdiq serve` of its own.

All errors are reported at once, each with its line, as those of a topology file are.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails

from mdiq.config.checks import listening_problems
from mdiq.config.document import MAX_BYTES, Document, read_document
from mdiq.config.findings import OTHER_PLACE, Finding, Loc, Problem, path_of
from mdiq.config.messages import noun_of
from mdiq.config.topology import Listening
from mdiq.config.units import shown
from mdiq.config.values import FilePath, Name, Silence, Timeout
from mdiq.errors import TopologyError

VERSION = 1
MAX_SERVERS = 64
EXAMPLE = "http://192.168.1.10:8080"


def _url(value: str) -> str:
    try:
        url = urlsplit(value)
        host, _ = url.hostname, url.port
    except ValueError:
        url, host = urlsplit(""), None
    if url.scheme not in ("http", "https") or not host or url.path not in ("", "/") or url.query or url.fragment:
        raise ValueError(f"{shown(value)} is not the address of an API; write for example {EXAMPLE}")
    if "@" in url.netloc:
        raise ValueError("a secret does not belong into this file; write the address alone, and a key into key_file")
    return f"{url.scheme}://{url.netloc}"


class _Section(BaseModel):
    model_config = Listening.model_config


class RouteServer(_Section):
    """One `mdiq serve`: a ring, or a copy of the model on one device."""

    name: Name = Field(description="What logs, metrics and `mdiq drain` call it; unique in the file.")
    url: Annotated[str, AfterValidator(_url)] = Field(description="Address of its API.")
    key_file: FilePath | None = Field(
        None, description="File with the API key that is sent to it; null: it needs none. Relative to this file."
    )
    pass_keys: bool = Field(
        False, description="Send it the keys of the clients; that of key_file is for its status alone then."
    )
    drained: bool = Field(False, description="It gets nothing new, as after `mdiq drain`, also after a restart.")
    ca_file: FilePath | None = Field(
        None, description="Certificate (PEM) of who has signed its own; null: those that the system trusts."
    )


def _some_servers(servers: tuple[RouteServer, ...]) -> tuple[RouteServer, ...]:
    if not 1 <= len(servers) <= MAX_SERVERS:
        raise ValueError(f"these are {len(servers)} servers; write 1 to {MAX_SERVERS}, each as `- name: ...`")
    return servers


class Routes(_Section):
    """The operator's file of a router."""

    version: Literal[1] = Field(description="Version of this file's format.")
    servers: Annotated[tuple[RouteServer, ...], AfterValidator(_some_servers)] = Field(
        description="The rings and copies."
    )
    api: Listening = Field(Listening(), description="The one address.")
    max_requests: Annotated[int, Field(ge=1, le=65_536)] = Field(
        1_024, description="Requests that are open at once, each prompt counted; more are refused."
    )
    silence_s: Silence = Field(
        5.0, alias="silence", description="A server is gone when nothing is heard of it for so long."
    )
    outage_tolerance_s: Timeout = Field(
        60.0,
        alias="outage_tolerance",
        description="Max wait of a request for another server when the one that had taken it is gone.",
    )


@dataclass(frozen=True, slots=True)
class LoadedRoutes:
    """Routes and where they came from."""

    routes: Routes
    file: Path

    def path(self, text: str) -> Path:
        """Return a path that the file names; a relative one begins beside the file."""
        return self.file.parent / os.path.expanduser(text)


def load_routes(file: Path) -> LoadedRoutes:
    """Return the Routes of a file.

    Raises:
        TopologyError: it has errors; the message lists all of them.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise TopologyError(
            [f"{file}: {error.strerror}; configs/routes/two-rings-and-a-copy.yaml is an example of such a file"]
        ) from None
    routes, findings = check_routes(data)
    if routes is None:
        raise TopologyError([finding.render(str(file)) for finding in findings])
    return LoadedRoutes(routes, file)


def check_routes(data: bytes) -> tuple[Routes | None, list[Finding]]:
    """Return what a file holds, or None and everything that is wrong with it."""
    document = read_document(data, _schema_of)
    findings = list(document.findings)
    routes: Routes | None = None
    if document.is_readable:
        try:
            routes = Routes.model_validate(document.data)
        except ValidationError as error:
            told = document.refused | document.incomplete
            findings += [
                _finding(document, each) for each in error.errors(include_url=False) if each["loc"] not in told
            ]
    if routes is not None:
        findings += [_located(document, problem) for problem in _problems(routes)]
    return (None if findings else routes), sorted(set(findings))


def _problems(routes: Routes) -> Iterator[Problem]:
    yield from listening_problems(routes.api)
    for what in ("name", "url"):
        seen: dict[str, int] = {}
        for i, server in enumerate(routes.servers):
            value = getattr(server, what)
            if (first := seen.setdefault(value, i)) != i:
                text = f"{value} is that of the server in {OTHER_PLACE} too; give each its own"
                yield Problem(("servers", i, what), text, (("servers", first, what),))
    for i, server in enumerate(routes.servers):
        if server.ca_file is not None and not server.url.startswith("https:"):
            yield Problem(("servers", i, "ca_file"), "a certificate is of https; write that in url, or remove it")


def _located(document: Document, problem: Problem) -> Finding:
    text = problem.text
    if problem.others:
        text = text.replace(OTHER_PLACE, f"line {document.line_of(problem.others[0])}")
    return Finding(document.line_of(problem.loc), path_of(problem.loc), text)


def _finding(document: Document, details: ErrorDetails) -> Finding:
    loc: Loc = details["loc"]
    return Finding(document.line_of(loc), path_of(loc), _message(loc, details))


def _schema_of(loc: Loc) -> Mapping[str, Any]:
    found: Mapping[str, Any] = _properties(loc[:-1]).get(str(loc[-1]), {}) if loc else {}
    return found


def _properties(loc: Loc) -> dict[str, Any]:
    section = _section_of(loc)
    properties: dict[str, Any] = section.model_json_schema()["properties"] if section else {}
    return properties


def _message(loc: Loc, details: ErrorDetails) -> str:
    properties = _properties(loc[:-1])
    match details["type"]:
        case "missing":
            return "it is missing; compare with configs/routes/two-rings-and-a-copy.yaml"
        case "extra_forbidden":
            close = get_close_matches(str(loc[-1]).lower(), properties, n=1)
            advice = f"did you mean {close[0]}?" if close else f"use one of {', '.join(properties)}"
            return f"it is not a key here; {advice}"
        case "value_error":
            return str(details["ctx"]["error"])
        case "literal_error":
            return f"{shown(details['input'])} is a version that this mdiq does not read; write {VERSION}"
        case "greater_than_equal" | "less_than_equal":
            return f"{shown(details['input'])} is out of range; {details['msg'].lower()}"
        case _:
            return f"it is {noun_of(details['input'])}; {details['msg'].removeprefix('Input ').lower()}"


def _section_of(loc: Loc) -> type[BaseModel] | None:
    keys = tuple(part for part in loc if isinstance(part, str))
    sections: dict[tuple[str, ...], type[BaseModel]] = {(): Routes, ("servers",): RouteServer, ("api",): Listening}
    return sections.get(keys)
