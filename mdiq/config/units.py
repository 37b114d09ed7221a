"""Texts with units to numbers: sizes, rates, times, and layers as operators count them.

The functions raise ValueError ("what; what to do"): the reader of the file adds the place and the line.
"""

import re

from mdiq.core.types import LayerRange

AUTO = "auto"

SIZE_PATTERN = r"\d+(\.\d+)?[KMGT]"
RATE_PATTERN = r"\d+(\.\d+)?[kmg]bit"
TIME_PATTERN = r"\d+(\.\d+)?(us|ms|s|min)"
LAYERS_PATTERN = r"\d{1,4}-\d{1,4}"

_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_BYTES_PER_S = {"k": "kbit", "m": "mbit", "g": "gbit"}
_MAX_CHARACTERS = 40  # of a value that a message repeats


def parse_size(value: object) -> int:
    """Return the bytes of a size such as ``700M`` or ``1.5G``; units are powers of 1024."""
    number, unit = _split(value, "700M", "a size")
    if unit in _SIZES:
        return round(number * _SIZES[unit])
    letter = unit[:1].upper()
    if re.fullmatch(r"[kmgt]i?b?|[kmgt]bytes?", unit, re.IGNORECASE):
        raise ValueError(f"{value} is not how a size is written here; write {number:g}{letter} (powers of 1024)")
    raise ValueError(f"{value} has an unknown unit; use one of K, M, G, T: for example 700M")


def parse_rate(value: object) -> float:
    """Return the bits per second of a rate such as ``20mbit``."""
    number, unit = _split(value, "20mbit", "a rate")
    if unit in _RATES:
        return number * _RATES[unit]
    if match := re.fullmatch(r"([kmg])(?:i?B/s|i?Bps)", unit, re.IGNORECASE):
        # Only a capital B means bytes: mbps and Mb/s are bits.
        factor = 8 if "B" in unit else 1
        raise ValueError(
            f"{value} is not how a rate is written here; write {number * factor:g}{_BYTES_PER_S[match[1].lower()]}"
        )
    if match := re.fullmatch(r"([kmg])(?:b|bits?|bits?/s)", unit, re.IGNORECASE):
        raise ValueError(f"{value} is not how a rate is written here; write {number:g}{_BYTES_PER_S[match[1].lower()]}")
    raise ValueError(f"{value} has an unknown unit; use one of kbit, mbit, gbit (a second): for example 20mbit")


def parse_time(value: object, example: str = "200ms") -> float:
    """Return the seconds of a time such as ``200ms`` or ``5s``; messages show the example, and take its unit."""
    number, unit = _split(value, example, "a time")
    if unit in _TIMES:
        return number * _TIMES[unit]
    if unit.lower() in _TIMES:
        raise ValueError(f"{value} is not how a time is written here; write {number:g}{unit.lower()}")
    raise ValueError(f"{value} has an unknown unit; use one of us, ms, s, min: for example {example}")


def parse_layers(value: object) -> LayerRange:
    """Return the LayerRange that the first and last layer name: ``0-11`` are twelve layers."""
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(item, int) for item in value):
        raise ValueError(f"it is a list; write the first and the last layer as {value[0]}-{value[1]}")
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(
            f"{value} could be a layer or a number of layers; write the first and the last one: "
            f"{value}-{value} is layer {value} alone" + (f", 0-{value - 1} are {value} layers" if value > 0 else "")
        )
    text = str(value).replace(" ", "")
    match = re.fullmatch(r"(\d{1,4})(-|\.\.|:|–|to)(\d{1,4})", text)
    if match is None:
        raise ValueError(
            f"{shown(value)} is not a range of layers; write the first and the last one, for example 0-11, or auto"
        )
    first, last = int(match[1]), int(match[3])
    if first > last:
        raise ValueError(f"{shown(value)} ends before it begins; write the first layer first: {last}-{first}")
    if match[2] != "-" or text != value:
        raise ValueError(f"{shown(value)} is not how layers are written here; write {first}-{last}")
    return LayerRange(first, last + 1)


def size_text(num_bytes: float) -> str:
    """Return a size as it is written in the file."""
    for unit, factor in reversed(_SIZES.items()):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g}{unit}"
    return f"{num_bytes / 1024:.3g}K"


def shown(value: object) -> str:
    """Return a value as a message repeats it: short, and nothing that a terminal would obey."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value == "":
        return "an empty text"
    text = "".join(character if character.isprintable() else "?" for character in str(value))
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


def _split(value: object, example: str, noun: str) -> tuple[float, str]:
    text = str(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else ""
    if re.fullmatch(r"\d{1,15}(\.\d{1,6})?", text):
        raise ValueError(f"{text} has no unit; write for example {text}{example.lstrip('0123456789')}")
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s?([A-Za-z/]+)", text.strip())
    if match is None:
        raise ValueError(f"{shown(value)} is not {noun}; write a number with its unit, for example {example}")
    if float(match[1]) == 0:
        raise ValueError(f"{text} is nothing; write more than that, for example {example}")
    if match[1] + match[2] != text:
        raise ValueError(f"{text} has a space in it; write {match[1]}{match[2]}")
    return float(match[1]), match[2]
