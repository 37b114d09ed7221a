"""The book's page of every command and option: `python -m tests.docs.generated` writes it, and a test compares."""

import inspect
import re
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from mdiq.cli.main import app

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "reference" / "command-line.md"

_HEAD = """\
# Command line

Every command and option, as `mdiq --help` shows them. `python -m tests.docs.generated` writes this page.
"""
_DEFAULT = re.compile(r" ?\[default: (.*)\]$")


def command_line_page() -> str:
    """Return the page of today, made of the commands of typer."""
    return "\n".join([_HEAD, *(_section(name, command) for name, command in shown_commands().items())])


def shown_commands() -> dict[str, Any]:
    """Return every command that users call, by its full name; groups go before their commands."""
    found: dict[str, Any] = {}
    left = [("mdiq", typer.main.get_command(app))]
    while left:
        name, command = left.pop(0)
        found[name] = command
        below = getattr(command, "commands", {})
        left = [(f"{name} {key}", value) for key, value in below.items() if not value.hidden] + left
    return found


def _section(name: str, command: Any) -> str:
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True) if command.callback else {}
    parameters = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    arguments = [_argument(parameter) for parameter in parameters if parameter.param_type_name == "argument"]
    usage = " ".join([name, *(["COMMAND"] if hasattr(command, "commands") else []), *arguments])
    usage += " [OPTIONS]" if len(parameters) > len(arguments) else ""
    parts = [f"## `{name}`\n", f"{command.help}\n", f"```text\n{usage}\n```\n"]
    if parameters:
        rows = [_row(parameter, hints[parameter.name]) for parameter in parameters]
        parts.append("\n".join(["| option | values | default | meaning |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _argument(parameter: Any) -> str:
    shown = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return shown if parameter.required else f"[{shown}]"


def _row(parameter: Any, hint: Any) -> str:
    meaning, default = parameter.help or "", _default(parameter)
    if said := _DEFAULT.search(meaning):
        meaning, default = meaning[: said.start()], said.group(1)
    name = ", ".join(f"`{spelling}`" for spelling in [*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        name = f"`{_argument(parameter)}`"
    elif parameter.envvar:
        default = f"`${parameter.envvar}`"
    cells = (name, _values(hint), default, meaning)
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = getattr(parameter.default, "value", parameter.default)
    if isinstance(default, bool):
        is_pair = default or parameter.secondary_opts
        return f"`{(parameter.opts if default else parameter.secondary_opts)[0]}`" if is_pair else "off"
    if isinstance(default, float):
        return f"`{default:g}`"
    return "" if default in (None, "") else f"`{default}`"


def _values(hint: Any) -> str:
    """Return the values of an option, as words. hint: its annotation, with typer's own mark."""
    kind, mark = get_args(hint)
    if type(None) in get_args(kind):  # list[str] | None
        kind = next(choice for choice in get_args(kind) if choice is not type(None))
    kind = next(iter(get_args(kind)), kind) if get_origin(kind) is list else kind
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    if mark.min is not None:
        return f"{mark.min:,} to {mark.max:,}" if mark.max is not None else f"{mark.min:,} or more"
    return {bool: "", str: "text", int: "whole number", float: "number", Path: "file"}[kind]


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(command_line_page(), encoding="utf-8")
