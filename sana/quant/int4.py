"""Symmetric 4-bit integers with a scale per group of inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.quant.nibbles import pack, unpack


def quantise_groups(x: Tensor, group: int, levels: float) -> tuple[Tensor, Tensor]:
    """Nearest codes of a matrix.

    ``scale = max |x| / levels`` of each group, rounded to bf16; ``code = round(x / scale)`` in -8 ... 7. A group of
    zeros has scale 1.

    Args:
        x: (m, k); zeros fill k up to a multiple of `group`.
        group: neighbours in a row that share a scale; even.
        levels: 7.5 uses all codes (nothing is further than about half a step from its code); 7 is symmetric.

    Returns:
        Codes (m, k') as float32 integers, and scales (m, k' / group) bfloat16.
    """
    groups = F.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    scale = (groups.abs().amax(dim=2) / levels).to(torch.bfloat16)
    scale = torch.where(scale == 0, 1.0, scale)
    return (groups / scale.float().unsqueeze(2)).round().clamp(-8, 7).flatten(1), scale


def dequantise_groups(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers that codes (m, k') stand for, float32."""
    return (codes.unflatten(1, (scale.shape[1], -1)) * scale.float().unsqueeze(2)).flatten(1)


def pack_codes(codes: Tensor) -> Tensor:
    """(m, k') codes -> (m, k' / 2) uint8, two codes + 8 per byte."""
    return pack((codes + 8).to(torch.uint8))


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`, float32."""
    return unpack(packed).float() - 8
