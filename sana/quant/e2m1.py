"""NVFP4 in plain torch: 4-bit floats, a scale in e4m3 per 16 of them, a scale in fp32 over all.

NVIDIA's format; codes, scales and packing are bit for bit those of torchao's `NVFP4Tensor.to_nvfp4` with a scale per
tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.quant.nibbles import pack, unpack

BLOCK = 16
LARGEST = 6.0
"""The largest number of e2m1."""
E4M3_LARGEST, E4M3_NORMAL = 448.0, 2.0**-6
ROOM = 256.0
"""Scale of the block with the largest number where block scales are searched for: they can grow by 7/4 within e4m3."""
WEIGHT_STEPS = (0, -1, 1, -2, 2, -3, 3, -4, 4, 5, 6, 7)
"""Of a block's scale, in neighbours of e4m3, which lie an eighth or less apart: more do not lessen Gaussian errors."""
TOKEN_STEPS = (0, -1, 5)
"""The three of those that are worth most: the largest number goes to 6, is clipped a little, or goes to about 4."""
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Of the codes 0 to 15: the sign in bit 3, the magnitude in bits 0 to 2."""


def encode(x: Tensor) -> Tensor:
    """Codes, uint8, of the nearest numbers of e2m1; ties to the even code, and beyond 6 to 6."""
    size = x.abs().clamp(max=LARGEST)
    # Numbers lie 1/2 apart below 2, 1 apart below 4, 2 apart above; `round` takes ties to even.
    code = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return code.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """float32 numbers of codes below 16."""
    return torch.tensor(VALUES, device=codes.device)[codes.int()]


def tensor_scale(largest: Tensor, block: float = E4M3_LARGEST) -> Tensor:
    """The fp32 scale of what is at most `largest` in size: it maps to 6 in a block of this scale."""
    scale = largest.float() / (block * LARGEST)
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)  # whose reciprocal is finite; NaN stays


def quantise(x: Tensor, scale: Tensor, steps: Sequence[int] = (0,)) -> tuple[Tensor, Tensor]:
    """Nearest NVFP4 of a matrix.

    Args:
        x: (m, k); zeros fill k up to a multiple of 16.
        scale: `tensor_scale` of all of it, (), or of each row, (m, 1).
        steps: block scales to try: that which takes the largest number to 6, rounded to e4m3, is 0, its neighbours are
            -1 and 1. Of several, each block takes the one with the least squared error, the first of equal ones. (The
            choice of 6 or about 4 is that of Cook et al. 2025, arXiv:2512.02010.)

    Returns:
        Packed codes (m, k' / 2) uint8 and block scales (m, k' / 16) float8_e4m3fn, at least its smallest normal number.
    """
    x = F.pad(x.float(), (0, -x.shape[1] % BLOCK))
    blocks = x.unflatten(1, (-1, BLOCK))
    wanted = blocks.abs().amax(dim=-1) / LARGEST / scale
    nearest = wanted.clamp(min=E4M3_NORMAL, max=E4M3_LARGEST).to(torch.float8_e4m3fn)
    given = _step(nearest, steps[0])
    codes = encode(_wanted(blocks, scale, given))
    if len(steps) > 1:
        least = _error(codes, blocks, scale, given)
        for step in steps[1:]:
            other = _step(nearest, step)
            tried = encode(_wanted(blocks, scale, other))
            error = _error(tried, blocks, scale, other)
            better = error < least
            codes = torch.where(better.unsqueeze(-1), tried, codes)
            given = torch.where(better, other.view(torch.uint8), given.view(torch.uint8)).view(given.dtype)
            least = torch.minimum(error, least)
    return pack(codes.flatten(1)), given


def _step(scales: Tensor, step: int) -> Tensor:
    """Neighbours of positive numbers of e4m3, between its smallest normal one and its largest."""
    if step == 0:
        return scales
    smallest, largest = 0x08, 0x7E  # their codes, which are in the order of the numbers
    return (scales.view(torch.uint8).int() + step).clamp(smallest, largest).to(torch.uint8).view(scales.dtype)


def _wanted(blocks: Tensor, scale: Tensor, given: Tensor) -> Tensor:
    """(m, n, 16) over the scale and the (m, n) block scales: what is rounded to e2m1."""
    # The order of these operations is torchao's, down to the last bit.
    factor = scale.reciprocal() / given.float()
    return blocks * factor.unsqueeze(-1)


def _error(codes: Tensor, blocks: Tensor, scale: Tensor, given: Tensor) -> Tensor:
    """(m, n): squared errors of blocks in units of the scale, which keeps the squares of small numbers normal."""
    return (decode(codes) - _wanted(blocks, scale, given)).square().sum(dim=-1) * given.float().square()


def dequantise(codes: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    """(m, k' / 2) codes, (m, k' / 16) block scales, scale as in `quantise` -> (m, k') float32."""
    values = decode(unpack(codes)).unflatten(1, (-1, BLOCK))
    return (values * (scale * scales.float()).unsqueeze(-1)).flatten(1)


def tile_scales(scales: Tensor) -> Tensor:
    """Block scales (m, n) in the order that cuBLAS reads, flat: tiles of 128 x 4, in which row 32 i + j and column c
    lie at 16 j + 4 i + c; zeros fill up the last tiles."""
    m, n = scales.shape
    bytes_ = F.pad(scales.view(torch.uint8), (0, -n % 4, 0, -m % 128))
    tiles = bytes_.view(-(-m // 128), 4, 32, -(-n // 4), 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(torch.float8_e4m3fn)
