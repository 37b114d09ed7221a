"""Which columns are split into how many copies, on models whose activations are known."""

from pathlib import Path

import pytest
import torch

from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.quantize import num_hot
from mdiq.engine.model.hot_columns import hot_columns
from tests.engine.tiny_models import make_model


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_columns_whose_activations_are_large_get_the_copies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdiq.engine.formats.quantize._HOT_STEP", 4)
    model = make_model(name)
    loud = [1, 6]
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith(("input_layernorm.weight", "ln_1.weight", "model.norm.weight", "ln_f.weight")):
                tensor[loud] = 40.0
    model.save_pretrained(tmp_path)
    done: list[tuple[int, int]] = []
    with open_checkpoint(tmp_path) as checkpoint:
        found = hot_columns(checkpoint, lambda *counts: done.append(counts))
        num_layers, hidden_size = checkpoint.config.num_layers, checkpoint.config.hidden_size
    assert done[-1] == (num_layers, num_layers)
    roles = ("qkv", "o", "gate_up", "down")
    assert set(found) == {"head", *(f"layer-{i:03}.{role}" for i in range(num_layers) for role in roles)}
    for key in ("head", *(f"layer-{i:03}.qkv" for i in range(num_layers))):
        assert len(found[key]) == num_hot(hidden_size, "qkv")
        assert set(loud) <= set(found[key].tolist())
        assert found[key].diff().all()  # places of one column are no neighbours
