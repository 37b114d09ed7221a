"""Weights from disk, one layer at a time: safetensors directories and GGUF files with one interface.

A Checkpoint reads only what it is asked for. Names, transpositions and permutations end here: what leaves has the roles
of ``families.py`` and the shape [out, in].
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from mdiq.engine.families import GGUF_NAMES
from mdiq.engine.formats.checkpoint_files import GgufSource, SafetensorsSource, Source
from mdiq.engine.formats.gguf_blocks import Blocks
from mdiq.engine.formats.gguf_file import GgufFile
from mdiq.engine.model_config import ModelConfig, config_from_gguf, gguf_file_of, read_config
from mdiq.errors import ModelError

_NORMS = ("attn_norm", "mlp_norm", "q_norm", "k_norm")
_ROPE_FACTORS = "rope_freqs.weight"
# Constants that some libraries store: tables of the rotation, and the mask of GPT-2's attention.
_UNUSED = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn_rot_embd\.weight|attn\.(masked_)?bias)"
)

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The weights of one Layer, as stored in value, f32 from GGUF or in the file's own dtype.

    matrices: [out, in] by role: qkv (Q, K and V on top of each other), o, gate_up (likewise; up alone where there is no
        gate), down.
    biases: [out] by the same roles, where the model has them.
    norms: [size] by "role" and "role.bias".
    """

    matrices: Tensors
    biases: Tensors
    norms: Tensors


