"""Partial copies of models: each Stage works on its own bytes as on the whole model, and on nothing else."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdiq.bench.shapes import shape_file
from mdiq.core.frame import Batch, Segment, TokenIds
from mdiq.core.types import Epoch, LayerRange, SeqId, WeightSettings
from mdiq.core.weights import PART_SUFFIX, Manifest, Waiting, WeightMap, encode
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.weight_map import map_weights
from mdiq.engine.model.hot_table import hot_table, of_layers
from mdiq.engine.runner import StageRunner
from mdiq.errors import ModelError
from tests.engine.tiny_models import MODELS, make_model, split_gguf

CHUNK = 4_096
STAGES = (LayerRange(0, 1), LayerRange(1, 3), LayerRange(3, 4))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))


def _model(name: str, folder: Path) -> Path:
    """Return a tiny model: of a family as one file or as shards, or a GGUF file."""
    if name == "gguf":
        return shape_file("tiny")
    if name == "gguf/split":
        return split_gguf(shape_file("tiny"), folder)[1]
    family, _, is_sharded = name.partition("/")
    make_model(family).save_pretrained(folder, max_shard_size="60KB" if is_sharded else "1GB")
    assert len(list(folder.glob("*.safetensors"))) > 2 or not is_sharded
    return folder


def _copy(model: Path, weights: WeightMap, layers: LayerRange, folder: Path, *, with_ends: bool = False) -> Path:
    """Return a partial copy as a Node has it: holes everywhere but in the chunks of the Manifest."""
    manifest = weights.manifest(layers, with_ends=with_ends)
    folder.mkdir()
    copy = folder / ("model" if manifest.is_directory else "model.gguf")
    if manifest.is_directory:
        copy.mkdir()
    for i, (name, size, mtime_ns) in enumerate(manifest.files):
        root = model.parent if model.is_file() else model
        content = (root / name if manifest.is_directory else model).read_bytes()
        path = copy / name if manifest.is_directory else copy
        with path.open("wb") as file:
            file.truncate(size)
            for file_index, chunk in manifest.chunks():
                if file_index == i:
                    file.seek(chunk * CHUNK)
                    file.write(content[chunk * CHUNK : (chunk + 1) * CHUNK])
        os.utime(path, ns=(mtime_ns, mtime_ns))
    copy.with_name(copy.name + PART_SUFFIX).write_bytes(encode(manifest))
    return copy


def _logits(paths: list[Path], weights: str, digest: str, table: Mapping[str, bytes] | None = None) -> torch.Tensor:
    """Return what three Stages make of a prompt, each from its own path; the others get the Starter's hot columns."""
    segments = (Segment(SeqId(1), 0, 5, wants_logits=True),)
    payloads: tuple[object, ...] = (TokenIds((3, 14, 15, 92, 65)),)
    runners = [
        StageRunner.load(
            path,
            layers,
            is_last=layers.stop == 4,
            owns_embedding_and_head=layers.start == 0,
            kv_tokens=64,
            weights=WeightSettings(weights),
            digest=digest,
            hot=of_layers(table or {}, layers) if layers.start else None,
        )
        for path, layers in zip(paths, STAGES, strict=True)
    ]
    for runner in runners:
        payloads = (runner.forward(Batch(Epoch(1), segments, payloads)),)  # type: ignore[arg-type]
    return runners[0].logits([payloads[0]])  # type: ignore[list-item]


@pytest.mark.parametrize("name", [*MODELS, "llama-gqa-tied/sharded", "gpt2/sharded", "gguf", "gguf/split"])
def test_stages_on_partial_copies_give_the_same_bits_as_on_the_whole_model(name: str, tmp_path: Path) -> None:
    model = _model(name, tmp_path / "whole")
    weights = map_weights(model, chunk_bytes=CHUNK)
    assert weights.digest == open_checkpoint(model).digest
    copies = [
        _copy(model, weights, layers, tmp_path / f"node-{i}", with_ends=i == 0) for i, layers in enumerate(STAGES)
    ]
    assert torch.equal(_logits(copies, "plain", weights.digest), _logits([model] * 3, "plain", weights.digest))


