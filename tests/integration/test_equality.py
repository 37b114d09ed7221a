"""The ring's tokens are those of transformers for the same weights, however many nodes there are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mdiq.engine.text.tokenizer import Tokenizer
from tests.integration.conftest import IS_WHOLE, Reference, reference_of, run_mdiq, write_prompts
from tests.integration.corpus import CHAT, RAW

COUNT = 64 if IS_WHOLE else 16
# The reference rounds nothing, so neither do weights and hops.
EXACT = ("--weights", "plain", "--wire", "f32")
GREEDY = ("--ignore-eos", "--temperature", "0", "--raw", *EXACT, "--json")
REQUESTS: list[Mapping[str, object]] = [{"prompt": text} for text in RAW] + [{"messages": chat} for chat in CHAT]
LONGEST = RAW.index(max(RAW, key=len))


@dataclass
class Expected:
    """Prompt ids of REQUESTS, and the reference's answers, each computed once."""

    prompts: list[list[int]]
    reference: Reference
    known: dict[int, list[int]]

    @classmethod
    def of(cls, model: Path, reference: Reference) -> "Expected":
        tokenizer = Tokenizer.load(model)
        raw = [tokenizer.encode(text) for text in RAW]
        return cls(raw + [tokenizer.chat_ids(chat) for chat in CHAT], reference, {})

    def check(self, index: int, result: Mapping[str, Sequence[int]], count: int, where: str) -> None:
        """Fail unless a result is the reference's, with ``count`` tokens."""
        if len(self.known.get(index, ())) < count:
            self.known[index] = self.reference.generate(self.prompts[index], count)
        answer = self.known[index][:count]
        assert result["prompt_token_ids"] == self.prompts[index]
        self.reference.check(self.prompts[index], result["token_ids"], answer, f"{where}, prompt {index}")


@pytest.fixture(scope="module")
def expected(real_model: Path) -> Iterator[Expected]:
    with reference_of(real_model) as reference:
        of_smollm = Expected.of(real_model, reference)
        lengths = sorted(map(len, of_smollm.prompts))
        assert len(lengths) == 24 and lengths[0] == 1 and 1_300 < lengths[-1] <= 1_500, lengths
        yield of_smollm


RINGS = [("--nodes", "1"), ("--nodes", "2"), ("--nodes", "3"), ("--nodes", "5"), ("--nodes", "3", "--in-process")]


@pytest.mark.parametrize("ring", RINGS if IS_WHOLE else [RINGS[3]], ids=" ".join)
def test_the_ring_gives_the_reference_tokens(ring: tuple[str, ...], expected: Expected, tmp_path: Path) -> None:
    # All of it on one node and on three; on the others every second prompt, the longest among them.
    is_all = ring in (RINGS[0], RINGS[2])
    chosen = list(range(24)) if is_all else list(range(LONGEST % 2, 24, 2))
    count = COUNT if is_all else COUNT // 2
    file = write_prompts(tmp_path / "prompts.jsonl", [REQUESTS[index] for index in chosen])
    done = run_mdiq("run", "--prompts", file, *ring, *GREEDY, "--max-tokens", str(count))
    assert done.code == 0, done.errors
    assert len(done.results) == len(chosen) and LONGEST in chosen
    for i, index in enumerate(chosen):
        assert done.results[i]["finish_reason"] == "length"
        expected.check(index, done.results[i], count, " ".join(ring))
    assert len(done.summary["nodes"]) == int(ring[1])


def test_sixteen_at_once_give_the_same_tokens_as_one_by_one(expected: Expected, tmp_path: Path) -> None:
    """Some alone, some beside fifteen others: coalesced batches change nothing."""
    short = [index for index, prompt in enumerate(expected.prompts) if len(prompt) < 300][:16]
    assert len(short) == 16
    for name, chosen in (("16", short), ("1", [short[0], short[7], short[15]])):
        file = write_prompts(tmp_path / "prompts.jsonl", [REQUESTS[index] for index in chosen])
        options = ("--nodes", "3", "--max-live", name, *GREEDY, "--max-tokens", str(COUNT))
        done = run_mdiq("run", "--prompts", file, *options)
        assert done.code == 0, done.errors
        for i, index in enumerate(chosen):
            expected.check(index, done.results[i], COUNT, f"{name} at once")


def test_a_qwen_of_q4_k_m_gives_the_reference_tokens_on_three_nodes(qwen_model: Path, tmp_path: Path) -> None:
    chosen = list(range(24)) if IS_WHOLE else [0, 2, 5, 7, 10, 18, 20, 22]
    count = 16 if IS_WHOLE else 8
    file = write_prompts(tmp_path / "prompts.jsonl", [REQUESTS[index] for index in chosen])
    # The ring first: its nodes and the reference together would take 5 GB.
    options = ("--model", qwen_model, "--nodes", "3", *GREEDY, "--max-tokens", str(count))
    done = run_mdiq("run", "--prompts", file, *options)
    assert done.code == 0, done.errors
    with reference_of(qwen_model) as reference:
        expected = Expected.of(qwen_model, reference)
        for i, index in enumerate(chosen):
            expected.check(index, done.results[i], count, "Qwen")
