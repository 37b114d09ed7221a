"""A Page as one HTML file: no resource from elsewhere, no script, and the whole JSON document inside it."""

from importlib.resources import files

from jinja2 import Environment
from markupsafe import Markup, escape

from mdiq.report import svg
from mdiq.report.page import Chart, Document, Page, Piece, Table, Text, Value, look_up, shown


def html(page: Page, document: Document) -> str:
    """Return the page. Each figure is a <data> element: data-json is its place in the document."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("mdiq.report").joinpath("page.html").read_text(encoding="utf-8"))

    def piece_html(piece: Piece) -> Markup:
        if not isinstance(piece, Value):
            return escape(piece)
        raw = look_up(document, piece.pointer)
        kind = Markup(' class="number"') if is_number(raw) else ""
        figure = Markup('<data value="{}" data-json="{}"{}>{}</data>')
        return figure.format("" if raw is None else raw, piece.pointer, kind, shown(raw, piece))

    def text_html(pieces: Text) -> Markup:
        return Markup("").join(piece_html(piece) for piece in pieces)

    def of_words(table: Table) -> list[bool]:
        """Return which columns have no number in any cell: words stand at the left, figures at the right."""

        def has_number(cell: Text) -> bool:
            return any(isinstance(piece, Value) and is_number(look_up(document, piece.pointer)) for piece in cell)

        return [not any(map(has_number, cells)) for cells in zip(*table.rows, strict=True)] or [True] * len(table.head)

    def picture(chart: Chart) -> Markup:
        return Markup(svg.draw(chart, document))  # svg.py escapes what it is given

    return template.render(page=page, document=document, text=text_html, of_words=of_words, picture=picture)


def is_number(raw: object) -> bool:
    return isinstance(raw, int | float) and not isinstance(raw, bool)
