"""A topology file to a Topology. All errors are reported at once, each with its line; see check_file.

Three passes: the document (config/document.py), each value alone (pydantic), the values together (config/checks.py). A
value that failed an earlier pass is replaced by a harmless one for the later passes, and problems that depend on it are
left out: one mistake gives one message, and hides no other.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from mdiq.config.checks import find_problems, find_warnings
from mdiq.config.document import MAX_BYTES, Document, read_document
from mdiq.config.findings import OTHER_PLACE, Finding, Loc, Problem, path_of
from mdiq.config.messages import SECTIONS, meant_by, noun_of, place_schema, value_message, without_indices
from mdiq.config.topology import VERSION, Topology
from mdiq.errors import TopologyError


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a file, by line. topology: None if there are errors. places: the lines of values."""

    file: Path
    topology: Topology | None
    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    places: Mapping[Loc, int]

    def with_more(self, errors: Sequence[Problem], warnings: Sequence[Problem]) -> "Report":
        """Return the same with what was found beside the file."""

        def merged(before: tuple[Finding, ...], problems: Sequence[Problem]) -> tuple[Finding, ...]:
            new = [Finding(self.places.get(each.loc, 1), path_of(each.loc), each.text) for each in problems]
            return tuple(sorted({*before, *new}))

        return replace(
            self,
            topology=None if errors else self.topology,
            errors=merged(self.errors, errors),
            warnings=merged(self.warnings, warnings),
        )

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

    def path(self, text: str) -> Path:
        """Return a path that the file names; a relative one begins beside the file."""
        return self.file.parent / os.path.expanduser(text)


def load_topology(file: Path, *, without_keys: bool = False) -> LoadedTopology:
    """Return the Topology of a file. without_keys: missing public keys are not an error; `mdiq keys` makes them.

    Raises:
        TopologyError: it has errors; the message lists all of them.
    """
    report = check_file(file, without_keys=without_keys)
    if report.topology is None:
        raise TopologyError(report.lines())
    return LoadedTopology(report.topology, file)


def check_file(file: Path, *, without_keys: bool = False) -> Report:
    """Return everything that is wrong with a file, and what will hurt.

    Raises:
        TopologyError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise TopologyError([f"{file}: no such file; `mdiq init` writes one, and configs/ has examples"]) from None
    except OSError as error:
        raise TopologyError([f"{file}: {error.strerror}; give a topology file that can be read"]) from None
    return check_bytes(data, file, without_keys=without_keys)


def check_bytes(data: bytes, file: Path, *, without_keys: bool = False) -> Report:
    """Return the same for what a file holds; ``file`` is what messages call it."""
    document = read_document(data, place_schema)
    if not document.is_readable:
        return Report(file, None, tuple(document.findings), (), {})
    return _Check(document, without_keys).report(file)


class _Check:
    """The passes over one document."""

    def __init__(self, document: Document, without_keys: bool) -> None:
        self._document = document
        self._without_keys = without_keys
        self._errors = list(document.findings)
        self._bad = document.refused | document.incomplete

    def report(self, file: Path) -> Report:
        data = self._document.data
        if not isinstance(data, Mapping):
            found = f"it holds {noun_of(data)}" if data is not None else "it holds no keys"
            message = f"{found}, and a topology is made of keys such as `nodes:`; compare with the examples in configs/"
            self._errors.append(Finding(self._document.line_of(()), "", message))
            return Report(file, None, tuple(self._errors), (), {})
        try:
            topology = Topology.model_validate(data)
        except ValidationError as error:
            self._values(error)
        if self._bad:  # so that problems between the other values are found too
            topology = Topology.model_validate(_Repair(self._bad).section((), data))
        problems = find_problems(topology, without_keys=self._without_keys)
        self._errors += [self._finding(problem) for problem in problems if self._is_sound(problem)]
        warnings = [self._finding(problem) for problem in find_warnings(topology) if self._is_sound(problem)]
        return Report(
            file,
            None if self._errors else topology,
            tuple(sorted(set(self._errors))),
            tuple(sorted(set(warnings))),
            self._document.lines,
        )

    def _values(self, error: ValidationError) -> None:
        """Tell what is wrong with each value alone."""
        found = error.errors(include_url=False)
        meant = {meant_by(details["loc"]) for details in found if details["type"] == "extra_forbidden"}
        for details in found:
            loc: Loc = details["loc"]
            if details["type"] == "missing" and loc in meant:
                self._bad.add(loc)  # it is there under a wrong name
                continue
            is_told = loc in self._bad or details["type"] == "missing" and loc[:-1] in self._document.incomplete
            self._bad.add(loc)
            if not is_told:
                self._errors.append(self._located(loc, value_message(details, self._document.raw.get(loc))))

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
        model = SECTIONS[without_indices(loc)]
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
        if isinstance(value, tuple) and without_indices(loc) not in SECTIONS:
            return tuple(item for i, item in enumerate(value) if (*loc, i) not in self._bad)
        if without_indices(loc) not in SECTIONS or value is None:
            return value
        if isinstance(value, tuple):
            return tuple(self.section((*loc, i), item) for i, item in enumerate(value))
        return self.section(loc, value)

    def _made_up(self, loc: Loc) -> object:
        """Return a harmless value; Problems that depend on it are left out."""
        made: dict[str, object] = {
            "version": VERSION,
            "path": "model",
            "name": f"made-up-{loc[1] if len(loc) > 1 else 0}",
            "address": "127.0.0.1",
            "from": "made-up",
            "to": "made-up",
            "wire": "auto",
            "epsilon": 1.0,
            "delta": 1e-6,
            "clip": 1.0,
        }
        key = loc[-1]
        if key == "model":
            return self.section(loc, {})
        if key == "nodes":
            return (self.section((*loc, 0), {"role": "starter"}),)
        return made[str(key)]
