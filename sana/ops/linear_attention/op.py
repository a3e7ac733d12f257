"""ReLU linear attention by its Triton kernels where `sana.ops.choice` says so, else in plain torch."""

from __future__ import annotations

from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from sana.ops import forward_ad as derivative
from sana.ops.choice import use_triton
from sana.ops.direct import direct
from sana.ops.linear_attention import naive
from sana.ops.linear_attention.plan import WIDEST

def relu_linear_attention(
    q: Float[Tensor, "b n heads dh"],
    k: Float[Tensor, "b n heads dh"],
    v: Float[Tensor, "b n heads dh"],
    eps: float = 1e-15,
) -> Float[Tensor, "b n heads dh"]:
    """Every token attends to every token, see `naive.relu_linear_attention`; the result has the type of v.

    Inputs may lie in memory in any order; heads wider than 64 are computed in plain torch. Derivatives: reverse, forward (one level), or both by plain torch.
    """
    if not _kernels(q, k, v):
        return naive.relu_linear_attention(q, k, v, eps)
    from sana.ops.linear_attention import triton

    out, dtype = v.dtype, reduce(torch.promote_types, (x.dtype for x in (q, k, v)))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if derivative.taken():
        values, tangents = derivative.unpack(q, k, v)
        if tangents is not None and not derivative.alone(*values, *tangents):
            return naive.relu_linear_attention(q, k, v, eps).to(out)
        if tangents is not None:
            return forward_ad.make_dual(*relu_linear_attention_jvp(*values, *tangents, eps)).to(out)
    if direct(q, k, v):
        return triton.launch(q, k, v, eps, save=False)[0].to(out)
    return triton.attention(q, k, v, eps)[0].to(out)


def relu_linear_attention_packed(
    qkv: Float[Tensor, "b n three_d"], heads: int, eps: float = 1e-15
) -> Float[Tensor, "b n d"]:
    """`relu_linear_attention` of the thirds of one buffer, whose gradient is one buffer too: nothing is concatenated.

    Raises:
        ValueError: the width is no multiple of 3 heads.
    """
    if qkv.shape[-1] % (3 * heads):
        raise ValueError(f"packed attention: width {qkv.shape[-1]} is no multiple of 3 x {heads} heads")
    q, k, v = naive.unpack(qkv, heads)
    if derivative.taken() or not _kernels(q, k, v):
        return relu_linear_attention(q, k, v, eps).flatten(2)
    from sana.ops.linear_attention import triton

    if direct(qkv):
        return triton.launch(q, k, v, eps, save=False)[0].flatten(2)
    return triton.packed(qkv, heads, eps)[0]


def relu_linear_attention_jvp(
    q: Float[Tensor, "b n heads dh"],
    k: Float[Tensor, "b n heads dh"],
    v: Float[Tensor, "b n heads dh"],
    dq: Float[Tensor, "b n heads dh"],
    dk: Float[Tensor, "b n heads dh"],
    dv: Float[Tensor, "b n heads dh"],
    eps: float = 1e-15,
) -> tuple[Float[Tensor, "b n heads dh"], Float[Tensor, "b n heads dh"]]:
    """The result for q, k and v of one type, and its derivative in the direction (dq, dk, dv); without gradients."""
    if not _kernels(q, k, v):
        return torch.func.jvp(lambda *x: naive.relu_linear_attention(*x, eps=eps), (q, k, v), (dq, dk, dv))
    from sana.ops.linear_attention import triton

    return triton.attention_jvp(q, k, v, dq, dk, dv, eps)


def _kernels(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return use_triton(q, k, v) and q.shape[-1] <= WIDEST and q.numel() > 0
