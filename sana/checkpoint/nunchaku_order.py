"""The order in which nunchaku's 4-bit kernels read a layer: pure permutations, and their inverses.

A warp multiplies 128 outputs by 64 inputs at a time with ``mma.m16n8k64`` (16-bit numbers: ``m16n8k16``), and each of
its 32 threads finds what it needs in one piece. With `lane` = thread, an output n of a tile is 16 a + 8 b + lane / 4,
an input k is 32 c + 8 (lane % 4) + i: fragments as in the PTX manual's figures for matrix B of these instructions.
Every size is a multiple of that tile here; `sana.checkpoint.nunchaku` fills them up.

The published counterpart is `NunchakuWeightPacker` (nunchaku/lora/flux/packer.py), and results are equal to the bit.
That is what was checked; no kernel of nunchaku was run on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128
"""Outputs of a tile; inputs are filled up to a multiple of it too, as kernels take two steps of 64 at once."""
RANK = 16
"""Low ranks are filled up to a multiple of this."""


def pack_codes(codes: Tensor) -> Tensor:
    """4-bit codes (n, k) uint8 below 16 -> (n, k / 2) int8; n and k multiples of 128.

    Signed integers are given as two's complement, e2m1 with the sign in bit 3.
    """
    n, k = codes.shape
    # tile, a, b, lane / 4 | step, c, lane % 4, i  ->  tile, step, a, lane, b, c, i
    order = codes.reshape(n // TILE, 8, 2, 8, k // 64, 2, 4, 8).permute(0, 4, 1, 3, 6, 2, 5, 7)
    return (order[..., 0::2] | order[..., 1::2] << 4).reshape(n, k // 2).view(torch.int8)


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`."""
    n, k = packed.shape[0], 2 * packed.shape[1]
    pairs = packed.view(torch.uint8).reshape(n // TILE, k // 64, 8, 8, 4, 2, 2, 4)
    order = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
    return order.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(n, k)


def pack_columns(values: Tensor) -> Tensor:
    """Numbers per output (n, g) -> (g, n), each tile of 128 with its g columns in one piece; n a multiple of 128.

    Thread 4 a + l of the warp holds outputs 16 a + 2 l, 16 a + 2 l + 1 and those 8 further on.
    """
    n, g = values.shape
    return values.reshape(n // TILE, 8, 2, 4, 2, g).permute(0, 5, 1, 3, 2, 4).reshape(g, n)


def unpack_columns(packed: Tensor) -> Tensor:
    """The inverse of `pack_columns`."""
    g, n = packed.shape
    return packed.reshape(n // TILE, g, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, g)


def pack_vector(values: Tensor) -> Tensor:
    """(n,) -> (n,): biases of outputs, smoothing scales of inputs; n a multiple of 128."""
    return pack_columns(values.unsqueeze(1)).flatten()


def unpack_vector(packed: Tensor) -> Tensor:
    """The inverse of `pack_vector`."""
    return unpack_columns(packed.unsqueeze(0)).flatten()


def pack_micro_scales(scales: Tensor) -> Tensor:
    """Block scales of NVFP4, (n, g) one-byte floats -> (g, n); n a multiple of 128, g of 4.

    Thread 4 l + q holds, for outputs 32 p + 8 q + l with p = 0 ... 3, the four scales of a step of 64 inputs.
    """
    n, g = scales.shape
    order = scales.view(torch.uint8).reshape(n // TILE, 4, 4, 8, g // 4, 4).permute(0, 4, 3, 2, 1, 5)
    return order.reshape(g, n).view(scales.dtype)


def unpack_micro_scales(packed: Tensor) -> Tensor:
    """The inverse of `pack_micro_scales`."""
    g, n = packed.shape
    order = packed.view(torch.uint8).reshape(n // TILE, g // 4, 8, 4, 4, 4).permute(0, 4, 3, 2, 1, 5)
    return order.reshape(n, g).view(packed.dtype)


def pack_up(up: Tensor) -> Tensor:
    """(n, r) -> (n, r), 16-bit: U of the branch; n and r multiples of 16."""
    return _tiles(up).permute(0, 3, 2, 5, 1, 4, 6).reshape(up.shape)


def unpack_up(packed: Tensor) -> Tensor:
    """The inverse of `pack_up`."""
    n, r = packed.shape
    return packed.reshape(n // 16, r // 16, 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6).reshape(n, r)


def pack_down(down: Tensor) -> Tensor:
    """(k, r) -> (k, r), 16-bit: D of the branch; k and r multiples of 16.

    As `pack_up` of its transpose, but tiles of one piece of inputs lie together.
    """
    return _tiles(down.mT).permute(3, 0, 2, 5, 1, 4, 6).reshape(down.shape)


def unpack_down(packed: Tensor) -> Tensor:
    """The inverse of `pack_down`."""
    k, r = packed.shape
    return packed.reshape(k // 16, r // 16, 8, 4, 2, 2, 2).permute(1, 4, 2, 0, 5, 3, 6).reshape(r, k).mT.contiguous()


def _tiles(matrix: Tensor) -> Tensor:
    """Outputs as (tile, b, lane / 4), inputs as (tile, c, lane % 4, i): fragments of m16n8k16."""
    n, k = matrix.shape
    return matrix.reshape(n // 16, 2, 8, k // 16, 2, 4, 2)
