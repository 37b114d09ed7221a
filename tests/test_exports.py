"""What the package says of itself, and what README.md says of the package."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import typer

import mdiq
from mdiq.cli.main import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
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


def _block(mark: str) -> list[str]:
    """Return the lines of the fenced block directly behind a comment line, which stands in README once."""
    found = re.findall(rf"^<!-- {mark} -->\n```\w+\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"<!-- {mark} -->: {len(found)} blocks directly behind it"
    return found[0].splitlines()


def _tree_folders() -> list[Path]:
    """Return the folders that README's tree names; two spaces of indentation are one level."""
    parents: list[str] = []
    folders = []
    for line in _block("tree"):
        indentation, name = re.match(r"( *)(\S+)/ *", line).groups()  # type: ignore[union-attr]
        parents[len(indentation) // 2 :] = [name]
        folders.append(Path(*parents))
    return folders


def test_the_version_is_that_of_the_installed_package() -> None:
    assert mdiq.__version__ == importlib.metadata.version("mdiq")


@pytest.mark.parametrize("mark", COMMANDS)
def test_the_readme_has_the_command(mark: str) -> None:
    assert _block(mark) == [COMMANDS[mark]]
    assert f"<!-- {mark} -->\n```bash\n" in README


def test_every_option_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert {"--nodes", "--json"} <= named, "it tests too little"
    assert named - _options() == set()


def test_every_folder_of_the_readmes_tree_exists() -> None:
    folders = _tree_folders()
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_every_room_is_in_the_readmes_tree() -> None:
    rooms = {module.parent.relative_to(ROOT) for module in (ROOT / "mdiq").glob("*/__init__.py")}
    assert rooms - set(_tree_folders()) == set()
