"""Peak signal-to-noise ratio of reconstructions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def psnr(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """10 log10(peak^2 / mean squared difference) in dB, per image, for pixels in [-1, 1] (peak 2), both clipped to it.

    Infinite for equal images. A set's PSNR is the mean of its images' values.
    """
    error = (x.float().clamp(-1, 1) - y.float().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)
