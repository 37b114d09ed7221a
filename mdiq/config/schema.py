"""The keys of a topology file for editors and for readers, as JSON schema: made of the models."""

import json
from typing import Any

from mdiq.config.topology import MAX_NODES, Topology

SCHEMA_FILE = "topology.schema.json"
SCHEMA_LINE = f"# yaml-language-server: $schema=./{SCHEMA_FILE}"
"""First line of a topology file: editors find the schema by it."""


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
