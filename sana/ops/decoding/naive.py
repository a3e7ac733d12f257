"""The decoder's small steps in plain torch, over maps (b, c, h, w)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bias_silu(x: Float[Tensor, "b c h w"], bias: Float[Tensor, " c"]) -> Float[Tensor, "b c h w"]:
    """silu(x + bias), the end of a convolution."""
    return F.silu(x + bias[:, None, None])


def doubling_kernels(weight: Float[Tensor, "d c 3 3"]) -> list[Float[Tensor, "d c 2 2"]]:
    """What a 3x3 convolution of a map that was enlarged by repetition does to the map itself.

    Outputs at even or odd rows and columns read 2x2 places, not nine: of the three places in a row that an output reads
    in the enlarged map, two are the same place of the map, and their weights are added. Rows 0, 0, 1, 1 and columns 0,
    1, 0, 1 (mod 2) of the result.
    """
    return [doubling_kernel(weight, k) for k in range(4)]


def doubling_kernel(weight: Float[Tensor, "d c 3 3"], k: int) -> Float[Tensor, "d c 2 2"]:
    """Number k of `doubling_kernels`."""
    kernel = _add_taps(_add_taps(weight, 2, k // 2), 3, k % 2)
    return kernel.contiguous(memory_format=torch.channels_last)


def _add_taps(kernel: Tensor, dim: int, odd: int) -> Tensor:
    """Three taps along a dimension -> the two of an output at even or odd places of the doubled map."""
    first, middle, last = kernel.unbind(dim)
    return torch.stack([first + middle, last] if odd else [first, middle + last], dim)


def double(
    parts: Iterable[Float[Tensor, "b d h_1 w_1"]],
    x: Float[Tensor, "b c h w"],
    bias: Float[Tensor, " d"] | None,
    shortcut: bool,
) -> Float[Tensor, "b d 2*h 2*w"]:
    """The map at twice the height and width, from convolutions with its `doubling_kernels`.

    Args:
        parts: their results, x padded by one on every side: the part of row i and column j begins at its place (i, j).
            Each is needed once, so they may be made one after the other.
        x: what was convolved.
        bias: added; None where the parts have it.
        shortcut: add the channels of x, each 4 d / c times in a row, shuffled to pixels.
    """
    (b, c, h, w), y, k = x.shape, x, 0
    for part in parts:  # not by enumerate, which would keep a part while the next is made
        (i, j), d = divmod(k, 2), part.shape[1]
        if k == 0:
            y = torch.empty(b, 2 * h, 2 * w, d, dtype=x.dtype, device=x.device).movedim(-1, 1)
        part = part[:, :, i : i + h, j : j + w]
        if bias is not None:
            part = part + bias[:, None, None]
        if shortcut:
            channel = torch.arange(k, 4 * d, 4, device=x.device)
            part = part + x[:, channel * c // (4 * d)]
        y[:, :, i::2, j::2] = part
        k += 1  # noqa: SIM113
        del part
    return y


def convolve_to_few(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "d c 3 3"], bias: Float[Tensor, " d"]
) -> Float[Tensor, "b d h w"]:
    """A 3x3 convolution with zero padding."""
    return F.conv2d(x, weight, bias, padding=1)
