"""RMSNorm in plain torch, with what networks do right after it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Activation = Literal["relu", "silu"] | None


def rms_norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"],
    eps: float,
    bias: Float[Tensor, " d"] | None = None,
    activation: Activation = None,
    residual: Float[Tensor, "... d"] | None = None,
) -> Float[Tensor, "... d"]:
    """residual + act(x / sqrt(mean(x^2) + eps) * weight + bias) over the last dimension.

    The norm is computed in at least fp32 and rounded to the type of x before the activation and the sum.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))  # one name, so that no step is kept longer than needed
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = (y * weight if bias is None else torch.addcmul(bias, y, weight)).to(x.dtype)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else residual + y


ACTIVATIONS = {"relu": F.relu, "silu": F.silu}
