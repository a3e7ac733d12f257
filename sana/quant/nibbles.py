"""Two 4-bit codes in a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """(..., k) uint8 below 16, k even -> (..., k / 2) uint8: the code of even index in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
