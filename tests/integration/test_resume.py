"""A file of prompts whose Starter is killed: real processes, and a model that loads at once."""

import random
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import mdiq_command, run_mdiq, write_prompts
from tests.integration.test_run import _free_ports
from tests.integration.tiny_model import write_tiny_model
from tests.killed_batch import KilledBatch, answer_of, results_of

SEED = 20
REQUESTS = [
    {
        "prompt": f"Request {i}",
        "max_tokens": 100 + 40 * (i % 7),
        "ignore_eos": True,
        **({"temperature": 0.9, "seed": i, "repetition_penalty": 1.1} if i % 2 else {}),
        **({"stop": ["e"]} if i % 5 == 4 else {}),
    }
    for i in range(40)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def calm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[object, ...]]:
    """The answers of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    prompts = write_prompts(folder / "in.jsonl", REQUESTS)
    run = ("run", "--model", model, "--raw", "--in-process", "--kv-tokens", "8192", "--prompts", prompts)
    done = run_mdiq(*run, "--out", folder / "out.jsonl")
    assert done.code == 0, done.errors
    return _answers(folder / "out.jsonl")


def _answers(out: Path) -> dict[int, tuple[object, ...]]:
    return {index: answer_of(result) for index, result in results_of(out).items()}


def test_a_starter_that_is_killed_again_and_again_answers_each_request_once(
    model: Path, calm: dict[int, tuple[object, ...]], tmp_path: Path
) -> None:
    """With its nodes, while it answers and while it loads; and without them; always on the same ports."""
    rng = random.Random(SEED)
    prompts = write_prompts(tmp_path / "in.jsonl", REQUESTS)
    ring = ("--nodes", "2", "--raw", "--threads", "1", "--kv-tokens", "8192", "--base-port", f"{_free_ports(2)}")
    batch = KilledBatch(mdiq_command("run", "--model", model, *ring), prompts, tmp_path)
    batch.run_and_kill(rng.uniform(0.0, 1.0), is_alone=False, once_it_serves=True)
    batch.run_and_kill(rng.uniform(0.5, 3.0), is_alone=False, once_it_serves=False)
    batch.run_and_kill(rng.uniform(0.0, 1.0), is_alone=True, once_it_serves=True)
    batch.finish()
    assert _answers(batch.out) == calm
    assert [death.orphans for death in batch.deaths] == [[]] * len(batch.deaths)
    assert len(batch.deaths) == 3 and max(death.kept_tokens for death in batch.deaths) > 0, batch.deaths
    assert any(result.get("resumed_tokens") for result in results_of(batch.out).values())
    assert "go on after" in batch.said
    assert sorted(file.name for file in tmp_path.glob("out.jsonl*")) == ["out.jsonl"], "the journal is removed"


def test_a_full_disk_ends_the_run_in_words_and_room_lets_it_go_on(
    model: Path, calm: dict[int, tuple[object, ...]], tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "in.jsonl", REQUESTS)
    out = tmp_path / "out.jsonl"
    run = ("run", "--model", model, "--raw", "--in-process", "--kv-tokens", "4096", "--prompts", prompts, "--out", out)
    # No file may be longer than so many KiB. The journal is at the limit first, which ends nothing.
    limited = ["bash", "-c", 'ulimit -f "$0"; exec "$@"', "40", *mdiq_command(*run)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "out.jsonl: File too large; free some, then go on with --resume" in done.stderr
    assert "out.jsonl.journal: disk I/O error; see that its disk works" in done.stderr
    assert "Results are still written" in done.stderr
    assert 0 < len(results_of(out)) < len(REQUESTS) and out.read_bytes().endswith(b"\n")
    done_now = run_mdiq(*run, "--resume")
    assert done_now.code == 0, done_now.errors
    assert _answers(out) == calm
