"""GGUF files: every quantized type as `gguf` dequantizes it, and nothing but ModelError from damaged ones."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from mdiq.bench.shapes import shape_file
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.gguf_file import GgufFile
from mdiq.errors import ModelError
from tests.engine.tiny_models import split_gguf

PLAIN = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F64)
QUANTIZED = [kind for kind in gguf.quants._type_traits if kind not in PLAIN]


def _write(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé", ""])
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_uint32("llama.block_count", 3)
    writer.add_bool("flag", True)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_quantized_type_is_read_as_gguf_reads_it(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (5, 2 * block_bytes), dtype=np.uint8)
    path = _write(tmp_path / "x.gguf", {"t": (data, kind)})
    with GgufFile(path) as file, np.errstate(all="ignore"):
        read = file.array("t")
        assert read.shape == (5, 2 * block) and read.dtype == np.float32
        assert np.array_equal(read, gguf.dequantize(data, kind), equal_nan=True)


def test_plain_types_and_metadata_are_read_as_written(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {
        "f32": (values, gguf.GGMLQuantizationType.F32),
        "f16": (values.astype(np.float16), gguf.GGMLQuantizationType.F16),
    }
    with GgufFile(_write(tmp_path / "x.gguf", tensors)) as file:
        assert np.array_equal(file.array("f32"), values) and np.array_equal(file.array("f16"), values)
        assert file.fields["tokenizer.ggml.tokens"] == ["a", "bé", ""]
        assert list(file.get("numbers", np.ndarray)) == [1.5, 2.5]
        assert file.get("llama.block_count", int) == 3 and file.get("flag", bool) is True
        assert file.get("absent", int, 7) == 7
        with pytest.raises(ModelError, match="absent is missing; expected int"):
            file.get("absent", int)
        with pytest.raises(ModelError, match="flag is of type bool; expected int"):
            file.get("flag", int)
        with pytest.raises(ModelError, match="tensor absent is missing"):
            file.array("absent")


def test_damaged_files_give_model_errors_only(tmp_path: Path) -> None:
    values = np.ones((4, 32), np.float32)
    whole = _write(tmp_path / "x.gguf", {"token_embd.weight": (values, gguf.GGMLQuantizationType.F32)}).read_bytes()
    rng = random.Random(5)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(1_500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data) // 2)] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        try:
            with open_checkpoint(path) as checkpoint:
                checkpoint.layer(0)
        except ModelError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused == 1_500  # the whole file is no model either: its config is missing


@pytest.mark.parametrize("kind", [31, 36, 137])
def test_a_type_that_is_not_read_is_named_with_its_tensor(tmp_path: Path, kind: int) -> None:
    path = _write(tmp_path / "x.gguf", {"blk.0.t": (np.ones((1, 32), np.float32), gguf.GGMLQuantizationType.F32)})
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.t") + len("blk.0.t") + 4 + 2 * 8  # behind the count of dimensions and both of them
    data[at : at + 4] = struct.pack("<I", kind)
    path.write_bytes(data)
    with pytest.raises(ModelError, match=rf"tensor blk.0.t has type {kind}, which is not read; use .* Q4_K_M or Q8_0"):
        GgufFile(path)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    return shape_file("tiny")


@pytest.mark.parametrize("has_empty_first", [True, False])
def test_a_split_model_is_read_whole_whichever_part_is_named(
    whole: Path, tmp_path: Path, has_empty_first: bool
) -> None:
    parts = split_gguf(whole, tmp_path / "split", has_empty_first=has_empty_first)
    assert len(parts) > 3 and GgufFile(parts[2]).paths == parts
    assert all(tensor.part for tensor in GgufFile(parts[0]).tensors.values()) == has_empty_first
    with open_checkpoint(whole) as expected:
        for part in parts:
            with open_checkpoint(part) as found:
                assert found.config == expected.config and found.digest == expected.digest
                assert torch.equal(found.layer(3).matrices["down"], expected.layer(3).matrices["down"])
                assert torch.equal(found.embedding(5, 7), expected.embedding(5, 7))


def test_parts_that_do_not_make_up_a_model_are_named(whole: Path, tmp_path: Path) -> None:
    def refuses(part: Path, text: str) -> None:
        with pytest.raises(ModelError, match=text) as caught:
            GgufFile(part)
        assert "\n" not in str(caught.value)

    parts = split_gguf(whole, tmp_path / "split")
    contents = [part.read_bytes() for part in parts]
    parts[2].unlink()
    refuses(parts[0], rf"{parts[2]}: it is missing; {parts[0].name} is one of {len(parts)} parts, and all are needed")
    parts[2].write_bytes(contents[1])
    refuses(parts[1], rf"{parts[2]}: it is part 2 of {len(parts)}, and its name says 3 of")
    parts[2].write_bytes(contents[2][:-40])
    refuses(parts[0], rf"{parts[2]}: tensor .* is truncated; fetch it again")
    parts[2].write_bytes(contents[2])
    (alone := tmp_path / "renamed.gguf").write_bytes(contents[1])
    refuses(alone, rf"it is part 2 of {len(parts)} of a split model, and its name does not end in -00002-of-0000")
    others = split_gguf(whole, tmp_path / "others", per_part=8)
    assert len(others) == len(parts)
    parts[1].write_bytes(others[1].read_bytes())
    refuses(parts[0], "its 6 parts have 38 tensors, and the model 39; fetch all parts again")
