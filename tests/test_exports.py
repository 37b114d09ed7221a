"""What the package says of itself, and what the pages for users say of the package."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import typer

import mdiq
from mdiq.cli.main import app
from tests.docs.book import PAGES, README, ROOT, name_of, text_of

COMMANDS = {
    "run": 'python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/mdiq run "Why is the sky blue?"',
    "tests": 'python3 -m venv .venv && .venv/bin/pip install -q "tox>=4.30,<5" && .venv/bin/tox',
}


def _options() -> set[str]:
    """Return every spelling of every option of the commands that users call."""
    spellings: set[str] = set()
    commands = [typer.main.get_command(app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        if not command.hidden:
            options = [*command.params, command.get_help_option(typer.Context(command))]
            spellings |= {spelling for option in options for spelling in [*option.opts, *option.secondary_opts]}
    return spellings


def _block(page: Path, mark: str) -> list[str]:
    """Return the lines of the fenced block directly after a comment line, which stands on the page once."""
    found = re.findall(rf"^<!-- {mark} -->\n```\w+\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"<!-- {mark} -->: {len(found)} blocks directly after it"
    return found[0].splitlines()


def _tree_folders() -> list[Path]:
    """Return the folders that the tree of CONTRIBUTING.md names; two spaces of indentation are one level."""
    parents: list[str] = []
    folders = []
    for line in _block(ROOT / "CONTRIBUTING.md", "tree"):
        indentation, name = re.match(r"( *)(\S+)/ *", line).groups()  # type: ignore[union-attr]
        parents[len(indentation) // 2 :] = [name]
        folders.append(Path(*parents))
    return folders


def test_the_version_is_that_of_the_installed_package() -> None:
    assert mdiq.__version__ == importlib.metadata.version("mdiq")


@pytest.mark.parametrize("mark", COMMANDS)
def test_the_readme_has_the_command(mark: str) -> None:
    assert _block(README, mark) == [COMMANDS[mark]]
    assert f"<!-- {mark} -->\n```bash\n" in text_of(README)


def test_every_option_that_the_pages_name_exists() -> None:
    named = {
        option: name_of(page)
        for page in PAGES
        if name_of(page) != "nodes/README.md"  # it has options of the programs beside it
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text_of(page))
    }
    assert {"--nodes", "--json", "--explain", "--dry-run"} <= named.keys(), "it tests too little"
    assert {option: page for option, page in named.items() if option not in _options()} == {}


def test_every_folder_of_the_tree_of_the_house_exists() -> None:
    folders = _tree_folders()
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_every_room_is_in_the_tree_of_the_house() -> None:
    rooms = {module.parent.relative_to(ROOT) for module in (ROOT / "mdiq").glob("*/__init__.py")}
    assert rooms - set(_tree_folders()) == set()
