"""A Stage's part of the model: its Layers, and on the Starter the embedding, the final norm and the head."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from mdiq.cache import Use
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.engine.device import choose_device, choose_dtype
from mdiq.engine.formats.checkpoint import Checkpoint, Tensors
from mdiq.engine.formats.layer_files import LayerFiles
from mdiq.engine.formats.packed_model import PackedModel
from mdiq.engine.formats.quantize import FORMATS
from mdiq.engine.kernels.choice import KernelChoice
from mdiq.engine.kernels.linear import Embedding, Linear, PackedEmbedding, PlainEmbedding, make_linear
from mdiq.engine.memory import reset_peak, return_free_memory
from mdiq.engine.model.hot_columns import hot_columns
from mdiq.engine.model.kv_cache import KvCache
from mdiq.engine.model.layer_loading import make_norm, packed_layer, plain_layer
from mdiq.engine.model.layers import (
    Activate,
    Norm,
    PlacedSegment,
    Rope,
    Step,
    activated,
    attention_over,
    layer_steps,
    run_layer,
)
from mdiq.engine.model.llvm_activation import CompiledActivation
from mdiq.engine.model.llvm_attention import CompiledAttention
from mdiq.engine.model.llvm_layers import CompiledLayers


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A Layer that is here: how it is computed, and what its weights take."""

    steps: tuple[Step, ...]
    num_bytes: int


