"""adaLN in plain torch: a LayerNorm whose affine comes from the timestep, and the gated residual sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def modulated_layer_norm(
    x: Float[Tensor, "b n d"],
    shift: Float[Tensor, "b f d"],
    scale: Float[Tensor, "b f d"],
    eps: float = 1e-6,
) -> Float[Tensor, "b n d"]:
    """LN(x) (1 + scale) + shift, where the tokens of frame i take row i of shift and scale (n = f h w)."""
    frames = shift.shape[1]
    normed = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (frames, -1))
    return torch.addcmul(shift.unsqueeze(2), normed, 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated_residual(
    x: Float[Tensor, "b n d"], gate: Float[Tensor, "b f d"], y: Float[Tensor, "b n d"]
) -> Float[Tensor, "b n d"]:
    """x + gate y, where the tokens of frame i take row i of gate."""
    split = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, split), gate.unsqueeze(2), y.unflatten(1, split)).flatten(1, 2)


def residual_modulated_layer_norm(
    x: Float[Tensor, "b n d"],
    y: Float[Tensor, "b n d"],
    shift: Float[Tensor, "b f d"],
    scale: Float[Tensor, "b f d"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
    """x + y, and `modulated_layer_norm` of that sum."""
    total = x + y
    return total, modulated_layer_norm(total, shift, scale, eps)
