"""The maths of a Layer: norms, rotary embedding, attention over the KV cache, MLP. Plain functions of tensors.

T: tokens of the Batch, all Segments one after the other. Hq, Hkv: query and KV heads. D: head_dim.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum, auto
from functools import partial

import torch
from torch.nn import functional

from mdiq.engine.families import Activation
from mdiq.engine.kernels.linear import Linear
from mdiq.engine.model.kv_cache import Placement, Slots
from mdiq.engine.model_config import ModelConfig, RopeConfig


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm (Zhang and Sennrich 2019) or, with a bias, LayerNorm, over the last dimension."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        if x.dtype == torch.float32:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # As the reference does: the mean of squares in f32, the weight in the model's dtype.
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One Layer, ready to run; shapes as in checkpoint.LayerTensors."""

    attn_norm: Norm
    mlp_norm: Norm
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    q_norm: Norm | None
    k_norm: Norm | None

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        parts = (getattr(self, field.name) for field in fields(self))
        return sum(part.num_bytes for part in parts if part is not None)


class Rope:
    """Rotary embedding (Su et al. 2021, eq. 34), halves split as in Hugging Face's models.

    factors: what each frequency is divided by, [D / 2], or None.
    """

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device, factors: torch.Tensor | None) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequencies = 1.0 / (config.theta**exponents) / config.linear_factor
        if config.llama3 is not None:
            frequencies = _llama3_scaled(frequencies, config.llama3)
        if factors is not None:
            frequencies = frequencies / factors
        self._frequencies = frequencies.to(device)  # [D / 2]

    def tables(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin for positions [T]: each [T, 1, D / 2] in ``dtype``."""
        angles = positions.float()[:, None] * self._frequencies  # [T, D/2]
        return angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x: [T, H, D] rotated by the angles of its positions."""
    left, right = x.chunk(2, dim=-1)
    rotated = torch.empty_like(x)
    new_left, new_right = rotated.chunk(2, dim=-1)
    torch.mul(left, cos, out=new_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=new_right).addcmul_(left, sin)
    return rotated


@dataclass(frozen=True, slots=True, eq=False)
class PlacedSegment:
    """A Segment within a Batch: rows ``first`` to ``first + length - 1``; ``start`` is its first position."""

    first: int
    length: int
    start: int
    placement: Placement


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""The attention of one Batch, for all of its Layers: (q, k, v, keys, values, window) -> [T, Hq * D].

It stores K and V of the Batch in the cache, and returns what each token finds in its own Sequence. q: [T, Hq, D]; k, v:
[T, Hkv, D]; keys, values: the Layer's pools, [slots, Hkv, D]. window: tokens that a token may look back on, itself
included; 0 is all.
"""


Activate = Callable[[torch.Tensor], torch.Tensor]
"""What stands between the two matmuls of an MLP; see activated."""


def attention_over(placed: Sequence[PlacedSegment], device: torch.device) -> Attend:
    """Return the attention of a Batch, by torch."""
    return partial(_attend, placed, write_slots(placed, device))


def _attend(
    placed: Sequence[PlacedSegment],
    writes: Slots,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """Store and look back; see Attend."""
    store(writes, k, v, keys, values)
    return look_back(placed, q, keys, values, window)


def write_slots(placed: Sequence[PlacedSegment], device: torch.device) -> Slots:
    """Return where K and V of a Batch go, in the order of its rows: one write serves all Segments."""
    if len(placed) == 1:
        return placed[0].placement.write
    slots: list[int] = []
    for segment in placed:
        write = segment.placement.write
        slots += range(write.start, write.stop) if isinstance(write, slice) else write.tolist()
    return torch.tensor(slots, device=device)


def store(writes: Slots, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Put K and V of a Batch into a Layer's pools: before any of its tokens looks back, since one may see another."""
    for pool, new in ((keys, k), (values, v)):
        if isinstance(writes, slice):
            pool[writes] = new
        else:
            pool.index_copy_(0, writes, new)


def look_back(
    placed: Sequence[PlacedSegment], q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int
) -> torch.Tensor:
    """Return what each token of some Segments finds, [their tokens, Hq * D]; q is the whole Batch's. See Attend.

    One attention call for each Sequence: gathering the keys of all into one padded call was slower from 8 Sequences of
    100 tokens on, since it copies what attention reads once (measured on AVX2).
    """
    num_kv_heads, head_dim = keys.shape[1], keys.shape[2]
    groups = q.shape[1] // num_kv_heads
    # What all Sequences share is done once: each step takes as long as a third of a short Sequence's attention.
    seen_keys, seen_values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]  # [1, Hkv, slots, D]
    rows = q.view(-1, 1, num_kv_heads, groups, head_dim).unbind()  # T times [1, Hkv, G, D]
    found: list[torch.Tensor] = []
    for segment in placed:
        read = segment.placement.read
        if segment.length == 1:
            if window and segment.start >= window:
                read = slice(read.stop - window, read.stop) if isinstance(read, slice) else read[-window:]
            # The query heads of a group read the same keys: they pass as rows of one head, and need no mask.
            one = functional.scaled_dot_product_attention(
                rows[segment.first], _seen(seen_keys, read), _seen(seen_values, read)
            )
            found.append(one)
            continue
        is_plain = segment.start == 0 and not (window and segment.length > window)
        mask = None if is_plain else _mask(segment.start, segment.length, window, q.device)
        many = functional.scaled_dot_product_attention(
            q[segment.first : segment.first + segment.length]
            .view(segment.length, num_kv_heads, groups, head_dim)
            .permute(1, 2, 0, 3),  # [Hkv, G, L, D]
            _seen(seen_keys, read)[0, :, None].expand(-1, groups, -1, -1),  # [Hkv, G, n, D], no copy
            _seen(seen_values, read)[0, :, None].expand(-1, groups, -1, -1),
            attn_mask=mask,
            is_causal=is_plain,
        )
        found.append(many.permute(2, 0, 1, 3))
    return (found[0] if len(found) == 1 else torch.cat(found)).reshape(-1, q.shape[1] * head_dim)


