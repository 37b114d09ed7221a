"""Types of the values of a topology file, each with the message about a wrong one."""

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from mdiq.config import units
from mdiq.config.addresses import checked_address
from mdiq.config.units import AUTO, shown
from mdiq.core.known_models import DEFAULT_MODEL
from mdiq.core.types import LayerRange
from mdiq.core.wire_formats import WireName

MIN_MEMORY = "64M"

Wire = Literal["auto", WireName]
Port = Annotated[int, Field(ge=1024, le=65535)]


def text_schema(pattern: str, values: str, *, or_auto: bool = False, or_null: bool = False) -> WithJsonSchema:
    """Return the JSON schema of a text with a unit. values: what the table says of it."""
    schema: dict[str, Any] = {"type": "string", "pattern": f"^({'auto|' if or_auto else ''}{pattern})$"}
    if or_null:
        schema["type"] = ["string", "null"]
    return WithJsonSchema(schema | {"x-values": values})


def _or_auto(value_of: Callable[[object], Any]) -> BeforeValidator:
    """Return the reader of a key that may be ``auto``, which is None."""

    def read(value: object) -> Any:
        if value is None:
            raise ValueError("it has no value; remove the line, or write auto")
        return None if value == AUTO else value_of(value)

    return BeforeValidator(read)


def _count(value: object) -> object:
    if isinstance(value, str):
        if value.isascii() and value.isdigit():
            raise ValueError(f"it is a text because of the quotes; write {shown(value)}")
        raise ValueError(f"{shown(value)} is neither auto nor a number; write auto or for example 2")
    return value


def _memory(value: object) -> int:
    if isinstance(value, str) and value.endswith("%"):
        raise ValueError(f"{shown(value)} is a share; write a size, for example 700M, or auto")
    num_bytes = units.parse_size(value)
    if num_bytes < units.parse_size(MIN_MEMORY):
        raise ValueError(f"{shown(value)} is too little to hold anything; write at least {MIN_MEMORY}, or auto")
    return num_bytes


def _rate(value: object) -> float | None:
    return None if value is None else units.parse_rate(value)


def _between(low: float, high: float, example: str) -> BeforeValidator:
    """Return the reader of a number from ``low`` to ``high``; YAML takes 1e-5 for a text."""

    def read(value: object) -> float:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            number = float(value)
        except ValueError:
            raise ValueError(f"{shown(value)} is not a number; write for example {example}") from None
        if not low <= number <= high:
            raise ValueError(f"{shown(value)} is out of range; write {low:g} to {high:g}, for example {example}")
        return number

    return BeforeValidator(read)


def _number_schema(low: float, high: float) -> WithJsonSchema:
    schema = {"type": "number", "minimum": low, "maximum": high}
    return WithJsonSchema(schema | {"x-values": f"{low:g} to {high:g}"})


def _time(low: str, high: str, example: str) -> BeforeValidator:
    """Return the reader of a time from ``low`` to ``high``."""

    def read(value: object) -> float:
        seconds = units.parse_time(value, example)
        if not units.parse_time(low) <= seconds <= units.parse_time(high):
            raise ValueError(f"{shown(value)} is out of range; write {low} to {high}, for example {example}")
        return seconds

    return BeforeValidator(read)


def _name(value: str) -> str:
    if re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
        return value
    better = re.sub(r"[^a-z0-9-]+", "-", value.lower())[:63].strip("-")
    advice = f"write for example {better}" if better else "write for example pi1"
    raise ValueError(f"{shown(value)} is not a node's name: a-z, 0-9 and - inside, at most 63; {advice}")


def _device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", value):
        return value
    if re.fullmatch(r"gpu|nvidia|jetson", value, re.IGNORECASE):
        raise ValueError(f"{value} is not a device's name; write cuda")
    raise ValueError(f"{shown(value)} is not a device; write cpu, cuda, cuda:0 or auto")


def _model_path(value: str) -> str:
    if not value.strip():
        raise ValueError(f"it is empty; write a model directory, a .gguf file or a known name: {DEFAULT_MODEL.name}")
    if re.match(r"[a-z]+://", value):
        raise ValueError(
            "mdiq does not download it; fetch it on the Starter's machine and write its directory or .gguf file"
        )
    if value.endswith((".safetensors", ".safetensors.index.json", "config.json")):
        raise ValueError("that is one file of a model; write the directory that holds it")
    if value.endswith((".bin", ".pt", ".pth", ".onnx", ".ckpt")):
        raise ValueError("this kind of file is not read; write a .gguf file or a directory with .safetensors files")
    return value


