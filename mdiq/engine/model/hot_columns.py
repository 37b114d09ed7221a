"""The columns of each matrix that meet the largest activations: int8 packing splits them into copies.

A few columns of a model's activations are 10 to 40 times as large as the rest, the same ones in every text (Dettmers et
al. 2022, LLM.int8()). Rounded to 8 bits together, they leave the rest few bits, which would cost SmolLM2 4 % of
perplexity. So such a column stands in the packed matrix several times, and each of its places takes an equal share of
the activation (Zhao et al. 2019, outlier channel splitting).

A scale for each block of an activation's columns, instead, leaves few bits to the rest of a large one's block. The
arithmetic simulated in f32 for SmolLM2 and 2,048 tokens: 2.3, 1.9 or 1.2 % with 256, 128 or 64 columns, 0.2 % with
copies. With AVX2 alone a compiled kernel for blocks of 256 took up to 1.5 times as long for 8 and 16 rows.

They are found once for a model, by reading a short text with weights in f32, one Layer at a time.
"""

from collections.abc import Callable
from functools import partial

import torch

from mdiq.core.types import SeqId
from mdiq.engine.formats.checkpoint import Checkpoint
from mdiq.engine.formats.quantize import num_hot
from mdiq.engine.kernels.linear import Linear
from mdiq.engine.memory import return_free_memory
from mdiq.engine.model.kv_cache import KvCache
from mdiq.engine.model.layer_loading import make_norm, plain_layer
from mdiq.engine.model.layers import PlacedSegment, Rope, activated, attention_over, layer_steps, run_layer
from mdiq.engine.text.sample_text import sample_text
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import MdiqError

_TOKENS = 256
_HEAD = "head"


def hot_columns(
    checkpoint: Checkpoint, progress: Callable[[int, int], object] = lambda *_: None
) -> dict[str, torch.Tensor]:
    """Return the columns to copy, i64, by "layer-000.qkv" and the like, and "head"; see quantize_columns.

    Raises:
        ModelError: the checkpoint lacks something.
    """
    config, device = checkpoint.config, torch.device("cpu")
    token_ids = torch.tensor(_token_ids(checkpoint))
    num_tokens = len(token_ids)
    positions = torch.arange(num_tokens)
    hidden = torch.cat([checkpoint.embedding(int(token), int(token) + 1).float() for token in token_ids])
    if (table := checkpoint.positions()) is not None:
        hidden = hidden + table[:num_tokens].float()
    angles = None
    if config.family.has_rotary:
        rope = Rope(config.rope, config.head_dim, device, checkpoint.rope_factors())
        angles = rope.tables(positions, torch.float32)
    found: dict[str, torch.Tensor] = {}
    for i in range(config.num_layers):
        cache = KvCache(1, _TOKENS, config.num_kv_heads, config.head_dim, torch.float32, device)
        placed = [PlacedSegment(0, num_tokens, 0, cache.extend(SeqId(1), 0, num_tokens))]
        watched: dict[str, _Watched] = {}

        def watch(role: str, linear: Linear, watched: dict[str, _Watched] = watched) -> Linear:
            watched[role] = _Watched(linear)
            return watched[role]

        weights = plain_layer(checkpoint, i, torch.float32, device, watch)
        attend = attention_over(placed, device)
        keys, values = cache.keys[0], cache.values[0]
        steps = layer_steps(weights, config, i)
        hidden = run_layer(hidden, steps, config, keys, values, attend, angles, partial(activated, config))
        found |= {f"layer-{i:03}.{role}": _hottest(linear.largest, role) for role, linear in watched.items()}
        del weights, steps, watched
        return_free_memory()
        progress(i + 1, config.num_layers)
    norm = make_norm(checkpoint.final_norm(), "final_norm", config.norm_eps, torch.float32, device)
    found[_HEAD] = _hottest(_relative(norm(hidden)), _HEAD)
    return found


class _Watched:
    """A matrix that notes what it is given."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self.num_bytes = linear.num_bytes
        self.largest = torch.zeros(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.largest = _relative(x)
        return self._linear(x)


def _relative(x: torch.Tensor) -> torch.Tensor:
    """Return each column's largest magnitude, [in]; each row, which has a scale of its own, by its root mean square."""
    rms = x.pow(2).mean(1, keepdim=True).sqrt_().clamp_min_(1e-30)
    return (x.abs() / rms).amax(0)


def _hottest(largest: torch.Tensor, role: str) -> torch.Tensor:
    """Return the copies that leave the least largest share, for each column's largest magnitude."""
    shares, places = largest.clone(), torch.ones_like(largest)
    copies: list[tuple[int, int]] = []
    for _ in range(num_hot(len(largest), role)):
        column = int(shares.argmax())
        copies.append((int(places[column]), column))
        places[column] += 1
        shares[column] = largest[column] / places[column]
    # Second copies after all first ones: two places of a large column side by side would cost the row bits.
    return torch.tensor([column for _, column in sorted(copies)], dtype=torch.int64)


def _token_ids(checkpoint: Checkpoint) -> list[int]:
    """Return a text in tokens; what `mdiq perplexity` reads is the beginning of it, so this is the end."""
    vocab_size, most = checkpoint.config.vocab_size, min(_TOKENS, checkpoint.config.context_tokens)
    try:
        ids = Tokenizer.load(checkpoint.path).encode(sample_text()[-16 * _TOKENS :])[:most]
    except MdiqError:
        ids = []  # a model without a tokenizer: a Node does not need one
    if len(ids) == most and max(ids) < vocab_size:
        return ids
    # Hot columns are much the same whatever is read.
    return [number * vocab_size // most for number in range(most)]
