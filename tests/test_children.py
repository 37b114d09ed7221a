"""Python that mdiq starts never imports from the working directory: what lies there is the user's."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "mdiq").rglob("*.py"), *(ROOT / "nodes").glob("*.py")])
ISOLATES = {"-P", "-I"}


def _starts(source: str) -> Iterator[tuple[int, bool]]:
    """Yield the line of each command with this interpreter in it, and whether the word behind keeps its path clean."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.List | ast.Tuple):
            continue
        for word, following in zip(node.elts, [*node.elts[1:], None], strict=False):
            if ast.unparse(word) == "sys.executable":
                yield word.lineno, isinstance(following, ast.Constant) and following.value in ISOLATES


def test_every_python_that_is_started_leaves_the_working_directory_out() -> None:
    starts = {
        f"{path.relative_to(ROOT)}:{line}": is_safe
        for path in SOURCES
        for line, is_safe in _starts(path.read_text(encoding="utf-8"))
    }
    assert len(starts) >= 8
    assert [place for place, is_safe in starts.items() if not is_safe] == []


@pytest.mark.parametrize(
    ("source", "is_safe"),
    [
        ("[sys.executable, '-m', 'mdiq']", False),
        ("f(*(sys.executable, *words))", False),
        ("[*inside, sys.executable, '-P', *words]", True),
    ],
)
def test_a_command_that_is_not_safe_is_found(source: str, is_safe: bool) -> None:
    assert [found for _, found in _starts(source)] == [is_safe]


def test_python_m_mdiq_executes_no_file_of_the_working_directory(tmp_path: Path) -> None:
    for name in ("structlog", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "-m", "mdiq", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("mdiq ")
