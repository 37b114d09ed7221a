"""The Gaussian mechanism on rows of activations, before a Hop's format encodes them.

The noise is made of bytes of the operating system's generator (os.urandom), each used once. A seeded generator such as
torch's is fast and not made for secrets: whoever learns some of its numbers, as a Node that knows a prompt does, may
compute the others and take the noise off again. And a restart, or a Replay, must never repeat noise.

Sums are made in f64 and rounded to the rows' dtype after that. Noise of floating-point numbers has gaps, by which a
value can be guessed that has little noise (Mironov 2012); the rounding hides most of the gaps of f64, and the promise
of core/noise.py is one of real numbers.
"""

import os
from math import prod

import numpy as np
import torch

from mdiq.core.noise import RowNoise


def noisy(rows: torch.Tensor, noise: RowNoise) -> torch.Tensor:
    """Return rows [n, width], clipped to ``noise.clip`` and with noise, on the CPU, in their dtype.

    Numbers that are not finite become 0: a row of them has no norm that could be clipped.
    """
    wide = rows.detach().to(device="cpu", dtype=torch.float64).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return (clipped(wide, noise.clip) + noise.sigma * normal(wide.shape)).to(rows.dtype)


def clipped(rows: torch.Tensor, clip: float) -> torch.Tensor:
    """Return rows [n, width] with those scaled down whose L2 norm exceeds ``clip``."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.mul(clip / norms.clamp_min(clip))


def normal(shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Return independent normal numbers, f64, from the operating system's generator.

    Box & Muller 1958, of 53 bits each; so none is larger than 8.6, which happens once in 1e17 numbers.
    """
    size = prod(shape)
    num_pairs = -(-size // 2)
    bits = np.frombuffer(os.urandom(16 * num_pairs), dtype="<u8") >> 11
    above_zero, turn = (bits[:num_pairs] + 1) * 2.0**-53, bits[num_pairs:] * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(above_zero)), 2 * np.pi * turn
    both = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
    return torch.from_numpy(both[:size]).view(tuple(shape))
