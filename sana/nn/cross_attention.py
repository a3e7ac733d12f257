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
        mask: Bool[Tensor, "b l"] | Float[Tensor, "b l"] | None,
    ) -> Float[Tensor, "b n d"]:
        """k and v from `keys_values`; mask as in `softmax_attention`."""
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
    mask: Bool[Tensor, "b l"] | Float[Tensor, "b l"] | None,
) -> Float[Tensor, "b heads n dh"]:
    """softmax(q k' / sqrt(dh)) v over the keys the mask allows; where it allows none, over all of them.

    The mask is True where a key may be attended to, or what `attention_bias` made of that; None: all keys. On GPUs and
    for inference a fused kernel, except where a forward derivative is taken, which fused kernels do not have. In
    training on CPUs matrix products in fp32: there the fused kernel's backward pass is slower, in bf16 by a factor of
    eight (torch 2.15), while its forward pass is up to twice as fast.
    """
    fused = _fused(q.device)
    dtype = q.dtype if fused else torch.promote_types(q.dtype, torch.float32)
    bias = None if mask is None else attention_bias(mask, dtype)[:, None, None]
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(dtype) @ (k.to(dtype) * q.shape[-1] ** -0.5).mT
        weight = (scores if bias is None else scores + bias).softmax(-1)
        return (weight @ v.to(dtype)).to(q.dtype)


def attention_bias(mask: Bool[Tensor, "b l"] | Float[Tensor, "b l"], dtype: torch.dtype) -> Float[Tensor, "b l"]:
    """What is added to the scores: 0 where the mask is True and -1e4 elsewhere; a bias that was made already, cast.

    Finite, not -inf: exactly zero weight beside any allowed key, and no NaN for a fully masked caption. Rows begin at
    multiples of 16 numbers, as the fused kernels want them: else they would copy the bias in every layer.
    """
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    length = mask.shape[1]
    rows = torch.zeros(mask.shape[0], -(-length // 16) * 16, dtype=dtype, device=mask.device)[:, :length]
    return rows.masked_fill_(~mask, -1e4)


def shared_bias(
    mask: Bool[Tensor, "b l"] | None, dtype: torch.dtype
) -> Float[Tensor, "b l"] | Bool[Tensor, "b l"] | None:
    """The bias that all layers of a forward pass share, so that it is not made in each; the mask itself where the
    layers will not use the fused kernel, whose scores are in another type.

    Args:
        mask: see `softmax_attention`.
        dtype: of the tokens; under autocast its type counts.
    """
    if mask is None or not _fused(mask.device):
        return mask
    place = mask.device.type
    autocast = place != "meta" and torch.is_autocast_enabled(place)
    return attention_bias(mask, torch.get_autocast_dtype(place) if autocast else dtype)


def needed_mask(mask: Bool[Tensor, "b l"] | None) -> Bool[Tensor, "b l"] | None:
    """The mask, or None where it is on a GPU and allows everything: without one the fastest kernel applies.

    This waits for the device, so it belongs to the preparation of a prompt, not to a step. Elsewhere nothing is gained.
    """
    return None if mask is not None and type(mask) is Tensor and mask.is_cuda and bool(mask.all()) else mask


def _fused(device: torch.device) -> bool:
    return (device.type == "cuda" or not torch.is_grad_enabled()) and forward_ad._current_level < 0
