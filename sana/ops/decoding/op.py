"""The decoder's small steps: by Triton for maps in channels_last where `sana.ops.choice` says so, else in plain torch.

For inference alone: where a derivative is taken, and under torch.compile, which fuses these steps itself, the plain way
is taken.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from sana.ops import forward_ad
from sana.ops.choice import use_triton
from sana.ops.decoding import naive
from sana.ops.direct import direct

FEW = 16
"""Channels that `convolve_to_few` makes in one product of the tensor cores."""


def kernels_for(x: Float[Tensor, "b c h w"], *others: Tensor) -> bool:
    """Whether a map and what is computed with it go to the kernels."""
    return (
        x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(other.dtype == x.dtype for other in others)
        and (not torch.is_autocast_enabled(x.device.type) or torch.get_autocast_dtype(x.device.type) == x.dtype)
        and not forward_ad.taken()
        and direct(x, *others)
        and use_triton(x, *others)
    )


def bias_silu(x: Float[Tensor, "b c h w"], bias: Float[Tensor, " c"]) -> Float[Tensor, "b c h w"]:
    """silu(x + bias), the end of a convolution; x is no longer needed, and may be overwritten."""
    if not kernels_for(x, bias):
        return naive.bias_silu(x, bias)
    from sana.ops.decoding import triton

    return triton.bias_silu(x, bias)


def doubling_kernels(weight: Float[Tensor, "d c 3 3"]) -> list[Float[Tensor, "d c 2 2"]]:
    """See `naive.doubling_kernels`; sums are fp32 and rounded once."""
    if not kernels_for(weight):
        return naive.doubling_kernels(weight)
    from sana.ops.decoding import triton

    return triton.doubling_kernels(weight)


def double(
    parts: Iterable[Float[Tensor, "b d h_1 w_1"]],
    x: Float[Tensor, "b c h w"],
    bias: Float[Tensor, " d"] | None,
    shortcut: bool,
) -> Float[Tensor, "b d 2*h 2*w"]:
    """See `naive.double`, which is taken without a bias, too."""
    if bias is None:
        return naive.double(parts, x, bias, shortcut)
    parts = list(parts)
    if not all(kernels_for(part, x, bias) for part in (x, *parts)):
        return naive.double(parts, x, bias, shortcut)
    from sana.ops.decoding import triton

    return triton.double(parts, x, bias, shortcut)


def convolve_to_few(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "d c 3 3"], bias: Float[Tensor, " d"]
) -> Float[Tensor, "b d h w"]:
    """A 3x3 convolution with zero padding to a few channels, such as colours.

    Libraries compute at least 64 channels, and cut off what was not asked for in a pass of its own.
    """
    if weight.shape[0] > FEW or not kernels_for(x, weight, bias):
        return naive.convolve_to_few(x, weight, bias)
    from sana.ops.decoding import triton

    return triton.convolve_to_few(x, weight, bias)
