"""Layers as one call of compiled code compute what run_layer does, for every family's parts, and never hang."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mdiq.core.frame import Batch, Segment, TokenIds
from mdiq.core.types import Epoch, LayerRange, SeqId, WeightSettings
from mdiq.engine.model.llvm_layers import CompiledLayers
from mdiq.engine.runner import StageRunner
from mdiq.engine.tensors import to_tensor
from mdiq.errors import EngineError
from tests.engine.tiny_models import make_model

PROMPTS = {1: tuple(i * 37 % 97 for i in range(20)), 2: (5,), 3: tuple(i * 11 % 97 for i in range(33))}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))


def _runner(name: str, folder: Path, layers: LayerRange, weights: str = "int8") -> StageRunner:
    if not folder.exists():
        make_model(name).save_pretrained(folder)
    return StageRunner.load(
        folder,
        layers,
        is_last=layers.stop == 4,
        owns_embedding_and_head=layers.start == 0,
        kv_tokens=256,
        weights=WeightSettings(weights),
    )


def _hidden(runner: StageRunner, first: int = 0) -> torch.Tensor:
    """Return what the Stage makes of the prompts, and of one more token of each: [T, hidden_size]."""
    runner.reset()
    found = []
    for pieces in (
        {i: (0, ids) for i, ids in PROMPTS.items()},
        {i: (len(ids), (7,)) for i, ids in PROMPTS.items()},
    ):
        segments = tuple(Segment(SeqId(i), start, len(ids), wants_logits=True) for i, (start, ids) in pieces.items())
        rows = runner.forward(Batch(Epoch(1), segments, tuple(TokenIds(ids) for _, ids in pieces.values())))
        found.append(to_tensor(rows, runner.config.hidden_size, torch.float32, torch.device("cpu")))
    return torch.cat(found)


def _parts(runner: StageRunner) -> list[Any]:
    return runner._model._parts


@pytest.mark.parametrize("name", ["llama-biased", "mistral-windowed", "qwen3", "gpt2"])
def test_they_compute_what_layers_of_torch_do(name: str, tmp_path: Path) -> None:
    """Beside norms and sums of other roundings, of which the 8 bits of an activation make a level at times."""
    runner = _runner(name, tmp_path / "model", LayerRange(0, 2))
    (part,) = _parts(runner)
    assert isinstance(part, CompiledLayers)
    compiled = _hidden(runner)
    runner._model._parts = [0, 1]
    expected = _hidden(runner)
    assert (compiled - expected).norm() < 4e-3 * expected.norm()


def test_layers_that_do_not_fit_are_run_between_those_that_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Layer is computed in one way wherever the cuts are: which that is goes by the Layer alone."""
    fits, asked = CompiledLayers.fits, iter([True, False, True, True])
    monkeypatch.setattr(CompiledLayers, "fits", staticmethod(lambda steps: next(asked) and fits(steps)))
    runner = _runner("qwen3", tmp_path / "model", LayerRange(0, 4))
    monkeypatch.undo()
    assert [type(part) for part in _parts(runner)] == [CompiledLayers, int, CompiledLayers]
    mixed = _hidden(runner)
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    expected = _hidden(_runner("qwen3", tmp_path / "model", LayerRange(0, 4)))
    assert (mixed - expected).norm() < 2e-2 * expected.norm()


def test_plain_weights_are_run_by_torch(tmp_path: Path) -> None:
    assert _parts(_runner("qwen3", tmp_path / "model", LayerRange(0, 4), weights="plain")) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_started", [0, 1])
def test_a_thread_that_cannot_be_started_fails_the_batch_and_leaves_nobody_waiting(
    num_started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = _runner("qwen3", tmp_path / "model", LayerRange(0, 4))
    expected = _hidden(runner)
    submit, left = ThreadPoolExecutor.submit, [num_started]
    started: list[Future[Any]] = []

    def failing(self: ThreadPoolExecutor, *call: Any) -> Future[Any]:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        started.append(submit(self, *call))
        return started[-1]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", failing)
    with pytest.raises(EngineError, match="can't start new thread"):
        _hidden(runner)
    assert len(started) == num_started and all(future.done() for future in started)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    assert torch.equal(_hidden(runner), expected)
