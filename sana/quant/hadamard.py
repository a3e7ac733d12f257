"""Rotations of neighbouring channels by Hadamard's matrix: they share an outlier among a block, and cancel in products.

Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456): x W^T = (x H) (W H)^T for every orthogonal H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_of(rotate: int, channels: int) -> int:
    """The largest block of at most `rotate` channels that divides their number; 0 or 1: nothing is rotated.

    Raises:
        ValueError: `rotate` is neither 0 nor a power of two.
    """
    if not isinstance(rotate, int) or rotate < 0 or rotate & (rotate - 1):
        raise ValueError(f"rotate={rotate} must be 0 (no rotation) or a power of two, such as 16")
    return math.gcd(rotate, channels) if rotate else 0


def hadamard(n: int, device: torch.device) -> Tensor | None:
    """(n, n) float32, n a power of two: Sylvester's matrix over sqrt(n), orthogonal and symmetric, so its own
    inverse. None where n is 0 or 1: nothing is to be rotated."""
    if n < 2:
        return None
    h = torch.full((1, 1), n**-0.5, device=device)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def rotate_blocks(x: Tensor, h: Tensor | None) -> Tensor:
    """(..., k) -> (..., k) float32: neighbours multiplied by a matrix of `hadamard`, whose size divides k. Twice is the
    identity."""
    x = x.float()
    return x if h is None else (x.unflatten(-1, (-1, len(h))) @ h).flatten(-2)
