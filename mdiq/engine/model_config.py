"""A model's shape and constants, from a Hugging Face config.json or a GGUF file's metadata. No tensors."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mdiq.engine.families import FAMILIES, LLAMA, Family, Window
from mdiq.engine.formats.gguf_file import GgufFile
from mdiq.errors import ModelError

_MAX_JSON_BYTES = 64 << 20
_COUNTS = "num_layers hidden_size num_heads num_kv_heads head_dim mlp_size vocab_size context_tokens".split()
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding (Su et al. 2021).

    theta: base of the frequencies.
    linear_factor: positions are divided by it ("linear" scaling).
    llama3: (factor, low_freq_factor, high_freq_factor, original_context) of Llama 3.1's scaling, or None.
    """

    theta: float = 10_000.0
    linear_factor: float = 1.0
    llama3: tuple[float, float, float, int] | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The model's parameters that the engine needs; counts unless named otherwise.

    windowed_layers: layers that attend to the last ``sliding_window`` tokens only; empty without a window.
    """

    family: Family
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    context_tokens: int
    norm_eps: float
    rope: RopeConfig = RopeConfig()
    is_tied: bool = False
    sliding_window: int = 0
    windowed_layers: frozenset[int] = frozenset()

    @property
    def text(self) -> str:
        """All its values, as text that is the same in every process."""
        # The family by its name: the order in which a frozenset prints differs between processes.
        shape = replace(self, family=LLAMA, windowed_layers=frozenset())
        return f"{self.family.name} {sorted(self.windowed_layers)} {shape!r}"

    @property
    def head_layers(self) -> float:
        """Return the head's weights as a multiple of a Layer's: the relative cost of a decoded token there."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = self.hidden_size * self.mlp_size * (3 if self.family.is_gated else 2)
        return self.vocab_size * self.hidden_size / (attention + mlp)

    def kv_bytes_per_token(self, num_layers: int, item_bytes: int) -> int:
        """Return the bytes of K and V of one token in ``num_layers`` layers."""
        return 2 * self.num_kv_heads * self.head_dim * item_bytes * num_layers

    def check(self, where: str) -> None:
        """Raise ModelError when the numbers cannot be those of a model."""
        for name in _COUNTS:
            if not 1 <= (count := getattr(self, name)) < 2**31:
                raise ModelError(f"{where}: {name} is {count}; it must be from 1 to 2^31: fetch the model again")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{where}: {self.num_heads} heads do not share {self.num_kv_heads} KV heads evenly")
        if self.family.has_rotary and self.head_dim % 2:
            raise ModelError(f"{where}: head_dim is {self.head_dim}; rotary embedding needs an even number")


def read_config(model: Path) -> ModelConfig:
    """Return the ModelConfig of a model directory in the Hugging Face layout, or of a .gguf file.

    Raises:
        ModelError: it is missing, malformed, or of an unsupported kind.
    """
    if (path := gguf_file_of(model)) is not None:
        with GgufFile(path) as file:
            return config_from_gguf(file)
    where = model / "config.json"
    return config_from_hf(read_json(where), str(where))


def gguf_file_of(model: Path) -> Path | None:
    """Return the GGUF file that a model is; None for a directory."""
    return None if model.is_dir() else model


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        ModelError: it is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path}: it is too large for a JSON file of a model; fetch it again")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; give a model directory or a .gguf file") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({str(error)[:80]}); fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object; fetch it again")
    return value


