"""Whole tiny models with packed weights: close to plain ones, the same alone and in company, whole and split."""

import gc
from pathlib import Path

import pytest
import torch

from mdiq.cache import State, entries, state_of
from mdiq.core.frame import Batch, Segment, TokenIds
from mdiq.core.types import Epoch, LayerRange, SeqId, WeightSettings
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.model import stage_model
from mdiq.engine.model.perplexity import losses
from mdiq.engine.model.stage_model import StageModel
from mdiq.engine.runner import StageRunner
from mdiq.engine.text.sample_text import sample_text
from mdiq.errors import ConfigError
from tests.engine.tiny_models import make_model

WHOLE = LayerRange(0, 4)
MODELS = ["llama-mha-untied", "llama-gqa-tied", "llama-biased", "qwen3", "gpt2"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))


def _runner(path: Path, weights: str, layers: LayerRange = WHOLE, *, is_last: bool = True) -> StageRunner:
    return StageRunner.load(
        path,
        layers,
        is_last=is_last,
        owns_embedding_and_head=layers.start == 0,
        kv_tokens=256,
        weights=WeightSettings(weights),
    )


def _decode(stages: list[StageRunner], prompts: dict[int, tuple[int, ...]], steps: int) -> dict[int, torch.Tensor]:
    """Return the logits of every step, greedy, all Sequences in one Batch: [steps, vocab_size] by Sequence."""
    pending = dict(prompts)
    starts = dict.fromkeys(prompts, 0)
    logits: dict[int, list[torch.Tensor]] = {i: [] for i in prompts}
    for _ in range(steps):
        segments = tuple(Segment(SeqId(i), starts[i], len(ids), wants_logits=True) for i, ids in pending.items())
        payloads = tuple(TokenIds(ids) for ids in pending.values())
        for stage in stages:
            output = stage.forward(Batch(Epoch(1), segments, payloads))
            rows = [1 if stage is stages[-1] else segment.length for segment in segments]
            payloads = tuple(output.rows(sum(rows[:k]), sum(rows[: k + 1])) for k in range(len(rows)))
        found = stages[0].logits(payloads)
        for row, i in enumerate(pending):
            logits[i].append(found[row])
            starts[i] += len(pending[i])
        pending = {i: (int(found[row].argmax()),) for row, i in enumerate(pending)}
    return {i: torch.stack(rows) for i, rows in logits.items()}


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_change_logits_little(name: str, weights: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "model")
    prompt = {0: (3, 14, 15, 92, 65, 35)}
    plain, packed = (_decode([_runner(tmp_path / "model", kind)], prompt, 1)[0] for kind in ("plain", weights))
    # Random weights are the hardest to pack; columns that are no multiple of a block stay int8.
    assert (packed - plain).norm() / plain.norm() < (0.1 if weights == "int8" else 0.3)
    assert not torch.equal(packed, plain)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama-mha-untied", "qwen3"])
def test_decoding_gives_the_same_bits_alone_and_in_company(name: str, weights: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "model")
    prompts = {0: (5,), 1: (7,), 2: (11,)}
    together = _decode([_runner(tmp_path / "model", weights)], prompts, 6)
    for i, prompt in prompts.items():
        assert torch.equal(_decode([_runner(tmp_path / "model", weights)], {i: prompt}, 6)[i], together[i])


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_split_model_gives_the_same_bits_as_a_whole_one(weights: str, tmp_path: Path) -> None:
    make_model("llama-gqa-tied").save_pretrained(tmp_path / "model")
    prompt = {0: (3, 14, 15, 92)}
    whole = _decode([_runner(tmp_path / "model", weights)], prompt, 4)[0]
    split = [
        _runner(tmp_path / "model", weights, LayerRange(0, 1), is_last=False),
        _runner(tmp_path / "model", weights, LayerRange(1, 4)),
    ]
    assert torch.equal(_decode(split, prompt, 4)[0], whole)


def test_packed_weights_take_less_memory(tmp_path: Path) -> None:
    make_model("llama-mha-untied").save_pretrained(tmp_path / "model")
    plain, int8 = (_runner(tmp_path / "model", kind).weight_bytes for kind in ("plain", "int8"))
    assert int8 < 0.4 * plain


def test_packed_weights_are_refused_off_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdiq.engine.runner.choose_device", lambda _: torch.device("cuda"))
    with pytest.raises(ConfigError, match="packed weights run on the CPU only"):
        _runner(tmp_path, "int8")


def test_packed_files_are_in_use_as_long_as_a_model_computes_with_them(tmp_path: Path) -> None:
    make_model("llama-gqa-tied").save_pretrained(tmp_path / "model")

    def states() -> set[State]:
        return {state_of(entry) for entry in entries(tmp_path / "cache") if entry.path.is_dir()}

    runner = _runner(tmp_path / "model", "int8")
    assert states() == {State.IN_USE}
    del runner
    gc.collect()
    assert states() == {State.FREE}


def test_losses_are_those_of_the_reference_over_windows(tmp_path: Path) -> None:
    reference = make_model("llama-gqa-tied").eval()
    reference.save_pretrained(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        model = StageModel(
            checkpoint,
            LayerRange(0, 4),
            owns_embedding_and_head=True,
            weights=WeightSettings("plain"),
            folder=tmp_path,
            progress=lambda *_: None,
        )
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        rows = [reference(row[None], labels=row[None]).loss for row in ids]
    expected = torch.stack(rows).mean().item()
    found = losses(model, ids.flatten().tolist() + [1, 2], window=40)
    assert len(found) == 2 * 39
    assert found.mean().item() == pytest.approx(expected, rel=1e-5)


def test_the_sample_text_is_long_and_english() -> None:
    text = sample_text()
    assert len(text) > 300_000
    assert text.count(" the ") > 3_000


def test_what_packing_takes_is_no_part_of_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done once on a device; a node that was planned by it would be refused what it serves on well."""
    make_model("llama-gqa-tied").save_pretrained(tmp_path / "model")
    resets: list[None] = []
    monkeypatch.setattr(stage_model, "reset_peak", lambda: resets.append(None))
    _runner(tmp_path / "model", "int8")
    assert len(resets) == 5  # the ends, and four Layers
    _runner(tmp_path / "model", "int8")
    assert len(resets) == 5
