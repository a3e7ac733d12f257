"""Symmetric int8 with one scale per row: per output channel of a weight, per token of activations."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127.5
"""Half the range of int8. With it no element is further than half a step from its code, -128 to 127, and codes and
scales are those of torchao's symmetric mapping; 127 would give steps 0.4 % wider."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., k) -> codes (..., k) int8, scale (..., 1) float32 with x about codes * scale; rows of zeros have scale 1.

    ``scale = max |x| / 127.5`` and ``codes = round(x / scale)``, ties to even.
    """
    x = x.float()
    scale = torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True)) / LEVELS
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)  # whose reciprocal is finite; NaN stays
    return (x * scale.reciprocal()).round_().clamp_(-128, 127).to(torch.int8), scale
