"""The shape of a model on this machine, and how mdiq would hold it. Reads headers, no weights."""

from pathlib import Path

import gguf

from mdiq.engine.formats.gguf_file import GgufFile
from mdiq.engine.model_config import ModelConfig, gguf_file_of, read_config
from mdiq.report.catalogue import Mark, Shape
from mdiq.report.simulate_nodes import BITS, Held, held_as

_KINDS = gguf.GGMLQuantizationType
_KEPT = {_KINDS.Q4_0, _KINDS.Q4_1, _KINDS.Q4_K, _KINDS.Q6_K}
_FOUR_BITS = {_KINDS.Q4_0, _KINDS.Q4_1, _KINDS.Q4_K}


def shape_of_file(model: Path) -> Shape:
    """Return the sizes of a model directory or a .gguf file.

    Raises:
        ModelError: it is missing, malformed, or of a kind that mdiq does not run.
    """
    return shape_of(read_config(model), model.stem)


def shape_of(config: ModelConfig, name: str) -> Shape:
    return Shape(
        name=name,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        mlp_size=config.mlp_size,
        vocab_size=config.vocab_size,
        is_tied=config.is_tied,
        is_gated=config.family.is_gated,
        mark=Mark.MEASURED,
        source="the file's header",
    )


def held_of_file(model: Path, weights: str, dtype: str) -> Held:
    """Return how mdiq holds a model's weights; "auto" is 4 bits for a file of 4-bit types, else 8 bits.

    In 4 bits, a GGUF file's matrices of 4 bits and of Q6_K stay as they are, and the others have 8.
    """
    path = gguf_file_of(model)
    if path is None:
        return held_as("int8" if weights == "auto" else weights, dtype)
    with GgufFile(path) as file:
        layers = [
            tensor
            for name, tensor in file.tensors.items()
            if name.startswith("blk.") and name.endswith(".weight") and len(tensor.shape) == 2
        ]
        num_weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in layers)
        has_four = any(tensor.type in _FOUR_BITS for tensor in layers)
        if weights == "auto":
            weights = "int4" if has_four else "int8"
        if weights != "int4" or not has_four:
            return held_as(weights, dtype)
        bits = 0.0
        for tensor in layers:
            block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
            each = 8 * block_bytes / block if tensor.type in _KEPT else BITS["int8"]
            bits += tensor.shape[0] * tensor.shape[1] * each
        return held_as(weights, dtype, bits / num_weights)