def _seen(pool: torch.Tensor, read: Slots) -> torch.Tensor:
    """Return some slots of a pool [1, Hkv, slots, D]: a view where they are neighbours."""
    if isinstance(read, slice):
        return pool.narrow(2, read.start, read.stop - read.start)
    # Of the pool as it lies, index_select gathers rows in half the time that indexing with a tensor takes.
    return pool[0].transpose(0, 1).index_select(0, read).transpose(0, 1)[None]


class Rows(Enum):
    """What a Layer's steps read and write: rows [T, width], one for each token."""

    HIDDEN = auto()  # [T, hidden_size]: what goes through all Layers
    NORMED = auto()  # [T, hidden_size]
    QKV = auto()  # [T, (Hq + 2 Hkv) * D]
    FOUND = auto()  # [T, Hq * D]: of attention
    UP = auto()  # [T, mlp_size], twice as wide where it is gated: gate before up
    ACTIVE = auto()  # [T, mlp_size]
    CHANGE = auto()  # [T, hidden_size]: what is added to HIDDEN


@dataclass(frozen=True, slots=True)
class Normalize:
    """target = norm(source); or, in place, of some heads of QKV."""

    norm: Norm
    source: Rows
    target: Rows
    heads: range | None = None


@dataclass(frozen=True, slots=True)
class Multiply:
    """target = linear(source)."""

    linear: Linear
    source: Rows
    target: Rows


@dataclass(frozen=True, slots=True)
class Rotate:
    """Rotate the heads of Q and K in QKV, in place."""


@dataclass(frozen=True, slots=True)
class LookBack:
    """FOUND = attention of QKV; see Attend."""

    window: int


@dataclass(frozen=True, slots=True)
class ActivateUp:
    """ACTIVE = activated(UP)."""


@dataclass(frozen=True, slots=True)
class AddChange:
    """HIDDEN += CHANGE."""


Step = Normalize | Multiply | Rotate | LookBack | ActivateUp | AddChange


