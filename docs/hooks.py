"""Hooks of mkdocs: pages from outside docs/, links that work in files and on the site, nothing from other servers."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "configs/README.md": "topology.md",
    "nodes/README.md": "nodes.md",
}
"""File of the repository -> page of the site."""
_SOURCES = {page: source for source, page in ELSEWHERE.items()}
_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_FETCHED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="?(?:https?:)?//[^>]*>')


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with links between files of the repository turned into links between pages."""
    uri = page.file.src_uri
    folder = posixpath.dirname(_SOURCES.get(uri, f"docs/{uri}"))

    def site_link(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target:
            return link[0]
        target = posixpath.normpath(posixpath.join(folder, target))
        if target in ELSEWHERE:
            target = ELSEWHERE[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif (ROOT / target).exists():
            return text  # a file that the site does not have, such as code
        return f"[{text}]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{anchor})"

    parts = _FENCED.split(markdown)
    return "".join(part if n % 2 else _LINK.sub(site_link, part) for n, part in enumerate(parts))


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Refuse a page that a browser completes from another server.

    Raises:
        PluginError: it has such a script, style, picture or frame.
    """
    if found := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: it is not complete without {found[0]}")
