"""CAME whose momentum takes one byte per element (SANA-1.5, arXiv 2501.18427, section 2.3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as sharded_zeros

from sana.optimizer.came import CAME, is_factored
from sana.optimizer.local import local

LEVELS = 127  # codes are -127 ... 127


class CAME8bit(CAME):
    """`CAME` with the momentum of large matrices in blocks of signed bytes.

    Each row of a matrix is cut into the fewest blocks of at most `block` elements, as equal as they can be. A block
    keeps scale = max |m| / 127 and codes round(m / scale): zero is exact, and a block of zeros has scale 0. Blocks do
    not cross rows, so that a matrix that is sharded over its rows is rounded like a whole one. A step computes with
    the momentum before it is rounded; row and column statistics, and tensors that are not factored or small, stay
    float32.

    The published optimizer (linear codes between the least and the largest value of 2048 rows, which have no exact
    zero) loses small momenta beside large ones; blocks of 2048 elements are what its paper describes.

    Args:
        params, lr, betas, eps, clip, weight_decay: see `CAME`.
        block: most elements that share a scale.
        min_size: matrices of at most so many elements stay float32.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip: float = 1.0,
        weight_decay: float = 0.0,
        block: int = 2048,
        min_size: int = 16384,
    ) -> None:
        if block < 1 or min_size < 0:
            raise ValueError(f"CAME8bit needs block >= 1 and min_size >= 0, got {block} and {min_size}")
        self.block, self.min_size = block, min_size
        super().__init__(params, lr, betas, eps, clip, weight_decay)

    def _new_momentum(self, p: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        if not is_factored(p) or p.numel() <= self.min_size:
            return super()._new_momentum(p, zeros)
        size = (p.shape[0], blocks_per_row(p.shape[1], self.block))
        if isinstance(p, DTensor):
            scale = sharded_zeros(size, dtype=torch.float32, device_mesh=p.device_mesh, placements=p.placements)
        else:
            scale = torch.zeros(size, dtype=torch.float32, device=p.device)
        return {"momentum_codes": torch.zeros_like(zeros, dtype=torch.int8), "momentum_scale": scale}

    def _average_momentum(self, states: list[dict[str, Tensor]], update: Tensor, beta: float) -> Tensor:
        if "momentum" in states[0]:
            return super()._average_momentum(states, update, beta)
        codes = [local(state["momentum_codes"]).view(update.shape[1:]) for state in states]
        scales = [local(state["momentum_scale"]) for state in states]
        momentum = torch.stack([dequantise(c, s) for c, s in zip(codes, scales, strict=True)])
        momentum.lerp_(update, 1 - beta)
        for m, c, s in zip(momentum, codes, scales, strict=True):
            quantise(m, c, s)
        return momentum


def blocks_per_row(length: int, block: int) -> int:
    """The fewest blocks of at most `block` elements that make up a row."""
    return -(-length // block)


def block_width(length: int, blocks: int) -> int:
    """Elements of each block of a row but the last, which may have fewer."""
    return -(-length // blocks)


def quantise(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Write a matrix as codes and scales, in place.

    Args:
        x: (out, in) float32.
        codes: (out, in) int8, written.
        scale: (out, blocks) float32, written; scale * 127 is the largest magnitude of a block.
    """
    blocks = scale.shape[1]
    width = block_width(x.shape[1], blocks)
    if x.numel() == 0:
        return
    if width * blocks == x.shape[1]:
        parts = x.unflatten(1, (blocks, width))
        torch.div(torch.linalg.vector_norm(parts, float("inf"), dim=2), LEVELS, out=scale)
        # A block of zeros, or of numbers so small that their scale is 0: every code is 0, whatever the divisor.
        divisor = scale.masked_fill(scale == 0, torch.inf).unsqueeze(2)
        codes.copy_(parts.div(divisor).round_().clamp_(-LEVELS, LEVELS).flatten(1))
        return
    for k in range(blocks):
        part = slice(k * width, (k + 1) * width)
        quantise(x[:, part], codes[:, part], scale[:, k : k + 1])


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """(out, in) float32 of codes (out, in) and scales (out, blocks)."""
    length, blocks = codes.shape[1], scale.shape[1]
    if blocks == 1:
        return codes * scale
    return codes * scale.repeat_interleave(block_width(length, blocks), 1)[:, :length]
