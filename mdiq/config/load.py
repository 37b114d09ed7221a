"""A topology file to a Topology. All that is wrong with it is told at once, each with its line; see check_file.

Three passes: the document (config/document.py), each value alone (pydantic), the values together (config/checks.py). A
value that failed an earlier pass is replaced by a harmless one for the later passes, and nothing that depends on it is
told: so one mistake is one message, and it hides no other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mdiq.config.checks import TopologyValueError, find_warnings
from mdiq.config.document import MOST_BYTES, Document, read_document
from mdiq.config.findings import OTHER_PLACE, Finding, Loc, Problem, path_of
from mdiq.config.topology import (
    MOST_NODES,
    UNCHECKED,
    VERSION,
    WITHOUT_KEYS,
    Api,
    HopWire,
    Links,
    ModelChoice,
    Node,
    RingWishes,
    Security,
    Topology,
)
from mdiq.config.units import shown
from mdiq.errors import TopologyError

SECTIONS: dict[Loc, type[BaseModel]] = {
    (): Topology,
    ("model",): ModelChoice,
    ("nodes",): Node,
    ("links",): Links,
    ("links", "hops"): HopWire,
    ("security",): Security,
    ("api",): Api,
    ("ring",): RingWishes,
}
"""Keys without list indices -> the model that reads what stands there."""

_NOUNS: dict[Loc, str] = {(): "the file", ("nodes",): "a node", ("links", "hops"): "a hop"}
_SECRETS = {
    "private_key": "make a new key with `mdiq keys`",
    "secret_key": "make a new key with `mdiq keys`",
    "secret": "make a new key with `mdiq keys`",
    "api_key": "write it into the file that api.keys_file names",
    "api_keys": "write them into the file that api.keys_file names",
    "password": "see security in configs/README.md",
    "token": "write it into the file that api.keys_file names",
}
_MEANT = {
    "ip": "address",
    "host": "address",
    "hostname": "address",
    "port": "data_port",
    "mem": "memory",
    "ram": "memory",
    "memory_limit": "memory",
    "gpu": "device",
    "cores": "threads",
    "cpus": "threads",
    "starter": "role",
    "type": "role",
    "id": "name",
    "key": "public_key",
    "pubkey": "public_key",
    "hosts": "nodes",
    "devices": "nodes",
    "bandwidth": "transfer_limit",
    "quantization": "weights",
    "file": "path",
}
"""What people write -> the key that they mean, where that is one of the section."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a file, by line. topology: None if there are errors."""

    file: Path
    topology: Topology | None
    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]

    def lines(self) -> list[str]:
        """Return the errors as an operator reads them."""
        return [finding.render(str(self.file)) for finding in self.errors]

    def warning_lines(self) -> list[str]:
        return [finding.render(str(self.file)) for finding in self.warnings]


@dataclass(frozen=True, slots=True)
class LoadedTopology:
    """A Topology and where it came from."""

    topology: Topology
    file: Path
    warnings: tuple[str, ...]

    def path(self, text: str) -> Path:
        """Return a path that the file names; a relative one begins beside the file."""
        return self.file.parent / Path(text).expanduser()


def load_topology(file: Path, *, without_keys: bool = False) -> LoadedTopology:
    """Return the Topology of a file. without_keys: public keys that are missing are no error, for who makes them.

    Raises:
        TopologyError: something is wrong with it; all of it is told.
    """
    report = check_file(file, without_keys=without_keys)
    if report.topology is None:
        raise TopologyError(report.lines())
    return LoadedTopology(report.topology, file, tuple(report.warning_lines()))


