"""The commands of the pages that compute: with a tiny model, short answers, and all stages in one process.

test_run.py starts the processes: here they would cost minutes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.book import PAGES, commands_of, text_of
from tests.docs.test_book import RUN_WITH_A_MODEL
from tests.integration.conftest import write_prompts
from tests.integration.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the prompts that the pages name, and a program `mdiq` that adds what is the test's own."""
    folder = tmp_path_factory.mktemp("book")
    model = write_tiny_model(folder / "model")
    write_prompts(folder / "in.jsonl", [{"prompt": f"Number {i}"} for i in range(3)])
    (folder / "bin").mkdir()
    own = f'--model "{model}" --max-tokens 4 --raw --kv-tokens 2048 --in-process'
    for name, arguments in (("mdiq", f'-P -m mdiq "$@" {own}'), ("python", '"$@"')):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}\n')
        program.chmod(0o755)
    return folder


COMMANDS = [command for page in PAGES for command in commands_of(text_of(page)) if RUN_WITH_A_MODEL.match(command)]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_command_of_the_pages_works(folder: Path, command: str) -> None:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = command.replace("--layers 10,12,8", "--layers 2,2,2")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
