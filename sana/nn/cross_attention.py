"""Softmax attention from the tokens to the caption."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from sana.nn.linear import Linear
from sana.nn.norm import RMSNorm
from sana.types import Grid


class CrossAttention(nn.Module):
    """Each token attends to the caption tokens that the mask allows (SANA: no norm before it, no gate after it).

    Args:
        width: d, a multiple of heads.
        heads: number of heads; scores are scaled by 1 / sqrt(width / heads).
        qk_norm: RMSNorm of q and of k over the full width, before heads are split (SANA-1.5).
        norm_eps: eps of the q/k norms (published 1e-6, diffusers 1e-5).
        linear: factory of the linear layers.

    Raises:
        ValueError: when width is no multiple of heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        linear: Linear = nn.Linear,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"CrossAttention: width {width} is not a multiple of heads {heads}")
        self.width, self.heads = width, heads
        self.q = linear(width, width)
        self.kv = linear(width, 2 * width)
        self.q_norm = RMSNorm(width, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, norm_eps) if qk_norm else nn.Identity()
        self.proj = linear(width, width)

    def keys_values(self, text: Float[Tensor, "b l d"]) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
        """Keys (normalised) and values of the caption: they do not depend on x or t, so once per prompt will do."""
        k, v = self.kv(text).chunk(2, dim=-1)
        return self.k_norm(k), v

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        k: Float[Tensor, "b l d"],
        v: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None,
    ) -> Float[Tensor, "b n d"]:
        """k and v from `keys_values`; mask True where a caption token may be attended to, None for all."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q_norm(self.q(x)), k, v))
        return self.proj(softmax_attention(q, k, v, mask).transpose(1, 2).flatten(2))

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Floating-point operations of one sample's forward, the caption's keys and values included."""
        n, d = grid.tokens, self.width
        return 4 * n * d * d + 4 * n * d * text_tokens + 4 * text_tokens * d * d


def softmax_attention(
    q: Float[Tensor, "b heads n dh"],
    k: Float[Tensor, "b heads l dh"],
    v: Float[Tensor, "b heads l dh"],
    mask: Bool[Tensor, "b l"] | None,
) -> Float[Tensor, "b heads n dh"]:
    """softmax(q k' / sqrt(dh)) v over the keys the mask allows; where it allows none, over all of them.

    On GPUs and for inference a fused kernel, except where a forward derivative is taken, which fused kernels do not
    have. In training on CPUs matrix products in fp32: there the fused kernel's backward pass is slower, in bf16 by a
    factor of eight (torch 2.15), while its forward pass is up to twice as fast.
    """
    fused = (q.is_cuda or not torch.is_grad_enabled()) and forward_ad._current_level < 0
    dtype = q.dtype if fused else torch.promote_types(q.dtype, torch.float32)
    # A finite penalty, not -inf: exactly zero weight beside any allowed key, and no NaN for a fully masked caption.
    bias = None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -1e4)[:, None, None]
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(dtype) @ (k.to(dtype) * q.shape[-1] ** -0.5).mT
        weight = (scores if bias is None else scores + bias).softmax(-1)
        return (weight @ v.to(dtype)).to(q.dtype)
