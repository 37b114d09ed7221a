"""Exact mode, all settings as they come: the same tokens, none aside, on any number of nodes, alone and in company."""

from pathlib import Path

import pytest

from tests.integration.conftest import run_mdiq, write_prompts
from tests.integration.corpus import CHAT, RAW

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

COUNT = 16
GREEDY = ("--max-tokens", str(COUNT), "--ignore-eos", "--temperature", "0", "--threads", "1", "--json")
ALONE, TOGETHER = ("--max-live", "1"), ("--max-live", "8")
RINGS = [
    ("--nodes", "1", *TOGETHER),
    ("--nodes", "2", *TOGETHER),
    ("--nodes", "3", *ALONE),
    ("--nodes", "3", "--in-process", *TOGETHER),
    ("--nodes", "5", *TOGETHER),
]
LONG = "\n".join(f"{i}. {text}" for i, text in enumerate(text for text in RAW if len(text) < 1_000) if text.strip())
"""Of it the longest prompts are made: they go through the ring in several chunks."""


def twelve_prompts() -> list[dict[str, object]]:
    """Return four short texts, five chats, and three prompts of more than one chunk."""
    short = [{"prompt": text} for text in RAW if 20 < len(text) < 200][:4]
    return [
        *short,
        *({"messages": messages} for messages in CHAT[:5]),
        *({"prompt": LONG[start : start + length]} for start, length in ((0, 1_500), (200, 2_500), (50, 1_100))),
    ]


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "12.jsonl", twelve_prompts())


@pytest.fixture(scope="module")
def answers(prompts_file: Path) -> dict[int, list[int]]:
    """What one node answers to each prompt alone."""
    done = run_mdiq("run", "--prompts", prompts_file, "--nodes", "1", *ALONE, *GREEDY)
    assert done.code == 0, done.errors
    assert sorted(len(result["prompt_token_ids"]) > 256 for result in done.results.values()) == [False] * 9 + [True] * 3
    return {index: result["token_ids"] for index, result in done.results.items()}


@pytest.mark.parametrize("ring", RINGS, ids=" ".join)
def test_any_ring_gives_the_same_tokens_alone_and_in_company(
    ring: tuple[str, ...], prompts_file: Path, answers: dict[int, list[int]]
) -> None:
    done = run_mdiq("run", "--prompts", prompts_file, *ring, *GREEDY)
    assert done.code == 0, done.errors
    assert len(done.results) == 12
    for index, result in done.results.items():
        assert result["token_ids"] == answers[index], f"prompt {index}"
