"""Blocks of 4 and 6 bits as GGUF files store them, taken apart without changing a value. Pure; no files.

Formats: ggml's ggml-common.h (block_q4_0, block_q4_1, block_q4_K, block_q6_K) and dequantize_row_* of ggml-quants.c.
"""

import numpy as np
import torch

BLOCK = 32
"""Columns that share a scale."""
GROUP = 256
"""Columns that share Q4_K's scale of scales."""
FOUR_BITS = frozenset({"Q4_0", "Q4_1", "Q4_K"})
"""Types that the 4-bit format represents exactly."""
KEPT = FOUR_BITS | {"Q6_K"}
"""Types that the "int4" format keeps unchanged."""
FEW_BITS = FOUR_BITS | {"Q5_0", "Q5_1", "Q5_K"}
"""Types of about 4 bits: those that 4 bits hold exactly, and those between 4 and 8 bits."""

Blocks = dict[str, torch.Tensor]
"""A matrix [out, in] in 4 or 6 bits: nibbles, u8 [out, in / BLOCK, BLOCK / 2], the even column's in the low half, and

- of Q4_0 and Q4_1, w = scale * (q - 8) + offset: scale and maybe offset, f32 [out, in / BLOCK];
- of Q4_K, w = d * scales * q - dmin * mins: scales and mins, u8 [out, in / BLOCK] in 0..63, d and dmin, f16 [out, in /
  GROUP];
- of Q6_K, w = d * scales * (q - 32): high, u8 [out, in / BLOCK, BLOCK / 4], scales, i8 [out, in / BLOCK, 2], d, f16
  [out, in / GROUP]. A scale is of half a block. Of nibbles, four bytes are a word, whose low halves are place 0, the
  high ones 1, those of the next word 2 and 3, and so on: byte i of ``high`` has the upper two bits of byte i % 4 of
  places 0..3 where i < 4 and of places 4..7 else, the first place lowest.
"""


def take_apart(data: np.ndarray, kind: str) -> Blocks:
    """Return the blocks of a matrix's rows, u8 [out, bytes], of a type of KEPT."""
    rows = torch.from_numpy(data)
    if kind == "Q6_K":
        return _q6_k(rows)
    return _q4_k(rows) if kind == "Q4_K" else _q4(rows, has_offset=kind == "Q4_1")


def _q4(rows: torch.Tensor, *, has_offset: bool) -> Blocks:
    num_head = 4 if has_offset else 2
    blocks = rows.view(rows.shape[0], -1, num_head + BLOCK // 2)
    numbers = blocks[..., :num_head].contiguous().view(torch.float16).float()
    found = {"nibbles": _paired(blocks[..., num_head:]), "scale": numbers[..., 0].contiguous()}
    if has_offset:
        found["offset"] = numbers[..., 1] + 8 * numbers[..., 0]
    return found


def _q4_k(rows: torch.Tensor) -> Blocks:
    num_out = rows.shape[0]
    groups = rows.view(num_out, -1, 4 + 12 + GROUP // 2)
    numbers = groups[..., :4].contiguous().view(torch.float16)
    # Six bits each: the low ones of scales 0..3, of mins 0..3, and of both 4..7, whose high bits lie above the first.
    first, second, third = (groups[..., at : at + 4] for at in (4, 8, 12))
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=-1)
    mins = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=-1)
    # 32 bytes hold 64 columns: a block in the low halves, and the next in the high ones.
    pairs = groups[..., 16:].reshape(num_out, -1, BLOCK)
    q = torch.stack((pairs & 15, pairs >> 4), dim=2).view(num_out, -1, 2, BLOCK // 2)
    return {
        "nibbles": _paired(q[..., 0, :] | (q[..., 1, :] << 4)),
        "scales": scales.reshape(num_out, -1),
        "mins": mins.reshape(num_out, -1),
        "d": numbers[..., 0].contiguous(),
        "dmin": numbers[..., 1].contiguous(),
    }


def _q6_k(rows: torch.Tensor) -> Blocks:
    num_out = rows.shape[0]
    groups = rows.view(num_out, -1, GROUP // 2 + GROUP // 4 + GROUP // 16 + 2)
    low, high, scales, d = groups.split_with_sizes([GROUP // 2, GROUP // 4, GROUP // 16, 2], dim=-1)
    # Of 128 columns: 64 bytes of low halves and then as many high ones; 32 bytes have the upper bits of four blocks.
    halves = low.reshape(num_out, -1, 2, BLOCK * 2)
    lows = torch.cat((halves & 15, halves >> 4), dim=-1).view(num_out, -1, BLOCK)
    pairs = high.reshape(num_out, -1, 2, BLOCK)
    highs = torch.stack([(pairs >> shift) & 3 for shift in (0, 2, 4, 6)], dim=3).view(num_out, -1, BLOCK)
    # [out, blocks, words, 4 bytes, even or odd]: place 2 * word + odd
    places = highs.view(num_out, -1, BLOCK // 8, 4, 2).transpose(3, 4).reshape(num_out, -1, 2, 4, 4)
    upper = places[..., 0, :] | places[..., 1, :] << 2 | places[..., 2, :] << 4 | places[..., 3, :] << 6
    return {
        "nibbles": lows[..., 0::2] | (lows[..., 1::2] << 4),
        "high": upper.flatten(2),
        "scales": scales.reshape(num_out, -1, 2).contiguous().view(torch.int8),
        "d": d.contiguous().view(torch.float16)[..., 0].contiguous(),
    }


def q6_values(blocks: Blocks) -> torch.Tensor:
    """Return the matrix that Q6_K blocks represent: f32 [out, in]."""
    nibbles, high = blocks["nibbles"], blocks["high"]
    num_out, num_blocks, _ = nibbles.shape
    upper = high.view(num_out, num_blocks, 2, 1, 4)  # [out, blocks, 2, 1, 4]
    places = torch.cat([upper >> shift & 3 for shift in (0, 2, 4, 6)], dim=3).flatten(2, 3)  # [out, blocks, 8, 4]
    highs = places.view(num_out, num_blocks, 4, 2, 4).transpose(3, 4).flatten(2)
    lows = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(2)
    scales = blocks["d"].float().repeat_interleave(GROUP // 16, dim=1) * blocks["scales"].flatten(1)
    values: torch.Tensor = ((lows | highs << 4).flatten(1).float() - 32) * scales.repeat_interleave(16, dim=1)
    return values


def _paired(halves: torch.Tensor) -> torch.Tensor:
    """Return bytes of neighbours, for bytes [.., BLOCK / 2] that pair a column with the one half a block further."""
    q = torch.cat((halves & 15, halves >> 4), dim=-1)
    return q[..., 0::2] | (q[..., 1::2] << 4)


def scale_and_offset(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Return them as f32 [out, in / BLOCK]: w = scale * (q - 8) + offset."""
    if "mins" not in blocks:
        scale = blocks["scale"]
        return scale, blocks.get("offset", torch.zeros_like(scale))
    d, dmin = (blocks[name].float().repeat_interleave(GROUP // BLOCK, dim=1) for name in ("d", "dmin"))
    scale = d * blocks["scales"]
    return scale, 8 * scale - dmin * blocks["mins"]
