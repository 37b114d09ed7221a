"""Model families as data: their differences and the names of their tensors. No code per family elsewhere.

To add a family made of the parts in layers.py, add a row here and a tiny model to the equality tests.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Activation(StrEnum):
    """Activation function of the MLP."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


class Window(StrEnum):
    """When a Hugging Face config's ``sliding_window`` applies."""

    NONE = "none"
    IF_THERE = "if there"
    BY_KEYS = "by keys"  # off without use_sliding_window; from layer max_window_layers on


HF_LLAMA = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "o": "model.layers.{i}.self_attn.o_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
}
HF_GPT2 = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "attn_norm": "transformer.h.{i}.ln_1",
    "qkv": "transformer.h.{i}.attn.c_attn",
    "o": "transformer.h.{i}.attn.c_proj",
    "mlp_norm": "transformer.h.{i}.ln_2",
    "up": "transformer.h.{i}.mlp.c_fc",
    "down": "transformer.h.{i}.mlp.c_proj",
}
GGUF_NAMES = {
    "embedding": "token_embd",
    "positions": "position_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attn_norm": "blk.{i}.attn_norm",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "qkv": "blk.{i}.attn_qkv",
    "o": "blk.{i}.attn_output",
    "q_norm": "blk.{i}.attn_q_norm",
    "k_norm": "blk.{i}.attn_k_norm",
    "mlp_norm": "blk.{i}.ffn_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One row: the structure of a family's layers.

    has_rms_norm: RMSNorm without bias; otherwise LayerNorm with one.
    is_gated: the MLP is down(act(gate(x)) * up(x)); otherwise down(act(up(x))).
    has_rotary: positions enter by rotary embedding; otherwise by a learned table beside the embedding.
    has_qk_norm: RMSNorm over each head of Q and K before the rotation (Qwen3).
    fused_qkv: the checkpoint stores Q, K and V as one matrix.
    is_transposed_hf: Hugging Face stores the matrices as [in, out] (GPT-2's Conv1D).
    is_permuted_gguf: GGUF stores the rows of Q and K for interleaved rotary embedding (llama.cpp's conversion).
    has_gpt2_config: the Hugging Face config has GPT-2's keys; otherwise Llama's.
    window: when its sliding window applies.
    biases: roles that have a bias in every model of the family; others have one where the checkpoint stores it.
    """

    name: str
    hf_names: Mapping[str, str]
    has_rms_norm: bool = True
    activation: Activation = Activation.SILU
    is_gated: bool = True
    has_rotary: bool = True
    has_qk_norm: bool = False
    fused_qkv: bool = False
    is_transposed_hf: bool = False
    is_permuted_gguf: bool = False
    has_gpt2_config: bool = False
    window: Window = Window.BY_KEYS
    biases: frozenset[str] = field(default_factory=frozenset)


LLAMA = Family("llama", HF_LLAMA, is_permuted_gguf=True, window=Window.NONE)
MISTRAL = Family("mistral", HF_LLAMA, is_permuted_gguf=True, window=Window.IF_THERE)
QWEN2 = Family("qwen2", HF_LLAMA, biases=frozenset({"q", "k", "v"}))
QWEN3 = Family("qwen3", HF_LLAMA, has_qk_norm=True)
GPT2 = Family(
    "gpt2",
    HF_GPT2,
    has_rms_norm=False,
    activation=Activation.GELU_TANH,
    is_gated=False,
    has_rotary=False,
    fused_qkv=True,
    is_transposed_hf=True,
    has_gpt2_config=True,
    biases=frozenset({"qkv", "o", "up", "down", "attn_norm", "mlp_norm", "final_norm"}),
)

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)}
"""By ``model_type`` of a Hugging Face config. GGUF's ``general.architecture`` has the same values."""
