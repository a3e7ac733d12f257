"""The middle of Mix-FFN on tokens: by Triton where `sana.ops.choice` says so, else in plain torch."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sana.ops import forward_ad
from sana.ops.choice import use_triton
from sana.ops.depthwise_gate import naive
from sana.ops.direct import direct


def depthwise_gate(
    u: Float[Tensor, "b n c2"], weight: Float[Tensor, "c2 1 3 3"], bias: Float[Tensor, " c2"], h: int, w: int
) -> Float[Tensor, "b n c"]:
    """value * silu(gate) with (value, gate) = conv(silu(u)) + bias; n = h w tokens of an image, c2 = 2 c.

    The convolution is 3x3, depthwise and padded with zeros. With Triton the result has the type of u, sums are fp32,
    and only the arguments are kept for the backward pass. A forward derivative is taken of the plain way.
    """
    if forward_ad.taken() or not use_triton(u, weight, bias):
        return naive.depthwise_gate(u, weight, bias, h, w)
    from sana.ops.depthwise_gate import triton

    if direct(u, weight, bias):
        return triton.launch_forward(u, weight, bias, h, w)
    return triton.depthwise_gate(u, weight, bias, h, w)
