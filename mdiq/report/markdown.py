"""A Page as Markdown, and a document as CSV: one line for every number and text in it, by its place."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from mdiq.report.page import Block, Bullets, Chart, Document, Heading, Page, Paragraph, Table, Text, look_up, shown

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def markdown(page: Page, document: Document, pictures: str) -> str:
    """Return the page. pictures: where its charts lie as NAME.svg, relative to it."""
    blocks = [f"# {_escaped(page.title)}", _text(page.subtitle, document)]
    if page.verdict is not None:
        blocks.append(f"**{_text(page.verdict.text, document)}**")
    blocks += [_block(block, document, pictures) for block in page.blocks]
    return "\n\n".join(blocks) + "\n"


def csv_text(document: Document) -> str:
    """Return every number and text of a document: its place, and what stands there.

    Spreadsheets compute texts that begin like a formula, and names may come from a ring's API: they get a ' before.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("place", "value"))
    writer.writerows(_leaves("", document))
    return out.getvalue()


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{place}/{key}", inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(f"{place}/{i}", inner)
    else:
        yield place, f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _block(block: Block, document: Document, pictures: str) -> str:
    match block:
        case Heading(text=text, level=level):
            return f"{'#' * level} {_text(text, document)}"
        case Paragraph(text=pieces):
            return _text(pieces, document)
        case Bullets(items=items):
            return "\n".join(f"- {_text(item, document)}" for item in items)
        case Table(head=head, rows=rows):
            lines = [head, *rows]
            texts = [
                "| " + " | ".join(_text(cell, document).replace("|", "\\|") for cell in line) + " |" for line in lines
            ]
            return "\n".join([texts[0], "|" + "---|" * len(head), *texts[1:]])
        case Chart(name=name, title=title):
            return f"![{_escaped(title)}]({pictures}{name}.svg)"


def _text(pieces: Text, document: Document) -> str:
    return "".join(
        _escaped(piece if isinstance(piece, str) else shown(look_up(document, piece.pointer), piece))
        for piece in pieces
    )


def _escaped(text: str) -> str:
    for sign in "\\`*_<>[]":
        text = text.replace(sign, f"\\{sign}")
    return text
