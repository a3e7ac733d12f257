"""Structural similarity of image pairs (Wang et al. 2004)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

WINDOW, SPREAD, K1, K2 = 11, 1.5, 0.01, 0.03


def ssim(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean SSIM per image of pixels in [-1, 1], clipped to it; 1 for equal images.

    A Gaussian window of 11 pixels (sigma 1.5), only where it lies wholly inside, the mean over channels and places.

    Raises:
        ValueError: a side of fewer than 11 pixels.
    """
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(f"ssim: images of {tuple(x.shape[2:])} pixels; the window needs {WINDOW}")
    x, y = (((z.float().clamp(-1, 1) + 1) / 2).double() for z in (x, y))
    places = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    weights = torch.exp(-(places**2) / (2 * SPREAD**2))
    weights /= weights.sum()
    c = x.shape[1]

    def blur(z: Tensor) -> Tensor:
        z = F.conv2d(z, weights.view(1, 1, -1, 1).expand(c, -1, -1, -1), groups=c)
        return F.conv2d(z, weights.view(1, 1, 1, -1).expand(c, -1, -1, -1), groups=c)

    mx, my = blur(x), blur(y)
    xx, yy, xy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = K1**2, K2**2
    similarity = (2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (xx + yy + c2))
    return similarity.flatten(1).mean(1).float()
