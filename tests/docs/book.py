"""The pages that users read, and the commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
PAGES = (
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "configs" / "README.md",
    ROOT / "nodes" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
_FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_HERE_DOCUMENT = re.compile(r"^(.*<<'(\w+)'\n.*?^\2)$", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    """Return what a page says."""
    return page.read_text(encoding="utf-8")


def without_blocks(text: str) -> str:
    """Return the text of a page without its fenced blocks."""
    return _FENCED.sub("", text)


def commands_of(text: str) -> list[str]:
    """Return the commands of a page's bash blocks, without comments, long ones on one line."""
    commands: list[str] = []
    for language, block in _FENCED.findall(text):
        if language != "bash":
            continue
        before = 0
        for found in _HERE_DOCUMENT.finditer(block):
            commands += [*_lines(block[before : found.start()]), found[1]]
            before = found.end()
        commands += _lines(block[before:])
    return commands


def _lines(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(re.sub(r"\s#.*", "", line).split()) for line in lines if line.strip()]


def named_commands_of(text: str) -> list[list[str]]:
    """Return the words after `mdiq` of each command that stands in a page's sentences and tables."""
    return [words.split() for words in re.findall(r"`mdiq\s+([^`]+)`", without_blocks(text))]


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} (.+)$", without_blocks(text), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        number, name = 0, anchor
        while name in found:
            number += 1
            name = f"{anchor}-{number}"
        found.add(name)
    return found


def links_of(text: str) -> list[str]:
    """Return the targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return str(page.relative_to(ROOT))
