"""Writes a document and its pages into a folder: JSON, CSV, and HTML and Markdown in each language, with pictures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from mdiq.errors import ConfigError
from mdiq.report import png, svg
from mdiq.report.html import html
from mdiq.report.markdown import csv_text, markdown
from mdiq.report.page import Document, Language, Page

MakePage = Callable[[Document, Language], Page]


def check_folder(folder: Path, name: str) -> None:
    """Make the folder; better before an hour of measuring than after it. name: as of ``write``.

    Raises:
        ConfigError: it cannot be made or not be written in, or a file in it that would be written anew cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".mdiq-probe"
        probe.touch()
        probe.unlink()
        for old in (*folder.glob(f"{name}.*"), *folder.glob(f"{name}-*")):
            with old.open("ab"):
                pass
    except OSError as error:
        raise _refused(folder, error) from None


def write(
    document: Document, make_page: MakePage, languages: Sequence[Language], folder: Path, name: str
) -> list[Path]:
    """Write NAME.json, NAME.csv, NAME.LANGUAGE.html and .md, and pictures; return the files.

    Pictures are SVG in each language and, if matplotlib is installed, PNG in those that it has a font for; at least in
    English.

    Raises:
        ConfigError: the folder cannot be written in.
    """
    files = [folder / f"{name}.json"]
    try:  # first, whatever becomes of the pages: it holds all that was measured
        files[0].write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8", "replace")
    except OSError as error:
        raise _refused(folder, error) from None
    texts = {f"{name}.csv": csv_text(document)}
    for language in languages:
        page = make_page(document, language)
        texts[f"{name}.{language}.html"] = html(page, document)
        texts[f"{name}.{language}.md"] = markdown(page, document, f"{name}-{language}-")
        for chart in page.charts:
            texts[f"{name}-{language}-{chart.name}.svg"] = svg.draw(chart, document)
    try:
        for file, text in texts.items():
            files.append(folder / file)
            files[-1].write_text(text, encoding="utf-8", errors="replace")  # a name may not be Unicode
        if png.can_draw():
            font = png.japanese_font()
            drawn = {language if language == "en" or font is not None else "en" for language in languages}
            for language in sorted(drawn):
                charts = make_page(document, language).charts
                own = None if language == "en" else font
                files += png.draw(charts, folder, f"{name}-{language}-", own)
    except OSError as error:
        raise _refused(folder, error) from None
    return files


def _refused(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--out {folder}: {error.strerror or error}; name a folder to write in")
