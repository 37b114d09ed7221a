"""A Stage that gets other Layers: those that stay are kept, and it computes what one that is loaded anew does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdiq.core.frame import Batch, Payload, Segment, TokenIds
from mdiq.core.types import Epoch, LayerRange, SeqId, WeightSettings
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.model import stage_model
from mdiq.engine.runner import StageRunner
from mdiq.errors import CapacityError, ModelError
from mdiq.runtime.loops import GivenUp
from mdiq.runtime.options import RemoteNode, RemoteRing, RingOptions
from mdiq.runtime.starter_stage import StarterStage
from tests.engine.tiny_models import make_model

KINDS = ("plain", "int8", "int4")
PROMPT = tuple(i * 37 % 97 for i in range(40))
NUM_LAYERS = 4


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    make_model("qwen3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The Layers that were read, in order."""
    layers: list[int] = []

    def noting(load: Callable[..., object], place: int) -> Callable[..., object]:
        def noted(*args: object, **kwargs: object) -> object:
            found = args[place]
            layers.append(found if isinstance(found, int) else int(Path(found.path).name.split("-")[1]))  # type: ignore[attr-defined]
            return load(*args, **kwargs)

        return noted

    monkeypatch.setattr(stage_model, "plain_layer", noting(stage_model.plain_layer, 1))
    monkeypatch.setattr(stage_model, "packed_layer", noting(stage_model.packed_layer, 1))
    return layers


def _load(path: Path, layers: LayerRange, kind: str, *, has_ends: bool = False) -> StageRunner:
    return StageRunner.load(
        path,
        layers,
        is_last=layers.stop == NUM_LAYERS,
        owns_embedding_and_head=has_ends,
        kv_tokens=128,
        weights=WeightSettings(kind),
    )


def _reshape(stage: StageRunner, path: Path, layers: LayerRange) -> None:
    stage.reshape(path, layers, is_last=layers.stop == NUM_LAYERS, kv_tokens=128)


def _logits(*stages: StageRunner) -> torch.Tensor:
    """Return what Stages make of a prompt: [1, vocab_size]."""
    segments = (Segment(SeqId(1), 0, len(PROMPT), wants_logits=True),)
    payload: Payload = TokenIds(PROMPT)
    for stage in stages:
        stage.reset()
        payload = stage.forward(Batch(Epoch(1), segments, (payload,)))
    return stages[0].logits([payload])


@pytest.mark.parametrize("kind", KINDS)
def test_stages_that_change_places_compute_as_those_that_are_loaded_anew(
    path: Path, read: list[int], kind: str
) -> None:
    first, second = _load(path, LayerRange(0, 2), kind, has_ends=True), _load(path, LayerRange(2, 4), kind)
    expected = _logits(first, second)
    num_bytes = first.weight_bytes, second.weight_bytes
    read.clear()
    _reshape(first, path, LayerRange(0, 1))
    _reshape(second, path, LayerRange(1, 4))
    assert read == [1], "only what is not there is read"
    assert torch.equal(_logits(first, second), expected)
    assert sum(num_bytes) == first.weight_bytes + second.weight_bytes
    read.clear()
    _reshape(first, path, LayerRange(0, 4))
    assert sorted(read) == [1, 2, 3]
    assert torch.equal(_logits(first), expected)
    _reshape(first, path, LayerRange(0, 2))
    _reshape(second, path, LayerRange(2, 4))
    assert torch.equal(_logits(first, second), expected)
    assert (first.weight_bytes, second.weight_bytes) == num_bytes


def test_a_stage_forgets_its_sequences_and_has_the_room_that_is_asked_for(path: Path) -> None:
    stage = _load(path, LayerRange(0, 4), "int8", has_ends=True)
    _logits(stage)
    assert stage.kv_tokens_in_use
    stage.reshape(None, LayerRange(0, 4), is_last=True, kv_tokens=256)
    assert (stage.kv_tokens_in_use, stage.kv_capacity_tokens) == (0, 256)
    with pytest.raises(CapacityError, match="KV cache"):
        stage.reshape(None, LayerRange(0, 4), is_last=True, kv_tokens=2**40)
    stage.reshape(None, LayerRange(0, 4), is_last=True, kv_tokens=128)
    _logits(stage)


def test_another_model_is_refused_and_what_is_there_can_be_used_again(path: Path, tmp_path: Path) -> None:
    stage = _load(path, LayerRange(0, 2), "int8", has_ends=True)
    make_model("qwen3").save_pretrained(tmp_path / "other")
    with open_checkpoint(path) as checkpoint:
        digest = checkpoint.digest
    with pytest.raises(ModelError, match="digests differ"):
        stage.reshape(path, LayerRange(0, 4), is_last=True, kv_tokens=128, digest="0" * len(digest))
    stage.reshape(path, LayerRange(0, 4), is_last=True, kv_tokens=128, digest=digest)
    assert torch.equal(_logits(stage), _logits(_load(path, LayerRange(0, 4), "int8", has_ends=True)))


def test_a_starter_whose_change_was_given_up_makes_it_the_next_time(path: Path) -> None:
    nodes = tuple(RemoteNode(name, "tcp://127.0.0.1:1", None) for name in ("desk", "pi1"))
    options = RingOptions(
        path,
        (LayerRange(0, 2), LayerRange(2, 4)),
        weights=WeightSettings("int8"),
        kv_tokens=128,
        remote=RemoteRing(nodes, "tcp://127.0.0.1:2", "tcp://127.0.0.1:3", secret=None),
    )
    stage = StarterStage(options)
    stage.load(lambda *_: None)
    assert options.remote is not None
    alone = replace(options, layers=(LayerRange(0, 4),), remote=replace(options.remote, nodes=nodes[:1]))
    expected = _logits(_load(path, LayerRange(0, 4), "int8", has_ends=True))

    def given_up(done: int, total: int) -> None:
        if done:
            raise GivenUp

    with pytest.raises(GivenUp):
        stage.reshape(alone, given_up)
    stage.reshape(alone, lambda *_: None)
    stage.runner.set_wire(None)
    assert torch.equal(_logits(stage.runner), expected)
    stage.reshape(options, lambda *_: None)
    stage.runner.set_wire("f32")
    assert torch.equal(_logits(stage.runner, _load(path, LayerRange(2, 4), "int8")), expected)