@pytest.mark.parametrize("name", ["gguf", "gguf/split"])
def test_packed_weights_of_a_partial_copy_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    model = _model(name, tmp_path / "whole")
    weights = map_weights(model, chunk_bytes=CHUNK)
    copies = [model, *(_copy(model, weights, STAGES[i], tmp_path / f"node-{i}", with_ends=False) for i in (1, 2))]
    packed = _logits(copies, "int8", weights.digest, hot_table(model, "int8"))
    shutil.rmtree(tmp_path / "cache" / "packed")
    assert torch.equal(packed, _logits([model] * 3, "int8", weights.digest))


@pytest.mark.parametrize("name", ["llama-gqa-tied/sharded", "gguf", "gguf/split"])
def test_what_was_not_fetched_is_refused_and_never_read_as_zeros(name: str, tmp_path: Path) -> None:
    model = _model(name, tmp_path / "whole")
    weights = map_weights(model, chunk_bytes=CHUNK)
    with open_checkpoint(_copy(model, weights, LayerRange(1, 2), tmp_path / "node")) as copy:
        assert copy.is_partial and copy.digest == weights.digest
        copy.layer(1)
        with pytest.raises(ModelError, match=r"tensor .* was not fetched to this node; fetch its layer first"):
            copy.layer(3)
        with pytest.raises(ModelError, match="was not fetched"):
            copy.embedding(0, 1)


@pytest.mark.parametrize("name", ["qwen2", "gguf"])
def test_a_wrong_byte_among_a_nodes_own_weights_is_another_digest(name: str, tmp_path: Path) -> None:
    model = _model(name, tmp_path / "whole")
    weights = map_weights(model, chunk_bytes=CHUNK)
    copy = _copy(model, weights, LayerRange(1, 2), tmp_path / "node")
    file, start, _ = weights.layers[1][0]
    with (copy / weights.files[file][0] if copy.is_dir() else copy).open("r+b") as data:
        data.seek(start)
        byte = data.read(1)
        data.seek(start)
        data.write(bytes([byte[0] ^ 1]))
    with open_checkpoint(copy) as opened:
        assert opened.digest != weights.digest
    with pytest.raises(ModelError, match="not the starter's model"):
        StageRunner.load(
            copy,
            LayerRange(1, 2),
            is_last=False,
            owns_embedding_and_head=False,
            kv_tokens=64,
            digest=weights.digest,
        )


@pytest.mark.parametrize("name", ["llama-mha-untied", "gpt2", "gguf"])
def test_every_tensor_belongs_to_one_layer_or_to_the_ends(name: str, tmp_path: Path) -> None:
    model = _model(name, tmp_path)
    weights = map_weights(model)
    ranges = sorted([*weights.ends, *(part for layer in weights.layers for part in layer)])
    headers = {file: stop for file, start, stop in weights.shared}
    last = ranges[0][0]
    at = headers[last]
    for _, start, stop in ranges:
        assert at <= start < at + 32, "bytes that belong to nobody, or to two"  # GGUF aligns to 32
        at = stop
    assert weights.files[last][1] - at < 32


def test_a_partial_copy_is_not_given_to_others(tmp_path: Path) -> None:
    model = _model("qwen3", tmp_path / "whole")
    copy = _copy(model, map_weights(model, chunk_bytes=CHUNK), LayerRange(0, 4), tmp_path / "node", with_ends=True)
    with pytest.raises(ModelError, match="it is a partial copy and cannot be given to others"):
        map_weights(copy)


def test_a_note_that_is_damaged_or_about_something_else_is_one_line(tmp_path: Path) -> None:
    model = _model("gguf", tmp_path)
    weights = map_weights(model, chunk_bytes=CHUNK)
    copy = _copy(model, weights, LayerRange(1, 2), tmp_path / "node")
    note = copy.with_name(copy.name + PART_SUFFIX)
    manifest = weights.manifest(LayerRange(1, 2), with_ends=False)
    other: Manifest = replace(manifest, fingerprints=bytes(32))
    cases = {b"junk": "cannot be read", encode(Waiting()): "does not say", encode(other): "about another model"}
    for data, text in cases.items():
        note.write_bytes(data)
        with pytest.raises(ModelError, match=text):
            open_checkpoint(copy)


def test_a_shard_whose_name_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    model = _model("qwen2/sharded", tmp_path / "whole")
    index = model / "model.safetensors.index.json"
    first = min(model.glob("*.safetensors"))
    first.rename(model / "with space.safetensors")
    index.write_text(index.read_text().replace(first.name, "with space.safetensors"))
    with pytest.raises(ModelError, match="with space.safetensors: its name cannot be sent to other nodes"):
        map_weights(model)
