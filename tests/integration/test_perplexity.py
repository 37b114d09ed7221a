"""What packed weights cost on the real model and a real text."""

import json
import subprocess

import pytest

from tests.integration.conftest import mdiq_command, run_mdiq


@pytest.mark.parametrize(("mode", "tokens"), [("--exact", "2048"), ("--fast", "384")])
def test_packed_weights_keep_the_bounds(mode: str, tokens: str) -> None:
    done = subprocess.run(
        mdiq_command("perplexity", "--tokens", tokens, "--json", mode), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout
    rows = {row["weights"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["int8"]["most"] == 1.005 and rows["int4"]["most"] == 1.01
    if mode == "--exact":  # enough tokens to decide
        assert all(rows[weights]["error"] < 0.005 for weights in ("int8", "int4"))
    assert rows["int4"]["weight_bytes"] < rows["int8"]["weight_bytes"] < 0.4 * rows["f32"]["weight_bytes"]
    # A text this regular is predicted far better than by chance (49,152 tokens), and far worse than by heart.
    assert 5 < rows["f32"]["perplexity"] < 50


def test_a_ring_of_int8_weights_gives_the_tokens_of_one_node() -> None:
    """A prompt of one chunk: the same bits on every ring, as long as no hop rounds. In 4 bits: test_same_tokens.py.

    With the same threads everywhere: a kernel is chosen for a number of threads, and each rounds in its own way.
    """
    arguments = ("--weights", "int8", "--wire", "f32", "--threads", "1", "--max-tokens", "24", "--ignore-eos", "--raw")
    answers = [
        run_mdiq("run", "The capital of France is", "--nodes", nodes, *arguments, "--json").results[0]["token_ids"]
        for nodes in ("1", "3")
    ]
    assert len(answers[0]) == 24
    assert answers[0] == answers[1]
