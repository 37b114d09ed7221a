"""Exact mode, all settings as they come: the same tokens, none aside, on any number of nodes, alone and in company."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import IS_WHOLE, run_mdiq, write_prompts
from tests.integration.corpus import CHAT, RAW

pytestmark = pytest.mark.timeout(600)

COUNT = 16 if IS_WHOLE else 8
GREEDY = ("--max-tokens", str(COUNT), "--ignore-eos", "--temperature", "0", "--threads", "1", "--json")
ALONE, TOGETHER = ("--max-live", "1"), ("--max-live", "8")
RINGS = [
    ("--nodes", "1", *TOGETHER),
    ("--nodes", "2", *TOGETHER),
    ("--nodes", "3", *ALONE),
    ("--nodes", "3", "--in-process", *TOGETHER),
    ("--nodes", "5", *TOGETHER),
]
SOME = {"real_model": RINGS[3:], "qwen_model": [("--nodes", "3", *TOGETHER)]}
CASES = [(model, ring) for model, some in SOME.items() for ring in (RINGS if IS_WHOLE else some)]
Answers = dict[int, list[int]]
LONG = "\n".join(f"{i}. {text}" for i, text in enumerate(text for text in RAW if len(text) < 1_000) if text.strip())
"""Of it the longest prompts are made: they go through the ring in several chunks."""


def twelve_prompts(lengths: tuple[int, int, int]) -> list[dict[str, object]]:
    """Return four short texts, five chats, and three texts of these lengths."""
    short = [{"prompt": text} for text in RAW if 20 < len(text) < 200][:4]
    return [
        *short,
        *({"messages": messages} for messages in CHAT[:5]),
        *({"prompt": LONG[start : start + length]} for start, length in zip((0, 200, 50), lengths, strict=True)),
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[Path, Answers]]:
    """Return a file of prompts, and what one node of a model answers to each alone; computed once."""
    known: dict[Path, tuple[Path, Answers]] = {}

    def answers(model: Path) -> tuple[Path, Answers]:
        if model not in known:
            lengths = (1_500, 2_500, 1_100) if IS_WHOLE else (300, 1_100, 200)
            file = write_prompts(tmp_path_factory.mktemp("prompts") / "12.jsonl", twelve_prompts(lengths))
            done = run_mdiq("run", "--model", model, "--prompts", file, "--nodes", "1", *ALONE, *GREEDY)
            assert done.code == 0, done.errors
            assert any(len(result["prompt_token_ids"]) > 256 for result in done.results.values()), "one chunk each"
            known[model] = file, {index: result["token_ids"] for index, result in done.results.items()}
        return known[model]

    return answers


@pytest.mark.parametrize(("model", "ring"), CASES, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_any_ring_gives_the_same_tokens_alone_and_in_company(
    model: str,
    ring: tuple[str, ...],
    answers: Callable[[Path], tuple[Path, Answers]],
    request: pytest.FixtureRequest,
) -> None:
    path: Path = request.getfixturevalue(model)
    file, expected = answers(path)
    done = run_mdiq("run", "--model", path, "--prompts", file, *ring, *GREEDY)
    assert done.code == 0, done.errors
    assert len(done.results) == 12
    for index, result in done.results.items():
        assert result["token_ids"] == expected[index], f"prompt {index}"


def test_chats_that_are_put_back_for_want_of_room_get_the_tokens_of_a_roomy_ring(
    real_model: Path, tmp_path: Path
) -> None:
    """Three of them begin in 10 blocks of 32 tokens, and each needs 5 in the end."""
    chats: list[dict[str, object]] = [{"messages": messages} for messages in CHAT if len(str(messages)) < 200]
    file = write_prompts(tmp_path / "chats.jsonl", (chats * 8)[:8])
    options = ("--prompts", file, "--nodes", "2", *GREEDY[2:], *TOGETHER, "--max-tokens", "112")
    roomy = run_mdiq("run", "--model", real_model, *options)
    tight = run_mdiq("run", "--model", real_model, *options, "--kv-tokens", "320")
    assert (roomy.code, tight.code) == (0, 0), roomy.errors + tight.errors
    assert roomy.summary["counts"].get("preemptions", 0) == 0 < tight.summary["counts"]["preemptions"]
    assert {i: result["token_ids"] for i, result in tight.results.items()} == {
        i: result["token_ids"] for i, result in roomy.results.items()
    }
