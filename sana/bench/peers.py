"""What others run: the arithmetic of diffusers' layers as expressions in torch, and its blocks compiled."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """What diffusers' `SanaLinearAttnProcessor2_0` does between its linear layers; (b, n, d) each."""
    dtype = query.dtype
    q = F.relu(query.transpose(1, 2).unflatten(1, (heads, -1))).float()
    k = F.relu(key.transpose(1, 2).unflatten(1, (heads, -1)).transpose(2, 3)).float()
    v = F.pad(value.transpose(1, 2).unflatten(1, (heads, -1)).float(), (0, 0, 0, 1), value=1.0)
    both = (v @ k) @ q
    return (both[:, :, :-1] / (both[:, :, -1:] + 1e-15)).flatten(1, 2).transpose(1, 2).to(dtype)


def depthwise_gate(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """diffusers' `GLUMBConv` between its 1x1 convolutions; (b, 2c, h, w) -> (b, c, h, w)."""
    value, gate = F.conv2d(F.silu(image), weight, bias, padding=1, groups=len(weight)).chunk(2, dim=1)
    return value * F.silu(gate)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """diffusers' adaLN in a block; (b, n, d) and (b, 1, d)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y, as diffusers writes it."""
    return x + gate * y


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """diffusers' `RMSNorm`, with the bias where there is one."""
    wide = x.float()
    y = (x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype) * weight
    return y if bias is None else y + bias


def compile_blocks(blocks: Iterable[nn.Module], **options: Any) -> None:
    """Regional compilation: one graph for all blocks of a class, whole and for one shape.

    Compiled is the function of the class, so that the second block meets the code of the first; diffusers' own
    `compile_repeated_blocks` names none for this network.
    """
    made: dict[type, Any] = {}
    for block in blocks:
        kind = type(block)
        if kind not in made:
            made[kind] = torch.compile(kind.forward, fullgraph=True, dynamic=False, **options)
        block.forward = MethodType(made[kind], block)
