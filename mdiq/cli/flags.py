"""Values of flags: texts with commas between, and files that are written at the end of a long run."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from mdiq.api.structure import structure_of
from mdiq.core.sequence import SamplingParams
from mdiq.core.wire_formats import AUTO, WIRE_FORMATS
from mdiq.errors import ConfigError


def parse_wires(text: str, num_nodes: int) -> tuple[str, ...]:
    """Return the formats that "bf16" (all Hops) or "bf16,auto" (each Hop) names.

    Raises:
        ConfigError: a format is unknown, or there are more or fewer of them than Hops.
    """
    wires = tuple(text.split(","))
    for wire in wires:
        if wire not in (*WIRE_FORMATS, AUTO):
            raise ConfigError(f"--wire {text}: {wire!r} is not a format; use one of {', '.join((*WIRE_FORMATS, AUTO))}")
    if len(wires) not in (1, num_nodes):
        raise ConfigError(f"--wire {text}: {len(wires)} formats for {num_nodes} hops; give one, or one for each")
    return wires


def check_writable(flag: str, path: Path) -> None:
    """Refuse a file that could not be written later; one that exists keeps its content.

    Raises:
        ConfigError: it cannot be written.
    """
    exists = path.exists()
    if exists and not path.is_file() and not path.is_dir():
        return  # a pipe or a terminal: opening one twice would end it, or wait
    try:
        path.open("ab").close()
        if not exists:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}; name a file that can be written") from None


def parse_numbers(flag: str, text: str, maximum: int) -> tuple[int, ...]:
    """Return the numbers of a list like 1,2,4."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} {text}: not whole numbers with commas between; write for example 1,2,4") from None
    if not all(1 <= number <= maximum for number in numbers):
        raise ConfigError(f"{flag} {text}: each must be from 1 to {maximum}")
    return numbers


def parse_temperatures(text: str) -> tuple[float, ...]:
    """Return the temperatures of a list like 0,0.7."""
    try:
        temperatures = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--temperature {text}: not numbers with commas between; write for example 0,0.7") from None
    if not all(0 <= temperature < math.inf for temperature in temperatures):
        raise ConfigError(f"--temperature {text}: each must be a finite number, 0 or more")
    return temperatures


def parse_biases(texts: Iterable[str]) -> tuple[tuple[int, float], ...]:
    """Return the biases of texts like 1234=-100.

    Raises:
        ConfigError: one is not a token id and a number, or out of range.
    """
    biases: dict[str, float] = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            biases[token] = float(bias)
        except ValueError:
            raise ConfigError(f"--logit-bias {text}: not TOKEN=BIAS; write for example 1234=-100") from None
    return SamplingParams().replaced({"logit_bias": biases}, "--logit-bias").logit_bias


def parse_form(text: str | None) -> str:
    """Return the grammar of a form as response_format of the API describes it; empty without one.

    Raises:
        ConfigError: it is not JSON, or no such form.
    """
    if text is None:
        return ""
    try:
        form = structure_of({"response_format": json.loads(text)})
    except (ValueError, RecursionError):
        wanted = '{"type": "json_object"}'
        raise ConfigError(f"--response-format {text[:40]}: not JSON; write for example '{wanted}'") from None
    return "" if form is None else form.grammar


def hand_split(layers: str | None, nodes: int | None) -> tuple[int, ...]:
    """Return the layers of each node as --layers gives them, or none if the split is automatic.

    Raises:
        ConfigError: they are not numbers, or --nodes disagrees.
    """
    if layers is None:
        return ()
    try:
        split = tuple(int(number) for number in layers.split(","))
    except ValueError:
        raise ConfigError(f"--layers {layers}: not numbers with commas between; write for example 10,12,8") from None
    if nodes is not None and nodes != len(split):
        raise ConfigError(f"--layers {layers}: that is {len(split)} nodes and --nodes says {nodes}; leave --nodes out")
    return split