def _model_name(value: str) -> str:
    if re.fullmatch(r"[\w.:/@+-]{1,128}", value, re.ASCII):
        return value
    raise ValueError(f"{shown(value)} is not a name for clients: letters, digits and . _ - : / @ +, at most 128")


def _origin(value: str) -> str:
    if value == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", value):
        return value
    raise ValueError(f"{shown(value)} is not an origin; write for example https://chat.example.org, or '*' for all")


def _host_name(value: str) -> str:
    if re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,251}[a-zA-Z0-9])?", value):
        return value
    raise ValueError(f"{shown(value)} is not a host's name; write for example chat.example.org, without a port")


def _public_key(value: str) -> str:
    if len(value) != 40:
        raise ValueError(f"it has {len(value)} characters and a public key has 40; copy it whole, or run `mdiq keys`")
    if wrong := re.search(r"[^0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]", value):
        raise ValueError(f"{wrong[0]!r} at character {wrong.start() + 1} is no sign of a key (Z85); copy it again")
    return value


def _path(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError("it is empty; write a path (a relative one begins beside this file)")
    return value


Name = Annotated[
    str, AfterValidator(_name), text_schema(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a-z, 0-9, -; at most 63")
]
Device = Annotated[
    str, AfterValidator(_device), text_schema(r"auto|cpu|cuda(:\d{1,2})?", "`cpu`, `cuda`, `cuda:0`, `auto`")
]
ModelPath = Annotated[str, AfterValidator(_model_path)]
ModelName = Annotated[str, AfterValidator(_model_name)]
Origin = Annotated[str, AfterValidator(_origin)]
HostName = Annotated[str, AfterValidator(_host_name)]
PublicKey = Annotated[
    Annotated[str, AfterValidator(_public_key)] | None,
    text_schema(r".{40}", "`null`, or 40 characters (Z85) in quotes", or_null=True),
]
FilePath = Annotated[str, AfterValidator(_path)]
Host = Annotated[str, AfterValidator(partial(checked_address, may_be_wildcard=True))]
Address = Annotated[str, AfterValidator(partial(checked_address, may_be_wildcard=False))]
Size = Annotated[
    int | None,
    _or_auto(_memory),
    text_schema(units.SIZE_PATTERN, "`auto`, or a size: `700M`, `2G` (powers of 1024)", or_auto=True),
]
Layers = Annotated[
    LayerRange | None,
    _or_auto(units.parse_layers),
    text_schema(units.LAYERS_PATTERN, "`auto`, or the first and the last layer, from 0: `0-11`", or_auto=True),
]
Rate = Annotated[
    float | None,
    BeforeValidator(_rate),
    text_schema(units.RATE_PATTERN, "`null`, or a rate: `20mbit` (a second)", or_null=True),
]
Count = Annotated[
    Annotated[int, Field(ge=1, le=1024)] | None,
    _or_auto(_count),
    WithJsonSchema(
        {
            "anyOf": [{"const": AUTO}, {"type": "integer", "minimum": 1, "maximum": 1024}],
            "x-values": "`auto`, or 1 to 1024",
        }
    ),
]
DecodeWait = Annotated[
    float, _time("1ms", "60s", "200ms"), text_schema(units.TIME_PATTERN, "a time: `200ms`, `5s`; 1ms to 60s")
]
Silence = Annotated[float, _time("2s", "60s", "5s"), text_schema(units.TIME_PATTERN, "a time: `5s`; 2s to 60s")]
Timeout = Annotated[float, _time("1s", "3600s", "60s"), text_schema(units.TIME_PATTERN, "a time: `60s`; 1s to 3600s")]
Epsilon = Annotated[float, _between(0.01, 1e6, "8"), _number_schema(0.01, 1e6)]
Delta = Annotated[float, _between(1e-12, 0.1, "1e-6"), _number_schema(1e-12, 0.1)]
Norm = Annotated[float, _between(1e-6, 1e9, "100"), _number_schema(1e-6, 1e9)]
