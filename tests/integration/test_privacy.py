"""What a node could read of prompts, on the real model."""

import json
import subprocess
from itertools import pairwise

from tests.integration.conftest import mdiq_command


def test_the_first_hop_tells_most_tokens_and_noise_hides_them() -> None:
    sizes = ["--train-tokens", "1024", "--test-tokens", "128", "--cut", "1", "--epsilon", "10000,300,10"]
    done = subprocess.run(
        mdiq_command("privacy", "smollm2-135m-instruct", *sizes, "--json"), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["epsilon"] for row in rows] == [None, 10_000, 300, 10]
    assert rows[0]["linear"] > 0.7 and rows[0]["nearest"] > 0.7
    assert rows[-1]["linear"] < 0.2 and rows[-1]["nearest"] < 0.2
    assert all(more["linear"] > less["linear"] for more, less in pairwise(rows))
    assert all(less["changed"] < more["changed"] for less, more in pairwise(rows[:3]))
    assert 5 < rows[0]["perplexity"] < 50 < rows[2]["perplexity"]
