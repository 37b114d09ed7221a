"""The keys of a topology file for editors (JSON schema) and for readers (tables): both made of the models."""

import json
from typing import Any

from mdiq.config.topology import MAX_NODES, Topology

SCHEMA_FILE = "topology.schema.json"
SCHEMA_LINE = f"# yaml-language-server: $schema=./{SCHEMA_FILE}"
"""First line of a topology file: editors find the schema by it."""

_SECTIONS = (
    ("The file itself", "Topology"),
    ("`model`", "ModelChoice"),
    ("`nodes`: each of them", "Node"),
    ("`links`", "Links"),
    ("`links.hops`: each of them", "HopWire"),
    ("`security`", "Security"),
    ("`api`", "Api"),
    ("`ring`", "RingWishes"),
)


def topology_schema() -> dict[str, Any]:
    """Return the JSON schema of a topology file."""
    schema: dict[str, Any] = Topology.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        for value in part["properties"].values():
            value.pop("title", None)  # the key again, in another case
            if "$ref" in value:
                model = schema["$defs"][value["$ref"].rpartition("/")[2]]
                value.setdefault("description", model["description"])
                if "default" in value:
                    value["default"] = {}  # the keys' own defaults, in the units of the file
    schema["properties"]["nodes"] |= {"minItems": 1, "maxItems": MAX_NODES}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "mdiq topology"}


def schema_text() -> str:
    """Return the schema as its file holds it."""
    return json.dumps(topology_schema(), indent=2, ensure_ascii=False) + "\n"


def key_tables() -> str:
    """Return every key with its values, default and meaning, as Markdown."""
    schema = topology_schema()
    parts = []
    for title, name in _SECTIONS:
        section = schema if name == "Topology" else schema["$defs"][name]
        rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
        for key, value in section["properties"].items():
            default = "required" if key in section.get("required", ()) else _default(value)
            meaning = value["description"].replace("|", "\\|")
            rows.append(f"| `{key}` | {values_text(value)} | {default} | {meaning} |")
        parts.append(f"### {title}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _default(value: dict[str, Any]) -> str:
    default = value["default"]
    if isinstance(default, dict):
        return "see below"
    if default == []:
        return "none"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def values_text(value: dict[str, Any]) -> str:
    """Return what may stand at a key, as Markdown. value: the key's JSON schema."""
    if "x-values" in value:
        text: str = value["x-values"]
        return text
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "minimum" in value:
        return f"{value['minimum']} to {value['maximum']}"
    if "anyOf" in value:
        return " or ".join("`null`" if choice["type"] == "null" else "a text" for choice in value["anyOf"])
    kinds = {"string": "a text", "boolean": "`true`, `false`", "array": "a list", "object": "keys, see below"}
    return kinds[value.get("type", "object")]