def check_file(file: Path, *, without_keys: bool = False) -> Report:
    """Return everything that is wrong with a file, and what will hurt.

    Raises:
        TopologyError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise TopologyError([f"{file}: no such file; `mdiq init` writes one, and configs/ has examples"]) from None
    except OSError as error:
        raise TopologyError([f"{file}: {error.strerror}; give a topology file that can be read"]) from None
    return check_bytes(data, file, without_keys=without_keys)


def check_bytes(data: bytes, file: Path, *, without_keys: bool = False) -> Report:
    """Return the same for what a file holds; ``file`` is what messages call it."""
    document = read_document(data)
    if not document.is_readable:
        return Report(file, None, tuple(document.findings), ())
    return _Check(document, without_keys).report(file)


class _Check:
    """The passes over one document."""

    def __init__(self, document: Document, without_keys: bool) -> None:
        self._document = document
        self._context = WITHOUT_KEYS if without_keys else None
        self._errors = list(document.findings)
        self._bad = set(document.refused)
        self._numbers = count(1)

    def report(self, file: Path) -> Report:
        data = self._document.data
        if not isinstance(data, Mapping):
            found = f"it holds {_noun(data)}" if data is not None else "it holds no keys"
            message = f"{found}, and a topology is made of keys such as `nodes:`; compare with the examples in configs/"
            self._errors.append(Finding(self._document.line_of(()), "", message))
            return Report(file, None, tuple(self._errors), ())
        try:
            topology = Topology.model_validate(data, context=self._context)
        except ValidationError as error:
            self._values(error)
            topology = self._together(data)
        warnings = [self._finding(problem) for problem in find_warnings(topology) if self._is_sound(problem)]
        return Report(
            file, None if self._errors else topology, tuple(sorted(set(self._errors))), tuple(sorted(set(warnings)))
        )

    def _values(self, error: ValidationError) -> None:
        """Tell what is wrong with each value alone."""
        found = error.errors(include_url=False)
        meant = {_meant_by(details["loc"]) for details in found if details["type"] == "extra_forbidden"}
        for details in found:
            loc: Loc = details["loc"]
            if isinstance(details.get("ctx", {}).get("error"), TopologyValueError):
                continue  # comes again when values that failed alone are out of the way
            if details["type"] == "missing" and loc in meant:
                self._bad.add(loc)  # it is there under a wrong name
                continue
            if (
                details["type"] == "missing"
                and loc in self._bad
                or any(loc[:n] in self._document.refused for n in range(len(loc) + 1))
            ):
                # A place that the document refused, or inside of one.
                self._bad.add(loc)
                continue
            self._bad.add(loc)
            self._errors.append(self._located(loc, _message(details, self._document.raw.get(loc))))

    def _together(self, data: Mapping[Any, Any]) -> Topology:
        """Return a Topology without the values that failed, and tell what is wrong between the others."""
        repaired = _Repair(self._bad).section((), data)
        try:
            return Topology.model_validate(repaired, context=self._context)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                problems = details.get("ctx", {}).get("error")
                assert isinstance(problems, TopologyValueError), f"a repaired topology: {details}"
                self._errors += [self._finding(problem) for problem in problems.problems if self._is_sound(problem)]
        return Topology.model_validate(repaired, context=UNCHECKED)

    def _is_sound(self, problem: Problem) -> bool:
        """Return whether a Problem depends on nothing that was repaired."""
        return not any(_touches(loc, bad) for loc in (problem.loc, *problem.others) for bad in self._bad)

    def _finding(self, problem: Problem) -> Finding:
        text = problem.text
        if problem.others:
            text = text.replace(OTHER_PLACE, f"line {self._document.line_of(problem.others[0])}")
        return self._located(problem.loc, text)

    def _located(self, loc: Loc, message: str) -> Finding:
        return Finding(self._document.line_of(loc), path_of(loc), message)


def _touches(loc: Loc, bad: Loc) -> bool:
    """Return whether one place is the other, or lies in it."""
    return loc[: len(bad)] == bad


class _Repair:
    """Makes data that pass, value by value: what failed is left out, and what must be there is made up."""

    def __init__(self, bad: set[Loc]) -> None:
        self._bad = bad

    def section(self, loc: Loc, data: object) -> dict[str, object]:
        """Return a section; its keys are known and its values passed alone."""
        model = SECTIONS[_without_indices(loc)]
        values: dict[str, object] = {}
        for name, field in model.model_fields.items():
            key = field.alias or name
            place = (*loc, key)
            given = isinstance(data, Mapping) and key in data and place not in self._bad
            if given:
                assert isinstance(data, Mapping)
                values[key] = self._value(place, data[key])
            elif field.is_required():
                values[key] = self._made_up(place)
        return values

    def _value(self, loc: Loc, value: object) -> object:
        if _without_indices(loc) not in SECTIONS:
            return value
        if isinstance(value, tuple):
            items = [self.section((*loc, i), item) for i, item in enumerate(value)]
            return tuple(items[:MOST_NODES])
        return self.section(loc, value)

    def _made_up(self, loc: Loc) -> object:
        """Return a value that disturbs nothing; Problems that depend on it are not told."""
        made: dict[str, object] = {
            "version": VERSION,
            "path": "model",
            "name": f"made-up-{loc[1] if len(loc) > 1 else 0}",
            "address": "127.0.0.1",
            "from": "made-up",
            "to": "made-up",
            "wire": "auto",
        }
        key = loc[-1]
        if key == "model":
            return self.section(loc, {})
        if key == "nodes":
            return (self.section((*loc, 0), {"role": "starter"}),)
        return made[str(key)]


def _without_indices(loc: Loc) -> Loc:
    return tuple(part for part in loc if isinstance(part, str))


def _message(details: ErrorDetails, raw: str | None) -> str:
    """Return what is wrong and what to do, for one error of pydantic."""
    loc: Loc = details["loc"]
    value, context = details["input"], details.get("ctx", {})
    match details["type"]:
        case "missing":
            return f"it is missing; {_example(loc)}"
        case "extra_forbidden":
            return _unknown_key(loc)
        case "value_error":
            return str(context["error"])
        case _ if value is None:
            return f"it has no value; {_example(loc)}"
        case "literal_error":
            return _not_one_of(loc, value)
        case "model_type" | "model_attributes_type" | "dict_type":
            return _no_section(loc, value)
        case "tuple_type":
            return _no_list(loc, value)
        case "greater_than_equal" | "less_than_equal":
            return f"{shown(value)} is out of range; write {_range(loc)}"
        case "int_type" | "bool_type" | "string_type" | "int_from_float":
            return _wrong_kind(loc, value, details["type"], raw)
        case _:
            return f"{details['msg']}; {_example(loc)}"


def _wrong_kind(loc: Loc, value: object, kind: str, raw: str | None) -> str:
    if isinstance(value, dict | tuple):
        wanted = {"string_type": "a text", "bool_type": "true or false"}.get(kind, "a number")
        return f"it is {_noun(value)}, and {wanted} belongs here; {_example(loc)}"
    text = shown(raw if raw is not None else value)
    if kind == "string_type":
        return f'YAML reads {text} as {_noun(value)}; put it in quotes if it is meant: "{text}"'
    if kind == "bool_type":
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return f"it is a text because of the quotes; write {value.lower()}"
        return f"{text} is neither true nor false; write one of them"
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return f"it is a text because of the quotes; write {value}"
    return f"{text} is not a whole number; write {_range(loc)}"


def _not_one_of(loc: Loc, value: object) -> str:
    if loc == ("version",):
        return (
            f"{shown(value)} is a version that this mdiq does not read; write {VERSION}, or use the mdiq that it is for"
        )
    choices = [str(choice) for choice in _schema_of(loc).get("enum", [_schema_of(loc).get("const")])]
    text = shown(value)
    close = get_close_matches(str(value).lower(), choices, n=1)
    advice = f"did you mean {close[0]}?" if close else f"write one of {', '.join(choices)}"
    return f"{text} is none of {', '.join(choices)}; {advice}" if close else f"{text} is not known here; {advice}"


def _no_section(loc: Loc, value: object) -> str:
    example = _example(loc)
    if isinstance(value, str) and ":" in value and " " not in value.partition(":")[2][:1]:
        key, _, rest = value.partition(":")
        return f"the blank behind the colon is missing; write {shown(key)}: {shown(rest)}"
    if loc and loc[0] == "nodes":
        return f"{_noun(value)} stands where a node should; begin it with `- name: ...` and its other keys below that"
    return f"{_noun(value)} stands where keys should; {example}"


def _no_list(loc: Loc, value: object) -> str:
    if loc == ("nodes",):
        if isinstance(value, dict) and not any(key in value for key in ("name", "address")):
            return "it is a mapping, and nodes is a list; write each as `- name: ...` and its other keys below that"
        return f"it is {_noun(value)}, and nodes is a list; begin each node with a dash: `- name: ...`"
    return f"it is {_noun(value)}, and a list belongs here; {_example(loc)}"


def _meant_by(loc: Loc) -> Loc | None:
    """Return the key that an unknown one likely means, in the same section."""
    *parents, last = loc
    key = str(last).lower().replace("-", "_")
    known = _keys_of(_without_indices(tuple(parents)))
    if (meant := _MEANT.get(key)) in known:
        return (*parents, str(meant))
    close = get_close_matches(key, known, n=1)
    return (*parents, close[0]) if close else None


def _unknown_key(loc: Loc) -> str:
    *parents, last = loc
    if (secret := str(last).lower()) in _SECRETS:
        return f"a secret does not belong into this file, which others read; remove it, and {_SECRETS[secret]}"
    inside = _without_indices(tuple(parents))
    key = str(last)
    known = _keys_of(inside)
    noun = _NOUNS.get(inside, ".".join(map(str, inside)))
    if (meant := _meant_by(loc)) is not None:
        return f"it is not a key of {noun}; did you mean {meant[-1]}?"
    places = [
        path_of(section) or "the file itself" for section in SECTIONS if key in _keys_of(section) and section != inside
    ]
    if places:
        return f"it is not a key of {noun}; it belongs to {places[0]}"
    return f"it is not a key of {noun}; remove it, or use one of {', '.join(known)}"


def _keys_of(inside: Loc) -> list[str]:
    return [field.alias or name for name, field in SECTIONS[inside].model_fields.items()] if inside in SECTIONS else []


def _schema_of(loc: Loc) -> dict[str, Any]:
    """Return the JSON schema of a key, or nothing for what is no key."""
    keys = _without_indices(loc)
    if not keys or keys[:-1] not in SECTIONS:
        return {}
    properties = SECTIONS[keys[:-1]].model_json_schema()["properties"]
    found: dict[str, Any] = properties.get(keys[-1], {})
    return found


def _range(loc: Loc) -> str:
    schema = _schema_of(loc)
    if "minimum" in schema:
        return f"{schema['minimum']} to {schema['maximum']}"
    return str(schema.get("x-values", "another value")).replace("`", "")


def _example(loc: Loc) -> str:
    """Return advice: how the key may look."""
    if loc == ("nodes",):
        return "write `nodes:`, and below it each device as `- name: ...` (`mdiq init` writes such a file)"
    schema, key = _schema_of(loc), loc[-1] if loc else ""
    if "examples" in schema:
        return f"write for example `{key}: {schema['examples'][0]}`"
    if "default" in schema and not isinstance(schema["default"], dict):
        default = schema["default"]
        text = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        return f"remove the line, or write for example `{key}: {text}`"
    return "remove the line, or write the keys below it (see configs/README.md)"


def _noun(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    match value:
        case None:
            return "nothing"
        case str():
            return "a text"
        case int() | float():
            return "a number"
        case dict():
            return "a mapping"
        case _:
            return "a list"