def layer_steps(weights: LayerWeights, config: ModelConfig, layer: int) -> tuple[Step, ...]:
    """Return how Layer number ``layer`` of the model is computed: for torch, see run_layer, and for compiled code."""
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    steps: list[Step] = [
        Normalize(weights.attn_norm, Rows.HIDDEN, Rows.NORMED),
        Multiply(weights.qkv, Rows.NORMED, Rows.QKV),
    ]
    if weights.q_norm is not None and weights.k_norm is not None:
        steps += [
            Normalize(weights.q_norm, Rows.QKV, Rows.QKV, range(num_heads)),
            Normalize(weights.k_norm, Rows.QKV, Rows.QKV, range(num_heads, num_heads + num_kv_heads)),
        ]
    if config.family.has_rotary:
        steps.append(Rotate())
    return (
        *steps,
        LookBack(config.sliding_window if layer in config.windowed_layers else 0),
        Multiply(weights.o, Rows.FOUND, Rows.CHANGE),
        AddChange(),
        Normalize(weights.mlp_norm, Rows.HIDDEN, Rows.NORMED),
        Multiply(weights.gate_up, Rows.NORMED, Rows.UP),
        ActivateUp(),
        Multiply(weights.down, Rows.ACTIVE, Rows.CHANGE),
        AddChange(),
    )


def run_layer(
    hidden: torch.Tensor,
    steps: Sequence[Step],
    config: ModelConfig,
    keys: torch.Tensor,
    values: torch.Tensor,
    attend: Attend,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    activate: Activate,
) -> torch.Tensor:
    """Return the Layer's output for hidden: [T, hidden_size], same shape and dtype."""
    num_rotated = config.num_heads + config.num_kv_heads
    rows = {Rows.HIDDEN: hidden}
    for step in steps:
        match step:
            case Normalize(norm, source, target, None):
                rows[target] = norm(rows[source])
            case Normalize(norm, heads=range(start=first, stop=stop)):
                some = _heads(rows[Rows.QKV], config)[:, first:stop]
                some.copy_(norm(some))
            case Multiply(linear, source, target):
                rows[target] = linear(rows[source])
            case Rotate():
                assert angles is not None  # a family that rotates has them
                some = _heads(rows[Rows.QKV], config)[:, :num_rotated]
                some.copy_(rotate(some, *angles))
            case LookBack(window):
                heads = _heads(rows[Rows.QKV], config)
                q, k, v = heads[:, : config.num_heads], heads[:, config.num_heads : num_rotated], heads[:, num_rotated:]
                rows[Rows.FOUND] = attend(q, k, v, keys, values, window)
            case ActivateUp():
                rows[Rows.ACTIVE] = activate(rows[Rows.UP])
            case AddChange():
                rows[Rows.HIDDEN] = rows[Rows.HIDDEN] + rows[Rows.CHANGE]
    return rows[Rows.HIDDEN]


def _heads(qkv: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return QKV as heads: a view [T, Hq + 2 Hkv, D]."""
    return qkv.view(qkv.shape[0], -1, config.head_dim)


def activated(config: ModelConfig, up: torch.Tensor) -> torch.Tensor:
    """Return what goes down again: it may overwrite ``up``, [T, intermediate_size], twice as wide where it is gated."""
    gate = None
    if config.family.is_gated:
        gate, up = up.chunk(2, dim=-1)
    x = up if gate is None else gate
    active = (
        functional.silu(x, inplace=True)
        if config.family.activation is Activation.SILU
        else functional.gelu(x, approximate="tanh")
    )
    return active if gate is None else active.mul_(up)


def _mask(start: int, length: int, window: int, device: torch.device) -> torch.Tensor:
    """Return which of ``start + length`` keys each of ``length`` queries sees: bool, [length, start + length]."""
    query = torch.arange(start, start + length, device=device)[:, None]
    key = torch.arange(start + length, device=device)
    mask = key <= query
    return mask & (key > query - window) if window else mask


def _llama3_scaled(frequencies: torch.Tensor, scaling: tuple[float, float, float, int]) -> torch.Tensor:
    """Return Llama 3.1's frequencies: long waves slowed by the factor, short ones kept, those between blended.

    Source: Meta's llama-models, ``apply_scaling``; the same in transformers' ``rope_type: llama3``.
    """
    factor, low, high, original_context = scaling
    waves = 2 * math.pi / frequencies
    blend = (original_context / waves - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = torch.where(waves > original_context / low, frequencies / factor, frequencies)
    is_between = (waves <= original_context / low) & (waves >= original_context / high)
    return torch.where(is_between, blended, scaled)
