"""Layers that travel as files: a node computes with them as on the whole model, whatever machine wrote them."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mdiq.bench.shapes import shape_file
from mdiq.cache import use
from mdiq.core.frame import Batch, Segment, TokenIds
from mdiq.core.types import Epoch, LayerRange, SeqId, WeightFormat, WeightSettings
from mdiq.engine.formats import packed_model
from mdiq.engine.formats.about import About
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.layer_files import LayerFiles
from mdiq.engine.formats.packed_file import PackedFile
from mdiq.engine.model.layer_loading import plain_layer
from mdiq.engine.model.layer_packing import LayerPacking
from mdiq.engine.runner import StageRunner
from mdiq.errors import ModelError, RingError
from tests.engine.tiny_models import MODELS, make_model, split_gguf

STAGES = (LayerRange(0, 1), LayerRange(1, 3), LayerRange(3, 4))
NAMES = [*MODELS, "llama-gqa-tied/sharded", "gpt2/sharded", "gguf", "gguf/4", "gguf/split"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _model(name: str, folder: Path) -> Path:
    """Return a tiny model: of a family as one file or as shards, or a GGUF file."""
    if name.startswith("gguf"):
        model = shape_file("tiny", 4 if name == "gguf/4" else 8)
        return split_gguf(model, folder)[1] if name == "gguf/split" else model
    family, _, is_sharded = name.partition("/")
    make_model(family).save_pretrained(folder, max_shard_size="60KB" if is_sharded else "1GB")
    assert len(list(folder.glob("*.safetensors"))) > 2 or not is_sharded
    return folder


@pytest.fixture
def packing(tmp_path: Path, cache: Path) -> Iterator[LayerPacking]:
    packing = LayerPacking(_model("gguf/4", tmp_path / "whole"), "int4", cache / "packed")
    yield packing
    packing.close()


def _fetched(packing: LayerPacking, layers: LayerRange, folder: Path) -> LayerFiles:
    """Return copies of the files of some Layers, as a Node has them: alone in a folder."""
    folder.mkdir(exist_ok=True)
    return LayerFiles({layer: Path(shutil.copy(packing.find(layer), folder)) for layer in layers}, use(folder))


def _logits(models: list[Path | LayerFiles], weights: WeightFormat, digest: str) -> torch.Tensor:
    """Return what three Stages make of a prompt, each from its own part of the model."""
    segments = (Segment(SeqId(1), 0, 5, wants_logits=True),)
    payloads: tuple[object, ...] = (TokenIds((3, 14, 15, 92, 65)),)
    runners = [
        StageRunner.load(
            model,
            layers,
            is_last=layers.stop == 4,
            owns_embedding_and_head=layers.start == 0,
            kv_tokens=64,
            weights=WeightSettings(weights),
            digest=digest,
        )
        for model, layers in zip(models, STAGES, strict=True)
    ]
    for runner in runners:
        payloads = (runner.forward(Batch(Epoch(1), segments, payloads)),)  # type: ignore[arg-type]
    return runners[0].logits([payloads[0]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("name", "weights"), [*((name, "plain") for name in NAMES), ("gguf", "int8"), ("gguf/4", "int4"), ("qwen2", "int8")]
)
def test_stages_with_files_of_layers_give_the_same_bits_as_on_the_whole_model(
    name: str, weights: WeightFormat, tmp_path: Path, cache: Path
) -> None:
    model = _model(name, tmp_path / "whole")
    packing = LayerPacking(model, weights, cache / "packed")
    fetched = [_fetched(packing, layers, tmp_path / f"node-{i}") for i, layers in enumerate(STAGES) if i]
    packing.close()
    parts = _logits([model, *fetched], weights, packing.digest)
    shutil.rmtree(cache / "packed")
    assert torch.equal(parts, _logits([model] * 3, weights, packing.digest))


@pytest.mark.parametrize("name", ["gguf", "gguf/4", "qwen3"])
def test_a_plain_layer_travels_with_the_bytes_that_the_model_has(name: str, tmp_path: Path, cache: Path) -> None:
    """Quantized tensors are not made wide for the way."""
    model = _model(name, tmp_path / "whole")
    packing = LayerPacking(model, "plain", cache / "packed")
    size = sum(packing.find(layer).stat().st_size for layer in range(packing.num_layers))
    packing.close()
    whole = model.stat().st_size if model.is_file() else (model / "model.safetensors").stat().st_size
    assert size < whole + 8_192 * packing.num_layers


def test_a_file_is_named_by_its_bytes_and_says_what_it_is_of(packing: LayerPacking) -> None:
    path = packing.find(2)
    assert path.name == f"layer-002-{hashlib.sha256(path.read_bytes()).hexdigest()}.safetensors"
    about = About.parse(PackedFile(path).about, "x")
    assert (about.digest, about.weights, about.is_gguf) == (packing.digest, "int4", True)


def test_a_layer_is_packed_once_and_with_the_same_bytes_everywhere(packing: LayerPacking, cache: Path) -> None:
    first = packing.find(1)
    stamp = first.stat().st_mtime_ns
    assert packing.find(1) == first and first.stat().st_mtime_ns == stamp
    first.unlink()
    assert packing.find(1) == first


@pytest.mark.parametrize("name", NAMES)
def test_what_a_file_says_of_its_model_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    with open_checkpoint(_model(name, tmp_path)) as checkpoint:
        about = About(checkpoint.digest, "plain", checkpoint.config, checkpoint.is_gguf, checkpoint.stored_kinds(1))
        assert About.parse(about.text, "x") == about


@pytest.mark.parametrize(
    "change",
    [
        None,
        {"config": 5},
        {"config": {}},
        {"stored": {"x": 5}},
        {"stored": []},
        {"config.family": "unheard-of"},
        {"config.family": []},
        {"config.num_layers": "x"},
        {"config.num_layers": 1e999},
        {"config.num_heads": 0},
        {"config.num_kv_heads": 7},
        {"config.hidden_size": 2**40},
        {"config.rope": None},
        {"config.rope": {"theta": 1, "linear_factor": 1, "llama3": [1]}},
        {"config.windowed_layers": 5},
    ],
)
def test_a_file_that_says_what_cannot_be_is_one_line(change: dict[str, object] | None, packing: LayerPacking) -> None:
    text = PackedFile(packing.find(0)).about
    values = json.loads(text)
    for key, value in (change or {}).items():
        first, _, second = key.partition(".")
        if second:
            values[first][second] = value
        else:
            values[first] = value
    with pytest.raises(ModelError, match=r"^here: ") as caught:
        About.parse("junk" if change is None else json.dumps(values), "here")
    assert "\n" not in str(caught.value)


def test_a_layer_that_was_not_fetched_is_an_error(packing: LayerPacking, tmp_path: Path) -> None:
    files = _fetched(packing, LayerRange(1, 2), tmp_path / "node")
    with pytest.raises(ModelError, match="layer 3 was not fetched to this node; fetch its file first"):
        files.layer(3)


def test_files_of_another_model_are_refused(packing: LayerPacking, tmp_path: Path, cache: Path) -> None:
    files = _fetched(packing, LayerRange(1, 2), tmp_path / "node")
    with pytest.raises(ModelError, match="it is not the starter's model"):
        _logits([files] * 3, "int4", "0" * 64)
    other = LayerPacking(_model("gguf", tmp_path), "int8", cache / "packed")
    mixed = {1: packing.find(1), 2: other.find(2)}
    other.close()
    with pytest.raises(ModelError, match="it is of another model than the files beside it"):
        LayerFiles(mixed, use(cache))


def test_a_layer_whose_file_is_removed_while_others_are_loaded_is_there(packing: LayerPacking, tmp_path: Path) -> None:
    """As by another process, which fetches what another build has packed."""
    files = _fetched(packing, LayerRange(1, 3), tmp_path / "node")
    for path in (tmp_path / "node").iterdir():
        path.unlink()
    assert [len(files.layer(layer).names) > 5 for layer in (1, 2)] == [True, True]


def _changed(path: Path, folder: Path, name: str, tensor: torch.Tensor | None) -> LayerFiles:
    """Return a Layer of which one tensor is another one, or gone."""
    tensors = load_file(path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    folder.mkdir()
    save_file(tensors, folder / path.name, metadata={"mdiq": PackedFile(path).about})
    return LayerFiles({1: folder / path.name}, use(folder))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_no_tensor_may_have_another_shape_or_type_than_the_model_calls_for(
    weights: str, tmp_path: Path, cache: Path
) -> None:
    """Kernels read without looking: a file from elsewhere must not make them read beyond their memory."""
    packing = LayerPacking(_model("gguf/4" if weights == "int4" else "gguf", tmp_path), weights, cache / "packed")
    path = packing.find(1)
    packing.close()
    tensors = load_file(path)
    LayerFiles({1: path}, use(cache)).layer(1)
    assert len(tensors) >= 10
    for i, (name, tensor) in enumerate(tensors.items()):
        is_optional = name.endswith((".hot", ".offset"))
        for k, other in enumerate((tensor[:-1].clone(), tensor.to(torch.float64), tensor[:0] if is_optional else None)):
            files = _changed(path, tmp_path / f"{i}-{k}", name, other)
            with pytest.raises(ModelError, match="is not as its model calls for; install the same mdiq everywhere"):
                files.layer(1)


def test_columns_that_the_matrix_does_not_have_are_refused(tmp_path: Path, cache: Path) -> None:
    packing = LayerPacking(_model("gguf", tmp_path), "int8", cache / "packed")
    path = packing.find(1)
    packing.close()
    name, hot = next((name, tensor) for name, tensor in load_file(path).items() if name.endswith(".hot"))
    for column in (-1, 2**40):
        other = hot.clone()
        other[0] = column
        with pytest.raises(ModelError, match=f"{name} is not as its model calls for"):
            _changed(path, tmp_path / f"at{column}", name, other).layer(1)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_no_tensor_may_be_a_single_number_and_none_may_be_unheard_of(weights: str, tmp_path: Path, cache: Path) -> None:
    """Of two packings of a matrix, another one than what was looked at might be computed with."""
    packing = LayerPacking(_model("gguf/4" if weights == "int4" else "gguf", tmp_path), weights, cache / "packed")
    path = packing.find(1)
    packing.close()
    numbers = {name: torch.zeros((), dtype=tensor.dtype) for name, tensor in load_file(path).items()}
    others = {name: torch.zeros(4) for name in ("x\ny", "qkv.nibbles", "qkv.q", "qkv.0.q", "o.dmin", "rope_factors")}
    for i, (name, tensor) in enumerate((*numbers.items(), *others.items())):
        if name in numbers and name in others:
            continue
        with pytest.raises(ModelError, match=r"is not as its model calls for") as caught:
            _changed(path, tmp_path / str(i), name, tensor).layer(1)
        assert "\n" not in str(caught.value)


_KINDS = [torch.int8, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool]


@pytest.fixture(params=["int8", "int4", "plain", "plain/gguf"])
def valid(request: pytest.FixtureRequest, tmp_path: Path, cache: Path) -> Path:
    """Return the file of a Layer, as a Starter sends it."""
    weights, _, kind = request.param.partition("/")
    name = "qwen3" if weights == "plain" and not kind else "gguf/4" if weights == "int4" else "gguf"
    packing = LayerPacking(_model(name, tmp_path / "whole"), weights, cache / "packed")
    path = packing.find(1)
    packing.close()
    return path


def _opens(path: Path, weights: str) -> bool:
    """Return whether a file is a Layer that can be computed with; what is none is one ModelError."""
    try:
        files = LayerFiles({1: path}, use(path.parent))
        if weights == "plain":
            plain_layer(files.stored(1), 1, torch.float32, torch.device("cpu"))
        else:
            files.layer(1)
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 1_000
        return False
    return True


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_whatever_bytes_come_make_a_layer_or_one_line(valid: Path, tmp_path: Path, data: st.DataObject) -> None:
    content, path = bytearray(valid.read_bytes()), tmp_path / "layer.safetensors"
    head = 8 + int.from_bytes(content[:8], "little")
    match data.draw(st.sampled_from(("bytes", "flips", "cut", "words", "tensors"))):
        case "bytes":
            content = bytearray(data.draw(st.binary(max_size=200)))
        case "flips":
            for at in data.draw(st.lists(st.integers(0, head + 64), min_size=1, max_size=4)):
                content[at] = data.draw(st.integers(0, 255))
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "words":  # of the header: kinds, shapes and what the file says of itself are still JSON
            words = sorted({*re.findall(rb"[A-Za-z0-9_.]+", bytes(content[:head]))})
            old, new = data.draw(st.sampled_from(words)), data.draw(st.sampled_from([*words, b"0", b"-1", b"null"]))
            text = bytes(content[8:head]).replace(old, new, 1)
            content[:head] = len(text).to_bytes(8, "little") + text
        case "tensors":
            tensors = load_file(valid)
            for name in data.draw(st.lists(st.sampled_from([*tensors, "qkv.0.q", "x"]), min_size=1, max_size=3)):
                shape, kind = data.draw(st.lists(st.integers(0, 3), max_size=3)), data.draw(st.sampled_from(_KINDS))
                tensors[name] = torch.zeros(shape, dtype=kind)
            save_file(tensors, path, metadata={"mdiq": PackedFile(valid).about})
            content = bytearray(path.read_bytes())
    path.write_bytes(content)
    weights = "plain" if "plain" in valid.parent.name else "packed"
    assert _opens(valid, weights)
    _opens(path, weights)


def test_a_file_that_cannot_be_read_is_one_line(packing: LayerPacking, tmp_path: Path) -> None:
    path = tmp_path / "layer-000.safetensors"
    for content in (b"", b"junk" * 100, packing.find(0).read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="cannot be read .*; delete it, it is fetched again") as caught:
            LayerFiles({0: path}, use(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights", "waits"), [("gguf/4", "int4", False), ("gguf", "plain", False), ("gguf", "int8", True)]
)
def test_a_layer_that_keeps_its_bytes_is_packed_while_a_starter_packs_its_own(
    name: str, weights: str, waits: bool, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads a text in f32 first, for as long as a transfer takes; of other layers one is held in f32 at a time."""
    monkeypatch.setattr(packed_model, "_PACKING_S", 0.01)
    packing = LayerPacking(_model(name, tmp_path), weights, cache / "packed")
    with packed_model._PACKING:
        finding = threading.Thread(target=packing.find, args=[1])
        finding.start()
        finding.join(0.5 if waits else 30)
        assert finding.is_alive() == waits
    finding.join(30)
    assert packing.find(1).exists()
    packing.close()


