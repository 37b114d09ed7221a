"""Pages as values: blocks of text, tables and charts, whose every figure is a place in a JSON document. Pure.

A Value names the place, as a JSON pointer (RFC 6901), and how the number there is written. Text and figures are kept
apart, so that html.py, markdown.py and svg.py can mark each figure with its place, and a test can look them all up.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Language = Literal["en", "ja"]
LANGUAGES: tuple[Language, ...] = ("en", "ja")
Document = Mapping[str, Any]
NOTHING = "–"
"""What stands where the document has null."""


@dataclass(frozen=True, slots=True)
class Value:
    """A figure of a document.

    pointer: of a number, a text, or null. digits: after the point. scale: the number is divided by it. unit: stands
    after it. has_sign: with + or -. exponent: of a number too small for its digits is written out.
    """

    pointer: str
    digits: int = 0
    scale: float = 1.0
    unit: str = ""
    has_sign: bool = False


Piece = str | Value
Text = tuple[Piece, ...]
Kind = Literal["plain", "good", "bad", "note"]


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading; level 2 begins a section."""

    text: Text
    level: int = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph. kind: how it is set off."""

    text: Text
    kind: Kind = "plain"


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list."""

    items: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first cell of each row is its head."""

    head: tuple[Text, ...]
    rows: tuple[tuple[Text, ...], ...]


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a Series. x: where it lies; of bars a number or the name of the bar. y: its value and its place."""

    x: float | str
    y: float
    value: Value


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind. is_predicted: drawn as what was not measured."""

    name: str
    points: tuple[Point, ...]
    is_predicted: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line with a word."""

    x: Value
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture. name: of its files. kind: lines over numbers, bars beside each other, or stacked on each other."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    kind: Literal["line", "bar", "stacked"] = "line"
    marks: tuple[Mark, ...] = ()


Block = Heading | Paragraph | Bullets | Table | Chart


@dataclass(frozen=True, slots=True)
class Page:
    """A page. verdict: its answer in one sentence, and whether that is a good one."""

    language: Language
    title: str
    subtitle: Text
    verdict: Paragraph | None
    blocks: tuple[Block, ...]

    @property
    def charts(self) -> tuple[Chart, ...]:
        return tuple(block for block in self.blocks if isinstance(block, Chart))


def look_up(document: Document, pointer: str) -> Any:
    """Return what stands at a place of a document.

    Raises:
        KeyError: there is nothing.
    """
    found: Any = document
    for part in pointer.split("/")[1:]:
        try:
            found = found[int(part)] if isinstance(found, Sequence) else found[part]
        except (IndexError, ValueError, TypeError):
            raise KeyError(pointer) from None
    return found


def shown(raw: object, value: Value) -> str:
    """Return a figure as it is written."""
    if raw is None:
        return NOTHING
    if isinstance(raw, bool):
        return "✓" if raw else NOTHING  # in either language
    if not isinstance(raw, int | float):
        return f"{raw}{value.unit}"
    number = raw / value.scale
    return f"{number:{'+' if value.has_sign else ''},.{value.digits}f}{value.unit}"


def text(template: str, values: Mapping[str, Value | str]) -> Text:
    """Return a sentence with ``{name}`` replaced by its values."""
    pieces: list[Piece] = []
    for i, part in enumerate(re.split(r"\{(\w+)\}", template)):
        piece = values[part] if i % 2 else part
        if piece != "":
            pieces.append(piece)
    return tuple(pieces)


def nouns(number: int, noun: str) -> str:
    """Return an English noun as it stands after a number: device or devices."""
    return noun if number == 1 else f"{noun}s"


@dataclass(frozen=True, slots=True)
class Words:
    """Sentences in one of the two languages, which stand beside each other in the source."""

    language: Language

    def word(self, en: str, ja: str) -> str:
        """Return the word of this language."""
        return en if self.language == "en" else ja

    def say(self, en: str, ja: str, **values: Value | str) -> Text:
        """Return the sentence of this language with its values."""
        return text(self.word(en, ja), values)
