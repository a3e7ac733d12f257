"""Normalisations: RMSNorm with fp32 statistics, and LayerNorm whose affine comes from the timestep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, returned in the type of x.

    Args:
        width: size of the last dimension.
        eps: added to the mean square.
        initial: the value every weight starts from (SANA scales the caption by 0.01).
    """

    def __init__(self, width: int, eps: float = 1e-5, initial: float = 1.0):
        super().__init__()
        self.eps = eps
        self.initial = initial
        self.weight = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def modulated_layer_norm(
    x: Float[Tensor, "b n d"],
    shift: Float[Tensor, "b f d"],
    scale: Float[Tensor, "b f d"],
    eps: float = 1e-6,
) -> Float[Tensor, "b n d"]:
    """LN(x) (1 + scale) + shift, where the tokens of frame i take row i of shift and scale (adaLN; n = f h w)."""
    frames = shift.shape[1]
    normed = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (frames, -1))
    return torch.addcmul(shift.unsqueeze(2), normed, 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated_residual(
    x: Float[Tensor, "b n d"], gate: Float[Tensor, "b f d"], y: Float[Tensor, "b n d"]
) -> Float[Tensor, "b n d"]:
    """x + gate y, where the tokens of frame i take row i of gate."""
    split = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, split), gate.unsqueeze(2), y.unflatten(1, split)).flatten(1, 2)
