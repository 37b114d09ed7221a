"""Weights in 8 and 4 bits: the arithmetic of packing. packed_model.py keeps the result; kernels/linear.py multiplies.

int8: one scale per row of the matrix, w = scale * q with q in -127..127. Copies of hot columns (see hot_columns.py)
follow after the matrix's own columns, and no two neighbours of a row may exceed what 16 bits hold of their products
with activations in 8 bits: x86 without VNNI adds two products in so many.
int4: blocks of 32 columns; see gguf_blocks.Blocks. A file of few bits decides for each matrix: blocks of 4 bits
and of Q6_K stay as they are, and what else it has is packed in 8. Other files are packed in 4.
"""

import torch
from torch.nn import functional

from mdiq.engine.formats.checkpoint import Checkpoint
from mdiq.engine.formats.gguf_blocks import BLOCK, FOUR_BITS

FORMATS = ("int8", "int4")
_HOT_SHARE = 0.03  # copies, of a matrix's columns
_HOT_SHARES = {"down": 0.08}  # its activations are products, and spread the most
_HOT_STEP = 32  # columns: what the kernels take
_MAX_PAIR = 127.4  # steps: rounding may add 1, and 255 * 128 is the most that 16 bits hold
_SYMMETRIC_ERROR = 1e-3  # of a scale: below it a block came from a format without offsets


def best_format(checkpoint: Checkpoint) -> str:
    """Return the one of FORMATS that suits a checkpoint: 4 bits where its file has matrices of 4 bits, else int8.

    4 bits keep the values of such matrices, and hold the file's others in 8; see PackedModel.
    """
    return "int4" if FOUR_BITS & checkpoint.layer_kinds() else "int8"


def chosen_format(wanted: str, checkpoint: Checkpoint, device: torch.device) -> str:
    """Return "plain" or one of FORMATS for a core.types.WeightFormat: packed weights are computed on the CPU only."""
    if wanted != "auto":
        return wanted
    return best_format(checkpoint) if device.type == "cpu" else "plain"


def num_hot(num_in: int, role: str) -> int:
    """Return how many copies of hot columns follow a matrix with ``num_in`` columns: none in a very narrow one."""
    if num_in < 4 * _HOT_STEP:
        return 0
    return max(round(_HOT_SHARES.get(role, _HOT_SHARE) * num_in / _HOT_STEP), 1) * _HOT_STEP


def quantize_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q: int8 [n, width], and scale: f32 [n], for rows [n, width]."""
    wide = rows.float()
    scale = wide.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def quantize_columns(weight: torch.Tensor, hot: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return a matrix [out, in] in int8, with copies of its hot columns.

    hot: i64 [k], the columns to copy, one as often as copies of it are wanted; or None.

    Returns q: int8 [out, in + k], the copies last; scale: f32 [out]; and "hot", as given, where k > 0.
    """
    if hot is None or not len(hot):
        q, scale = _quantize_pairs(weight)
        return {"q": q, "scale": scale}
    q, scale = _quantize_pairs(torch.cat((weight, weight[:, hot]), dim=1))
    return {"q": q, "scale": scale, "hot": hot}


def _quantize_pairs(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as quantize_int8, with a scale that keeps every pair of neighbours within _MAX_PAIR."""
    wide = weight.float()
    pairs = functional.pad(wide, (0, wide.shape[1] % 2)).view(wide.shape[0], -1, 2)
    # Activations are 0 to 255: the worst that a pair can add up to is its positive part, or its negative one.
    most = torch.maximum(pairs.clamp_min(0).sum(-1), pairs.clamp_max(0).sum(-1).neg_()).amax(1)
    scale = torch.maximum(wide.abs().amax(1) / 127, most / _MAX_PAIR).clamp_min_(torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return nibbles, scales and offsets for weight: [out, in], in a multiple of BLOCK.

    nibbles: u8 [out, in / BLOCK, BLOCK / 2], the even column in the low half. scales: f32 [out, in / BLOCK].
    offsets: f32, likewise, or None where all blocks do without.
    """
    blocks = weight.float().view(weight.shape[0], -1, BLOCK)
    # As Q4_0: the value of the largest magnitude becomes q = 0.
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = _not_zero(largest / -8)
    q = (blocks / scale).round_().add_(8).clamp_(0, 15)
    error = (q.sub(8).mul_(scale) - blocks).abs_().amax(-1, keepdim=True)
    if bool((error <= scale.abs() * _SYMMETRIC_ERROR).all()):
        return _nibbles(q), scale[..., 0].contiguous(), None
    # As Q4_1: the range of the block in 15 steps.
    least, most = blocks.aminmax(dim=-1, keepdim=True)
    scale = _not_zero((most - least) / 15)
    q = ((blocks - least) / scale).round_().clamp_(0, 15)
    offset = least + 8 * scale
    return _nibbles(q), scale[..., 0].contiguous(), offset[..., 0].contiguous()


def unpack_int4(nibbles: torch.Tensor) -> torch.Tensor:
    """Return q: u8 [out, in], 0..15, for nibbles [out, in / BLOCK, BLOCK / 2]."""
    return torch.stack((nibbles & 15, nibbles >> 4), dim=-1).view(nibbles.shape[0], -1)


def _nibbles(q: torch.Tensor) -> torch.Tensor:
    q = q.to(torch.uint8)
    return q[..., 0::2] | (q[..., 1::2] << 4)


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.abs() < 1e-30, torch.full_like(scale, 1e-30), scale)
