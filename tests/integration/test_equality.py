"""The ring's tokens are those of transformers for the same weights, however many nodes there are."""

from pathlib import Path

import pytest

from tests.integration.conftest import Reference, run_mdiq, write_prompts
from tests.integration.corpus import CHAT, RAW

COUNT = 64
# The reference rounds nothing, so neither do weights and hops.
EXACT = ("--weights", "plain", "--wire", "f32")
GREEDY = ("--max-tokens", str(COUNT), "--ignore-eos", "--temperature", "0", *EXACT, "--json")
Answers = dict[int, tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    requests = [{"prompt": text} for text in RAW] + [{"messages": messages} for messages in CHAT]
    return write_prompts(tmp_path_factory.mktemp("prompts") / "24.jsonl", requests)


@pytest.fixture(scope="module")
def expected(prompts_file: Path, reference: Reference) -> Answers:
    """Prompt ids and the reference's answer, by index."""
    done = run_mdiq("run", "--prompts", prompts_file, "--raw", "--nodes", "1", "--max-tokens", "1", "--json")
    assert done.code == 0, done.errors
    prompts = {index: result["prompt_token_ids"] for index, result in done.results.items()}
    lengths = sorted(map(len, prompts.values()))
    assert len(lengths) == 24 and lengths[0] == 1 and 1_300 < lengths[-1] <= 1_500, lengths
    return {index: (prompt, reference.generate(prompt, COUNT)) for index, prompt in prompts.items()}


@pytest.mark.parametrize(
    "ring", [("--nodes", "1"), ("--nodes", "2"), ("--nodes", "3"), ("--nodes", "5"), ("--nodes", "3", "--in-process")]
)
def test_the_ring_gives_the_reference_tokens(
    ring: tuple[str, ...], prompts_file: Path, expected: Answers, reference: Reference, tmp_path: Path
) -> None:
    # All of it on one node and on three; on the others the beginnings of every second one, the longest among them.
    by_length = sorted(expected, key=lambda index: len(expected[index][0]))
    is_whole = ring in (("--nodes", "1"), ("--nodes", "3"))
    count, chosen = (COUNT, by_length) if is_whole else (COUNT // 2, by_length[1::2])
    lines = prompts_file.read_text(encoding="utf-8").splitlines(keepends=True)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(lines[index] for index in chosen), encoding="utf-8")
    done = run_mdiq("run", "--prompts", file, "--raw", *ring, *GREEDY, "--max-tokens", str(count))
    assert done.code == 0, done.errors
    assert len(done.results) == len(chosen) and max(len(expected[index][0]) for index in chosen) > 1_300
    for i, index in enumerate(chosen):
        prompt, whole = expected[index]
        result, answer = done.results[i], whole[:count]
        assert result["prompt_token_ids"] == prompt
        assert result["finish_reason"] == "length"
        reference.check(prompt, result["token_ids"], answer, f"{' '.join(ring)}, prompt {index}")
    assert len(done.summary["nodes"]) == int(ring[1])


def test_sixteen_at_once_give_the_same_tokens_as_one_by_one(
    prompts_file: Path, expected: Answers, reference: Reference, tmp_path: Path
) -> None:
    """Some alone, some beside fifteen others: coalesced batches change nothing."""
    short = [index for index, (prompt, _) in expected.items() if len(prompt) < 300][:16]
    assert len(short) == 16
    requests = [{"prompt_token_ids": expected[index][0]} for index in short]
    together = run_mdiq("run", "--prompts", write_prompts(tmp_path / "16.jsonl", requests), "--nodes", "3", *GREEDY)
    assert together.code == 0, together.errors
    for i, index in enumerate(short):
        prompt, answer = expected[index]
        reference.check(prompt, together.results[i]["token_ids"], answer, f"one of 16: {index}")
    for i in 0, 7, 15:
        alone = run_mdiq(
            "run", "--prompts", write_prompts(tmp_path / f"{i}.jsonl", requests[i : i + 1]), "--nodes", "3", *GREEDY
        )
        reference.check(expected[short[i]][0], alone.results[0]["token_ids"], expected[short[i]][1], f"alone: {i}")
