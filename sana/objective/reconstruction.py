"""Distances between an image and its reconstruction, one number per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def absolute(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean absolute difference of the pixels (L1)."""
    return (x - y).abs().flatten(1).mean(1)


def perceptual(
    x: Sequence[Float[Tensor, "b _ _ _"]], y: Sequence[Float[Tensor, "b _ _ _"]], eps: float = 1e-6
) -> Float[Tensor, " b"]:
    """Distance of two images in the features of a frozen network, averaged over its layers.

    As LPIPS (Zhang et al. 2018, arXiv 1801.03924, equation 1) with all channel weights 1: features are scaled to unit
    length at each place, their squared distance is averaged over the places. Each layer gives a value in [0, 4].

    Args:
        x, y: feature maps of the two images, layer by layer, each (b, channels, height, width).
        eps: added to the squared length, so that empty places have a gradient.

    Raises:
        ValueError: no layers, or not the same number of layers.
    """
    if len(x) != len(y) or not x:
        raise ValueError(f"perceptual: needs the same layers of both images, got {len(x)} and {len(y)}")
    layers = []
    for a, b in zip(x, y, strict=True):
        a = a * torch.rsqrt(a.square().sum(1, keepdim=True) + eps)
        b = b * torch.rsqrt(b.square().sum(1, keepdim=True) + eps)
        layers.append((a - b).square().sum(1).flatten(1).mean(1))
    return torch.stack(layers).mean(0)
