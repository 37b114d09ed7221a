"""Hot columns as bytes, for Nodes that have a part of the model: found where all of it is, the same everywhere."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from mdiq.cache import cache_directory
from mdiq.core.types import LayerRange
from mdiq.engine.formats.checkpoint import Checkpoint, open_checkpoint
from mdiq.engine.formats.quantize import PackedModel, num_hot
from mdiq.engine.model.hot_columns import hot_columns
from mdiq.engine.model.layer_loading import ROLES
from mdiq.engine.model_config import ModelConfig
from mdiq.errors import ModelError

_BYTES = 4


def hot_table(path: Path, weights: str) -> dict[str, bytes]:
    """Return the hot columns of the whole model at ``path``, i32 little endian, by name; found now if they never were.

    Raises:
        ModelError: the model cannot be read.
    """
    with open_checkpoint(path) as checkpoint, torch.inference_mode():
        find_hot = partial(hot_columns, checkpoint)
        with PackedModel(checkpoint, weights, cache_directory() / "packed", find_hot) as packed:
            return {
                name: columns.to(torch.int32).numpy().astype("<i4").tobytes()
                for name, columns in packed.hot_columns().items()
            }


def of_layers(table: Mapping[str, bytes], layers: LayerRange) -> dict[str, bytes]:
    """Return what a Stage with these Layers needs of a table."""
    names = {_name(layer, role) for layer in layers for role in ROLES}
    return {name: columns for name, columns in table.items() if name in names}


def hot_columns_from(table: Mapping[str, bytes], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return a table that came from elsewhere as column numbers, i64.

    Raises:
        ModelError: they are no columns of the model's matrices.
    """
    config = checkpoint.config
    known = {_name(layer, role) for layer in range(config.num_layers) for role in ROLES}
    found: dict[str, torch.Tensor] = {}
    for name, data in table.items():
        if name not in known or len(data) % _BYTES:
            raise ModelError(
                f"hot columns: {name[:40]!r} is none of the model's matrices; install the same mdiq everywhere"
            )
        role = name.rpartition(".")[2]
        width = _width(config, role)
        columns = (
            torch.frombuffer(bytearray(data), dtype=torch.int32).long() if data else torch.zeros(0, dtype=torch.long)
        )
        most = num_hot(width, role)
        if len(columns) > most or bool(((columns < 0) | (columns >= width)).any()):
            raise ModelError(
                f"hot columns of {name}: not {most} numbers below {width}; install the same mdiq everywhere"
            )
        found[name] = columns
    return found


def _width(config: ModelConfig, role: str) -> int:
    widths = {"down": config.mlp_size, "o": config.num_heads * config.head_dim}
    return widths.get(role, config.hidden_size)


def _name(layer: int, role: str) -> str:
    return f"layer-{layer:03}.{role}"