class StageModel:
    """Weights of a LayerRange on ``device``, and how to run them."""

    def __init__(
        self,
        model: Checkpoint | LayerFiles,
        layers: LayerRange,
        *,
        owns_embedding_and_head: bool,
        weights: WeightSettings,
        folder: Path,
        progress: Callable[[int, int], object],
    ) -> None:
        """Read the weights, one Layer at a time; ``progress`` is called with (done, total) in Layers after each step.

        model: the whole model; or these Layers in the format of ``weights``, which have no ends. weights: its format is
        "plain" or one of quantize.FORMATS. folder: where packed weights and measurements of kernels are kept.

        Raises:
            ModelError: the model lacks something.
            EngineError: this device has no kernel for the weights' format.
        """
        self.config = config = model.config
        self._weights = weights
        self._folder = folder
        self._dtype = dtype = choose_dtype(weights.dtype)
        self._device = device = choose_device(weights.device)
        self._embedding: Embedding | None = None
        self._positions: torch.Tensor | None = None
        self._final_norm: Norm | None = None
        self._head: Linear | None = None
        self._ends_bytes = 0
        self._loaded: dict[int, _Loaded] = {}
        self._in_use: list[Use] = []
        self._rope: Rope | None = None
        if config.family.has_rotary:
            self._rope = Rope(config.rope, config.head_dim, device, model.rope_factors())
        self._attention = CompiledAttention.find(config, dtype, device)
        self._activate: Activate = CompiledActivation.find(config, dtype, device) or partial(activated, config)
        self._load(model, layers, progress, with_ends=owns_embedding_and_head)
        self._steps = [self._loaded[layer].steps for layer in layers]
        self._parts = self._in_parts()

    def reshape(
        self, model: Checkpoint | LayerFiles | None, layers: LayerRange, progress: Callable[[int, int], object]
    ) -> None:
        """Have other Layers of the same model: those that are here stay, others go first, then the rest is read.

        model, progress: see above; None where nothing is lacking. After an error it computes nothing until it is
        reshaped again.

        Raises:
            ModelError, EngineError: see above.
        """
        self._steps, self._parts = [], []
        self._loaded = {layer: self._loaded[layer] for layer in layers if layer in self._loaded}
        return_free_memory(collect=True)
        if model is not None:
            self._load(model, layers, progress)
        self._steps = [self._loaded[layer].steps for layer in layers]
        self._parts = self._in_parts()

    def lacks(self, layers: LayerRange) -> list[int]:
        """Return which of these Layers are not here."""
        return [layer for layer in layers if layer not in self._loaded]

    def _load(
        self,
        model: Checkpoint | LayerFiles,
        layers: LayerRange,
        progress: Callable[[int, int], object],
        *,
        with_ends: bool = False,
    ) -> None:
        """Read what is not here yet, one Layer at a time."""
        missing, done = self.lacks(layers), 0
        total = len(missing) + with_ends

        def step() -> None:
            progress(done, total)

        step()
        config, dtype, device, folder, weights = self.config, self._dtype, self._device, self._folder, self._weights
        choice = KernelChoice(exact=weights.exact, folder=folder)
        with ExitStack() as stack:
            packed: PackedModel | LayerFiles | None = None
            if isinstance(model, LayerFiles):
                self._in_use = model.in_use
                packed = model if weights.format in FORMATS else None
            elif weights.format in FORMATS:
                find_hot = partial(hot_columns, model, lambda *_: step())
                made = PackedModel(model, weights.format, folder / "packed", find_hot, step)
                packed = stack.enter_context(made)
                self._in_use = packed.in_use
            if with_ends:
                assert isinstance(model, Checkpoint)  # files of Layers are for the other Nodes
                if isinstance(packed, PackedModel):
                    self._load_packed_ends(packed, choice)
                else:
                    self._load_ends(model)
                done = 1
                _settle(packed)
                step()
            for layer in missing:
                if packed is not None:
                    loaded = packed_layer(config, packed.layer(layer), choice, dtype, device)
                else:
                    stored = model.stored(layer) if isinstance(model, LayerFiles) else model
                    loaded = plain_layer(stored, layer, dtype, device)
                self._loaded[layer] = _Loaded(layer_steps(loaded, config, layer), loaded.num_bytes)
                _settle(packed)
                done += 1
                step()

    @property
    def weight_bytes(self) -> int:
        """What the weights take; a tied head is counted once unless its packing is a second copy."""
        return self._ends_bytes + sum(loaded.num_bytes for loaded in self._loaded.values())

    @property
    def owns_embedding(self) -> bool:
        """Whether this is the Starter's part."""
        return self._embedding is not None

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return [T, hidden_size] for token ids [T] at positions [T]."""
        assert self._embedding is not None  # only the Starter is given token ids
        hidden = self._embedding(token_ids)
        return hidden if self._positions is None else hidden + self._positions[positions]

    def run(
        self, hidden: torch.Tensor, positions: torch.Tensor, cache: KvCache, placed: Sequence[PlacedSegment]
    ) -> torch.Tensor:
        """Return hidden: [T, hidden_size] after this Stage's Layers."""
        compiled = None if self._attention is None else self._attention.over(placed)
        attend = attention_over(placed, self._device) if compiled is None else compiled
        angles = None if self._rope is None else self._rope.tables(positions, hidden.dtype)
        for part in self._parts:
            if isinstance(part, CompiledLayers):
                assert compiled is not None  # it is made of compiled attention
                hidden = part.run(hidden, compiled, angles, cache)
                continue
            hidden = run_layer(
                hidden,
                self._steps[part],
                self.config,
                cache.keys[part],
                cache.values[part],
                attend,
                angles,
                self._activate,
            )
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [n, vocab_size], f32, for the last Stage's rows [n, hidden_size]."""
        assert self._final_norm is not None and self._head is not None  # only the Starter makes tokens
        return self._head(self._final_norm(hidden)).float()

    def _in_parts(self) -> list[CompiledLayers | int]:
        """Return the Stage's Layers in order: those next to each other that can be compiled as one, others by place."""
        attention, activation = self._attention, self._activate
        if attention is None or not isinstance(activation, CompiledActivation):
            return list(range(len(self._steps)))
        parts: list[CompiledLayers | int] = []
        for fits, group in groupby(range(len(self._steps)), lambda i: CompiledLayers.fits(self._steps[i])):
            places = list(group)
            compiled = None
            if fits:
                with suppress(RuntimeError):  # not for this model's shapes, wherever its Layers are
                    compiled = CompiledLayers(
                        self.config,
                        [self._steps[i] for i in places],
                        first_in_cache=places[0],
                        attention=attention,
                        activation=activation,
                    )
            parts += places if compiled is None else [compiled]
        return parts

    def _load_ends(self, checkpoint: Checkpoint) -> None:
        matrix = checkpoint.embedding().to(device=self._device, dtype=self._dtype)
        self._embedding = PlainEmbedding(matrix)
        self._ends_bytes += self._embedding.num_bytes
        self._set_positions(checkpoint.positions())
        self._final_norm = self._norm(checkpoint.final_norm())
        if (head := checkpoint.head()) is None:
            self._head = make_linear(matrix, None, self._dtype, self._device)
        else:
            self._head = make_linear(head, None, self._dtype, self._device)
            self._ends_bytes += self._head.num_bytes

    def _load_packed_ends(self, packed: PackedModel, choice: KernelChoice) -> None:
        file = packed.ends()
        norms = {name: file.tensor(name) for name in file.names if name.startswith("final_norm")}
        self._final_norm = self._norm(norms)
        self._set_positions(file.find("positions"))
        self._head = choice.load(file, "embedding" if self.config.is_tied else "head")
        # Another mapping: the pages that packing the head has read go with the first one.
        self._embedding = PackedEmbedding(packed.ends(), self._dtype)
        self._ends_bytes += self._head.num_bytes + self._embedding.num_bytes

    def _set_positions(self, positions: torch.Tensor | None) -> None:
        if positions is not None:
            self._positions = positions.to(device=self._device, dtype=self._dtype, copy=True)
            self._ends_bytes += self._positions.nbytes

    def _norm(self, tensors: Tensors) -> Norm:
        norm = make_norm(tensors, "final_norm", self.config.norm_eps, self._dtype, self._device)
        self._ends_bytes += norm.num_bytes
        return norm


def _settle(packed: PackedModel | LayerFiles | None) -> None:
    """Give freed memory back, and leave out of the process's peak what packing took: it is done once on a device."""
    return_free_memory()
    if packed is not None and packed.has_packed:
        packed.has_packed = False
        reset_peak()