class Checkpoint:
    """An open model; use it as a context manager, or call ``close``.

    config: its shape.
    path: where it lies, for messages.
    is_gguf: whether its tensors have the names and the order of GGUF files.
    """

    def __init__(self, path: Path, config: ModelConfig, source: Source, *, is_gguf: bool) -> None:
        self.path = path
        self.config = config
        self.is_gguf = is_gguf
        self._source = source
        self._names = GGUF_NAMES if is_gguf else config.family.hf_names

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files."""
        self._source.close()

    @property
    def digest(self) -> str:
        """A fingerprint of the model: every tensor's name, shape, type and first 4 KiB, hashed.

        It tells models apart that differ by mistake; it is no proof against forgery.
        """
        digest = hashlib.sha256(self.config.text.encode())
        for name in self._source.names():
            digest.update(name.encode() + b"\0" + self._source.fingerprint(name))
        return digest.hexdigest()

    def check_names(self) -> None:
        """Raise ModelError if a tensor is stored that nothing asks for: without it the answers would be wrong."""
        asked = {_ROPE_FACTORS} if self.is_gguf else set()
        parts = [part for rows in self._parts().values() for part in rows]
        for i in range(self.config.num_layers):
            asked.update(self._name(role, i, kind) for role in parts for kind in ("weight", "bias"))
            asked.update(self._norm_names(_NORMS if self.config.family.has_qk_norm else _NORMS[:2], i))
        asked.update(self._norm_names(("final_norm",), 0))
        # A head beside the embedding that a config ties it to is the embedding once more.
        asked.update(self._name(role, 0, "weight") for role in ("embedding", "head"))
        if not self.config.family.has_rotary:
            asked.add(self._name("positions", 0, "weight"))
        unknown = [name for name in self._source.names() if name not in asked and not _UNUSED.fullmatch(name)]
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise ModelError(
                f"{self.path}: tensor {', '.join(unknown[:3])}{more}: it is not used for a model of type "
                f"{self.config.family.name}, and without it the answers would be wrong; use the model's original "
                "directory (bf16, f16 or f32, not quantized, adapters merged), or a .gguf file (Q4_K_M or Q8_0)"
            )

    def _norm_names(self, roles: Iterable[str], i: int) -> list[str]:
        kinds = {role: ("weight", "bias") if role in self.config.family.biases else ("weight",) for role in roles}
        return [self._name(role, i, kind) for role in roles for kind in kinds[role]]

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return self._source.files()

    def stored_layer(self, i: int) -> dict[str, torch.Tensor]:
        """Return the tensors of Layer ``i`` by their own names, as they are stored; u8 where torch has no such type."""
        return {name: self._source.stored(name) for name in self._layer_names(i)}

    def stored_kinds(self, i: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return type and shape of those tensors of Layer ``i`` that torch has no type for."""
        kinds = {name: self._source.stored_kind(name) for name in self._layer_names(i)}
        return {name: kind for name, kind in kinds.items() if kind is not None}

    def _layer_names(self, i: int) -> list[str]:
        parts = [part for rows in self._parts().values() for part in rows]
        roles = [role for role in (*parts, *_NORMS) if role in self._names]
        names = [self._name(role, i, kind) for role in roles for kind in ("weight", "bias")]
        return [name for name in names if self._source.has(name)]

    def embedding(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the token embedding: [vocab_size, hidden_size], or some rows of it."""
        return self._vocabulary("embedding", start, stop)

    def positions(self) -> torch.Tensor | None:
        """Return the learned positions, [context_tokens, hidden_size], or None where positions are rotary."""
        if self.config.family.has_rotary:
            return None
        return self._checked("positions", (self.config.context_tokens, self.config.hidden_size))

    def head(self, start: int = 0, stop: int | None = None) -> torch.Tensor | None:
        """Return the output matrix, [vocab_size, hidden_size], or some rows; None where it is the embedding."""
        return None if self.config.is_tied else self._vocabulary("head", start, stop)

    def final_norm(self) -> Tensors:
        """Return the norm before the head: [hidden_size] as "final_norm", and its bias where it has one."""
        return dict(self._norm("final_norm", 0, self.config.hidden_size))

    def rope_factors(self) -> torch.Tensor | None:
        """Return what each rotary frequency is divided by, [head_dim / 2], where a GGUF file stores it (Llama 3.1)."""
        if self.is_gguf and self._source.has(_ROPE_FACTORS):
            return self._source.read(_ROPE_FACTORS)
        return None

    def layer_kinds(self) -> frozenset[str]:
        """Return the types of all Layers' matrices, as the files call them."""
        parts = [part for rows in self._parts().values() for part in rows]
        names = [self._name(part, i, "weight") for i in range(self.config.num_layers) for part in parts]
        return frozenset(self._source.kind(name) for name in names if self._source.has(name))

    def layer_blocks(self, i: int) -> dict[str, list[tuple[int, Blocks | None]]]:
        """Return what Layer ``i``'s matrices are stacked of, by the roles of LayerTensors, as it is stored.

        Each part is (its rows, its blocks, or None where the file has it in another type).
        """
        heads = {"q": self.config.num_heads, "k": self.config.num_kv_heads}
        found: dict[str, list[tuple[int, Blocks | None]]] = {}
        for role, parts in self._parts().items():
            found[role] = []
            for part, num_rows in parts.items():
                blocks = self._source.blocks(self._name(part, i, "weight"))
                if blocks is not None and part in heads and self.config.family.is_permuted_gguf:
                    blocks = {name: _unpermuted(tensor, heads[part]) for name, tensor in blocks.items()}
                found[role].append((num_rows, blocks))
        return found

    def head_blocks(self) -> Blocks | None:
        """Return the output matrix as it is stored; None where it is the embedding too or of another type."""
        return None if self.config.is_tied else self._source.blocks(self._name("head", 0, "weight"))

    def _parts(self) -> dict[str, dict[str, int]]:
        """Return what a Layer's matrices are stacked of, by their role: rows by the role of each part."""
        config, family = self.config, self.config.family
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = {"qkv": q_size + 2 * kv_size} if family.fused_qkv else {"q": q_size, "k": kv_size, "v": kv_size}
        ups = ("gate", "up") if family.is_gated else ("up",)
        return {
            "qkv": qkv,
            "o": {"o": config.hidden_size},
            "gate_up": dict.fromkeys(ups, config.mlp_size),
            "down": {"down": config.hidden_size},
        }

    def layer(self, i: int, kept: Collection[str] = ()) -> LayerTensors:
        """Return the weights of Layer ``i``.

        kept: roles of which the caller has ``layer_blocks``: their matrices are not read, and have no columns here.

        Raises:
            ModelError: a tensor is missing or has another shape than the config says.
        """
        config, family = self.config, self.config.family
        widths = {"o": config.num_heads * config.head_dim, "down": config.mlp_size}
        heads = {"q": config.num_heads, "k": config.num_kv_heads}
        matrices: dict[str, torch.Tensor] = {}
        biases: dict[str, torch.Tensor] = {}
        for role, parts in self._parts().items():
            width = widths.get(role, config.hidden_size)
            linears = [
                self._linear(part, i, (rows, width), heads=heads.get(part, 0), reads=role not in kept)
                for part, rows in parts.items()
            ]
            matrices[role], bias = _stacked(linears)
            if bias is not None:
                biases[role] = bias
        norms: dict[str, torch.Tensor] = {}
        for role in _NORMS if family.has_qk_norm else _NORMS[:2]:
            norms.update(self._norm(role, i, config.head_dim if role in ("q_norm", "k_norm") else config.hidden_size))
        return LayerTensors(matrices, biases, norms)

    def _linear(
        self, role: str, i: int, shape: tuple[int, int], *, heads: int = 0, reads: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return matrix and bias of a role; ``heads`` marks the ones that GGUF may store permuted."""
        family = self.config.family
        is_transposed = family.is_transposed_hf and not self.is_gguf
        if reads:
            weight = self._checked(role, (shape[1], shape[0]) if is_transposed else shape, i)
        else:
            name = self._name(role, i, "weight")
            stored = self._source.stored_kind(name)
            assert stored is not None  # safetensors files have no blocks
            self._check_shape(name, stored[1], shape)
            weight = torch.empty(shape[0], 0)
        if is_transposed:
            weight = weight.t().contiguous()
        has_bias = role in family.biases or self._source.has(self._name(role, i, "bias"))
        bias = self._checked(role, (shape[0],), i, "bias") if has_bias else None
        if heads and self.is_gguf and family.is_permuted_gguf:
            weight = _unpermuted(weight, heads) if reads else weight
            bias = None if bias is None else _unpermuted(bias, heads)
        return weight, bias

    def _norm(self, role: str, i: int, size: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield role, self._checked(role, (size,), i)
        if role in self.config.family.biases:
            yield f"{role}.bias", self._checked(role, (size,), i, "bias")

    def _vocabulary(self, role: str, start: int, stop: int | None) -> torch.Tensor:
        vocab_size = self.config.vocab_size
        num_rows = len(range(*slice(start, stop).indices(vocab_size)))
        return self._checked(role, (num_rows, self.config.hidden_size), rows=(start, stop))

    def _checked(
        self,
        role: str,
        shape: tuple[int, ...],
        i: int = 0,
        part: str = "weight",
        rows: tuple[int, int | None] = (0, None),
    ) -> torch.Tensor:
        name = self._name(role, i, part)
        tensor = self._source.read(name, *rows)
        self._check_shape(name, tuple(tensor.shape), shape)
        return tensor

    def _check_shape(self, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
        if found != shape:
            raise ModelError(
                f"{self.path}: tensor {name} has shape {list(found)} and the config calls for {list(shape)}; "
                "fetch the model again"
            )

    def _name(self, role: str, i: int, part: str) -> str:
        name = f"{self._names[role].format(i=i)}.{part}"
        # Some checkpoints of GPT-2 leave the first word out.
        short = name.removeprefix("transformer.")
        return short if short != name and not self._source.has(name) and self._source.has(short) else name


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model directory in the Hugging Face layout, or a .gguf file.

    Raises:
        ModelError: missing, truncated, malformed, or of an unsupported kind.
    """
    with ExitStack() as opened:
        source: Source
        gguf_file = gguf_file_of(path)
        if gguf_file is None:
            config = read_config(path)
            source = SafetensorsSource(path)
            opened.callback(source.close)
        else:
            file = opened.enter_context(GgufFile(gguf_file))
            config, source = config_from_gguf(file), GgufSource(file)
        checkpoint = Checkpoint(path, config, source, is_gguf=gguf_file is not None)
        checkpoint.check_names()
        opened.pop_all()
        return checkpoint


def _stacked(parts: list[tuple[torch.Tensor, torch.Tensor | None]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return matrices on top of each other, so that one matmul serves them; likewise their biases."""
    if len(parts) == 1:
        return parts[0]
    biases = [bias for _, bias in parts if bias is not None]
    if biases and len(biases) != len(parts):
        # Zeros stand in for what a checkpoint leaves out, as Q and V of some models have a bias and K has none.
        biases = [torch.zeros(w.shape[0], dtype=w.dtype) if b is None else b for w, b in parts]
    return torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None


def _unpermuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows in the order of half-split rotary embedding; GGUF interleaves the halves of each head."""
    rows = tensor.shape[0] // heads
    return tensor.view(heads, rows // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
