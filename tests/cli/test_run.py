"""A long file of prompts is fed to the ring as it answers, not all at once. test_resume.py: over restarts."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mdiq.cli import run
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.errors import CapacityError, ConfigError, ContextLengthError, MdiqError
from mdiq.plan.pace import PaceSettings
from mdiq.service.batch import Batch
from mdiq.service.requests import PromptLine, Requests
from tests.fake_ring import FakeRing, ring_options


class FakeTokenizer:
    vocab_size = 1_000
    has_chat_template = False
    eos_token_ids = frozenset[int]()

    def __init__(self) -> None:
        self.num_encoded = 0

    def with_special_stops(self, params: SamplingParams) -> SamplingParams:
        return params

    def check_fits(self, text: str, room: int) -> None:
        if len(text) >= room:
            raise ContextLengthError("too long for me")

    def encode(self, text: str) -> list[int]:
        self.num_encoded += 1
        return list(text.encode())


TWO = SamplingParams(max_tokens=2)


class NotingRing(FakeRing):
    """Refuses a prompt of one byte, and notes how many prompts were encoded when the first Sequence came."""

    def __init__(self, tokenizer: FakeTokenizer) -> None:
        super().__init__(ring_options(1), context_tokens=100)
        self._tokenizer = tokenizer
        self.encoded_at_first: int | None = None
        self.refuses = self._note

    def _note(self, sequence: Sequence) -> MdiqError | None:
        if self.encoded_at_first is None:
            self.encoded_at_first = self._tokenizer.num_encoded
        return CapacityError("too short for me") if len(sequence.prompt) == 1 else None


def _run(
    lines: list[PromptLine], batch: Batch | None, tokenizer: FakeTokenizer, prompts: Path | None = Path("in.jsonl")
) -> Any:
    options: Any = SimpleNamespace(prompts=prompts, as_json=False)
    config: Any = SimpleNamespace(vocab_size=1_000, context_tokens=200)
    ring: Any = SimpleNamespace(pace=PaceSettings())
    requests = Requests(tokenizer, config, raw=True)  # type: ignore[arg-type]
    return run._Run(options, ring, requests, lines, Console(file=io.StringIO()), batch, None)


async def test_requests_of_a_long_file_are_made_and_submitted_as_others_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "MAX_SUBMITTED", 8)
    lines = [PromptLine(i, f"in.jsonl:{i}", TWO, text=f"number {i}", digest=f"{i}") for i in range(100)]
    lines[50] = PromptLine(50, "in.jsonl:50", SamplingParams(), text="!", digest="50")
    tokenizer = FakeTokenizer()
    with Batch(tmp_path / "out.jsonl", resume=False, is_journalled=True) as batch:
        async with NotingRing(tokenizer) as ring:
            await _run(lines, batch, tokenizer).serve_all(ring)
    assert 1 < ring.peak_open <= 8 and ring.encoded_at_first is not None and ring.encoded_at_first <= 8
    assert tokenizer.num_encoded == 100
    results = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(results) == 100 and sum('"finish_reason": "error"' in line for line in results) == 1
    assert "too short for me" in next(line for line in results if '"request": "50"' in line)


async def test_a_lone_prompt_is_checked_before_the_ring_loads_and_tokenized_once() -> None:
    tokenizer = FakeTokenizer()
    one = _run([PromptLine(0, "prompt", SamplingParams(max_tokens=1), text="hello")], None, tokenizer, None)
    one._requests.check(one._lines, is_single=True)
    assert tokenizer.num_encoded == 1
    async with NotingRing(tokenizer) as ring:
        await one.serve_all(ring)
    assert tokenizer.num_encoded == 1 and one._results[0].text == "x"
    with pytest.raises(ContextLengthError):
        one._requests.check([PromptLine(0, "prompt", SamplingParams(), text="a" * 300)], is_single=True)


async def test_a_line_that_cannot_fit_the_ring_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    lines = [PromptLine(i, f"in.jsonl:{i}", SamplingParams(), text=text) for i, text in enumerate(["ab", "a" * 150])]
    tokenizer = FakeTokenizer()
    with Batch(tmp_path / "out.jsonl", resume=False, is_journalled=True) as batch:
        async with NotingRing(tokenizer) as ring:
            await _run(lines, batch, tokenizer).serve_all(ring)
    assert tokenizer.num_encoded == 1
    results = (tmp_path / "out.jsonl").read_text().splitlines()
    assert "too long for me" in next(line for line in results if '"index": 1' in line)


def test_a_bias_of_a_token_that_the_model_lacks_is_refused_by_its_name() -> None:
    params = SamplingParams(logit_bias=((999, 1.0), (1_000, 1.0)))
    lines = [PromptLine(0, "in.jsonl:1", params, text="ab")]
    with pytest.raises(ConfigError, match="in.jsonl:1: logit_bias: token id 1000: the model has 1000 tokens only"):
        _run(lines, None, FakeTokenizer())._requests.check(lines, is_single=False)
