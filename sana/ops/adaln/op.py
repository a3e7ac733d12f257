"""adaLN on tokens: by Triton where `sana.ops.choice` says so, else in plain torch.

shift, scale and gate hold one row per frame, which its n / f tokens share. With Triton statistics and sums are fp32;
kept for the backward pass are the normalised input and two numbers per token. A forward derivative is taken of the
plain way.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sana.ops import forward_ad
from sana.ops.adaln import naive
from sana.ops.choice import use_triton
from sana.ops.direct import direct


def modulated_layer_norm(
    x: Float[Tensor, "b n d"],
    shift: Float[Tensor, "b f d"],
    scale: Float[Tensor, "b f d"],
    eps: float = 1e-6,
) -> Float[Tensor, "b n d"]:
    """LN(x) (1 + scale) + shift, where the tokens of frame i take row i of shift and scale (adaLN; n = f h w)."""
    if forward_ad.taken() or not use_triton(x, shift, scale):
        return naive.modulated_layer_norm(x, shift, scale, eps)
    from sana.ops.adaln import triton

    out = _result(x, shift, scale)
    if direct(x, shift, scale):
        return triton.launch_norm(x, None, shift, scale, eps, out)[0]
    return triton.modulated_layer_norm(x, shift, scale, eps, out)[0]


def gated_residual(
    x: Float[Tensor, "b n d"], gate: Float[Tensor, "b f d"], y: Float[Tensor, "b n d"]
) -> Float[Tensor, "b n d"]:
    """x + gate y, where the tokens of frame i take row i of gate."""
    if forward_ad.taken() or not use_triton(x, gate, y):
        return naive.gated_residual(x, gate, y)
    from sana.ops.adaln import triton

    if direct(x, gate, y):
        return triton.launch_gate(x, gate, y)
    return triton.gated_residual(x, gate, y)


def residual_modulated_layer_norm(
    x: Float[Tensor, "b n d"],
    y: Float[Tensor, "b n d"],
    shift: Float[Tensor, "b f d"],
    scale: Float[Tensor, "b f d"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
    """x + y, and `modulated_layer_norm` of that sum, in one pass over the tokens."""
    if forward_ad.taken() or not use_triton(x, y, shift, scale):
        return naive.residual_modulated_layer_norm(x, y, shift, scale, eps)
    from sana.ops.adaln import triton

    out = _result(x, y, shift, scale)
    if direct(x, y, shift, scale):
        normed, total = triton.launch_norm(x, y, shift, scale, eps, out)[:2]
    else:
        normed, total = triton.residual_modulated_layer_norm(x, y, shift, scale, eps, out)[:2]
    return total, normed


def _result(x: Tensor, *others: Tensor) -> torch.dtype:
    """The type of the normed tokens: what the arguments promote to, or autocast's, as only linears read them."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    dtype = x.dtype
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return dtype
