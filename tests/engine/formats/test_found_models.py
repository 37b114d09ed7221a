"""Model directories and files as people have them: the right model, or one line that says what to do."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.gguf_file import GgufFile
from mdiq.engine.model_config import config_from_gguf
from mdiq.errors import ModelError
from tests.engine.tiny_models import make_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_model("llama-gqa-tied").save_pretrained(tmp_path)
    return tmp_path


def _configure(directory: Path, **more: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4"])
def test_a_quantized_checkpoint_is_refused_by_its_method(directory: Path, method: str) -> None:
    _configure(directory, quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=rf"config.json: quantization_config: weights quantized by {method} are not"):
        open_checkpoint(directory)
    _configure(directory, quantization_config=None)
    open_checkpoint(directory).close()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.ones(80, 48).to(torch.float8_e4m3fn)),
        ("lm_head.weight", torch.ones(97, 48).to(torch.float8_e5m2)),
    ],
)
def test_weights_of_8_bits_without_a_word_in_the_config_are_refused(
    directory: Path, name: str, tensor: torch.Tensor
) -> None:
    path = directory / "model.safetensors"
    save_file({**load_file(path), name: tensor}, path)
    with pytest.raises(ModelError, match=f"tensor {name} .* is of quantized weights"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"model.layers.0.mlp.up_proj.{kind}"
            for kind in (
                *("weight_scale", "weight_scale_inv", "weight_scales", "scales", "weight_zero_point", "g_idx"),
                *("qweight", "lora_A.weight", "lora_magnitude_vector", "weight_g"),
            )
        ),
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.sinks",
        "model.layers.0.input_layernorm.bias",
        "model.layers.4.input_layernorm.weight",
        "lm_head.bias",
        "score.weight",
    ],
)
def test_a_stored_tensor_that_nothing_asks_for_is_refused(directory: Path, name: str) -> None:
    path = directory / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(4)}, path)
    with pytest.raises(ModelError, match=f"tensor {name}: it is not used .* use the model's original directory"):
        open_checkpoint(directory)


def test_the_first_unused_tensors_are_named_and_the_others_counted(directory: Path) -> None:
    path = directory / "model.safetensors"
    save_file({**load_file(path), **{f"z.{i}": torch.ones(1) for i in range(9)}}, path)
    with pytest.raises(ModelError, match=r"tensor z\.0, z\.1, z\.2 and 6 more: it is not used"):
        open_checkpoint(directory)


def test_constants_beside_the_weights_do_no_harm(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}
    more["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, **more}, path)
    open_checkpoint(directory).close()
    gpt2 = tmp_path_factory.mktemp("gpt2")
    make_model("gpt2").save_pretrained(gpt2)
    tensors = load_file(gpt2 / "model.safetensors")
    masks = {"h.0.attn.bias": torch.ones(1, 1, 256, 256), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    for whole in ({**tensors, **masks}, {name.removeprefix("transformer."): t for name, t in tensors.items()} | masks):
        save_file(whole, gpt2 / "model.safetensors")
        open_checkpoint(gpt2).close()


def test_a_part_of_the_config_that_is_quantized_is_refused(directory: Path) -> None:
    _configure(directory, text_config={"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ModelError, match="text_config.quantization_config: weights quantized by awq are not read"):
        open_checkpoint(directory)


@pytest.mark.parametrize("keys", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}])
def test_rotation_of_a_part_of_each_head_is_refused(directory: Path, keys: dict[str, object]) -> None:
    _configure(directory, **keys)
    with pytest.raises(ModelError, match=r"partial_rotary_factor is 0\.5; only 1 is supported"):
        open_checkpoint(directory)


def test_a_whole_file_goes_before_an_index_that_is_left_over(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    )
    with open_checkpoint(directory) as checkpoint:
        assert len(checkpoint.final_norm()) == 1


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 2.0}, 2.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, 2.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, 1.0),
        ({}, 1.0),
    ],
)
def test_a_factor_of_rope_scaling_counts_by_its_old_key_and_without_a_type(
    tmp_path: Path, keys: dict[str, object], factor: float
) -> None:
    with GgufFile(_gguf(tmp_path, keys)) as file:
        assert config_from_gguf(file).rope.linear_factor == factor


@pytest.mark.parametrize(
    "keys",
    [
        {"attention.scale": 0.5},
        {"logit_scale": 0.0625},
        {"attention.clamp_kqv": 8.0},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"residual_scale": 0.22},
        {"embedding_scale": 12.0},
        {"attention.max_alibi_bias": 8.0},
        {"rope.scaling.attn_factor": 1.19},
        {"rope.scaling.alpha": 1000.0},
        {"attention.value_length": 8.0},
        {"rope.freq_base_swa": 500.0},
        {"attention.sliding_window_pattern": 6.0},
        {"attention.causal": False},
        {"use_parallel_residual": True},
        {"something.new": "on"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_key_that_changes_the_answers_is_refused_by_its_name(tmp_path: Path, keys: dict[str, object]) -> None:
    name = next(iter(keys))
    with (
        GgufFile(_gguf(tmp_path, keys)) as file,
        pytest.raises(ModelError, match=f"llama.{name} is .*: it may change the answers and is not known here; use"),
    ):
        config_from_gguf(file)


def test_keys_at_what_they_are_anyway_are_taken(tmp_path: Path) -> None:
    keys: dict[str, object] = {
        **dict.fromkeys(("attention.scale", "logit_scale", "attention.clamp_kqv", "final_logit_softcapping"), 0.0),
        **dict.fromkeys(("residual_scale", "embedding_scale", "rope.scaling.attn_factor"), 1.0),
        **{"attention.causal": True, "use_parallel_residual": False, "something.new": "", "vocab_size": 8.0},
    }
    for more in {}, {"attention.scale": 0.25, "rope.freq_base": 500.0, "rope.freq_base_swa": 500.0}:
        with GgufFile(_gguf(tmp_path, {**keys, **more})) as file:
            config_from_gguf(file)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.scale", "blk.0.attn_sinks.weight", "blk.0.attn_norm.bias", "blk.1.ffn_up.weight"]
)
def test_a_tensor_of_a_gguf_file_that_nothing_asks_for_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"tensor {name}: it is not used"):
        open_checkpoint(_gguf(tmp_path, {}, name))
    harmless = ("rope_freqs.weight", "blk.0.attn_rot_embd.weight", "blk.0.attn_q.bias", "blk.0.ffn_up.weight")
    open_checkpoint(_gguf(tmp_path, {}, *harmless)).close()


def _gguf(folder: Path, keys: dict[str, object], *names: str) -> Path:
    """Write a llama's metadata with ``keys`` besides, its embedding, and tensors of these names; no whole model."""
    path = folder / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("block_count", 1), ("attention.head_count", 2), ("embedding_length", 32)):
        writer.add_uint32(f"llama.{name}", value)
    for name, value in (("feed_forward_length", 64), ("context_length", 128)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}
    for name, value in keys.items():
        add[type(value)](f"llama.{name}", value)
    for name in ("token_embd.weight", *names):
        writer.add_tensor(name, np.ones((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
