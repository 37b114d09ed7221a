from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2Config

from mdiq.bench.shapes import SHAPES, shape_file
from mdiq.core.types import LayerRange
from mdiq.engine.families import GPT2
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.gguf_file import GgufFile
from mdiq.engine.runner import StageRunner
from mdiq.errors import ConfigError
from tests.engine.tiny_models import Chain


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("bits", [8, 4])
def test_a_shape_is_read_back_as_it_was_asked_for(bits: int) -> None:
    shape = SHAPES["tiny"]
    with open_checkpoint(shape_file("tiny", bits)) as checkpoint:
        config = checkpoint.config
        assert (config.num_layers, config.hidden_size, config.mlp_size) == (4, 64, 128)
        assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
        assert (config.vocab_size, config.context_tokens, config.is_tied) == (320, 512, False)
        assert config.rope.theta == shape.rope_theta
        assert checkpoint.layer(3).matrices["down"].shape == (64, 128)


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
def test_weights_keep_the_size_of_what_they_multiply(bits: int, kind: str) -> None:
    with GgufFile(shape_file("tiny", bits)) as file:
        assert file.tensors["blk.0.ffn_down.weight"].type.name == kind
        weights = file.array("blk.0.ffn_down.weight")
    assert 0.9 < float(np.sqrt(128) * weights.std()) < 1.1
    assert len(np.unique(weights)) > 8


def test_eight_bit_quants_stay_in_the_range_of_the_format() -> None:
    path = shape_file("tiny", 8)
    with GgufFile(path) as file:
        tensor = file.tensors["token_embd.weight"]
        data = np.frombuffer(path.read_bytes(), np.uint8, tensor.num_bytes, tensor.offset).reshape(-1, 34)
    assert data[:, 2:].view(np.int8).min() == -127


@pytest.mark.parametrize("bits", [8, 4])
def test_a_ring_of_a_shape_answers_with_finite_logits(bits: int) -> None:
    path = shape_file("tiny", bits)
    assert len(Chain.load(path, [2, 2]).generate({0: [5, 6, 7]}, 4)[0]) == 4
    runner = StageRunner.load(
        path,
        LayerRange(0, 4),
        is_last=True,
        owns_embedding_and_head=True,
        kv_tokens=64,
    )
    assert runner.config.vocab_size == 320


def test_a_file_that_is_there_is_taken_as_it_is(cache: Path) -> None:
    told: list[str] = []
    path = shape_file("tiny", 8)
    before = path.stat().st_mtime_ns
    assert shape_file("tiny", 8, told.append) == path
    assert path.stat().st_mtime_ns == before
    assert [file.name for file in (cache / "shapes").iterdir()] == [path.name]


def test_what_does_not_exist_is_refused_by_name(cache: Path) -> None:
    with pytest.raises(ConfigError, match="--shape huge: no such shape; known are tiny, "):
        shape_file("huge")
    with pytest.raises(ConfigError, match="--bits 5"):
        shape_file("tiny", 5)
    (cache / "shapes").write_text("a file in the way")
    with pytest.raises(ConfigError, match="set MDIQ_CACHE"):
        shape_file("tiny")


def test_the_shape_of_gpt2_is_that_of_transformers() -> None:
    wanted, shape = GPT2Config(), SHAPES["gpt2"]
    assert (shape.num_layers, shape.hidden_size, shape.num_heads) == (wanted.n_layer, wanted.n_embd, wanted.n_head)
    assert (shape.vocab_size, shape.context_tokens) == (wanted.vocab_size, wanted.n_positions)
    assert (shape.mlp_size, shape.norm_eps) == (4 * wanted.n_embd, wanted.layer_norm_epsilon)
    assert shape.is_tied is wanted.tie_word_embeddings
    assert shape.num_kv_heads == shape.num_heads, "GPT-2 has no grouped queries"


def test_a_ring_of_gpt2s_family_answers_as_one_stage_does() -> None:
    path = shape_file("tiny-gpt2")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.family is GPT2
        assert (checkpoint.config.mlp_size, checkpoint.config.is_tied) == (256, False)
    alone, split = (Chain.load(path, layers).generate({0: [5, 6, 7]}, 8)[0] for layers in ([4], [1, 3]))
    assert alone == split
    assert len(set(alone)) > 1


def test_full_multi_head_attention_has_as_many_kv_heads_as_query_heads() -> None:
    with open_checkpoint(shape_file("tiny-mha")) as full, open_checkpoint(shape_file("tiny")) as grouped:
        assert (full.config.num_heads, full.config.num_kv_heads) == (4, 4)
        assert full.config.hidden_size == grouped.config.hidden_size
        assert full.config.kv_bytes_per_token(1, 4) == 2 * grouped.config.kv_bytes_per_token(1, 4)
