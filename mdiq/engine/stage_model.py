"""A Stage's part of the model: its Layers, and on the Starter the embedding, the final norm and the head."""

from collections.abc import Callable, Sequence

import torch

from mdiq.core.types import LayerRange
from mdiq.engine.checkpoint import Checkpoint, Tensors
from mdiq.engine.kernels import Linear, make_linear
from mdiq.engine.kv_cache import KvCache
from mdiq.engine.layers import LayerWeights, Norm, Rope, Span, run_layer


class StageModel:
    """Weights of a LayerRange in ``dtype`` on ``device``, and how to run them.

    weight_bytes: what they take; a tied head is counted once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: LayerRange,
        *,
        owns_embedding_and_head: bool,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], object],
    ) -> None:
        """Read the weights, one Layer at a time; ``progress`` is told (done, total) in Layers.

        Raises:
            ModelError: the checkpoint lacks something.
        """
        self.config = config = checkpoint.config
        self._layers = layers
        self._dtype = dtype
        self._device = device
        total = len(layers) + owns_embedding_and_head
        progress(0, total)
        self._embedding: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None
        self._final_norm: Norm | None = None
        self._head: Linear | None = None
        self.weight_bytes = 0
        if owns_embedding_and_head:
            self._load_ends(checkpoint)
            progress(1, total)
        self._rope: Rope | None = None
        if config.family.has_rotary:
            self._rope = Rope(config.rope, config.head_dim, device, checkpoint.rope_factors())
        self._weights: list[LayerWeights] = []
        for layer in layers:
            self._weights.append(self._load_layer(checkpoint, layer))
            progress(total - (layers.stop - 1 - layer), total)

    @property
    def owns_embedding(self) -> bool:
        """Whether this is the Starter's part."""
        return self._embedding is not None

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return [T, hidden_size] for token ids [T] at positions [T]."""
        assert self._embedding is not None  # only the Starter is given token ids
        hidden = self._embedding[token_ids]
        return hidden if self._positions is None else hidden + self._positions[positions]

    def run(self, hidden: torch.Tensor, positions: torch.Tensor, cache: KvCache, spans: Sequence[Span]) -> torch.Tensor:
        """Return hidden: [T, hidden_size] behind this Stage's Layers."""
        angles = None if self._rope is None else self._rope.tables(positions, hidden.dtype)
        for i, layer in enumerate(self._layers):
            hidden = run_layer(
                hidden, self._weights[i], self.config, layer, cache.keys[i], cache.values[i], spans, angles
            )
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [n, vocab_size], f32, for the last Stage's rows [n, hidden_size]."""
        assert self._final_norm is not None and self._head is not None  # only the Starter makes tokens
        return self._head(self._final_norm(hidden)).float()

    def _load_ends(self, checkpoint: Checkpoint) -> None:
        self._embedding = checkpoint.embedding().to(device=self._device, dtype=self._dtype)
        self.weight_bytes += self._embedding.nbytes
        if (positions := checkpoint.positions()) is not None:
            self._positions = positions.to(device=self._device, dtype=self._dtype)
            self.weight_bytes += self._positions.nbytes
        self._final_norm = self._norm(checkpoint.final_norm(), "final_norm")
        if (head := checkpoint.head()) is None:
            self._head = make_linear(self._embedding, None, self._dtype, self._device)
        else:
            self._head = make_linear(head, None, self._dtype, self._device)
            self.weight_bytes += self._head.num_bytes

    def _load_layer(self, checkpoint: Checkpoint, layer: int) -> LayerWeights:
        tensors = checkpoint.layer(layer)
        linears = {
            role: make_linear(matrix, tensors.biases.get(role), self._dtype, self._device)
            for role, matrix in tensors.matrices.items()
        }
        self.weight_bytes += sum(linear.num_bytes for linear in linears.values())
        has_qk_norm = self.config.family.has_qk_norm
        return LayerWeights(
            attn_norm=self._norm(tensors.norms, "attn_norm"),
            mlp_norm=self._norm(tensors.norms, "mlp_norm"),
            q_norm=self._norm(tensors.norms, "q_norm") if has_qk_norm else None,
            k_norm=self._norm(tensors.norms, "k_norm") if has_qk_norm else None,
            **linears,
        )

    def _norm(self, tensors: Tensors, role: str) -> Norm:
        weight = tensors[role].to(device=self._device, dtype=self._dtype)
        bias = tensors.get(f"{role}.bias")
        bias = None if bias is None else bias.to(device=self._device, dtype=self._dtype)
        self.weight_bytes += weight.nbytes + (0 if bias is None else bias.nbytes)
        return Norm(weight, bias, self.config.norm_eps)
