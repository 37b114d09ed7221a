"""A Layer's tensors ready to run: from the checkpoint as they are, or from packed files."""

from collections.abc import Callable, Mapping

import torch

from mdiq.engine.formats.checkpoint import Checkpoint, Tensors
from mdiq.engine.formats.packed_file import PackedFile
from mdiq.engine.kernels.choice import KernelChoice
from mdiq.engine.kernels.linear import Linear, make_linear
from mdiq.engine.model.layers import LayerWeights, Norm
from mdiq.engine.model_config import ModelConfig

ROLES = ("qkv", "o", "gate_up", "down")
"""The matrices of a Layer."""


def plain_layer(
    checkpoint: Checkpoint,
    layer: int,
    dtype: torch.dtype,
    device: torch.device,
    wrap: Callable[[str, Linear], Linear] = lambda _, linear: linear,
) -> LayerWeights:
    """Return a Layer in ``dtype`` on ``device``; ``wrap`` is given each matrix by its role.

    Raises:
        ModelError: the checkpoint lacks something.
    """
    tensors = checkpoint.layer(layer)
    linears = {
        role: wrap(role, make_linear(matrix, tensors.biases.get(role), dtype, device))
        for role, matrix in tensors.matrices.items()
    }
    return _layer(checkpoint.config, tensors.norms, linears, dtype, device)


def packed_layer(
    config: ModelConfig, file: PackedFile, choice: KernelChoice, dtype: torch.dtype, device: torch.device
) -> LayerWeights:
    """Return a packed Layer in the kernels that are fastest here.

    Raises:
        EngineError: this device has no kernel for the weights' format.
    """
    linears = {role: choice.load(file, role) for role in ROLES}
    return _layer(config, {name: file.tensor(name) for name in file.names if "norm" in name}, linears, dtype, device)


def make_norm(tensors: Tensors, role: str, eps: float, dtype: torch.dtype, device: torch.device) -> Norm:
    """Return a norm; its tensors are copies, since a view of a mapped file would keep all of it mapped."""
    bias = tensors.get(f"{role}.bias")
    return Norm(
        tensors[role].to(device=device, dtype=dtype, copy=True),
        None if bias is None else bias.to(device=device, dtype=dtype, copy=True),
        eps,
    )


def _layer(
    config: ModelConfig, norms: Tensors, linears: Mapping[str, Linear], dtype: torch.dtype, device: torch.device
) -> LayerWeights:
    def norm(role: str) -> Norm:
        return make_norm(norms, role, config.norm_eps, dtype, device)

    has_qk_norm = config.family.has_qk_norm
    return LayerWeights(
        attn_norm=norm("attn_norm"),
        mlp_norm=norm("mlp_norm"),
        q_norm=norm("q_norm") if has_qk_norm else None,
        k_norm=norm("k_norm") if has_qk_norm else None,
        **linears,
    )
