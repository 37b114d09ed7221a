"""Blocks of 4 bits: taken apart, they stand for the values that `gguf` finds in them."""

import gguf
import numpy as np
import pytest
import torch

from mdiq.engine.formats.gguf_blocks import Blocks, q6_values, scale_and_offset, take_apart
from mdiq.engine.formats.quantize import unpack_int4

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144, "Q6_K": 210}


def random_rows(kind: str, num_rows: int, num_groups: int = 2, seed: int = 0) -> np.ndarray:
    """Return rows of ``num_groups`` times 256 columns of a type: random bytes, with small scales."""
    numbers = np.random.default_rng(seed)
    num_blocks = num_groups if kind.endswith("K") else 8 * num_groups
    rows = numbers.integers(0, 256, (num_rows, num_blocks, BLOCK_BYTES[kind]), dtype=np.uint8)
    scales = (numbers.standard_normal((num_rows, num_blocks, 2)) * 0.01).astype(np.float16)
    if kind == "Q6_K":
        rows[..., 208:] = scales.view(np.uint8)[..., :2]
    else:
        num_scale_bytes = 2 if kind == "Q4_0" else 4
        rows[..., :num_scale_bytes] = scales.view(np.uint8)[..., :num_scale_bytes]
    return rows.reshape(num_rows, -1)


def values(blocks: Blocks) -> torch.Tensor:
    """Return the matrix that blocks stand for: f64 [out, in]."""
    if "high" in blocks:
        return q6_values(blocks).double()
    scale, offset = (part.double()[..., None] for part in scale_and_offset(blocks))
    q = unpack_int4(blocks["nibbles"]).view(*scale.shape[:2], -1).double()
    return ((q - 8) * scale + offset).flatten(1)


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_blocks_stand_for_the_values_that_gguf_finds(kind: str) -> None:
    data = random_rows(kind, 5)
    expected = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
    found = values(take_apart(data, kind)).float()
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()  # f32 sums in another order
