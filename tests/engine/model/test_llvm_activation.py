"""Compiled activation functions against torch's, and each row alone against the same among others."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from mdiq.engine.families import FAMILIES, Activation
from mdiq.engine.kernels import llvm_matmul
from mdiq.engine.model.layers import activated
from mdiq.engine.model.llvm_activation import CompiledActivation
from mdiq.engine.model_config import ModelConfig

CPU = torch.device("cpu")


def _config(width: int, family: str) -> ModelConfig:
    return ModelConfig(
        family=FAMILIES[family],
        num_layers=1,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        mlp_size=width,
        vocab_size=1,
        context_tokens=1,
        norm_eps=1e-5,
    )


def _kinds() -> list[ModelConfig]:
    return [_config(width, family) for family in ("llama", "gpt2") for width in (16, 17, 81, 160, 896)]


@pytest.mark.parametrize("config", _kinds(), ids=lambda config: f"{config.family.activation}-{config.mlp_size}")
def test_it_is_torchs_function(config: ModelConfig) -> None:
    compiled = CompiledActivation.find(config, torch.float32, CPU)
    assert compiled is not None
    width = config.mlp_size * (2 if config.family.is_gated else 1)
    up = torch.randn(33, width, generator=torch.Generator().manual_seed(width)) * 4
    up[0, : config.mlp_size] = torch.linspace(-120, 120, config.mlp_size)
    found, expected = compiled(up.clone()), activated(config, up.double())
    assert torch.allclose(found.double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("config", _kinds(), ids=lambda config: f"{config.family.activation}-{config.mlp_size}")
def test_a_row_has_the_same_bits_in_any_company_on_any_number_of_threads(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = CompiledActivation.find(config, torch.float32, CPU)
    assert compiled is not None
    width = config.mlp_size * (2 if config.family.is_gated else 1)
    up = torch.randn(257, width, generator=torch.Generator().manual_seed(width)) * 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = torch.cat([compiled(up[i : i + 1]) for i in range(len(up))])
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", partial(int, threads))
        assert torch.equal(compiled(up), alone)
        assert torch.equal(compiled(up[5:12]), alone[5:12])


def test_where_it_cannot_be_compiled_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = _config(64, "llama")
    assert fitting.family.activation is Activation.SILU
    assert CompiledActivation.find(replace(fitting, mlp_size=15), torch.float32, CPU) is None
    assert CompiledActivation.find(fitting, torch.bfloat16, CPU) is None
    assert CompiledActivation.find(fitting, torch.float32, torch.device("cuda")) is None
    monkeypatch.setattr(llvm_matmul, "find_spec", lambda name: None)
    assert CompiledActivation.find(fitting, torch.float32, CPU) is None