def config_from_hf(config: Mapping[str, object], where: str) -> ModelConfig:
    """Return the ModelConfig that a Hugging Face config.json describes.

    Raises:
        ModelError: the family or something it uses is not supported, or a field is missing or of the wrong type.
    """
    family = _family(_Fields(config, where).get("model_type", str, ""), where)
    parts = [("", config), *((f"{key}.", part) for key, part in config.items() if isinstance(part, Mapping))]
    for prefix, part in parts:
        for key in ("quantization_config", "compression_config"):
            if quantized := part.get(key):
                method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
                raise ModelError(
                    f"{where}: {prefix}{key}: weights quantized by {str(method or 'an unknown method')[:40]} are not "
                    "read; use the model's original directory (bf16, f16 or f32), or a .gguf file (Q4_K_M or Q8_0)"
                )
    read = _gpt2_from_hf if family.has_gpt2_config else _llama_from_hf
    result = read(_Fields(config, where), family)
    result.check(where)
    return result


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Return the ModelConfig that a GGUF file's metadata describes.

    Raises:
        ModelError: the architecture or something it uses is not supported, or a field is missing or of the wrong type.
    """
    where = str(file.path)
    architecture = file.get("general.architecture", str)
    family = _family(architecture, where)

    def count(key: str, default: int | None = None) -> int:
        return file.get(f"{architecture}.{key}", int, default)

    if count("expert_count", 0) > 0:
        raise ModelError(f"{where}: mixture-of-experts models are not supported; use a dense one")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{where}: tensor token_embd.weight is missing; fetch or convert the file again")
    num_layers, num_heads = count("block_count"), count("attention.head_count")
    hidden_size = count("embedding_length")
    rope_dims = count("rope.dimension_count", hidden_size // max(num_heads, 1))
    head_dim = count("attention.key_length", rope_dims)
    if family.has_rotary and rope_dims != head_dim:
        raise ModelError(f"{where}: rotary embedding of {rope_dims} of {head_dim} dimensions is not supported")
    _check_gguf_keys(file, architecture, head_dim)
    window = count("attention.sliding_window", 0)
    norm = "layer_norm_rms_epsilon" if family.has_rms_norm else "layer_norm_epsilon"
    result = ModelConfig(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=count("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_size=count("feed_forward_length"),
        vocab_size=embedding.shape[0],
        context_tokens=count("context_length"),
        norm_eps=file.get(f"{architecture}.attention.{norm}", float),
        rope=_rope_from_gguf(file, architecture),
        is_tied="output.weight" not in file.tensors,
        sliding_window=window,
        windowed_layers=frozenset(range(num_layers)) if 0 < window < count("context_length") else frozenset(),
    )
    result.check(where)
    return result


_GGUF_KEYS = frozenset(
    {
        # Applied, or checked where they are read.
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "expert_count"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.sliding_window"),
        *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
        *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
        # Without effect on a dense model whose rotation is scaled linearly or not at all.
        *("vocab_size", "tensor_data_layout", "expert_used_count", "rope.scaling.original_context_length"),
        *("rope.scaling.finetuned", "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    }
)
_FACTORS = ("scale", "factor")


def _check_gguf_keys(file: GgufFile, architecture: str, head_dim: int) -> None:
    """Raise ModelError for a key of the architecture that mdiq does not apply, unless its value is neutral.

    A number is neutral at 0, a factor also at 1, and those listed here at the families' own values.
    """
    neutral = {
        "attention.causal": True,
        "attention.scale": head_dim**-0.5,
        "attention.value_length": head_dim,
        "rope.dimension_count_swa": head_dim,
        "rope.freq_base_swa": file.fields.get(f"{architecture}.rope.freq_base"),
    }
    for key, value in file.fields.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in _GGUF_KEYS:
            continue
        if isinstance(value, bool) or name == "attention.causal":
            is_neutral = value is neutral.get(name, False)
        elif isinstance(value, int | float):
            wanted = neutral.get(name, 1.0 if name.endswith(_FACTORS) else 0)
            is_neutral = not value or (isinstance(wanted, int | float) and math.isclose(value, wanted, rel_tol=1e-5))
        else:
            is_neutral = isinstance(value, np.ndarray | list | str) and not np.any(np.asarray(value))
        if not is_neutral:
            raise ModelError(
                f"{file.path}: {key[:80]} is {str(value)[:40]}: it may change the answers and is not known here; "
                "use a model without it"
            )


def _family(name: str, where: str) -> Family:
    if name not in FAMILIES:
        raise ModelError(f"{where}: models of type {name!r} are not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _rope_from_gguf(file: GgufFile, architecture: str) -> RopeConfig:
    theta = file.get(f"{architecture}.rope.freq_base", float, 10_000.0)
    # Where only a factor is named, also by its key of 2023, it is linear: as llama.cpp takes it.
    kind = file.get(f"{architecture}.rope.scaling.type", str, "linear")
    factor = file.get(
        f"{architecture}.rope.scaling.factor", float, file.get(f"{architecture}.rope.scale_linear", float, 1.0)
    )
    if kind not in ("none", "linear"):
        raise ModelError(f"{file.path}: rope scaling {kind!r} is not supported; only none, linear and llama3 are")
    # Llama 3.1's scaling comes as a tensor of factors, which checkpoint.py reads.
    return RopeConfig(theta, factor if kind == "linear" and factor > 0 else 1.0)


def _gpt2_from_hf(config: "_Fields", family: Family) -> ModelConfig:
    activation = config.get("activation_function", str, "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ModelError(f"{config.where}: activation_function {activation!r} is not supported; only gelu_new is")
    needed = {
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "scale_attn_weights": True,
    }
    for name, wanted in needed.items():
        if config.get(name, bool, wanted) is not wanted:
            raise ModelError(f"{config.where}: {name} is {not wanted}; only {wanted} is supported")
    hidden_size, num_heads = config.get("n_embd", int), config.get("n_head", int)
    return ModelConfig(
        family=family,
        num_layers=config.get("n_layer", int),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // max(num_heads, 1),
        mlp_size=config.get("n_inner", int, 4 * hidden_size),
        vocab_size=config.get("vocab_size", int),
        context_tokens=config.get("n_positions", int, 1024),
        norm_eps=config.get("layer_norm_epsilon", float, 1e-5),
        is_tied=config.get("tie_word_embeddings", bool, True),
    )


def _llama_from_hf(config: "_Fields", family: Family) -> ModelConfig:
    activation = config.get("hidden_act", str, "silu")
    if activation != "silu":
        raise ModelError(f"{config.where}: hidden_act {activation!r} is not supported; only silu is")
    num_layers = config.get("num_hidden_layers", int)
    num_heads = config.get("num_attention_heads", int)
    hidden_size = config.get("hidden_size", int)
    context_tokens = config.get("max_position_embeddings", int, 2048)
    window, windowed = _windows(config, family, num_layers, context_tokens)
    return ModelConfig(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads", int, num_heads),
        head_dim=config.get("head_dim", int, hidden_size // max(num_heads, 1)),
        mlp_size=config.get("intermediate_size", int),
        vocab_size=config.get("vocab_size", int),
        context_tokens=context_tokens,
        norm_eps=config.get("rms_norm_eps", float, 1e-6),
        rope=_rope_from_hf(config),
        is_tied=config.get("tie_word_embeddings", bool, False),
        sliding_window=window,
        windowed_layers=windowed,
    )


def _windows(config: "_Fields", family: Family, num_layers: int, context_tokens: int) -> tuple[int, frozenset[int]]:
    """Return the sliding window and the layers that have it; (0, none) if no sequence can be longer than it."""
    window = config.get("sliding_window", int, 0)
    if family.window is Window.BY_KEYS and not config.get("use_sliding_window", bool, False):
        window = 0
    if family.window is Window.NONE or not 0 < window < context_tokens:
        return 0, frozenset()
    kinds = config.values.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return window, frozenset(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    first = config.get("max_window_layers", int, 0) if family.window is Window.BY_KEYS else 0
    return window, frozenset(range(first, num_layers))


def _rope_from_hf(config: "_Fields") -> RopeConfig:
    # Transformers 5 writes rope_parameters; earlier ones rope_theta and rope_scaling.
    scaling = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ModelError(f"{config.where}: rope_scaling is not an object; fetch the model again")
    parameters = _Fields(scaling, config.where)
    theta = parameters.get("rope_theta", float, config.get("rope_theta", float, 10_000.0))
    share = parameters.get("partial_rotary_factor", float, config.get("partial_rotary_factor", float, 1.0))
    if share != 1.0:
        raise ModelError(f"{config.where}: partial_rotary_factor is {share}; only 1 is supported: use another model")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, parameters.get("factor", float))
    if kind == "llama3":
        return RopeConfig(
            theta,
            llama3=(
                parameters.get("factor", float),
                parameters.get("low_freq_factor", float),
                parameters.get("high_freq_factor", float),
                parameters.get("original_max_position_embeddings", int),
            ),
        )
    raise ModelError(
        f"{config.where}: rope scaling {kind!r} is not supported; use a model with default, linear or llama3"
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of a JSON object. where: names its file in errors."""

    values: Mapping[str, object]
    where: str

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return a field of type ``kind``, or the default without one.

        Raises:
            ModelError: it is missing, or of another type.
        """
        value = self.values.get(key)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "is missing" if value is None else f"is {value!r}"
            raise ModelError(f"{self.where}: {key} {found}; expected {kind.__name__}: fetch the model again")
        return value
