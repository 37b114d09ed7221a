"""Looks up every figure of a page in its JSON document."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

from mdiq.report.page import Bullets, Chart, Document, Heading, Page, Paragraph, Table, Text, Value, look_up, shown

WORDS = re.compile(r"p95|GPT-2|f32|bf16|i8|int8|int4")
"""Words of running text with a digit in them, which are no figures."""


def values_of(page: Page) -> Iterator[Value]:
    """Yield every Value of the text of a page, and of its charts' points."""

    def of(text: Text) -> Iterator[Value]:
        yield from (piece for piece in text if isinstance(piece, Value))

    yield from of(page.subtitle)
    yield from of(page.verdict.text if page.verdict else ())
    for block in page.blocks:
        match block:
            case Heading(text=text) | Paragraph(text=text):
                yield from of(text)
            case Bullets(items=items):
                for item in items:
                    yield from of(item)
            case Table(head=head, rows=rows):
                for row in (head, *rows):
                    for cell in row:
                        yield from of(cell)
            case Chart(series=all_series, marks=marks):
                yield from (point.value for series in all_series for point in series.points)
                yield from (mark.x for mark in marks)


class _Reader(HTMLParser):
    """Collects figures, places, free text and links of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.figures: list[tuple[str, str, str]] = []  # place, raw value, text
        self.places: list[str] = []
        self.free: list[str] = []
        self.links: list[str] = []
        self.script = ""
        self._open: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.links += [values[name] for name in ("src", "href", "xlink:href", "action", "srcset") if name in values]
        if tag == "link" or (tag == "script" and values.get("type") != "application/json"):
            self.links.append(tag)
        if tag not in ("meta", "br"):
            self._open.append((tag, values))
        if "data-json" in values:
            self.places.append(values["data-json"])
        if tag == "data":
            self.figures.append((values["data-json"], values["value"], ""))

    def handle_endtag(self, tag: str) -> None:
        opened = self._open.pop()
        assert opened[0] == tag, f"<{opened[0]}> is closed by </{tag}>"

    def handle_data(self, text: str) -> None:
        tags = [tag for tag, _ in self._open]
        if "script" in tags:
            self.script += text
        elif "data" in tags:
            place, raw, before = self.figures[-1]
            self.figures[-1] = (place, raw, before + text)
        elif "style" not in tags and not self._is_of_a_picture():
            self.free.append(text)

    def _is_of_a_picture(self) -> bool:
        """Numbers of axes, names of lines, and what is shown of a point that carries its place."""
        tag, values = self._open[-1] if self._open else ("", {})
        below = self._open[-2][1] if len(self._open) > 1 else {}
        return values.get("class") in ("tick", "label", "mark") or (tag == "title" and "data-json" in below)


def assert_traces_back(html: str, page: Page, document: Document) -> int:
    """See that each figure of a page is what the document has there, and that there is no other; return how many."""
    reader = _Reader()
    reader.feed(html)
    assert reader.links == [], "it needs a resource from elsewhere"
    assert not re.search(r"url\(|@import", re.sub(r"<script.*</script>", "", html, flags=re.S))
    assert json.loads(reader.script) == json.loads(json.dumps(document))
    known: dict[str, set[str]] = {}
    for value in values_of(page):
        known.setdefault(value.pointer, set()).add(shown(look_up(document, value.pointer), value))
    for place in reader.places:
        look_up(document, place)
    for place, raw, text in reader.figures:
        found: Any = look_up(document, place)
        assert raw == ("" if found is None else str(found)), place
        assert text in known[place], place
        if isinstance(found, int | float) and not isinstance(found, bool):
            assert re.search(r"\d", text), place
    loose = [text for text in reader.free if re.search(r"\d", WORDS.sub("", text))]
    assert loose == [], "these figures are in no <data>"
    return len(reader.figures)
