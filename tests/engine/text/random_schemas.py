"""Random JSON schemas that a small model can fill in: texts and lists are short."""

import random
from typing import Any

_WORDS = ("name", "city", "age", "tags", "price", "kind", "items", "unit", "note", "is_open")


def random_schema(seed: int) -> dict[str, Any]:
    """Return the schema of an object."""
    rng = random.Random(seed)
    schema = _object(rng, 3)
    if rng.random() < 0.2:  # a part by its name
        schema["$defs"] = {"Part": _object(rng, 1)}
        schema["properties"]["part"] = {"$ref": "#/$defs/Part"}
        schema["required"].append("part")
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    required = [name for name in names if rng.random() < 0.8] or names[:1]
    properties = {name: _value(rng, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    simple = (_text, _integer, _number, _enum, _boolean)
    nested = (_list, _either, lambda rng, depth: _object(rng, depth))
    if depth > 0 and rng.random() < 0.4:
        return rng.choice(nested)(rng, depth)
    return rng.choice(simple)(rng)


def _text(rng: random.Random) -> dict[str, Any]:
    more: tuple[dict[str, Any], ...] = (
        {"maxLength": rng.randint(4, 20)},
        {"minLength": 2, "maxLength": 12},
        {"pattern": r"^[A-Z][a-z]{1,6}$"},
        {"pattern": r"^\d{3}-\d{2}$"},
        {"format": "ipv4"},
        {"format": "uuid"},
    )
    return {"type": "string", **rng.choice(more)}


def _integer(rng: random.Random) -> dict[str, Any]:
    least = rng.randint(-50, 50)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 1_000)}


def _number(rng: random.Random) -> dict[str, Any]:
    return {"type": "number", "minimum": 0, "exclusiveMaximum": rng.randint(1, 100)}


def _enum(rng: random.Random) -> dict[str, Any]:
    return rng.choice(({"enum": ["red", "green", 3, None, 'a "b"']}, {"const": "fixed"}, {"enum": ["é", "\n"]}))


def _boolean(rng: random.Random) -> dict[str, Any]:
    return {"type": rng.choice(("boolean", "null", ["boolean", "null"]))}


def _list(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _value(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, depth - 1), {"type": "null"}]}
