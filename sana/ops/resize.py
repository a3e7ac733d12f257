"""From the size that was drawn to the size that was asked for."""

from __future__ import annotations

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize_and_crop(x: Float[Tensor, "b c h w"], height: int, width: int) -> Float[Tensor, "b c height width"]:
    """Scale images so that they just cover the asked size, then cut out its middle.

    Bilinear, with antialiasing where it shrinks. The scaled side is rounded up: diffusers rounds it down, and then
    lacks a row or a column for some sizes. Where neither differs the result is the same.

    Args:
        x: images of any range.
        height, width: pixels, positive.

    Raises:
        ValueError: a side is not positive.
    """
    if height < 1 or width < 1:
        raise ValueError(f"the size must be positive, got {height}x{width}")
    h, w = x.shape[2:]
    if (h, w) == (height, width):
        return x
    scale = max(height / h, width / w)
    # Not one more because of the rounding of the quotient.
    scaled = (max(height, math.ceil(h * scale - 1e-6)), max(width, math.ceil(w * scale - 1e-6)))
    if scaled != (h, w):
        x = F.interpolate(x, size=scaled, mode="bilinear", align_corners=False, antialias=True)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return x[:, :, top : top + height, left : left + width]
