"""ReLU linear attention in plain torch (SANA, arXiv 2410.10629, section 2.2).

With phi = ReLU, every query is answered by a ratio of two sums over the tokens it may see:

    out_n = sum_m v_m (phi(k_m) . phi(q_n)) / (sum_m phi(k_m) . phi(q_n) + eps)

All sums are taken in fp32 (float64 for float64 inputs), whatever the input type and whether or not autocast is on:
under bf16 the state would otherwise lose the small contributions of single tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def relu_linear_attention(
    q: Float[Tensor, "b n heads dh"],
    k: Float[Tensor, "b n heads dh"],
    v: Float[Tensor, "b n heads dh"],
    eps: float = 1e-15,
) -> Float[Tensor, "b n heads dh"]:
    """Every token attends to every token; the result has the type of v.

    The sums are associated in the cheaper order: (q k') v for fewer tokens than channels per head, q (k' v) otherwise.
    """
    with torch.autocast(q.device.type, enabled=False):
        query, key, value = _by_head(q).relu_(), _by_head(k).relu_(), _by_head(v)
        if q.shape[1] < q.shape[3]:
            weight = query @ key.mT
            numerator, denominator = weight @ value, weight.sum(-1, keepdim=True)
        else:
            numerator = query @ (key.mT @ value)
            denominator = torch.linalg.vecdot(query, key.sum(-2, keepdim=True)).unsqueeze(-1)
        return _by_token(numerator * (denominator + eps).reciprocal(), v.dtype)


def relu_attention_sums(
    k: Float[Tensor, "*b n heads dh"], v: Float[Tensor, "*b n heads dh"]
) -> Float[Tensor, "*b heads dh dh_1"]:
    """sum_m phi(k_m) [v_m, 1] over the tokens, in fp32 (float64): all that queries need to know of them.

    Sums of disjoint sets of tokens add up to those of their union, so they can be taken part by part.
    """
    with torch.autocast(k.device.type, enabled=False):
        key, value = _by_head(k).relu_(), _by_head(v)
        return torch.cat([key.mT @ value, key.sum(-2).unsqueeze(-1)], dim=-1)


def relu_attention_answer(
    q: Float[Tensor, "*b n heads dh"], sums: Float[Tensor, "*b heads dh dh_1"], eps: float = 1e-15
) -> Float[Tensor, "*b n heads dh"]:
    """What every query gets from the tokens summed in `sums`; of the type of q."""
    with torch.autocast(q.device.type, enabled=False):
        numerator, denominator = (_by_head(q).relu_() @ sums).split([q.shape[-1], 1], dim=-1)
        return _by_token(numerator * (denominator + eps).reciprocal(), q.dtype)


def causal_relu_linear_attention(
    q: Float[Tensor, "b f n heads dh"],
    k: Float[Tensor, "b f n heads dh"],
    v: Float[Tensor, "b f n heads dh"],
    state: Float[Tensor, "b heads dh dh_1"],
    eps: float = 1e-15,
) -> tuple[Float[Tensor, "b f n heads dh"], Float[Tensor, "b heads dh dh_1"]]:
    """Every token attends to the tokens of its own and of all earlier frames, those summed in `state` included.

    state is sum_m phi(k_m) [v_m, 1] over the tokens of earlier frames, (b, heads, dh, dh + 1) in fp32 (float64): zeros
    before the first frame. Returns the output, of the type of v, and the state after the last frame.
    """
    with torch.autocast(q.device.type, enabled=False):
        seen = relu_attention_sums(k, v).cumsum(1) + state.unsqueeze(1)  # out of place: autograd keeps every frame's
    return relu_attention_answer(q, seen, eps).to(v.dtype), seen[:, -1]


def unpack(qkv: Float[Tensor, "b n three_d"], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k and v (b, n, heads, dh) of the thirds of one buffer."""
    q, k, v = (third.unflatten(-1, (heads, -1)) for third in qkv.chunk(3, dim=-1))
    return q, k, v


def _by_head(x: Tensor) -> Tensor:
    """(..., n, heads, dh) -> a copy (..., heads, n, dh) in at least fp32: one pass casts and transposes."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(-3, -2).to(dtype, copy=True, memory_format=torch.contiguous_format)


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., heads, n, dh) -> a copy (..., n, heads, dh) of the given type."""
    return x.transpose(-3, -2).to(dtype, copy=True, memory_format=torch.contiguous_format)
