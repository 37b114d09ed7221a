"""Packing to 8 and 4 bits, and the files that keep it."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from mdiq.cli.options import Weights
from mdiq.core.types import WeightFormat
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.checkpoint_files import GgufSource
from mdiq.engine.formats.gguf_blocks import BLOCK
from mdiq.engine.formats.gguf_file import GgufFile
from mdiq.engine.formats.packed_file import PackedFile
from mdiq.engine.formats.packed_model import PackedModel
from mdiq.engine.formats.quantize import (
    FORMATS,
    best_format,
    chosen_format,
    num_hot,
    quantize_columns,
    quantize_int4,
    quantize_int8,
    unpack_int4,
)
from mdiq.engine.kernels.choice import KernelChoice
from mdiq.errors import CapacityError, ModelError
from tests.engine.formats.test_gguf_blocks import BLOCK_BYTES, random_rows, values
from tests.engine.tiny_models import make_model


def _matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _from_int4(nibbles: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    blocks = (unpack_int4(nibbles).float().view(*scale.shape, BLOCK) - 8) * scale[..., None]
    return (blocks if offset is None else blocks + offset.float()[..., None]).view(scale.shape[0], -1)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"F16"}, "int8"),
        ({"BF16"}, "int8"),
        ({"Q8_0"}, "int8"),
        ({"Q5_K", "Q6_K"}, "int8"),
        ({"Q4_K", "Q6_K"}, "int4"),
        ({"Q5_0", "Q4_K", "Q6_K", "Q8_0"}, "int4"),  # what a file of Q4_K_M is where columns are no multiple of 256
        ({"Q4_0"}, "int4"),
        ({"Q4_1"}, "int4"),
    ],
)
def test_the_best_format_of_a_file_follows_the_types_of_its_matrices(kinds: set[str], expected: str) -> None:
    assert best_format(SimpleNamespace(layer_kinds=lambda: frozenset(kinds))) == expected  # type: ignore[arg-type]


def test_auto_is_what_suits_the_file_on_a_cpu_and_plain_on_a_gpu() -> None:
    checkpoint: Any = SimpleNamespace(layer_kinds=lambda: frozenset({"Q4_K", "Q6_K"}))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [chosen_format("auto", checkpoint, device) for device in (cpu, gpu)] == ["int4", "plain"]
    assert [chosen_format(wanted, checkpoint, cpu) for wanted in ("plain", "int8", "int4")] == ["plain", "int8", "int4"]
    assert {"auto", "plain", *FORMATS} == set(get_args(WeightFormat)) == {member.value for member in Weights}


def test_int8_is_within_half_a_step_of_every_weight() -> None:
    weight = _matrix(12, 64)
    q, scale = quantize_int8(weight)
    assert q.abs().amax() == 127
    assert ((q.float() * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("num_in", [64, 63])
def test_no_pair_of_neighbours_can_overflow_16_bits(num_in: int) -> None:
    q = quantize_columns(_matrix(200, num_in).pow(3), None)["q"].int()
    pairs = torch.nn.functional.pad(q, (0, num_in % 2)).view(200, -1, 2)
    assert 255 * pairs.clamp_min(0).sum(-1).amax() < 2**15
    assert 255 * pairs.clamp_max(0).sum(-1).amin() >= -(2**15)
    assert pairs.clamp_min(0).sum(-1).amax() > 120  # and no range is given away


def test_copies_follow_behind_the_columns_of_a_matrix() -> None:
    weight, hot = _matrix(12, 64), torch.tensor([3, 40, 3])
    columns = quantize_columns(weight, hot)
    assert columns["q"].shape == (12, 67)
    assert torch.equal(columns["q"][:, 64:], columns["q"][:, hot])
    error = columns["q"][:, :64].float() * columns["scale"][:, None] - weight
    assert (error.abs() <= columns["scale"][:, None] * 0.5001).all()


def test_copies_are_few_and_come_in_steps() -> None:
    assert [num_hot(num_in, "qkv") for num_in in (64, 576, 2048, 8192)] == [0, 32, 64, 256]
    assert [num_hot(num_in, "down") for num_in in (64, 1536, 5632)] == [0, 128, 448]


def test_int4_is_within_half_a_step_of_every_weight() -> None:
    weight = _matrix(12, 64) + 0.5
    nibbles, scale, offset = quantize_int4(weight)
    assert nibbles.shape == (12, 64 // BLOCK, BLOCK // 2)
    assert offset is not None
    error = (_from_int4(nibbles, scale, offset) - weight).abs().view(12, -1, BLOCK)
    # bf16 has 8 bits: the offset may add 1/256 of itself.
    assert (error <= scale[..., None] * 0.501 + offset.abs().float()[..., None] / 256).all()


@pytest.mark.parametrize("has_offset", [True, False])
def test_weights_that_come_from_blocks_of_4_bits_keep_their_values(has_offset: bool) -> None:
    q = torch.randint(0, 16, (6, 3, BLOCK), generator=torch.Generator().manual_seed(5))
    q[..., 0], q[..., 1] = 0, 15  # as every block of Q4_1 has both, and one of Q4_0 its largest value as 0
    scale = _matrix(6, 3).half().float().abs() + 0.1
    offset = _matrix(6, 3).half().float() if has_offset else torch.zeros(6, 3)
    weight = ((q - 8) * scale[..., None] + offset[..., None]).view(6, -1)
    nibbles, found_scale, found_offset = quantize_int4(weight)
    assert (found_offset is not None) == has_offset
    assert (unpack_int4(nibbles).view(q.shape) == q).all()
    assert torch.allclose(found_scale, scale, rtol=1e-4)


def test_a_matrix_of_zeros_stays_one() -> None:
    q, scale = quantize_int8(torch.zeros(2, 32))
    assert not (q * scale[:, None]).any()
    assert not _from_int4(*quantize_int4(torch.zeros(2, 32))).any()


def test_a_layer_is_packed_once_and_read_from_its_file_later(tmp_path: Path) -> None:
    make_model("llama-gqa-tied").save_pretrained(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint, PackedModel(checkpoint, "int8", tmp_path, dict) as packed:
        first = packed.layer(1)
        assert torch.equal(first.tensor("o.q"), quantize_columns(checkpoint.layer(1).matrices["o"], None)["q"])
        stamp = first.path.stat().st_mtime_ns
        assert packed.layer(1).path.stat().st_mtime_ns == stamp
        first.path.write_bytes(first.path.read_bytes()[:100])  # as a full disk leaves it
        assert torch.equal(
            packed.layer(1).tensor("o.q"), quantize_columns(checkpoint.layer(1).matrices["o"], None)["q"]
        )


def test_the_vocabulary_is_packed_in_parts_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdiq.engine.formats.packed_model._ROWS", 10)
    make_model("llama-mha-untied").save_pretrained(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint, PackedModel(checkpoint, "int4", tmp_path, dict) as packed:
        ends = packed.ends()
        head = checkpoint.head()
        assert head is not None
        assert torch.equal(ends.tensor("head.q"), quantize_columns(head, None)["q"])
        assert torch.equal(ends.tensor("embedding.q"), quantize_columns(checkpoint.embedding(), None)["q"])


def test_without_a_folder_that_can_be_written_the_files_are_temporary(tmp_path: Path) -> None:
    make_model("llama-gqa-tied").save_pretrained(tmp_path / "model")
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        with PackedModel(checkpoint, "int8", blocked, dict) as packed:
            path = packed.layer(0).path
            assert path.is_file()
        assert not path.exists()


def test_a_cache_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("llama-gqa-tied").save_pretrained(tmp_path / "model")
    hot = {"head": torch.tensor([2, 4])}
    with open_checkpoint(tmp_path / "model") as checkpoint:
        with PackedModel(checkpoint, "int8", tmp_path / "packed", lambda: hot) as packed:
            kept = [packed.layer(0).path, packed.ends().path]
        monkeypatch.setattr(os, "access", lambda *_: False)
        with PackedModel(checkpoint, "int8", tmp_path / "packed", dict) as packed:
            assert [packed.layer(0).path, packed.ends().path] == kept
            assert torch.equal(packed._hot_columns("head"), hot["head"])
            own = packed.layer(1).path
            assert own.is_file() and tmp_path not in own.parents
        assert not own.exists()


@pytest.mark.parametrize("is_early", [True, False])
def test_a_disk_that_is_full_is_named(is_early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    if is_early:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000))
    else:
        monkeypatch.setattr("mdiq.engine.formats.packed_file.save_file", fill)
    make_model("llama-gqa-tied").save_pretrained(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        with PackedModel(checkpoint, "int8", tmp_path / "packed", dict) as packed:
            with pytest.raises(CapacityError, match=r"^no space left in .*: \d MB needed, \d+ MB free"):
                packed.layer(0)
    assert not list(tmp_path.glob("packed/*/*"))


def test_hot_columns_are_found_once_for_both_formats(tmp_path: Path) -> None:
    make_model("llama-gqa-tied").save_pretrained(tmp_path / "model")
    calls: list[int] = []

    def find() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"layer-000.o": torch.tensor([1, 5]), "head": torch.tensor([2, 4])}

    with open_checkpoint(tmp_path / "model") as checkpoint:
        for weights in ("int8", "int8", "int4"):
            with PackedModel(checkpoint, weights, tmp_path / "packed", find) as packed:
                assert torch.equal(packed.ends().tensor("embedding.hot"), torch.tensor([2, 4]))
                if weights == "int8":
                    assert torch.equal(packed.layer(0).tensor("o.hot"), torch.tensor([1, 5]))
                    assert packed.layer(0).find("down.hot") is None
    assert calls == [1]


HIDDEN, MLP, VOCAB = 256, 512, 40
KINDS = {
    "attn_q": "Q4_K",
    "attn_k": "Q4_K",
    "attn_v": "Q6_K",
    "attn_output": "Q4_0",
    "ffn_gate": "Q4_K",
    "ffn_up": "Q4_1",
    "ffn_down": "Q5_0",
}


def _write_gguf(path: Path, head: str) -> Path:
    """Write a model of one Layer whose matrices have many types."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", 1), ("embedding_length", HIDDEN), ("feed_forward_length", MLP)):
        writer.add_uint32(f"llama.{key}", value)
    for key, value in (("context_length", 64), ("attention.head_count", 4), ("attention.head_count_kv", 2)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10_000.0)
    shapes = {"attn_k": (128, HIDDEN), "attn_v": (128, HIDDEN), "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN)}
    shapes |= {"attn_q": (HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_down": (HIDDEN, MLP)}
    matrices = {f"blk.0.{name}": (shapes[name], kind) for name, kind in KINDS.items()}
    matrices |= {"token_embd": ((VOCAB, HIDDEN), "Q4_K"), "output": ((VOCAB, HIDDEN), head)}
    for seed, (name, ((num_out, num_in), kind)) in enumerate(matrices.items()):
        if kind in BLOCK_BYTES:
            data = random_rows(kind, num_out, num_in // 256, seed)
        else:
            wide = _matrix(num_out, num_in).numpy()
            data = gguf.quantize(wide, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _held(file: PackedFile, role: str) -> torch.Tensor:
    """Return the matrix that a packed one stands for."""
    if f"{role}.0.nibbles" in file.names or f"{role}.0.q" in file.names:
        num_parts = len({name.split(".")[1] for name in file.names if name.startswith(f"{role}.")})
        return torch.cat([_held(file, f"{role}.{k}") for k in range(num_parts)])
    if f"{role}.q" in file.names:
        return file.tensor(f"{role}.q") * file.tensor(f"{role}.scale")[:, None]
    blocks = {name.removeprefix(f"{role}."): file.tensor(name) for name in file.names if name.startswith(f"{role}.")}
    return values(blocks).float()


@pytest.mark.parametrize("head", ["Q4_K", "Q6_K", "Q8_0"])
def test_each_matrix_of_a_file_of_few_bits_is_held_as_its_type_asks(head: str, tmp_path: Path) -> None:
    path = _write_gguf(tmp_path / "model.gguf", head)
    with open_checkpoint(path) as checkpoint, PackedModel(checkpoint, "int4", tmp_path, dict) as packed:
        assert best_format(checkpoint) == "int4"
        file, matrices = packed.layer(0), dict(checkpoint.layer(0).matrices)
        matrices["head"] = checkpoint.head()
        ends = packed.ends()
        kept = {"o": True, "down": False, "head": head != "Q8_0", "qkv.0": True, "qkv.1": True}
        kept |= {"gate_up.0": True, "gate_up.1": True}
        for role, is_kept in kept.items():
            names = ends.names if role == "head" else file.names
            assert (f"{role}.nibbles" in names) == is_kept
            assert (f"{role}.q" in names) == (not is_kept)
        assert file.shape("qkv.0.nibbles")[0] == HIDDEN + 128, "Q and K are one matrix"
        for role, expected in matrices.items():
            found = _held(ends if role == "head" else file, role)
            # 8 bits of a pair's share of the row's range; kept types give the value itself.
            rows = expected.abs().amax(1, keepdim=True)
            tolerance = torch.full_like(rows, 1e-6)
            if role == "down" or (role == "head" and head == "Q8_0"):
                tolerance[:] = 1 / 120
            assert ((found - expected).abs() <= tolerance * rows).all(), role


def test_what_packed_parts_give_is_what_the_matrix_gives(tmp_path: Path) -> None:
    path = _write_gguf(tmp_path / "model.gguf", "Q4_K")
    with open_checkpoint(path) as checkpoint, PackedModel(checkpoint, "int4", tmp_path, dict) as packed:
        file = packed.layer(0)
        for role, matrix in checkpoint.layer(0).matrices.items():
            linear = KernelChoice(exact=True, folder=tmp_path).load(file, role)
            x = _matrix(5, matrix.shape[1])
            expected = x @ matrix.t()
            found = linear(x)
            assert found.shape == expected.shape
            assert (found - expected).norm() < 0.03 * expected.norm(), role
            assert torch.equal(linear(x[2:3]), found[2:3])


def test_matrices_whose_blocks_are_kept_are_not_made_wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That would be most of the time that packing takes; and the result is the same."""
    path = _write_gguf(tmp_path / "model.gguf", "Q4_K")
    read: list[str] = []
    array = GgufFile.array

    def noting(self: GgufFile, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        read.append(name)
        return array(self, name, start, stop)

    monkeypatch.setattr(GgufFile, "array", noting)
    with open_checkpoint(path) as checkpoint:
        with PackedModel(checkpoint, "int4", tmp_path, dict) as packed:
            packed.layer(0)
        wide = [f"blk.0.{name}.weight" for name, kind in KINDS.items() if kind == "Q5_0"]
        assert read == ["blk.0.ffn_down.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"] and wide == read[:1]


def test_a_kept_matrix_of_another_shape_than_the_config_calls_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write_gguf(tmp_path / "model.gguf", "Q4_K")
    monkeypatch.setattr(GgufSource, "stored_kind", lambda self, name: (self.kind(name), (7, HIDDEN)))
    with open_checkpoint(path) as checkpoint, PackedModel(checkpoint, "int4", tmp_path, dict) as packed:
        with pytest.raises(ModelError, match=r"blk.0.attn_q.weight has shape \[7, 256\] and the config calls for"):
            packed.layer(0)
