"""What a command imports, in a process of its own: torch takes seconds, and comes when nothing is left to refuse."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "llvmlite", "aiohttp", "matplotlib", "transformers"}


def _imported(*command: str) -> set[str]:
    """Return what a Python that runs these words has imported."""
    done = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", *command], capture_output=True, text=True, timeout=50
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["bench", "--help"], ["serve", "--help"], ["route", "--help"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    imported = _imported("-m", "mdiq", *words)
    assert "mdiq.cli.main" in imported
    assert imported & (HEAVY | {"numpy", "tokenizers", "zmq", "jinja2"}) == set()


def test_what_can_be_refused_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": 7}\n')
    assert _imported("-m", "mdiq", "run", "--prompts", str(prompts)) & HEAVY == set()
    assert _imported("-m", "mdiq", "run", "--model", str(tmp_path / "nowhere.gguf"), "Hello") & HEAVY == set()


def test_all_that_runs_before_the_other_nodes_have_started_does_without_torch() -> None:
    names = ("cli.run", "cli.bench", "runtime.ring_host", "engine.model_config", "engine.text.tokenizer")
    needed = f"import {', '.join(f'mdiq.{name}' for name in names)}"
    imported = _imported("-c", needed)
    assert "mdiq.runtime.processes" in imported
    assert imported & HEAVY == set()
