"""Tiny random models of every family, written by transformers as safetensors, and what transformers says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mdiq.core.frame import Batch, Payload, Segment, TokenIds
from mdiq.core.types import Epoch, LayerRange, SeqId, WeightSettings
from mdiq.engine.runner import StageRunner

NEAR_TIE = 1e-3
"""A token that differs counts as equal where the reference's two best logits are closer than this."""
PROMPTS = {0: [5], 1: [3, 14, 15, 92, 65], 2: [i * 31 % 97 for i in range(40)]}
COUNT = 16
"""Tokens of an answer to each."""

_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS = {
    "llama-mha-untied": (
        LlamaForCausalLM,
        LlamaConfig(**{**_SHAPE, "num_key_value_heads": 6}, tie_word_embeddings=False),
    ),
    "llama-gqa-tied": (LlamaForCausalLM, LlamaConfig(**_SHAPE, tie_word_embeddings=True)),
    "llama-long": (LlamaForCausalLM, LlamaConfig(**{**_SHAPE, "max_position_embeddings": 2048})),
    "llama-3.1-rope": (LlamaForCausalLM, LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3_ROPE)),
    "llama-linear-rope": (
        LlamaForCausalLM,
        LlamaConfig(**_SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
    ),
    "llama-biased": (LlamaForCausalLM, LlamaConfig(**_SHAPE, head_dim=16, attention_bias=True, mlp_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**_SHAPE, head_dim=16, sliding_window=None)),
    "mistral-windowed": (MistralForCausalLM, MistralConfig(**_SHAPE, head_dim=16, sliding_window=12)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_SHAPE)),
    "qwen2-windowed": (
        Qwen2ForCausalLM,
        Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=12, max_window_layers=2),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=97, n_embd=96, n_layer=4, n_head=6, n_positions=256, bos_token_id=1, eos_token_id=2),
    ),
}


def make_model(name: str) -> PreTrainedModel:
    """Return a model with random weights, large enough that logits differ clearly, biases and norms included."""
    kind, config = MODELS[name]
    torch.manual_seed(7)
    config._attn_implementation = "eager"
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            is_matrix = parameter.dim() > 1
            parameter.normal_(0.0 if is_matrix else 0.5, 0.3)
    return model


def split_gguf(whole: Path, folder: Path, *, has_empty_first: bool = True, per_part: int = 9) -> list[Path]:
    """Write a GGUF file as its parts, as llama.cpp splits it, and return them in order; the first without tensors."""
    folder.mkdir(exist_ok=True)
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=per_part, small_first_shard=has_empty_first)
    for field in reader.fields.values():
        if field.types and field.name != "general.architecture" and not field.name.startswith("GGUF."):
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


def reference_tokens(model: PreTrainedModel, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Return the greedy answer of transformers, and how far apart the two best logits were at each step."""
    tokens, gaps = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float().topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
    return tokens[len(prompt) :], gaps


def assert_gives_reference_tokens(
    name: str, folder: Path, splits: Sequence[tuple[list[int], int]], devices: Sequence[str] = ("cpu",)
) -> None:
    """Check a family's answers, however its layers are split and prompts cut, against those of transformers.

    splits: layers of each Stage, and tokens of a chunk.
    """
    model = make_model(name)
    model.save_pretrained(folder)
    reference = {s: reference_tokens(model, prompt, COUNT) for s, prompt in PROMPTS.items()}
    assert len({token for expected, _ in reference.values() for token in expected}) > 2, "it tests too little"
    for split, chunk in splits:
        answers = Chain.load(folder, split, devices=devices).generate(PROMPTS, COUNT, chunk)
        for s, (expected, gaps) in reference.items():
            for i, (token, wanted) in enumerate(zip(answers[s], expected, strict=True)):
                if token != wanted:
                    assert gaps[i] < NEAR_TIE, f"split {split}, prompt {s}, token {i}: {token} is not {wanted}"
                    break


@dataclass
class Chain:
    """Stages of one model, called one after the other."""

    stages: list[StageRunner]

    @classmethod
    def load(cls, path: Path, split: list[int], dtype: str = "f32", devices: Sequence[str] = ("cpu",)) -> "Chain":
        """Load Stages of so many layers each, on the devices in turn."""
        stages, start = [], 0
        for i, size in enumerate(split):
            stages.append(
                StageRunner.load(
                    path,
                    LayerRange(start, start + size),
                    is_last=i == len(split) - 1,
                    owns_embedding_and_head=i == 0,
                    weights=WeightSettings("plain", dtype, device=devices[i % len(devices)]),
                    kv_tokens=1024,
                )
            )
            start += size
        return cls(stages)

    def forward(self, pieces: list[tuple[int, int, list[int]]], parents: Mapping[int, int] | None = None) -> list[int]:
        """Run (sequence, start, tokens) pieces in one Batch; return the next token of each.

        parents: whose cache a Sequence begins with, by Sequence.
        """
        parent_ids = {s: SeqId(parent) for s, parent in (parents or {}).items()}
        segments = tuple(
            Segment(SeqId(s), start, len(tokens), wants_logits=True, parent=parent_ids.get(s))
            for s, start, tokens in pieces
        )
        payloads: tuple[Payload, ...] = tuple(TokenIds(tuple(tokens)) for _, _, tokens in pieces)
        for stage in self.stages:
            output = stage.forward(Batch(Epoch(1), segments, payloads))
            row, split = 0, []
            for segment in segments:
                split.append(output.rows(row, row + segment.length))
                row += segment.length
            payloads = tuple(split)
        return self.stages[0].logits([output.rows(i, i + 1) for i in range(len(pieces))]).argmax(-1).tolist()

    def generate(self, prompts: dict[int, list[int]], count: int, chunk: int = 1000) -> dict[int, list[int]]:
        """Return greedy answers, all Sequences in every Batch, prompts in chunks."""
        answers: dict[int, list[int]] = {s: [] for s in prompts}
        pending = {}
        for s, prompt in prompts.items():
            for start in range(0, len(prompt), chunk):
                pending[s] = self.forward([(s, start, prompt[start : start + chunk])])[0]
        while True:
            for s, token in pending.items():
                answers[s].append(token)
            if len(answers[next(iter(answers))]) == count:
                return answers
            pieces = [(s, len(prompts[s]) + len(answers[s]) - 1, [token]) for s, token in pending.items()]
            pending = dict(zip(pending, self.forward(pieces), strict=True))