def test_what_a_killed_packing_left_goes_with_the_next_one(packing: LayerPacking, cache: Path) -> None:
    code = """
import os, pathlib, sys
from mdiq.engine.formats import packed_file
from mdiq.engine.model.layer_packing import LayerPacking
packed_file.save_file = lambda tensors, path, **_: (path.write_bytes(bytes(99)), os._exit(9))
LayerPacking(pathlib.Path(sys.argv[1]), "int4", pathlib.Path(sys.argv[2])).find(1)
"""
    done = subprocess.run([sys.executable, "-c", code, str(shape_file("tiny", 4)), str(cache / "packed")], check=False)
    before = {path.name for path in cache.rglob("*") if path.stat().st_size == 99}
    assert done.returncode == 9 and before
    path = packing.find(1)
    assert {path.name for path in cache.rglob("*") if path.stat().st_size == 99} == set()
    assert [*path.parent.iterdir()] == [path]


def test_a_packing_that_is_closed_ends_at_its_next_step(packing: LayerPacking, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def stepping(*_: object) -> None:
        packing.stop()  # as ``close`` does from another thread, which then waits
        steps.append("find")

    monkeypatch.setattr(packed_model.PackedModel, "_pack_layer", lambda self, i: (stepping(), self._on_step()))
    with pytest.raises(RingError, match="its layers are packed no further"):
        packing.find(3)
    assert steps == ["find"]
    assert not packed_model._PACKING.locked()
