"""What a node could read of prompts, on the real model; and a ring of processes with noise before a node."""

import json
import subprocess
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mdiq.plan.privacy import promised, total_epsilon
from tests.integration.conftest import mdiq_command
from tests.integration.tiny_model import NUM_LAYERS, write_tiny_model
from tests.integration.two_nodes import TwoNodes, two_nodes

pytestmark = pytest.mark.timeout(600)

PROMPT = [i * 31 % 251 for i in range(40)]


def test_the_first_hop_tells_most_tokens_and_noise_hides_them() -> None:
    sizes = ["--train-tokens", "1024", "--test-tokens", "128", "--cut", "1", "--epsilon", "10000,300,10"]
    done = subprocess.run(
        mdiq_command("privacy", "--model", "smollm2-135m-instruct", *sizes, "--json"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["epsilon"] for row in rows] == [None, 10_000, 300, 10]
    assert rows[0]["linear"] > 0.7 and rows[0]["nearest"] > 0.7
    assert rows[-1]["linear"] < 0.2 and rows[-1]["nearest"] < 0.2
    assert all(more["linear"] > less["linear"] for more, less in pairwise(rows))
    assert all(less["changed"] < more["changed"] for less, more in pairwise(rows[:3]))
    assert 5 < rows[0]["perplexity"] < 50 < rows[2]["perplexity"]


def _answer(ring: TwoNodes, max_tokens: int) -> list[str]:
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    request = urllib.request.Request(
        f"{ring.api}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=400) as response:
        choice: dict[str, Any] = json.loads(response.read())["choices"][0]
    tokens: list[str] = choice["logprobs"]["tokens"]
    return tokens


def test_a_ring_with_noise_answers_counts_every_row_and_goes_on_after_a_loss(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    noise = {"epsilon": 8, "delta": 1e-6, "clip": 5}
    with two_nodes(
        tmp_path, {"path": "model", "weights": "plain"}, NUM_LAYERS, {"noise": noise}, ring={"prefix_reuse": False}
    ) as ring:
        answers = [_answer(ring, 12) for _ in range(2)]
        assert [len(answer) for answer in answers] == [12, 12]
        assert answers[0] != answers[1], "noise is drawn anew"
        rows = len(PROMPT) + 12 - 1
        assert ring.metric("mdiq_noise_rows_total") == 2 * rows
        assert ring.metric("mdiq_noise_worst_request_rows") == rows
        worst = total_epsilon(promised(8, 1e-6, 5), rows)
        assert ring.metric("mdiq_noise_worst_request_epsilon") == pytest.approx(worst, abs=1e-3)
        ring.replace_second()
        assert len(_answer(ring, 12)) == 12  # perhaps from the Starter alone, and nothing is sent then
        assert ring.metric("mdiq_noise_rows_total") >= 2 * rows
        assert "noise_is_not_exact" in ring.log_of("serve")
