"""Exact mode, packed weights: the same bits for any split, chunking, company, number of threads, and in a Replay."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from mdiq.core.frame import Batch, Payload, Segment, TokenIds
from mdiq.core.types import Epoch, LayerRange, SeqId, WeightSettings
from mdiq.engine.runner import StageRunner
from tests.engine.tiny_models import make_model

SPLITS = [(4,), (1, 3), (2, 2), (3, 1), (1, 1, 2), (1, 1, 1, 1)]
PROMPT = tuple(i * 37 % 97 for i in range(70))
OTHERS = {7: (5,), 8: tuple(i * 11 % 97 for i in range(45)), 9: PROMPT[:33]}
STEPS = 8
MINE = 1


class _Ring:
    """Stages of a tiny model, called one after the other."""

    def __init__(self, path: Path, weights: str, split: Sequence[int]) -> None:
        starts = [sum(split[:i]) for i in range(len(split))]
        self._stages = [
            StageRunner.load(
                path,
                LayerRange(start, start + size),
                is_last=start + size == 4,
                owns_embedding_and_head=start == 0,
                kv_tokens=512,
                weights=WeightSettings(weights),
            )
            for start, size in zip(starts, split, strict=True)
        ]

    def forward(self, pieces: dict[int, tuple[int, tuple[int, ...]]]) -> dict[int, torch.Tensor]:
        """Run pieces (start, tokens) of Sequences in one Batch; return the logits behind the last token of each."""
        segments = tuple(Segment(SeqId(i), start, len(ids), wants_logits=True) for i, (start, ids) in pieces.items())
        payloads: tuple[Payload, ...] = tuple(TokenIds(ids) for _, ids in pieces.values())
        for stage in self._stages:
            output = stage.forward(Batch(Epoch(1), segments, payloads))
            lengths = [1 if stage is self._stages[-1] else segment.length for segment in segments]
            payloads = tuple(output.rows(sum(lengths[:k]), sum(lengths[: k + 1])) for k in range(len(lengths)))
        return dict(zip(pieces, self._stages[0].logits(payloads), strict=True))

    def decode(self, prompt: tuple[int, ...], chunk: int, others: dict[int, tuple[int, ...]]) -> torch.Tensor:
        """Return the logits of each step for a prompt in chunks, while other Sequences decode: [STEPS, vocab_size]."""
        for stage in self._stages:
            stage.reset()
        company = {i: (0, ids) for i, ids in others.items()}

        def step(mine: tuple[int, tuple[int, ...]]) -> torch.Tensor:
            found = self.forward({**company, MINE: mine})
            for i, (start, ids) in company.items():
                company[i] = (start + len(ids), (int(found[i].argmax()),))
            return found[MINE]

        for start in range(0, len(prompt), chunk):
            logits = step((start, prompt[start : start + chunk]))
        found = [logits]
        for position in range(len(prompt), len(prompt) + STEPS - 1):
            found.append(step((position, (int(found[-1].argmax()),))))
        return torch.stack(found)


@pytest.fixture(scope="module", params=["mistral-windowed", "qwen3", "gpt2"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDIQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("model")
        make_model(request.param).save_pretrained(folder)
        yield folder


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_any_split_chunking_company_and_replay_gives_the_same_bits(path: Path, weights: str) -> None:
    whole = _Ring(path, weights, (4,))
    expected = whole.decode(PROMPT, len(PROMPT), {})
    tokens = tuple(expected.argmax(-1).tolist())
    for split in SPLITS:
        ring = _Ring(path, weights, split)
        for chunk, others in ((len(PROMPT), {}), (16, {}), (16, OTHERS), (7, OTHERS), (1, {}), (70, OTHERS)):
            assert torch.equal(ring.decode(PROMPT, chunk, others), expected), f"{split} in {chunk} beside {len(others)}"
    for done in range(1, STEPS):
        replayed = whole.decode(PROMPT + tokens[:done], 32, {})
        assert torch.equal(replayed[: STEPS - done], expected[done:]), f"a replay behind {done} tokens"


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_any_number_of_threads_gives_the_same_bits(path: Path, weights: str) -> None:
    ring = _Ring(path, weights, (4,))
    expected = ring.decode(PROMPT, 16, OTHERS)
    threads = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ring.decode(PROMPT, 70, OTHERS), expected)
    finally:
        torch.set_num_threads(threads)
