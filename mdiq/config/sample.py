"""A topology file from a few answers. Its comments come from the schema, so that they say what is so today."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from mdiq.config.addresses import is_loopback, machine_of
from mdiq.config.schema import SCHEMA_LINE, topology_schema, values_text
from mdiq.config.topology import VERSION
from mdiq.core.known_models import DEFAULT_MODEL
from mdiq.core.types import USUAL_WEIGHTS

NODE_KEYS = ("data_port", "control_port", "weights_port", "device", "threads", "memory", "layers")
"""What may be said of a node beside its name, address and role."""

_FIRST_FREE_PORT = 7403  # the Starter has 7400 to 7402
_WIDTH = 100

_TOP = """\
The topology of an mdiq ring: its devices, its model, and who may talk to whom.
`mdiq check` tells what is wrong with this file; editors complete its keys with the schema that lies beside it."""


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """A device. values: keys of NODE_KEYS with their values as the file writes them."""

    name: str
    address: str
    spare: bool = False
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a file is made of; the first node is the Starter."""

    nodes: tuple[NodeAnswer, ...]
    model: str = DEFAULT_MODEL.name
    weights: str = USUAL_WEIGHTS
    insecure: bool = False


def topology_text(answers: Answers) -> str:
    """Return an annotated topology file. It is not checked: wrong answers make a wrong file."""
    schema = topology_schema()
    sections: dict[str, dict[str, Any]] = schema["$defs"]
    lines = [SCHEMA_LINE, *_comment(_TOP, 0), f"version: {VERSION}", ""]
    lines += ["model:", *_section(sections["ModelChoice"], {"path": answers.model, "weights": answers.weights}), ""]
    lines += [*_comment(schema["properties"]["nodes"]["description"], 0), "nodes:"]
    lines += _nodes(answers, sections["Node"])
    lines += ["", "links:", *_section(sections["Links"], {})]
    lines += ["", "security:", *_section(sections["Security"], {"insecure": answers.insecure})]
    lines += ["", "api:", *_section(sections["Api"], {}), "", "ring:", *_section(sections["RingWishes"], {})]
    lines += ["", *_comment(schema["properties"]["journal"]["description"], 0), "journal: auto"]
    return "\n".join(lines) + "\n"


def scalar(value: object) -> str:
    """Return a value as YAML writes it; a text that YAML would read as something else is put in quotes."""
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z0-9_./~][\w./~:@+-]*", value, re.ASCII) and not value.endswith(":"):
        if yaml.safe_load(value) == value:
            return value
    return json.dumps(value, ensure_ascii=False)


def _nodes(answers: Answers, section: dict[str, Any]) -> Iterator[str]:
    ports = _data_ports(answers.nodes)
    needs_keys = not answers.insecure and not all(is_loopback(node.address) for node in answers.nodes)
    for i, node in enumerate(answers.nodes):
        values: dict[str, object] = {"name": node.name, "role": "starter" if i == 0 else "worker"}
        values |= {"address": node.address, "data_port": ports[i]}
        values |= {key: _value(text) for key, text in node.values.items()}
        if node.spare:
            values["spare"] = True
        if needs_keys:
            values["public_key"] = None
        if i == 0:
            # The first node shows all keys; the others only what is their own.
            yield from _section(section, values, as_item=True)
            continue
        yield ""
        order = [key for key in section["properties"] if key in values]
        for n, key in enumerate(order):
            yield f"  {'- ' if n == 0 else '  '}{key}: {scalar(values[key])}"


def _data_ports(nodes: tuple[NodeAnswer, ...]) -> list[object]:
    """Return each node's data port: the usual one, or another where nodes share a machine."""
    taken: set[tuple[str, object]] = {
        (machine_of(node.address), _value(node.values.get("data_port", ""))) for node in nodes
    }
    ports: list[object] = []
    for i, node in enumerate(nodes):
        machine = machine_of(node.address)
        port = _value(node.values["data_port"]) if "data_port" in node.values else 7400
        if "data_port" not in node.values and any(machine_of(other.address) == machine for other in nodes[:i]):
            port = next(n for n in range(_FIRST_FREE_PORT, 65536) if (machine, n) not in taken)
        taken.add((machine, port))
        ports.append(port)
    return ports


def _section(section: dict[str, Any], values: Mapping[str, object], *, as_item: bool = False) -> Iterator[str]:
    """Yield every key with its comment, its value or default."""
    indent = 4 if as_item else 2
    for n, (key, schema) in enumerate(section["properties"].items()):
        value = values.get(key, schema.get("default"))
        dash = as_item and n == 0
        yield from _comment(_about(schema), 2 if dash else indent)
        text = f"{key}: {scalar(value)}"
        yield f"  - {text}" if dash else " " * indent + text


def _about(schema: dict[str, Any]) -> str:
    values = values_text(schema).replace("`", "")
    return f"{schema['description']} ({values})" if values not in ("a text", "a list") else str(schema["description"])


def _comment(text: str, indent: int) -> list[str]:
    return [
        f"{' ' * indent}# {line}"
        for part in text.splitlines()
        for line in textwrap.wrap(part, _WIDTH, break_long_words=False)
    ]


def _value(text: str) -> object:
    """Return a value that a flag gave: whole numbers are numbers, all else is a text."""
    return int(text) if re.fullmatch(r"0|[1-9]\d{0,8}", text) else text
