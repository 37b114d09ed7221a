"""Model directories and files as people have them: the right model, or one line that says what to do."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mdiq.engine.checkpoint import open_checkpoint
from mdiq.engine.gguf_file import GgufFile
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
        ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
        ("model.layers.0.mlp.up_proj.qweight", torch.ones(6, 80, dtype=torch.int32)),
    ],
)
def test_quantized_weights_without_a_word_in_the_config_are_refused(
    directory: Path, name: str, tensor: torch.Tensor
) -> None:
    path = directory / "model.safetensors"
    save_file({**load_file(path), name: tensor}, path)
    with pytest.raises(ModelError, match=f"tensor {name} .* is of quantized weights"):
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
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("block_count", 1), ("attention.head_count", 2), ("embedding_length", 32)):
        writer.add_uint32(f"llama.{name}", value)
    for name, value in (("feed_forward_length", 64), ("context_length", 128)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, value in keys.items():
        writer.add_string(f"llama.{name}", value) if isinstance(value, str) else writer.add_float32(
            f"llama.{name}",
            value,  # type: ignore[arg-type]
        )
    writer.add_tensor("token_embd.weight", np.ones((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(path) as file:
        assert config_from_gguf(file).rope.linear_factor == factor
